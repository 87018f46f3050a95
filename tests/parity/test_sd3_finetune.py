"""Fine-tuning SD3 against PyTorch, as diffusers' train_dreambooth_sd3.py trains it: ten steps of each profile."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import convert
from spqr_jax import backbones, data, finetune, profiles
from spqr_jax.params import flatten
from tests import flow_reference
from tests.parity import flow_training
from tests.parity.test_finetune import CAPTIONS

jax.config.update("jax_default_matmul_precision", "highest")
LENGTH = 8  # tokens for T5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipe, folder = flow_reference.sd3("sd35m"), tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return pipe, convert.load(folder)._replace(text_length=LENGTH)


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return flow_training.images(CAPTIONS, (16, 16))


def predict(pipe, noisy, times, captions: list[str]):
    """The script's call of the transformer."""
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    states = {"encoder_hidden_states": context, "pooled_projections": pooled}
    return pipe.transformer(noisy, timestep=times, **states).sample


@pytest.mark.parametrize(
    ("profile", "joint_text"), [("lite", False), ("lite", True), ("moderate", False), ("standard", False)]
)
def test_ten_steps(saved, dataset, profile, joint_text):
    o = flow_training.optimiser({"lite": 0.095, "moderate": 0.12, "standard": 1.15}[profile])
    tuned, _ = flow_training.compare(*saved, dataset, o, profile, predict, joint_text)
    check_frozen(saved[1], tuned, profile, joint_text)


def check_frozen(pipeline, tuned, profile: str, joint_text: bool) -> None:
    """Only the profile's leaves have changed; the table of positions never does."""
    before, after = (flatten(p.params["transformer"]) for p in (pipeline, tuned))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    flags = flatten(profiles.mask(pipeline.params["transformer"], profile))
    assert flags == {
        path.removeprefix("transformer."): flag
        for path, flag in flatten(profiles.mask(pipeline.params, profile)).items()
        if path.startswith("transformer.")
    }
    expected = {path for path, flag in flags.items() if flag}
    if joint_text:
        region = backbones.of(pipeline).regions.lora_text
        expected |= {path for path in before if region.search(path)}
    # The last block hands no text tokens on, so its queries of text tokens have no effect.
    last = "transformer_blocks.2.attn."
    idle = {path for path in before if re.search(rf"{re.escape(last)}(add_q_proj|norm_added_q)\.", path)}
    assert changed - idle == expected - idle and "pos_embed.pos_embed" not in changed


def test_what_lite_and_the_text_stream_are_asked_of(saved, reference):
    _, pipeline = saved
    with pytest.raises(ValueError, match='joint_text adapts the text stream under the profile "lite" only'):
        finetune.prepare(pipeline, "moderate", rank=2, alpha=2.0, dropout=0.0, seed=0, joint_text=True)
    other = convert.load(reference("sd1")[1])
    with pytest.raises(ValueError, match=r"joint_text needs the region 'lora_text' .* Stable Diffusion 1\.x or 2\.x"):
        finetune.prepare(other, "lite", rank=2, alpha=2.0, dropout=0.0, seed=0, joint_text=True)
    with pytest.raises(ValueError, match=r"text_encoder: Stable Diffusion 3 or 3\.5 has no text encoders"):
        finetune.prepare(pipeline, "lite", rank=2, alpha=2.0, dropout=0.0, seed=0, text_encoder=True)
