"""Methods on SD3: UCE against its authors' algebra for flow transformers in PyTorch, ESD's loss against diffusers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax import backbones, methods
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import negative_guidance
from spqr_jax.params import flatten
from spqr_jax.sampling import partial
from tests import flow_reference

jax.config.update("jax_default_matmul_precision", "highest")
LENGTH = 8  # tokens for T5
CONCEPT = Concept(
    "test",
    erase=("nude", "the dog"),
    target="a cat",
    preserve=("a dog", "eat"),
    prompts=("nude dog", "a nude"),
    replacements=("a dog", "a cat"),
)


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "without_t5"])
def saved(request, tmp_path_factory):
    pipe, folder = flow_reference.sd3("sd35", with_t5=request.param), tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return pipe, convert.load(folder)._replace(text_length=LENGTH)


def changed(before, after) -> set[str]:
    one, two = flatten(before.params["transformer"]), flatten(after.params["transformer"])
    return {path for path in one if not np.array_equal(one[path], two[path])}


def by_authors(pipe, weight: torch.Tensor, place: int) -> np.ndarray:
    """W* of uce_flux_edit.py in float64, without the bias that its targets have. place: 0 text states, 1 pooled."""
    rows = {}
    for text in (*CONCEPT.erase, CONCEPT.target, *CONCEPT.preserve):
        with torch.no_grad():
            found = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        last = [len(pipe.tokenizer(text).input_ids) - 2]
        if pipe.tokenizer_3 is not None:
            last.append(77 + int(sum(pipe.tokenizer_3(text).attention_mask)) - 2)
        rows[text] = (found[0][0, last] if place == 0 else found[2]).double()
    weight = weight.double()
    right, gram = 0.5 * weight, 0.5 * torch.eye(weight.shape[1], dtype=torch.float64)
    pairs = [(text, CONCEPT.target) for text in CONCEPT.erase] + [(text, text) for text in CONCEPT.preserve]
    for text, source in pairs:
        for c, v in zip(rows[text], rows[source], strict=True):
            right = right + torch.outer(weight @ v, c)
            gram = gram + torch.outer(c, c)
    return (right @ torch.inverse(gram)).numpy().T


def test_uce_edits_what_reads_the_text(saved):
    pipe, pipeline = saved
    edited = methods.METHODS["uce"].align(pipeline, CONCEPT, variant="v2")
    layers = {"context_embedder": 0, "time_text_embed.text_embedder.linear_1": 1}
    assert changed(pipeline, edited) == {f"{layer}.kernel" for layer in layers}
    for layer, place in layers.items():
        expected = by_authors(pipe, pipe.transformer.get_submodule(layer).weight.detach(), place)
        start = flatten(pipeline.params["transformer"])[f"{layer}.kernel"]
        found = flatten(edited.params["transformer"])[f"{layer}.kernel"]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected - start).max()


def test_uce_of_2023_is_refused(saved):
    with pytest.raises(ValueError, match='variant "v2" alone'):
        methods.METHODS["uce"].align(saved[1], CONCEPT)


def test_times_of_partly_sampled_latents_are_the_samplers_own(saved):
    sampler = partial.sampler(saved[1], 4, 3.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    times = [sampler.times(k, 1, np.random.default_rng(0))[0] for k in range(4)]
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy()[::-1])


def test_the_loss_of_esd(saved):
    """For the same latents and time, with the target of the frozen transformer of diffusers."""
    pipe, pipeline = saved
    denoiser, weights = backbones.denoiser(pipeline), pipeline.params["transformer"]
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 16)).astype(np.float32)
    times, eta = np.float32([880.5, 100.25]), 1.5
    told = negative_guidance.encode(pipeline, CONCEPT.erase)
    text, empty = told.rows(np.array([0, 1])), told.rows(np.array([2, 2]))
    moved = {path: leaf * 1.1 if path == "proj_out.bias" else leaf for path, leaf in flatten(weights).items()}
    from spqr_jax.params import unflatten

    student, frozen = (denoiser.bind(tree) for tree in (unflatten(moved), weights))
    ours = float(negative_guidance.erasing_loss(student, frozen, latents, times, text, empty, eta))

    def predict(texts):
        with torch.no_grad():
            context, _, pooled, _ = pipe.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
            )
            x = torch.tensor(latents.transpose(0, 3, 1, 2))
            return pipe.transformer(x, context, pooled, torch.tensor(times)).sample

    with_text, without = predict(list(CONCEPT.erase)), predict(["", ""])
    bias = pipe.transformer.proj_out.bias
    start = bias.data.clone()
    bias.data = start * 1.1
    learned = predict(list(CONCEPT.erase))
    bias.data = start
    theirs = torch.nn.functional.mse_loss(learned, without - eta * (with_text - without))
    assert ours == pytest.approx(float(theirs), rel=1e-5)


SMALL = {
    "esd": {"steps": 2, "sampling_steps": 2, "method": "esd-x", "lr": 1e-3},
    "modular_lora": {"steps": 2, "sampling_steps": 2, "rank": 2, "merged": True, "lr": 1e-2},
    "safety_dpo": {"steps": 2, "sampling_steps": 2, "rank": 2, "images": 2, "batch_size": 2, "lr": 1e-2},
}
REGION = {"esd": "cross_attention", "modular_lora": "lora", "safety_dpo": "lora"}


@pytest.mark.parametrize("name", SMALL)
def test_methods_change_their_region_and_nothing_else(saved, name):
    _, pipeline = saved
    if "text_encoder_3" in pipeline.params:
        pytest.skip("once is enough")
    tuned = methods.METHODS[name].align(pipeline, CONCEPT, seed=0, **SMALL[name])
    region = getattr(backbones.of(pipeline).regions, REGION[name])
    expected = {path for path in flatten(pipeline.params["transformer"]) if region.search(path)}
    found = changed(pipeline, tuned)
    # The last block hands no text tokens on: nothing that only they are made from has an effect.
    assert found <= expected and len(found) >= len(expected) - 2
    assert all(np.isfinite(leaf).all() for leaf in flatten(tuned.params["transformer"]).values())


@pytest.mark.parametrize(
    "name", sorted(set(methods.METHODS) - {"none", "uce", "esd", "modular_lora", "safety_dpo", "sld"})
)
def test_other_methods_are_refused_in_one_line(saved, name):
    method = methods.METHODS[name]
    with pytest.raises(ValueError, match=r"Stable Diffusion 3 or 3\.5") as caught:
        method.check_backbone(saved[1])
        method.align(saved[1], CONCEPT, seed=0)
    assert "\n" not in str(caught.value)
