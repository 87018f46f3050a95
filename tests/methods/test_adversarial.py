"""STEREO and AdvUnlearn: attacks, targets, losses and gradients against PyTorch; what they leave alone."""

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.methods import Concept, advunlearn, stereo
from spqr_jax.methods.tools import loop, pictures, word_vectors
from spqr_jax.pipeline import tokenize
from spqr_jax.sampling import partial

torch = pytest.importorskip("torch")
from tests import stand_in

CAT = Concept("cat", ("cat", "nude"), retain=("dog", "do", "a dog"), templates=("a {}", "do {} dog"))
MSE = torch.nn.functional.mse_loss
RNG = np.random.default_rng(0)
T = np.array([300, 300], np.int32)


@pytest.fixture(scope="module")
def pipeline(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def states(pipeline):
    return np.asarray(backbones.condition(pipeline, ["cat", "nude", "", "dog"]).context)


def latents() -> np.ndarray:
    return RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)


def words(pipeline, slots: word_vectors.Slots, vectors) -> torch.Tensor:
    """Word vectors of the ids, the slots' replaced one by one."""
    rows = torch.tensor(np.asarray(word_vectors.word_table(pipeline.params["text_encoder"])))[
        torch.tensor(slots.ids).long()
    ]
    rows = [[row[j] for j in range(row.shape[0])] for row in rows]
    for b, places in enumerate(slots.places):
        for k, place in enumerate(places):
            rows[b][place] = vectors[b][k]
    return torch.stack([torch.stack(row) for row in rows])


def test_prefix_stands_between_start_and_concept(pipeline):
    """[BOS, free, cat, EOS, ...]: as long as before, one end token less."""
    plain, slots = tokenize(pipeline, ["cat"])[0], word_vectors.prefixed(pipeline, ["cat"], 2)
    assert slots.places.tolist() == [[1, 2]] and slots.ids.shape == (1, len(plain))
    assert slots.ids[0, 0] == plain[0] and slots.ids[0, 3:].tolist() == plain[1:-2].tolist()
    with pytest.raises(ValueError, match="prefix=99"):
        word_vectors.prefixed(pipeline, ["cat"], 99)


def test_a_learned_word_equal_to_a_known_one_encodes_alike(pipeline):
    """Slots are read where the template has {}: with the vector of "cat", the states of "a cat" and "do cat dog"."""
    slots = word_vectors.framed(pipeline, ["a {}", "do {} dog"])
    vectors = np.tile(word_vectors.word_vector(pipeline, "cat", "word"), (2, 1, 1))
    encoder = pipeline.definitions["text_encoder"], pipeline.params["text_encoder"]
    ours = word_vectors.encode_jit(*encoder, slots.ids, slots.places, vectors)
    expected = backbones.condition(pipeline, ["a cat", "do cat dog"]).context
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_attacks_equal_pytorch(pipeline, states):
    """Both attacks' losses and gradients with respect to the word vectors."""
    unet = stand_in.torch_unet({p: x.detach() for p, x in stand_in.tensors(pipeline.params["unet"]).items()})
    text = stand_in.torch_text({p: x.detach() for p, x in stand_in.tensors(pipeline.params["text_encoder"]).items()})
    static = word_vectors.static_of(pipeline)
    models = pipeline.params["unet"], pipeline.params["text_encoder"]
    x, slots = latents(), word_vectors.prefixed(pipeline, ["cat", "nude"], 1)
    vectors = (0.02 * RNG.standard_normal((2, 1, 32))).astype(np.float32)
    inputs = (*models, x, T, slots.ids, slots.places, states[:2])
    loss, grads = stand_in.jitted(word_vectors.prefix_gradient, static, {"prefix": vectors}, *inputs)
    free = torch.tensor(vectors, requires_grad=True)
    found = unet(torch.tensor(x), torch.tensor(T), text(words(pipeline, slots, free)))
    theirs = MSE(found, unet(torch.tensor(x), torch.tensor(T), torch.tensor(states[:2])))
    expected = torch.autograd.grad(theirs, free)[0].numpy()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    assert np.abs(grads["prefix"] - expected).max() <= 1e-4 * np.abs(expected).max()
    _, fast = stand_in.jitted(word_vectors.prefix_gradient, static._replace(sign=True), {"prefix": vectors}, *inputs)
    np.testing.assert_array_equal(fast["prefix"], np.sign(grads["prefix"]))

    slots, key = word_vectors.framed(pipeline, CAT.templates), jax.random.key(3)
    batch = {"mean": latents(), "std": np.abs(latents())}
    inputs = (*models, backbones.schedule(pipeline), batch, slots.ids, slots.places, np.array([1, 0]), key)
    gradient = loop.descent(word_vectors.inversion_loss)
    loss, grads = stand_in.jitted(gradient, static, {"vectors": vectors[:, 0]}, *inputs)
    noisy, noise, t = stand_in.drawn(key, batch)
    theirs = MSE(unet(noisy, t, text(words(pipeline, slots, free.flip(0)))), noise)
    expected = torch.autograd.grad(theirs, free)[0][:, 0].numpy()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    assert np.abs(grads["vectors"] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_stereo_losses_equal_pytorch(pipeline, states):
    """c - (s - 1)(c - "") of the round, and the compositional target of the end, for s = 2.5, g = 2."""
    leaves = stand_in.tensors(pipeline.params["unet"])
    frozen = stand_in.torch_unet({p: x.detach() for p, x in leaves.items()})
    params, x = pipeline.params["unet"], latents()
    cat, nude, empty, dog = (np.repeat(s[None], 2, axis=0) for s in states)
    denoiser = backbones.denoiser(pipeline)
    inputs = (params, {}, params, x, T, Condition(cat), Condition(empty), np.float32(2.5 - 2))
    loss, grads = stand_in.jitted(loop.descent(stereo.erase_loss), denoiser, *inputs)

    def of(text, unet=frozen):
        return unet(torch.tensor(x), torch.tensor(T), torch.tensor(text))

    theirs = MSE(of(cat, stand_in.torch_unet(leaves)), of(cat) - 1.5 * (of(cat) - of(empty)))
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    stand_in.assert_close(grads, stand_in.gradients(theirs, leaves))

    negatives = np.stack([cat, nude])
    inputs = (params, {}, params, x, T, Condition(nude), Condition(empty), Condition(dog), negatives, np.float32(2))
    loss, grads = stand_in.jitted(loop.descent(stereo.final_loss), denoiser, *inputs)
    away = (of(cat) + of(nude)) / 2 - of(empty)
    theirs = MSE(of(nude, stand_in.torch_unet(leaves)), of(empty) + (of(dog) - of(empty)) - 3 * away)
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    stand_in.assert_close(grads, stand_in.gradients(theirs, leaves))


def test_advunlearn_outer_loss_equals_pytorch(pipeline, states):
    leaves = stand_in.tensors(pipeline.params["text_encoder"])
    unet = stand_in.torch_unet({p: x.detach() for p, x in stand_in.tensors(pipeline.params["unet"]).items()})
    x, z = latents(), latents()
    cat, empty = (np.repeat(states[[i]], 2, axis=0) for i in (0, 2))
    slots, ids = word_vectors.prefixed(pipeline, ["cat", "cat"], 1), tokenize(pipeline, ["nude", "dog"])
    vectors = (0.02 * RNG.standard_normal((2, 1, 32))).astype(np.float32)
    retained = np.stack([states[1], states[3]])
    static, weights = word_vectors.static_of(pipeline), advunlearn.Weights(np.float32(1.5), np.float32(0.3))
    erase = (x, T, slots.ids, slots.places, vectors, Condition(cat), Condition(empty))
    retain = (z, T, ids, Condition(retained))
    inputs = (pipeline.params["text_encoder"], {}, pipeline.params["unet"], erase, retain, weights)
    loss, grads = stand_in.jitted(loop.descent(advunlearn.outer_loss), static, *inputs)

    def of(sample, text):
        return unet(torch.tensor(sample), torch.tensor(T), torch.as_tensor(text))

    # The table is trained by neither, so words are constants here; its gradient is left out of the comparison.
    text = stand_in.torch_text(leaves)
    theirs = MSE(
        of(x, text(words(pipeline, slots, torch.tensor(vectors)))), of(x, empty) - 1.5 * (of(x, cat) - of(x, empty))
    )
    plain = word_vectors.Slots(ids, np.zeros((2, 0), int))
    theirs = theirs + 0.3 * MSE(of(z, text(words(pipeline, plain, None))), of(z, retained))
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    expected = stand_in.gradients(theirs, leaves)
    trained = {p for p, flag in stand_in.flat(advunlearn.trained(pipeline.params["text_encoder"])).items() if flag}
    assert trained and not any("embedding" in path for path in trained)
    ours = {path: leaf for path, leaf in stand_in.flat(grads).items() if path in trained}
    stand_in.assert_close(params_lib.unflatten(ours), {path: expected[path] for path in trained})


def test_trained_sets_by_the_names_of_diffusers(reference):
    """STEREO: linear and convolutional layers outside attn2; AdvUnlearn: the encoder's layers and the final norm."""
    real = convert.load(reference("sd1")[1])
    modules = dict(reference("sd1")[0].unet.named_modules())
    for path, flag in stand_in.flat(stereo.trained(STABLE_DIFFUSION, real.params["unet"])).items():
        layer = modules[path.rpartition(".")[0]]
        assert flag == (isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "attn2" not in path), path
    names = [name for name, _ in reference("sd1")[0].text_encoder.named_parameters()]
    trained = stand_in.flat(advunlearn.trained(real.params["text_encoder"]))
    assert len(names) == len(trained)
    assert sum(trained.values()) == sum("embeddings" not in name for name in names) > 0


def test_a_walk_is_ddim(pipeline, states):
    """After two steps of four, against the DDIM update written out, at the timestep it says."""
    sampler, (text, empty) = partial.sampler(pipeline, 4, 3.0), (Condition(states[[i]]) for i in (0, 2))
    walked = partial.walk(sampler, pipeline.params["unet"], text, empty, 2, np.random.default_rng(1))
    unet = stand_in.torch_unet({p: x.detach() for p, x in stand_in.tensors(pipeline.params["unet"]).items()})
    x = torch.tensor(np.random.default_rng(1).standard_normal((1, 8, 8, 4), np.float32))
    powers = torch.tensor(np.asarray(backbones.schedule(pipeline)))
    for t, after in ((751, 501), (501, 251)):
        time = torch.tensor([t])
        without = unet(x, time, torch.tensor(states[2:3]))
        noise = without + 3.0 * (unet(x, time, torch.tensor(states[:1])) - without)
        clean = (x - (1 - powers[t]).sqrt() * noise) / powers[t].sqrt()
        x = powers[after].sqrt() * clean + (1 - powers[after]).sqrt() * noise
    np.testing.assert_allclose(walked, x.numpy(), rtol=1e-4, atol=1e-5)
    assert sampler.tables.timesteps[2] == 251


STEREO = {"images": 4, "erase_steps": 2, "attack_steps": 2, "final_steps": 2, "sampling_steps": 4, "image_steps": 2}


def test_stereo_changes_its_layers_and_nothing_else(pipeline):
    options = {**STEREO, "rounds": 1, "start_word": "dog", "batch_size": 2, "erase_lr": 1e-3, "final_lr": 1e-3}
    aligned, again = (stereo.align(pipeline, CAT, seed=1, **options) for _ in range(2))
    expected = {
        p for p, flag in stand_in.flat(stereo.trained(STABLE_DIFFUSION, pipeline.params["unet"])).items() if flag
    }
    assert stand_in.changed(pipeline.params["unet"], aligned.params["unet"]) == expected
    assert not stand_in.changed(aligned.params["unet"], again.params["unet"])
    assert aligned.params["text_encoder"] is pipeline.params["text_encoder"]


def test_every_round_sees_its_own_pictures_of_every_text(pipeline):
    """Fewer pictures than prompts: a word without a picture would stay the start word, and be erased as such."""
    prompts = [f"{frame} {text}".strip() for frame in ("", "a", "do", "dog") for text in CAT.erase]
    gallery = pictures.make(pipeline, prompts, 6, seed=0, texts=CAT.erase, steps=2)
    rounds = [{int(n) for rows in stereo.gallery_rows(6, 2, k, 2, 2, 6, 0) for n in rows} for k in (0, 1)]
    assert rounds == [{0, 1, 4, 5}, {2, 3}]
    for rows in rounds:
        assert {gallery.prompt[n] % len(CAT.erase) for n in rows} == {0, 1}
    assert [int(n) for rows in stereo.gallery_rows(6, 1, 1, 2, 3, 1, 0) for n in sorted(rows)] == [1, 3, 5]


@pytest.mark.parametrize(("prompts", "texts", "count"), [(31 * 11, 31, 64), (6, 2, 13), (6, 3, 4), (5, 1, 12)])
def test_pictures_show_texts_in_turn_and_each_its_prompts_in_turn(prompts, texts, count):
    order = pictures.prompt_numbers(prompts, count, 7, texts)
    assert len(order) == count and order.tolist() == pictures.prompt_numbers(prompts, count, 7, texts).tolist()
    for start in range(0, count - texts + 1, texts):
        assert sorted(order[start : start + texts] % texts) == list(range(texts))
    for text in range(texts):
        own = order[order % texts == text]
        assert np.ptp(np.bincount(own // texts, minlength=prompts // texts)) <= 1


@pytest.mark.parametrize("kind", ["full", "fast"])
def test_advunlearn_trains_exactly_the_encoder(pipeline, kind):
    options = {"steps": 3, "warmup": 1, "attack_steps": 2, "retain_batch_size": 2, "sampling_steps": 4, "lr": 1e-3}
    aligned = advunlearn.align(pipeline, CAT, attack=kind, batch_size=2, walks=2, **options)
    expected = {p for p, flag in stand_in.flat(advunlearn.trained(pipeline.params["text_encoder"])).items() if flag}
    assert stand_in.changed(pipeline.params["text_encoder"], aligned.params["text_encoder"]) == expected
    assert aligned.params["unet"] is pipeline.params["unet"]


def test_bad_input(pipeline):
    with pytest.raises(ValueError, match="`anchors` is empty"):
        stereo.align(pipeline, Concept("cat", ("cat",)))
    with pytest.raises(ValueError, match="start_word"):
        stereo.align(pipeline, CAT, start_word="")
    with pytest.raises(ValueError, match="images=3, expected at least 4"):
        stereo.align(pipeline, CAT, start_word="cat", images=3)
    with pytest.raises(ValueError, match="templates leave no room"):
        stereo.align(pipeline, CAT._replace(templates=("do " * 90 + "{}",)), start_word="cat")
    with pytest.raises(ValueError, match="`retain` is empty"):
        advunlearn.align(pipeline, Concept("cat", ("cat",)))
    with pytest.raises(ValueError, match="prompts=3, expected at least 5"):
        advunlearn.align(pipeline, CAT)
    with pytest.raises(ValueError, match="attack must be"):
        advunlearn.align(pipeline, CAT, attack="free")
