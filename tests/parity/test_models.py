"""Whole models against diffusers and transformers on PyTorch, same random weights, float32."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import params as params_lib

jax.config.update("jax_default_matmul_precision", "highest")
KINDS = ["sd1", "sd2", "sdxl"]


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_unet(reference, kind):
    torch_pipe, directory = reference(kind)
    pipeline = convert.load(directory)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    context = rng.standard_normal((2, 77, 32)).astype(np.float32)
    timesteps = np.array([3, 801])
    extra, theirs_extra = (), {}
    if kind == "sdxl":
        embeds, ids = rng.standard_normal((2, 24)).astype(np.float32), np.tile([64, 64, 0, 0, 64, 64], (2, 1))
        extra = (embeds, ids)
        theirs_extra = {"text_embeds": torch.tensor(embeds), "time_ids": torch.tensor(ids)}
    with torch.no_grad():
        theirs = torch_pipe.unet(
            torch.tensor(latents), torch.tensor(timesteps), torch.tensor(context), added_cond_kwargs=theirs_extra
        ).sample
    model = pipeline.definitions["unet"].bind(pipeline.params["unet"])
    ours = jax.jit(lambda x: model(x, timesteps, context, *extra))(latents.transpose(0, 2, 3, 1))
    assert relative_error(np.asarray(ours).transpose(0, 3, 1, 2), theirs) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders(reference, kind):
    torch_pipe, directory = reference(kind)
    pipeline = convert.load(directory)
    ids = torch_pipe.tokenizer(["a cat", "nude", ""], padding="max_length", return_tensors="np").input_ids
    for component in ("text_encoder", "text_encoder_2"):
        if component not in pipeline.params:
            continue
        with torch.no_grad():
            theirs = getattr(torch_pipe, component)(torch.tensor(ids), output_hidden_states=True)
        ours = pipeline.definitions[component].bind(pipeline.params[component])(ids)
        assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) <= 1e-5
        assert relative_error(ours.hidden_states[-2], theirs.hidden_states[-2]) <= 1e-5
        if component == "text_encoder_2":
            assert relative_error(ours.text_embeds, theirs.text_embeds) <= 1e-5
        else:
            assert relative_error(ours.pooled, theirs.pooler_output) <= 1e-5


def test_vae(reference):
    torch_pipe, directory = reference("sd1")
    pipeline = convert.load(directory)
    vae = pipeline.definitions["vae"].bind(pipeline.params["vae"])
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        theirs = torch_pipe.vae.encode(torch.tensor(images)).latent_dist
        decoded = torch_pipe.vae.decode(theirs.mean).sample
    mean, logvar = vae.encode(images.transpose(0, 2, 3, 1))
    assert relative_error(np.asarray(mean).transpose(0, 3, 1, 2), theirs.mean) <= 1e-5
    assert relative_error(np.asarray(logvar).transpose(0, 3, 1, 2), theirs.logvar) <= 1e-5
    assert relative_error(np.asarray(vae.decode(mean)).transpose(0, 3, 1, 2), decoded) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_diffusers(reference, kind, tmp_path):
    """load -> save_diffusers -> diffusers gives the same weights, bit for bit."""
    torch_pipe, directory = reference(kind)
    convert.save_diffusers(convert.load(directory), tmp_path)
    again = type(torch_pipe).from_pretrained(tmp_path, local_files_only=True)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(torch_pipe, component):
            continue
        ours, theirs = getattr(again, component).state_dict(), getattr(torch_pipe, component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ids = [p.tokenizer("a cat eats the dog").input_ids for p in (again, torch_pipe)]
    assert ids[0] == ids[1]


def test_sd15_unet_has_the_published_parameter_count():
    from spqr_jax import pipeline as pipeline_lib

    config = {"cross_attention_dim": 768}  # every other field at its default is SD1.5's
    _, shapes = pipeline_lib.define("unet", config)
    assert params_lib.count(shapes) == 859_520_964
