"""Methods on FLUX: UCE against its authors' algebra in PyTorch, ESD's loss and samples against diffusers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import backbones, methods
from spqr_jax.methods.tools import negative_guidance
from spqr_jax.params import flatten, unflatten
from spqr_jax.sampling import partial
from tests import flux_reference as flux
from tests.methods.test_sd3 import CONCEPT, LENGTH, SMALL, changed
from tests.parity.compared import relative_error

jax.config.update("jax_default_matmul_precision", "highest")
SIDE = 8  # latents


@pytest.fixture(scope="module")
def saved():
    """(diffusers' pipeline, ours) of dev, at a small size."""
    pipe, folder = flux.saved("dev")
    pipeline = convert.load(folder)
    small = pipeline.configs["transformer"] | {"sample_size": SIDE}
    return pipe, pipeline._replace(text_length=LENGTH, configs=pipeline.configs | {"transformer": small})


def encoded(pipe, texts):
    with torch.no_grad():
        return pipe.encode_prompt(texts, None, max_sequence_length=LENGTH)


def by_authors(pipe, weight: torch.Tensor, place: int) -> np.ndarray:
    """W* of uce_flux_edit.py in float64, without the bias that its targets have. place: 0 text states, 1 pooled."""
    rows = {}
    for text in (*CONCEPT.erase, CONCEPT.target, *CONCEPT.preserve):
        found = encoded(pipe, text)
        last = int(sum(pipe.tokenizer_2(text).attention_mask)) - 2
        rows[text] = (found[0][0, last] if place == 0 else found[1][0]).double()
    weight = weight.double()
    right, gram = 0.5 * weight, 0.5 * torch.eye(weight.shape[1], dtype=torch.float64)
    pairs = [(text, CONCEPT.target) for text in CONCEPT.erase] + [(text, text) for text in CONCEPT.preserve]
    for text, source in pairs:
        right = right + torch.outer(weight @ rows[source], rows[text])
        gram = gram + torch.outer(rows[text], rows[text])
    return (right @ torch.inverse(gram)).numpy().T


def test_uce_edits_what_its_authors_edit(saved):
    pipe, pipeline = saved
    edited = methods.METHODS["uce"].align(pipeline, CONCEPT, variant="v2")
    layers = {"context_embedder": 0, "time_text_embed.text_embedder.linear_1": 1}
    assert changed(pipeline, edited) == {f"{layer}.kernel" for layer in layers}
    for layer, place in layers.items():
        expected = by_authors(pipe, pipe.transformer.get_submodule(layer).weight.detach(), place)
        start, found = (flatten(p.params["transformer"])[f"{layer}.kernel"] for p in (pipeline, edited))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected - start).max()


def predict(pipe, latents, times, texts):
    """diffusers' prediction under guidance 1, [B, h, w, C]."""
    (batch, height, width, channels), (context, pooled, ids) = latents.shape, encoded(pipe, texts)
    with torch.no_grad():
        out = pipe.transformer(
            hidden_states=pipe._pack_latents(
                torch.tensor(latents.transpose(0, 3, 1, 2)), batch, channels, height, width
            ),
            timestep=torch.tensor(times) / 1000,
            guidance=torch.ones(batch),
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=ids,
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        ).sample
    return pipe._unpack_latents(out, height, width, 1).permute(0, 2, 3, 1)


def test_the_loss_of_esd(saved):
    """For the same latents and time, with the target of the frozen transformer of diffusers."""
    pipe, pipeline = saved
    denoiser, weights = backbones.denoiser(pipeline), pipeline.params["transformer"]
    latents, times, eta = flux.noise(2, (SIDE, SIDE)), np.float32([875, 250]), 1.5
    told = negative_guidance.encode(pipeline, CONCEPT.erase)
    text, empty = told.rows(np.array([0, 1])), told.rows(np.array([2, 2]))
    moved = {path: leaf * 1.1 if path == "proj_out.bias" else leaf for path, leaf in flatten(weights).items()}
    student, frozen = (denoiser.bind(tree) for tree in (unflatten(moved), weights))
    ours = float(negative_guidance.erasing_loss(student, frozen, latents, times, text, empty, eta))
    with_text, without = predict(pipe, latents, times, list(CONCEPT.erase)), predict(pipe, latents, times, ["", ""])
    bias = pipe.transformer.proj_out.bias
    start = bias.data.clone()
    bias.data = start * 1.1
    learned = predict(pipe, latents, times, list(CONCEPT.erase))
    bias.data = start
    theirs = torch.nn.functional.mse_loss(learned, without - eta * (with_text - without))
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_latents_part_of_the_way_are_those_of_diffusers(saved):
    """Two of four steps with guidance 3.5, which dev reads: one prediction a step."""
    pipe, pipeline = saved
    sampler, done = partial.sampler(pipeline, 4, 3.5), 2
    assert (sampler.guidance, sampler.told) == (1, 3.5)
    told = negative_guidance.encode(pipeline, CONCEPT.erase)
    text, empty = told.rows(np.array([0, 1])), told.rows(np.array([-1]))
    found = partial.walk(sampler, pipeline.params["transformer"], text, empty, done, np.random.default_rng(7))
    noise = np.random.default_rng(7).standard_normal((2, *sampler.shape), np.float32)
    seen = []

    def keep(pipe, step, time, state):
        seen.append(pipe._unpack_latents(state["latents"], SIDE, SIDE, 1).permute(0, 2, 3, 1).numpy())
        return state

    side = SIDE * flux.FACTOR
    packed = pipe._pack_latents(torch.tensor(noise.transpose(0, 3, 1, 2)), 2, 16, SIDE, SIDE)
    options = {"num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": LENGTH, "output_type": "latent"}
    pipe(list(CONCEPT.erase), latents=packed, height=side, width=side, callback_on_step_end=keep, **options)
    assert relative_error(found, seen[done - 1]) <= 1e-5


REGION = {"esd": "cross_attention", "modular_lora": "lora", "safety_dpo": "lora"}


@pytest.mark.parametrize("name", ["esd", pytest.param("modular_lora", marks=pytest.mark.slow)])
def test_methods_change_their_region_and_nothing_else(saved, name):
    _, pipeline = saved
    tuned = methods.METHODS[name].align(pipeline, CONCEPT, seed=0, **SMALL[name])
    region = getattr(backbones.of(pipeline).regions, REGION[name])
    assert changed(pipeline, tuned) == {path for path in flatten(pipeline.params["transformer"]) if region.search(path)}
    assert all(np.isfinite(leaf).all() for leaf in flatten(tuned.params["transformer"]).values())


@pytest.mark.slow
def test_safety_dpo(saved):
    _, pipeline = saved
    tuned = methods.METHODS["safety_dpo"].align(pipeline, CONCEPT, seed=0, **SMALL["safety_dpo"])
    region = backbones.of(pipeline).regions.lora
    assert changed(pipeline, tuned) == {path for path in flatten(pipeline.params["transformer"]) if region.search(path)}


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"none", "uce", "eraseanything", *REGION}))
def test_other_methods_are_refused_in_one_line(saved, name):
    method = methods.METHODS[name]
    with pytest.raises(ValueError, match=r"FLUX\.1") as caught:
        method.check_backbone(saved[1])
        method.align(saved[1], CONCEPT, seed=0)
    assert "\n" not in str(caught.value)


def test_esd_of_schnell_samples_without_guidance():
    pipeline = convert.load(flux.saved("schnell")[1])
    with pytest.raises(ValueError, match="distilled without guidance, found 3; set guidance=0"):
        partial.sampler(pipeline, 4, 3.0)
    assert partial.sampler(pipeline, 4, 0.0).guidance == 1
