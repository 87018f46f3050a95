"""Whole samples of SD3 against diffusers' pipeline: same latents, same texts, float32."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax import backbones
from spqr_jax.generate import generate
from tests import flow_reference
from tests.parity import samples

jax.config.update("jax_default_matmul_precision", "highest")
LENGTH = 20  # tokens for T5


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """kind -> (diffusers' pipeline, ours), made once."""
    made = {}

    def get(kind: str, with_t5: bool = True):
        if (kind, with_t5) not in made:
            pipe = flow_reference.sd3(kind, with_t5=with_t5)
            folder = tmp_path_factory.mktemp(kind)
            pipe.save_pretrained(folder)
            made[kind, with_t5] = pipe, convert.load(folder)
        return made[kind, with_t5]

    return get


noise = samples.flow_noise


def theirs_of(pipe, latents: np.ndarray, **options) -> np.ndarray:
    return samples.diffusers_flow_images(pipe, latents, max_sequence_length=LENGTH, **options)


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.02, "the reference is a flat image and proves nothing"
    beyond, regraded = samples.apart(ours, theirs)
    assert beyond <= samples.PIXELS and regraded <= samples.REGRADED


@pytest.mark.parametrize(
    ("kind", "steps", "with_t5"),
    [
        ("sd3", 8, True),
        ("sd35", 8, True),
        ("sd35m", 8, True),
        ("sd35m", 28, True),
        ("sd3", 28, True),
        ("sd3", 8, False),
    ],
)
def test_samples(pipelines, kind, steps, with_t5):
    pipe, pipeline = pipelines(kind, with_t5)
    assert backbones.of(pipeline).key == "sd3"
    theirs = theirs_of(pipe, noise(2), num_inference_steps=steps)
    options = {"scheduler": "flow_euler", "guidance": 5.0, "max_sequence_length": LENGTH, "latents": noise(2)}
    check(generate(pipeline, samples.PROMPTS, [0, 0], steps=steps, **options), theirs)


def test_another_size_and_a_negative_prompt(pipelines):
    pipe, pipeline = pipelines("sd3")
    latents = noise(2, 4, 12)
    theirs = theirs_of(pipe, latents, num_inference_steps=4, negative_prompt=["the dog"] * 2)
    options = {"scheduler": "flow_euler", "guidance": 5.0, "max_sequence_length": LENGTH, "latents": latents}
    check(
        generate(pipeline, samples.PROMPTS, [0, 0], steps=4, height=8, width=24, negative="the dog", **options), theirs
    )


def test_dynamic_shifting(pipelines):
    pipe, pipeline = pipelines("sd3")
    own, config = pipe.scheduler, {"shift": 3.0, "use_dynamic_shifting": True}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    try:
        theirs = theirs_of(pipe, noise(2), num_inference_steps=4, guidance_scale=1.0)
    finally:
        pipe.scheduler = own
    pipeline = pipeline._replace(configs=pipeline.configs | {"scheduler": config})
    options = {"scheduler": "flow_euler", "guidance": 1.0, "max_sequence_length": LENGTH, "latents": noise(2)}
    check(generate(pipeline, samples.PROMPTS, [0, 0], steps=4, **options), theirs)


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_condition_is_that_of_diffusers_at_the_usual_length(pipelines, with_t5):
    pipe, pipeline = pipelines("sd3", with_t5)
    prompts = ["a cat eats the dog", ""]
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    ours = backbones.condition(pipeline, prompts)
    assert ours.context.shape == (2, 77 + 256, 32)
    np.testing.assert_allclose(ours.context, context.numpy(), atol=1e-5 * float(context.abs().max()), rtol=0)
    np.testing.assert_allclose(ours.pooled, pooled.numpy(), atol=1e-5 * float(pooled.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "pndm"}, "FlowMatchEulerDiscreteScheduler"),
        ({"scheduler": "flow_euler", "max_sequence_length": 513}, r"must lie in 1\.\.512, found 513"),
        ({"scheduler": "flow_euler", "height": 6}, "positive multiples of 4, found 6x16"),
    ],
)
def test_options_that_do_not_fit_are_refused(pipelines, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipelines("sd3")[1], ["a cat"], [0], steps=2, **options)


def test_a_length_is_refused_where_it_is_fixed(reference):
    with pytest.raises(ValueError, match=r"max_sequence_length .* Stable Diffusion 1\.x or 2\.x does not have"):
        generate(convert.load(reference("sd1")[1]), ["a cat"], [0], steps=2, max_sequence_length=77)
