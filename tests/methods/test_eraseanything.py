"""EraseAnything on a small FLUX: attention, losses and steps against diffusers and PEFT, and what it asks of texts."""

import contextlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from spqr_jax import backbones
from spqr_jax.concepts import Concept
from spqr_jax.methods import eraseanything
from spqr_jax.methods.eraseanything import Erasing, Image, Preserving, Static, Strengths
from spqr_jax.methods.tools import attention_maps, low_rank
from spqr_jax.methods.tools.loop import Adam, compiled, transform
from spqr_jax.methods.tools.low_rank import Added, LowRank
from spqr_jax.params import flatten
from spqr_jax.sampling import partial
from tests import flux_reference
from tests.parity.compared import nchw, relative_error

jax.config.update("jax_default_matmul_precision", "highest")
SIDE, LENGTH, RANK, LAYERS = 4, 12, 2, flux_reference.TRANSFORMER["num_layers"]
PROMPT, NAMED = "a nude dog", "nude"
TOLD, GUIDANCE, ETA = np.float32([3]), np.float32([3.5]), 1.0
STRENGTHS = Strengths(1.0, 0.001, 0.1, 0.1)
ADAM = Adam(1e-3, weight_decay=1e-2, second_lr=5e-4)
CONCEPT = Concept("test", ("nude", "the dog"), preserve=("a cat", "eat"), templates=("a {} eat",))


@pytest.fixture(scope="module")
def saved():
    """(diffusers' pipeline, ours) of dev, at a small size."""
    return flux_reference.loaded("dev", SIDE, LENGTH)


def drawn(seed):
    return np.random.default_rng(seed).standard_normal((1, SIDE, SIDE, 16)).astype(np.float32)


# --- in PyTorch ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(maps):
    """Every attention's probabilities [B, heads, L, L] into `maps`."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def keeping(*, query, key, **options):
        maps.append(torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1))
        return attend(query=query, key=key, **options)

    torch.nn.functional.scaled_dot_product_attention = keeping
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend


def called(pipe, transformer, latents, time, text, guidance):
    """(velocity [1, C, h, w], attention of the last double block), with gradients."""
    with torch.no_grad():
        context, pooled, ids = pipe.encode_prompt(text, None, max_sequence_length=LENGTH)
    maps: list[torch.Tensor] = []
    with recorded(maps):
        out = transformer(
            hidden_states=pipe._pack_latents(torch.tensor(latents).permute(0, 3, 1, 2), 1, 16, SIDE, SIDE),
            timestep=torch.tensor(time) / 1000,
            guidance=torch.tensor(guidance),
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=ids,
            img_ids=pipe._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, "cpu", torch.float32),
        ).sample
    return pipe._unpack_latents(out, SIDE, SIDE, 1), maps[LAYERS - 1]


def watched_by(pipe, prompt, text):
    """Places of a text's tokens, as in the authors' code: wherever one of its tokens stands."""
    wanted = pipe.tokenizer_2(text).input_ids[:-1]
    return [place for place, token in enumerate(pipe.tokenizer_2(prompt).input_ids[:-1]) if token in wanted]


def feature_by(attended, places):
    """The first head's columns of these tokens, averaged, of norm 1: [L]."""
    return torch.nn.functional.normalize(attended[..., places][:, 0].permute(0, 2, 1).mean(1), dim=1)[0]


def erasing_by(pipe, student, frozen, image, latents, time):
    e_0, e_p = (called(pipe, frozen, latents, time, text, TOLD)[0].detach() for text in ("", PROMPT))
    e_n = called(pipe, student, latents, time, PROMPT, TOLD)[0]
    erased = torch.nn.functional.mse_loss(e_n, e_0 - ETA * (e_p - e_0))
    noisy = image[0] + time[0] / 1000 * (image[1] - image[0])
    attended = called(pipe, student, noisy, time, PROMPT, GUIDANCE)[1]
    mask = torch.zeros_like(attended)
    mask[..., watched_by(pipe, PROMPT, NAMED)] = 1
    paid = sum(torch.norm(mask * attended, dim=(0, 1))).sum()
    return STRENGTHS.erasing * erased + STRENGTHS.attention * paid


def preserving_by(pipe, student, image, time, others):
    noisy = image[0] + time[0] / 1000 * (image[1] - image[0])
    velocity, attended = called(pipe, student, noisy, time, PROMPT, GUIDANCE)
    kept = torch.nn.functional.mse_loss(velocity, torch.tensor(nchw(image[1] - image[0])))
    own = feature_by(attended, watched_by(pipe, PROMPT, NAMED))
    similar = torch.tensor(np.array(others)) @ own / eraseanything.TEMPERATURE
    return STRENGTHS.image * kept + STRENGTHS.contrast * (similar[0] - torch.logsumexp(similar, 0))


def adapted(adapter):
    """diffusers' transformer with PEFT's adapters of these factors, and path -> (A, B)."""
    from peft import LoraConfig

    model = flux_reference.transformer("dev")
    model.load_state_dict(flux_reference.saved("dev")[0].transformer.state_dict())
    model.requires_grad_(False)
    targets = ["attn.add_k_proj", "attn.add_q_proj"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    factors = {}
    for path, own in adapter.items():
        layer = model.get_submodule(path.removesuffix(".kernel"))
        factors[path] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for parameter, value in zip(factors[path], own, strict=True):
            parameter.data = torch.tensor(np.asarray(value).T.copy())
    assert len(factors) == sum(parameter.requires_grad for parameter in model.parameters()) / 2 == 2 * LAYERS
    return model, factors


# --- compared --------------------------------------------------------------------------------------------------------


def test_attention_and_features_are_those_of_diffusers(saved):
    pipe, pipeline = saved
    texts = eraseanything.encode(pipeline, [eraseanything.Step(np.zeros(1, int), PROMPT, NAMED, ())], "")
    text, watched = texts.of(PROMPT, NAMED, TOLD)
    denoiser, weights, time = backbones.denoiser(pipeline), pipeline.params["transformer"], np.float32([500])
    predicted, attended = jax.jit(
        lambda weights: eraseanything.flux.predict_and_attend(denoiser.definition.bind(weights), drawn(0), time, text)
    )(weights)
    with torch.no_grad():
        velocity, maps = called(pipe, pipe.transformer, drawn(0), time, PROMPT, TOLD)
    assert relative_error(nchw(predicted), velocity.numpy()) <= 1e-5
    assert relative_error(attended, maps.numpy()) <= 1e-5
    assert list(np.flatnonzero(watched)) == watched_by(pipe, PROMPT, NAMED) == [1]
    found = eraseanything._feature_of(denoiser, weights, drawn(0), time, text, watched)
    assert relative_error(found, feature_by(maps, [1]).numpy()) <= 1e-5


def test_steps_are_those_of_peft_and_adamw(saved):
    """Two steps that erase, two that preserve, in turn, with one optimiser: losses, and factors of the adapter."""
    pipe, pipeline = saved
    denoiser, frozen = backbones.denoiser(pipeline), pipeline.params["transformer"]
    adapter = low_rank.create(frozen, eraseanything.flux.TEXT_ATTENTION, rank=RANK, seed=0, normal=True)
    # B is not zero, so that A has a gradient from the first step.
    rng = np.random.default_rng(1)
    adapter = {
        path: LowRank(own.down, 0.1 * rng.standard_normal(own.up.shape, np.float32)) for path, own in adapter.items()
    }
    schedule, key = backbones.schedule(pipeline), jax.random.key(0)
    plan = [eraseanything.Step(np.zeros(1, int), PROMPT, NAMED, ())]
    texts = eraseanything.encode(pipeline, plan, "")
    text, watched = texts.of(PROMPT, NAMED, GUIDANCE)
    others = rng.standard_normal((4, LENGTH + SIDE * SIDE // 4)).astype(np.float32)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    update = compiled(eraseanything.GRADIENT, Static(denoiser, Added(), STRENGTHS), ADAM)
    student, factors = adapted(adapter)
    optimiser = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=ADAM.lr, weight_decay=1e-2)
    tuned, state = adapter, transform(ADAM).init(adapter)
    for i, at in enumerate((875.0, 875.0, 250.0, 250.0)):
        time = np.float32([at])
        image = Image(drawn(2), np.zeros_like(drawn(2)), time, text, watched)
        noise = np.array(denoiser.draw(key, image.mean, image.std, schedule).noise)
        if i % 2:
            turn, theirs = Preserving(others), preserving_by(pipe, student, (drawn(2), noise), time, others)
        else:
            told, neutral = texts.of(PROMPT, NAMED, TOLD)[0], texts.neutral().guided(TOLD)
            turn = Erasing(drawn(3), told, neutral, np.float32(ETA))
            theirs = erasing_by(pipe, student, pipe.transformer, (drawn(2), noise), drawn(3), time)
        tuned, state, (ours, _) = update(tuned, state, None, frozen, schedule, image, turn, key)
        assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-5)
        optimiser.param_groups[0]["lr"] = ADAM.second_lr if i % 2 else ADAM.lr
        optimiser.zero_grad()
        theirs.backward()
        optimiser.step()
    for path, pair in factors.items():
        for own, reference in zip(tuned[path], pair, strict=True):
            assert relative_error(own, reference.detach().numpy().T) <= 1e-5


def test_a_synonym_is_moved_away_from_and_unrelated_words_are_moved_to():
    others = np.eye(3, dtype=np.float32)
    towards = -np.array(jax.grad(eraseanything.contrast_loss)(np.full(3, 3**-0.5, np.float32), others))
    assert towards[0] < 0 < towards[1] == towards[2]


def test_attention_that_is_zero_has_a_gradient():
    attended = np.zeros((1, 2, 3, 3), np.float32)
    attended[..., 0] = 1
    grads = jax.grad(eraseanything.attention_loss)(attended, np.array([True, True]))
    assert np.isfinite(grads).all() and (grads[..., 0] > 0).all() and (grads[..., 1:] == 0).all()


# --- as a method -----------------------------------------------------------------------------------------------------


def test_prompts_are_shuffled_and_name_synonyms():
    rng = np.random.default_rng(0)
    made = [eraseanything.reworded("a photo of {}", "the dog", ("a cat",), rng) for _ in range(400)]
    assert {named for _, named in made} == {"the dog", "a cat"}
    assert all(prompt.count(named) == 1 for prompt, named in made)
    assert all(sorted(prompt.replace(named, "").split()) == ["a", "of", "photo"] for prompt, named in made)
    share = np.mean([named == "a cat" for _, named in made])
    assert share == pytest.approx(eraseanything.REPLACED, abs=0.08)
    kept = np.mean([prompt.startswith("a photo of ") for prompt, _ in made])
    assert kept == pytest.approx(1 - eraseanything.SHUFFLED * 23 / 24, abs=0.06)


def test_a_text_that_is_cut_off_is_refused(saved):
    with pytest.raises(ValueError, match="the tokens of 'nude' lie behind the first 3 of 'a the nude'; shorten it"):
        attention_maps.positions_t5(saved[1], "a the nude", "nude", 3)
    assert list(attention_maps.positions_t5(saved[1], "a the nude", "nude", 4)) == [False, False, True, False]
    with pytest.raises(ValueError, match="do not occur in the prompt 'a dog'"):
        attention_maps.positions_t5(saved[1], "a dog", "nude", 8)


def test_a_concept_without_unrelated_words_and_a_missing_strength_are_refused(saved):
    with pytest.raises(ValueError, match=r"strengths=\(1, 0.1\), expected 4 numbers"):
        eraseanything.align(saved[1], CONCEPT, strengths=(1, 0.1))
    with pytest.raises(ValueError, match="`retain` is empty"):
        eraseanything.align(saved[1], CONCEPT._replace(preserve=()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_queries_and_keys_of_text_change_and_nothing_else(kind):
    _, pipeline = flux_reference.loaded(kind, SIDE, LENGTH)
    options = {"steps": 4, "images": 1, "sampling_steps": 2, "sampling_guidance": 3.0 if kind == "dev" else 0.0}
    tuned = eraseanything.align(pipeline, CONCEPT, seed=0, rank=RANK, **options)
    before, after = (flatten(each.params["transformer"]) for each in (pipeline, tuned))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if eraseanything.flux.TEXT_ATTENTION.search(path)}
    assert len(changed) == 2 * LAYERS and all(np.isfinite(leaf).all() for leaf in after.values())


def test_schnell_is_refused_guidance_before_any_work():
    with pytest.raises(ValueError, match="distilled without guidance, found 3; set guidance=0"):
        eraseanything.align(flux_reference.loaded("schnell", SIDE, LENGTH)[1], CONCEPT)


@pytest.mark.slow
def test_features_are_read_where_the_students_own_samples_stand(saved):
    """At the time after the steps that were done, all from one noise."""
    _, pipeline = saved
    sampler = partial.sampler(pipeline, 3, 3.0)
    plan = [eraseanything.Step(np.zeros(1, int), PROMPT, NAMED, ("a dog", "eat"))]
    texts = eraseanything.encode(pipeline, plan, "")
    weights = pipeline.params["transformer"]
    found = eraseanything.features(sampler, weights, texts, ("a dog", "eat"), np.random.default_rng(5))
    rng = np.random.default_rng(5)
    done, noise = int(rng.integers(3)), int(rng.integers(2**32))
    for row, other in enumerate(("a dog", "eat")):
        text, watched = texts.of(other, other, TOLD)
        latents = partial.walk(sampler, weights, text, texts.neutral(), done, np.random.default_rng(noise))
        time = np.float32([sampler.tables.timesteps[done]])
        with torch.no_grad():
            maps = called(saved[0], saved[0].transformer, np.array(latents), time, other, TOLD)[1]
        assert relative_error(found[row], feature_by(maps, list(np.flatnonzero(watched))).numpy()) <= 1e-5
