"""Methods on FLUX: UCE against its authors' algebra in PyTorch, ESD's loss and samples against diffusers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import methods
from spqr_jax.methods.tools import negative_guidance
from spqr_jax.sampling import partial
from tests import flux_reference as flux
from tests.methods import flow
from tests.methods.flow import CONCEPT, LENGTH
from tests.parity.compared import relative_error

jax.config.update("jax_default_matmul_precision", "highest")
SIDE = 8  # latents


@pytest.fixture(scope="module")
def saved():
    """(diffusers' pipeline, ours) of dev, at a small size."""
    return flux.loaded("dev", SIDE, LENGTH)


def encoded(pipe, texts):
    with torch.no_grad():
        return pipe.encode_prompt(texts, None, max_sequence_length=LENGTH)


def test_uce_edits_what_its_authors_edit(saved):
    pipe, pipeline = saved

    def states(text):
        context, pooled, _ = encoded(pipe, text)
        return context[0, [int(sum(pipe.tokenizer_2(text).attention_mask)) - 2]], pooled

    flow.check_uce(pipe, pipeline, states)


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
    latents, times = flux.noise(2, (SIDE, SIDE)), np.float32([875, 250])
    flow.check_loss_of_esd(pipe, pipeline, latents, times, lambda texts: predict(pipe, latents, times, texts))


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


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in flow.SMALL if name != "esd"]


@pytest.mark.parametrize("name", ["esd", *SLOW])
def test_methods_change_their_region_and_nothing_else(saved, name):
    found, region = flow.changed_by(saved[1], name)
    assert found == region


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"none", "uce", "eraseanything", *flow.REGION}))
def test_other_methods_are_refused_in_one_line(saved, name):
    flow.check_refused(saved[1], name, r"FLUX\.1")


def test_esd_of_schnell_samples_without_guidance():
    pipeline = convert.load(flux.saved("schnell")[1])
    with pytest.raises(ValueError, match="distilled without guidance, found 3; set guidance=0"):
        partial.sampler(pipeline, 4, 3.0)
    assert partial.sampler(pipeline, 4, 0.0).guidance == 1
