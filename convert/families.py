"""What is known beforehand: how the formats name a pipeline's components, and the configurations of its families.

A new architecture adds its components to `COMPONENTS` and its published configurations to `FAMILIES`. Single files hold
weights alone, so their configurations come from here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert import kinds
from spqr_jax.backbones import class_name


class Component(NamedTuple):
    """One part of a pipeline that has weights, as files of every format name it.

    Attributes:
        kind: the kind of a file that holds this component alone (`convert.kinds`).
        library: its library in a diffusers model_index.json. Its class is that of its config.
        weights: its weight file in a diffusers directory, without extension.
        prefixes: first parts of its keys in a single file of the original code.
        kohya: its names in the keys of kohya's and SPM's adapters; none if no adapter sits on it.
        interface: fields of its config that other components rely on, so that weights from elsewhere must share them.
        tokenizer: the component of the pipeline that makes its input, if it reads texts.
    """

    kind: str
    library: str
    weights: str
    prefixes: tuple[str, ...]
    kohya: tuple[str, ...] = ()
    interface: tuple[str, ...] = ()
    tokenizer: str = ""


# In the order in which they are read and listed.
COMPONENTS = {
    "unet": Component(
        kinds.UNET,
        "diffusers",
        "diffusion_pytorch_model",
        prefixes=("model.diffusion_model.",),
        kohya=("unet",),
        interface=("in_channels", "cross_attention_dim", "addition_embed_type"),
    ),
    "transformer": Component(
        kinds.TRANSFORMER,
        "diffusers",
        "diffusion_pytorch_model",
        prefixes=(),
        kohya=("transformer", "unet"),
        interface=("in_channels", "joint_attention_dim", "pooled_projection_dim"),
    ),
    "vae": Component(
        kinds.VAE,
        "diffusers",
        "diffusion_pytorch_model",
        prefixes=("first_stage_model.",),
        interface=("latent_channels",),
    ),
    "text_encoder": Component(
        kinds.TEXT_ENCODER,
        "transformers",
        "model",
        prefixes=("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
        kohya=("te", "te1"),
        tokenizer="tokenizer",
    ),
    "text_encoder_2": Component(
        kinds.TEXT_ENCODER,
        "transformers",
        "model",
        prefixes=("conditioner.embedders.1.", "text_encoders.clip_g."),
        kohya=("te2",),
        tokenizer="tokenizer_2",
    ),
    "text_encoder_3": Component(
        kinds.TEXT_ENCODER,
        "transformers",
        "model",
        prefixes=("text_encoders.t5xxl.",),
        kohya=("te3",),
        tokenizer="tokenizer_3",
    ),
}

# The vocabulary of every Stable Diffusion. It is read from the local cache only.
VOCABULARY = "openai/clip-vit-large-patch14"
T5_VOCABULARY = "google/t5-v1_1-xxl"

# The last three are in every Stable Diffusion's scheduler_config.json, whatever its own sampler. diffusers' DDIM and
# PNDM do otherwise by default.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_PNDM = {
    "_class_name": "PNDMScheduler",
    **_SCHEDULE,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# The published files have eos_token_id 2 (see spqr_jax.backbones.models.CLIPTextModel).
_TOKENS = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_CLIP_L = {
    **_TOKENS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class Family(NamedTuple):
    """One published architecture.

    Attributes:
        name: as messages call it.
        configs: component (and "scheduler", "model_index") -> config.
        prediction_known: whether all its checkpoints predict the same: noise, or velocity.
    """

    name: str
    configs: dict[str, dict[str, Any]]
    prediction_known: bool = True


FAMILIES = {
    "SD1": Family(
        "SD1",
        {
            "unet": {**_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            "vae": _VAE,
            "text_encoder": _CLIP_L,
            "scheduler": _PNDM,
            "model_index": {},
        },
    ),
    "SD2": Family(
        "SD2",
        {
            "unet": {
                **_UNET,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "vae": {**_VAE, "sample_size": 768},
            "text_encoder": {
                **_CLIP_L,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "projection_dim": 512,
                "hidden_act": "gelu",
            },
            "scheduler": _PNDM,
            "model_index": {},
        },
        prediction_known=False,
    ),
    "SDXL": Family(
        "SDXL",
        {
            "unet": {
                **_UNET,
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "use_linear_projection": True,
                "transformer_layers_per_block": [1, 2, 10],
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": _CLIP_L,
            "text_encoder_2": {
                **_CLIP_L,
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "projection_dim": 1280,
                "hidden_act": "gelu",
            },
            "scheduler": {
                "_class_name": "EulerDiscreteScheduler",
                **_SCHEDULE,
                "prediction_type": "epsilon",
                "steps_offset": 1,
                "timestep_spacing": "leading",
            },
            "model_index": {"force_zeros_for_empty_prompt": True},
        },
    ),
}


_VAE_16 = {
    **_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
_PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def _sd3(width: int, layers: int, **transformer: Any) -> dict[str, dict[str, Any]]:
    """The configs of SD3 and SD3.5. width: heads of 64 channels."""
    return {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "attention_head_dim": 64,
            "num_attention_heads": width,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * width,
            "pooled_projection_dim": 2048,
            **transformer,
        },
        "vae": _VAE_16,
        "text_encoder": {**_CLIP_L, **_PROJECTED},
        "text_encoder_2": {**FAMILIES["SDXL"].configs["text_encoder_2"], **_PROJECTED},
        "text_encoder_3": T5_XXL,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        "model_index": {},
    }


FAMILIES |= {
    "SD3": Family("SD3", _sd3(24, 24, pos_embed_max_size=192)),
    "SD3.5 medium": Family(
        "SD3.5 medium",
        _sd3(24, 24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    ),
    "SD3.5 large": Family("SD3.5 large", _sd3(38, 38, pos_embed_max_size=192, qk_norm="rms_norm")),
}


def _flux(guidance: bool, **scheduler: Any) -> dict[str, dict[str, Any]]:
    """The configs of FLUX.1. guidance: whether it is distilled with guidance."""
    return {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": guidance,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae": {**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _CLIP_L,
        "text_encoder_2": T5_XXL,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
            **scheduler,
        },
        "model_index": {},
    }


FAMILIES |= {
    "FLUX.1 dev": Family("FLUX.1 dev", _flux(True, shift=3.0, use_dynamic_shifting=True)),
    "FLUX.1 schnell": Family("FLUX.1 schnell", _flux(False, shift=1.0, use_dynamic_shifting=False)),
}
# Components that a pipeline of every family has, beside one of the denoisers.
DENOISERS = tuple(name for name in COMPONENTS if COMPONENTS[name].kind in (kinds.UNET, kinds.TRANSFORMER))
NEEDED = ("vae", "text_encoder")


def tokenizer_names(components: Iterable[str]) -> list[str]:
    """The tokenizers that these components of a pipeline read from."""
    return [COMPONENTS[name].tokenizer for name in components if COMPONENTS[name].tokenizer]


def tokenizer_class(component: str, config: dict[str, Any]) -> str:
    """transformers' class of the tokenizer that a text encoder reads from."""
    return "T5TokenizerFast" if class_name(component, config) == "T5EncoderModel" else "CLIPTokenizer"


def infer(state: Mapping[str, Any]) -> Family | None:
    """The family of a CompVis checkpoint, by the width of the text states that its cross-attention reads.

    SD3 and SD3.5 are told by their second attention, and by their width. None if no family has this width. All other
    shapes are checked when the weights are read.
    """
    if patches := next((key for key in state if key.endswith("x_embedder.proj.weight")), None):
        dual = any(".attn2." in key for key in state)
        width = np.asarray(state[patches]).shape[0]
        return {1536: FAMILIES["SD3.5 medium" if dual else "SD3"], 2432: FAMILIES["SD3.5 large"]}.get(width)
    key = next((k for k in state if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    width = np.asarray(state[key]).shape[-1] if key else None
    for family in FAMILIES.values():
        if family.configs.get("unet", {}).get("cross_attention_dim", 0) == width:
            return family
    return None


def tokenizers(names: Iterable[str]) -> dict[str, Any]:
    """The tokenizers from the local Hugging Face cache; the second CLIP of SDXL and SD3 has its own padding.

    Raises OSError if a vocabulary is not in the cache.
    """
    from transformers import CLIPTokenizer, T5Tokenizer

    padding: dict[str, dict[str, Any]] = {"tokenizer": {}, "tokenizer_2": {"pad_token": "!"}}
    return {
        name: CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=True, **padding[name])
        if name in padding
        else T5Tokenizer.from_pretrained(T5_VOCABULARY, local_files_only=True)
        for name in names
    }
