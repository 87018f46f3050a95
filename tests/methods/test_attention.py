"""Methods that suppress attention: maps, losses and gradients against diffusers with an attention processor."""

import re

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import backbones, schedulers
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.backbones.noising import DDPM
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.methods import Concept, fmn, mace
from spqr_jax.methods.tools import attention_maps, closed_form, loop, low_rank, word_vectors
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import LowRank
from spqr_jax.methods.tools.pictures import Pictures

FLAT = params_lib.flatten
CONCEPT = Concept("cat", ("cat", "nude"))
FMN_OPTIONS = {"steps": 2, "images": 2, "sampling_steps": 2}
FMN_ADAM = Adam(2e-6, weight_decay=0.01, clip=1.0)
# These have no gradient, and two steps of decay are below float32's resolution.
AFTER_THE_LAST_MAP = re.compile(
    r"^conv_(norm_)?out\.|^up_blocks\.1\.attentions\.1\.(proj_out|transformer_blocks\.0\.(attn2\.to_(v|out)|norm3|ff))\."
)


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


class Recording:
    """A diffusers attention processor that computes attention in full and keeps its probabilities."""

    def __init__(self, keep):
        self.maps, self.keep, self.added = [], keep, {}

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **_):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if "to_k" in self.added:
            k, v = k + context @ self.added["to_k"], v + context @ self.added["to_v"]
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        probabilities = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        if self.keep:
            self.maps.append(probabilities)
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def recorded(reference):
    """(latents, t, context, {module name: {"to_k": change [in, out], ...}}) -> cross-attention maps in order."""
    unet = reference("sd1")[0].unet
    before = unet.attn_processors

    def run(latents, t, context, added=None):
        processors = {name: Recording(".attn2." in name) for name in before}
        for name, change in (added or {}).items():
            processors[f"{name}.processor"].added = change
        order: list = []
        for processor in processors.values():
            processor.maps = order
        unet.set_attn_processor(processors)
        latents = torch.tensor(np.array(latents).transpose(0, 3, 1, 2))
        unet(latents, torch.tensor(np.array(t)), torch.tensor(np.array(context)))
        return order

    yield run
    unet.set_attn_processor(before)


def one_step(gradient, static, adam, params, *inputs):
    """(loss, gradient) from one step of the program that `align` runs: Adam's first moment is a tenth of the gradient,
    which was clipped to norm 1."""
    update, state = loop.compiled(gradient, static, adam), loop.transform(adam).init(params)
    _, state, (loss, norm) = update(params, state, None, *inputs)
    scale = np.float32(10 * max(1.0, float(norm)))
    return float(loss), jax.tree.map(lambda m: np.asarray(m) * scale, optax.tree_utils.tree_get(state, "mu"))


def close(found, expected):
    expected = expected.numpy()
    assert np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_positions(pipeline):
    """The concept's tokens, and every end-of-text token: padding is end-of-text in SD1."""
    ids = pipeline.tokenizers["tokenizer"]("a photo of nude cat").input_ids
    cat = pipeline.tokenizers["tokenizer"]("cat", add_special_tokens=False).input_ids
    place = len(ids) - 1 - len(cat)
    alone = attention_maps.positions(pipeline, "a photo of nude cat", "cat", end=False)
    assert alone.shape == (77,) and np.flatnonzero(alone).tolist() == list(range(place, len(ids) - 1))
    both = attention_maps.positions(pipeline, "a photo of nude cat", "cat", end=True)
    assert np.flatnonzero(both).tolist() == list(range(place, 77))
    with pytest.raises(ValueError, match="'dog' do not occur in the prompt 'a cat'"):
        attention_maps.positions(pipeline, "a cat", "dog", end=False)


def test_fmn_loss_and_gradient_equal_pytorch(pipeline, reference, recorded):
    """One norm over all layers and heads, of attention to the watched tokens."""
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal((2, 1, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((1, 77, 32)).astype(np.float32)
    batch = {"mean": mean, "std": np.abs(std), "condition": Condition(context)}
    watched = rng.random((1, 77)) < 0.3
    alphas, key = backbones.schedule(pipeline), jax.random.key(3)
    unet = loop.on_device(pipeline.params["unet"])
    trained, rest = params_lib.partition(unet, jax.tree.map(lambda _: True, unet))
    inputs = (rest, alphas, batch, watched, key)
    value, gradient = one_step(fmn.GRADIENT, backbones.denoiser(pipeline), FMN_ADAM, trained, *inputs)

    latents, noise, t = DDPM.draw(key, batch["mean"], batch["std"], alphas)
    noisy = schedulers.ddpm.add_noise(alphas, latents, noise, t)
    maps = recorded(noisy, t, context)
    assert len(maps) == 4 and all(layer.shape[-1] == 77 for layer in maps)
    chosen = torch.tensor(watched[0])
    loss = torch.cat([layer[..., chosen].flatten() for layer in maps]).norm()
    model = reference("sd1")[0].unet
    model.zero_grad()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    gradient = FLAT(gradient)
    for name in ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "down_blocks.0.attentions.0.proj_in"):
        weight = model.get_submodule(name).weight.grad
        close(gradient[f"{name}.kernel"].reshape(weight.shape[1], -1), weight.reshape(weight.shape[0], -1).T)


def test_mace_loss_and_gradient_equal_pytorch(pipeline, recorded):
    """A norm a layer, inside a mask that is taken at each layer's size as torch.nn.functional.interpolate does."""
    rng = np.random.default_rng(1)
    unet = loop.on_device(pipeline.params["unet"])
    fresh = low_rank.create(unet, STABLE_DIFFUSION.regions.key_value, rank=1, seed=0, normal=True)
    adapter = {p: LowRank(a.down, rng.standard_normal(a.up.shape).astype(np.float32)) for p, a in fresh.items()}
    mean, std = rng.standard_normal((2, 1, 8, 8, 4)).astype(np.float32)
    masks, watched = rng.random((1, 8, 8)) < 0.4, rng.random((1, 77)) < 0.3
    context, t = rng.standard_normal((1, 77, 32)).astype(np.float32), np.array([210], np.int32)
    alphas, key = backbones.schedule(pipeline), jax.random.key(4)
    inputs = (unet, alphas, mean, std, masks, context, watched, t, key)
    adam = Adam(1e-5, weight_decay=0.01, clip=1.0)
    value, gradient = one_step(mace.GRADIENT, backbones.denoiser(pipeline), adam, adapter, *inputs)

    keys = jax.random.split(key)
    clean = mean + std * jax.random.normal(keys[0], mean.shape)
    noisy = schedulers.ddpm.add_noise(alphas, clean, jax.random.normal(keys[1], mean.shape), t)
    factors = {p: [torch.tensor(f, requires_grad=True) for f in pair] for p, pair in adapter.items()}
    added: dict = {}
    for path, (down, up) in factors.items():
        layer, _, name = path.removesuffix(".kernel").rpartition(".")
        added.setdefault(layer, {})[name] = down @ up
    loss = 0
    for layer in recorded(noisy, t, context, added):
        side = int(layer.shape[2] ** 0.5)
        small = torch.nn.functional.interpolate(torch.tensor(masks)[None].float(), size=(side, side)) > 0.5
        loss = loss + layer[:, :, small.flatten()][..., torch.tensor(watched[0])].norm()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    for path, pair in factors.items():
        for found, factor in zip(gradient[path], pair, strict=True):
            if factor.grad is None:  # the last layer's values reach no map
                assert not found.any() and path.endswith("attn2.to_v.kernel")
            else:
                close(found, factor.grad)


def test_a_mask_that_misses_a_layer_has_no_slope():
    maps = [np.random.default_rng(0).random((1, 2, 16, 5)).astype(np.float32)]
    empty, watched = np.zeros((1, 8, 8), bool), np.ones((1, 5), bool)
    value, slope = jax.value_and_grad(lambda m: mace.suppression_loss([m], empty, watched))(maps[0])
    assert value == 0 and not slope.any()


def test_fmn_trains_exactly_its_parameters(pipeline, monkeypatch):
    aligned = fmn.align(pipeline, CONCEPT, seed=1, **FMN_OPTIONS)
    before, after = FLAT(pipeline.params["unet"]), FLAT(aligned.params["unet"])
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed == {path for path in before if not AFTER_THE_LAST_MAP.search(path)}
    assert aligned.params["text_encoder"] is pipeline.params["text_encoder"]

    given = []
    monkeypatch.setattr(loop, "fit", lambda *args, **_: given.append(args[4]) or args[4])
    same = fmn.align(pipeline, CONCEPT, seed=1, train="xattn", **FMN_OPTIONS)
    assert set(FLAT(given[0])) == {path for path in before if ".attn2." in path}
    assert all(np.array_equal(leaf, before[path]) for path, leaf in FLAT(same.params["unet"]).items())


def test_fmn_watches_the_words_it_inverted(pipeline, monkeypatch):
    """Two texts, whose learned vectors are here another word's: the captions are then that word's."""
    dog = word_vectors.word_table(pipeline.params["text_encoder"])[
        pipeline.tokenizers["tokenizer"]("dog", add_special_tokens=False).input_ids
    ]
    assert dog.shape == (1, 32)
    asked = []
    monkeypatch.setattr(word_vectors, "invert", lambda *args, **_: asked.append(args) or np.repeat(dog, 2, axis=0))
    zeros = np.zeros((3, 8, 8, 4), np.float32)
    pictures = Pictures(zeros, zeros, np.array([0, 1, 0]), Condition(np.zeros((2, 77, 32), np.float32)))
    learned, watched = fmn.inverted(pipeline, pictures, "a photo of {}", Adam(1e-3), 1, 0, True, False)
    assert asked[0][5] == 2 and asked[0][6] == ["a photo of {}"] and asked[0][7].shape == (32,)
    expected = closed_form.text_states(pipeline, ["a photo of dog"])[0]
    for context, tokens in zip(learned.condition.context, watched, strict=True):
        np.testing.assert_allclose(context, expected, atol=1e-5)
        np.testing.assert_array_equal(tokens, attention_maps.positions(pipeline, "a photo of dog", "dog", end=True))


def test_masks_are_where_the_model_looks(pipeline, recorded):
    """diffusers' maps over heads and tokens, every layer enlarged to the latents, above the middle of their range."""
    mean = np.random.default_rng(5).standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = closed_form.text_states(pipeline, ["a cat"]).astype(np.float32)
    watched = attention_maps.positions(pipeline, "a cat", "cat", end=False)
    masks = mace.masks_from_attention(pipeline, mean, context, watched)
    assert masks.shape == (2, 8, 8) and masks.dtype == bool
    t, noise = np.array([250, 250]), np.random.default_rng(0).standard_normal(mean.shape, np.float32)
    noisy = schedulers.ddpm.add_noise(backbones.schedule(pipeline), mean, noise, t)
    seen = np.zeros((2, 8, 8))
    for layer in recorded(noisy, t, np.repeat(context, 2, axis=0)):
        mass = layer.detach().numpy()[..., watched].mean((1, 3))
        side = round(mass.shape[1] ** 0.5)
        seen += np.stack([np.kron(m.reshape(side, side), np.ones((8 // side, 8 // side))) for m in mass])
    middle = (seen.min((1, 2)) + seen.max((1, 2)))[:, None, None] / 2
    sure = np.abs(seen - middle) > 1e-4
    assert sure.mean() > 0.9 and np.array_equal(masks[sure], (seen > middle)[sure])
    assert masks.any((1, 2)).all() and not masks.all((1, 2)).any()


def test_refusals(pipeline, reference):
    with pytest.raises(ValueError, match="FMN is not defined for SDXL"):
        fmn.align(convert.load(reference("sdxl")[1]), CONCEPT)
    with pytest.raises(ValueError, match="images=0, expected at least 1"):
        fmn.align(pipeline, CONCEPT, images=0)
    with pytest.raises(ValueError, match='train must be "full" or "xattn"'):
        fmn.align(pipeline, CONCEPT, train="some")
    with pytest.raises(ValueError, match="template 'a cat' must contain"):
        fmn.align(pipeline, CONCEPT._replace(templates=("a cat",)))
