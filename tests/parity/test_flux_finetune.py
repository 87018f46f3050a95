"""Fine-tuning of FLUX against PyTorch, as diffusers' train_dreambooth_flux.py trains it: uniform times, the noise less
the latents as the target, dev told guidance 1; PEFT's LoRA, torch.optim.AdamW, clipping, warm-up.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import convert
from spqr_jax import data
from spqr_jax.params import flatten as flat
from tests import flux_reference as flux
from tests.parity import flow_training
from tests.parity.compared import relative_error
from tests.parity.test_finetune import changed, torch_weights

jax.config.update("jax_default_matmul_precision", "highest")
LENGTH = 12  # tokens of a text
CAPTIONS = ["a cat", "the dog", "a cat eat", "nude", "dog", ""]
# Norms that clip some steps and not others.
NORMS = {
    ("dev", "lite"): 0.045,
    ("dev", "moderate"): 0.1,
    ("dev", "standard"): 1.85,
    ("schnell", "lite"): 0.045,
    ("schnell", "moderate"): 0.075,
    ("schnell", "standard"): 1.55,
}


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return flow_training.images(CAPTIONS, (8, 12))


def load(kind: str):
    return convert.load(flux.saved(kind)[1])._replace(text_length=LENGTH)


def predict(pipe, noisy, times, captions: list[str]):
    """The script's call of the transformer."""
    with torch.no_grad():
        context, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=LENGTH)
    (batch, channels, height, width), guided = noisy.shape, pipe.transformer.config.guidance_embeds
    output = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
        timestep=times / 1000,
        guidance=torch.ones(batch) if guided else None,
        pooled_projections=pooled,
        encoder_hidden_states=context,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(output, height * flux.FACTOR, width * flux.FACTOR, flux.FACTOR)


def check(kind: str, dataset, profile: str, joint_text: bool = False) -> None:
    pipe, pipeline, o = flux.saved(kind)[0], load(kind), flow_training.optimiser(NORMS[kind, profile])
    tuned, model = flow_training.compare(pipe, pipeline, dataset, o, profile, predict, joint_text)
    before, after = (flat(p.params["transformer"]) for p in (pipeline, tuned))
    start, theirs = convert.rename.into_torch(pipeline.params["transformer"]), torch_weights(model)
    assert {convert.rename.torch_name(path) for path in changed(before, after)} == {
        key for key in theirs if not np.array_equal(theirs[key], start[key])
    }


# One comparison runs always; the rest with `-m slow`, since each compiles a program of its own.
CASES = list(NORMS)
CASES = [case if case == ("dev", "moderate") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("kind", "profile"), CASES)
def test_ten_steps(dataset, kind, profile):
    check(kind, dataset, profile)


@pytest.mark.slow
def test_lite_with_the_text_stream(dataset):
    check("dev", dataset, "lite", joint_text=True)


def test_encoded_images_are_those_of_the_script(dataset):
    from spqr_jax.training import latents

    pipeline = load("dev")
    ours = latents.encode(pipeline, dataset).scaled(pipeline)
    assert max(map(relative_error, ours, flow_training.encoded(flux.saved("dev")[0], dataset))) <= 1e-5
