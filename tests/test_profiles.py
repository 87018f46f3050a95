"""Which parameters each profile trains: exact names and counts, against diffusers' and PEFT's own modules.

The full-size models exist by shape only: here under `jax.eval_shape`, in PyTorch on the meta device.
"""

import functools

import jax
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from convert.rename import torch_name
from spqr_jax import backbones, profiles
from spqr_jax import params as params_lib
from spqr_jax.training import lora

SD = {"sample_size": 64, "cross_attention_dim": 768}  # every other field at diffusers' default is Stable Diffusion 1's
CONFIGS = {
    "SD1.5": SD,
    "SD2.1": {
        **SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# standard: the published sizes of the UNets. lite, rank 8: twice the 797,184 that diffusers' LoRA script reports for
# Stable Diffusion 1 at rank 4. moderate: over layers of width d, 2 E d + d^2 + d with E = cross_attention_dim.
COUNTS = {
    "SD1.5": {"lite": 1_594_368, "moderate": 31_572_160, "standard": 859_520_964},
    "SD2.1": {"lite": 1_659_904, "moderate": 37_961_920, "standard": 865_910_724},
    "SDXL": {"lite": 11_612_160, "moderate": 443_270_400, "standard": 2_567_463_684},
}
# (transformer blocks, width) of each model.
LAYERS = {
    "SD1.5": [(5, 320), (5, 640), (6, 1280)],
    "SD2.1": [(5, 320), (5, 640), (6, 1280)],
    "SDXL": [(10, 640), (60, 1280)],
}
CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TINY = {
    "a": {"attn1": {"to_k": {"kernel": 0}}, "attn2": {"to_k": {"kernel": 0}, "to_q": {"kernel": 0}}},
    "conv": {"kernel": 0, "bias": 0},
}


@functools.cache
def ours(name: str):
    return backbones.define("unet", CONFIGS[name])


@functools.cache
def theirs(name: str):
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**CONFIGS[name])


def shapes(params) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> sizes, sorted: layouts differ between the two, and are tested elsewhere."""
    return {torch_name(path): tuple(sorted(leaf.shape)) for path, leaf in params_lib.flatten(params).items()}


def torch_shapes(named) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(p.shape)) for name, p in named}


def chosen(params, profile: str):
    return params_lib.partition(params, profiles.mask(params, profile))[0]


@pytest.mark.parametrize("name", ["SD1.5", "SD2.1", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_standard_is_the_whole_unet(name):
    _, params = ours(name)
    assert shapes(chosen(params, "standard")) == torch_shapes(theirs(name).named_parameters())
    assert params_lib.count(params) == COUNTS[name]["standard"]


@pytest.mark.parametrize("name", ["SD1.5", "SD2.1", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_moderate_is_cross_attention_without_its_queries(name):
    _, params = ours(name)
    expected = {
        f"{module}.{leaf}": parameter
        for module, layer in theirs(name).named_modules()
        if module.endswith(CROSS_ATTENTION)
        for leaf, parameter in layer.named_parameters(recurse=False)
    }
    trained = chosen(params, "moderate")
    assert shapes(trained) == torch_shapes(expected.items())
    context = CONFIGS[name]["cross_attention_dim"]
    assert sum(n * (2 * context * d + d * d + d) for n, d in LAYERS[name]) == COUNTS[name]["moderate"]
    assert params_lib.count(trained) == COUNTS[name]["moderate"]


@pytest.mark.parametrize("name", ["SD1.5", "SD2.1", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_lite_is_what_peft_adds(name):
    peft = pytest.importorskip("peft")
    definition, params = ours(name)
    adapted = jax.eval_shape(lambda p: lora.split_keys(lora.attach(definition, p, rank=8)[1])[0], params)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**CONFIGS[name])
        unet.add_adapter(peft.LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    expected = {n.replace(".default", ""): p for n, p in unet.named_parameters() if p.requires_grad}
    trained = chosen(adapted, "lite")
    assert {key.replace(".lora.", "."): value for key, value in shapes(trained).items()} == torch_shapes(
        expected.items()
    )
    assert params_lib.count(trained) == COUNTS[name]["lite"]


def test_lite_before_adapters_marks_the_kernels_that_receive_one():
    _, params = ours("SD1.5")
    marked = params_lib.flatten(chosen(params, "lite"))
    assert len(marked) == 16 * 2 * 4 and all(path.endswith(".kernel") for path in marked)


def test_other_profiles_leave_adapters_alone():
    definition, params = ours("SD1.5")
    adapted = jax.eval_shape(lambda p: lora.attach(definition, p)[1], params)
    assert not any(".lora." in path for path in params_lib.flatten(chosen(adapted, "moderate")))


def test_a_whole_pipelines_mask_trains_the_unet_only():
    text = {"text_model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": 0}}}}}}
    flags = params_lib.flatten(profiles.mask({"unet": TINY, "text_encoder": text, "vae": TINY}, "standard"))
    assert {path for path, flag in flags.items() if flag} == {f"unet.{path}" for path in params_lib.flatten(TINY)}


def test_refuses_unknown_profiles_and_models_without_matches():
    with pytest.raises(ValueError, match="profile 'full' is unknown; expected one of lite, moderate, standard"):
        profiles.mask(TINY, "full")
    for profile in ("lite", "moderate"):
        with pytest.raises(ValueError, match="matches no parameter"):
            profiles.mask({"conv": {"kernel": 0}}, profile)
