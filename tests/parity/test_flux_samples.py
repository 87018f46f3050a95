"""Whole samples of FLUX against diffusers' pipeline: same weights, prompts and initial latents."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import backbones
from spqr_jax.generate import generate
from tests import flux_reference as flux
from tests.parity.compared import BLOCK, relative_error
from tests.parity.test_generate import check_equal

jax.config.update("jax_default_matmul_precision", "highest")
PROMPTS = ["a cat", "the dog eat"]
SIZE = {"height": 8 * flux.FACTOR, "width": 12 * flux.FACTOR}


@pytest.fixture(scope="module")
def pipelines():
    """kind -> (diffusers' pipeline, ours)."""
    return {kind: (flux.saved(kind)[0], convert.load(flux.saved(kind)[1])) for kind in flux.KINDS}


def ours(pipeline, steps=2, guidance=3.5, **options) -> np.ndarray:
    options = {"latents": flux.noise(2), "scheduler": "flow_euler"} | SIZE | options
    return generate(pipeline, PROMPTS, [0, 0], steps=steps, guidance=guidance, **options)


def check_sample(pipelines, kind: str, steps: int) -> None:
    rows = flux.sample(kind, pipelines[kind][1], steps)
    assert not [row for row in rows if not row.error <= row.limit]


@pytest.mark.parametrize(("kind", "steps"), [("dev", 28), ("schnell", 8)])
def test_whole_samples(pipelines, kind, steps):
    check_sample(pipelines, kind, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("dev", 8), ("schnell", 28)])
def test_whole_samples_of_other_lengths(pipelines, kind, steps):
    check_sample(pipelines, kind, steps)


def test_the_scale_of_guidance_is_read_image_by_image(pipelines):
    pipe, pipeline = pipelines["dev"]
    options = {"max_sequence_length": 9}
    together = ours(pipeline, guidance=[1.5, 8.0], **options)
    for row, scale in enumerate((1.5, 8.0)):
        theirs = flux.images(pipe, PROMPTS, flux.noise(2), 2, scale, 9)[row]
        check_equal(together[row], theirs)
    assert not np.array_equal(together[0], ours(pipeline, guidance=8.0, **options)[0])


@pytest.mark.parametrize("kind", flux.KINDS)
def test_text_states_are_those_of_diffusers(pipelines, kind):
    pipe, pipeline = pipelines[kind]
    texts = ["a cat", "", "nude"]
    told = backbones.condition(pipeline, texts)
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=flux.USUAL[kind][1])
    assert relative_error(told.context, states) <= BLOCK and relative_error(told.pooled, pooled) <= BLOCK
    # Training reads these: diffusers' scripts train dev with guidance 1.
    assert (told.guidance is None) == (kind == "schnell") and (kind == "schnell" or told.guidance.tolist() == [1, 1, 1])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("schnell", {"guidance": 3.5}, "FLUX.1 schnell is distilled without guidance, found 3.5; set guidance=0"),
        (
            "schnell",
            {"guidance": 0, "max_sequence_length": 300},
            "schnell reads at most 256 tokens of a text, found 300",
        ),
        ("dev", {"max_sequence_length": 513}, "must lie in 1..512, found 513"),
        ("dev", {"height": 18}, "must be positive multiples of 4, found 18x24"),
        ("dev", {"scheduler": "ddim"}, "scheduler ddim: _class_name='FlowMatchEulerDiscreteScheduler'"),
    ],
)
def test_what_a_flux_does_not_have_is_refused_before_any_work(pipelines, monkeypatch, kind, options, message):
    monkeypatch.setattr("spqr_jax.backbones.text.encode", None)
    with pytest.raises(ValueError, match=message):
        ours(pipelines[kind][1], **{"latents": None} | options)


@pytest.mark.parametrize("kind", flux.KINDS)
def test_round_trip_through_diffusers(kind, tmp_path):
    """load -> save_diffusers -> diffusers gives the same weights, bit for bit, and the same tokens."""
    pipe, directory = flux.saved(kind)
    convert.save_diffusers(convert.load(directory), tmp_path)
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        found, theirs = getattr(again, component).state_dict(), getattr(pipe, component).state_dict()
        assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in theirs)
    assert again.tokenizer_2("the cat").input_ids == pipe.tokenizer_2("the cat").input_ids
    assert again.transformer.config.guidance_embeds == (kind == "dev")
