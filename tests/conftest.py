"""Small random pipelines made with diffusers and transformers: the references of every parity test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs compiled once serve every test, worker and subprocess.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/spqr_jax/compilation"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Hundreds of small programs run once each: LLVM's optimisation would take twice as long as everything else.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import json
from pathlib import Path

import pytest

from tests.browser import browser  # noqa: F401, a fixture
from tests.distributions import installed  # noqa: F401, a fixture

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "sd1": {**UNET, "attention_head_dim": 4},
    "sd2": {**UNET, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        **UNET,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 16,
}
SCHEDULERS = {
    "sd1": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "sd2": ("DDIMScheduler", {"prediction_type": "v_prediction", "steps_offset": 1, "clip_sample": False}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
}


def write_tokenizer(folder: Path, length: int = 77):
    """A CLIP tokenizer over bytes, letters and a few merges: the real class with a small vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("n", "u"), ("d", "e</w>")]
    vocab = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=length)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def torch_pipeline(kind: str, seed: int = 0):
    """A tiny random StableDiffusion(XL)Pipeline of diffusers."""
    import tempfile

    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = write_tokenizer(Path(tempfile.mkdtemp()))
    unet_config = dict(UNETS[kind])
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16 if kind == "sdxl" else 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 24,
        "hidden_act": "quick_gelu" if kind == "sd1" else "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    name, extra = SCHEDULERS[kind]
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **extra)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet_config),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    if kind == "sdxl":
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text)), "tokenizer_2": tokenizer}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
        for parameter in module.parameters():  # random norms and biases too, so that a swap shows
            parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """kind -> (diffusers pipeline, its saved directory), made once per session."""
    made = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            pipeline = torch_pipeline(kind)
            pipeline.save_pretrained(directory)
            made[kind] = (pipeline, directory)
        return made[kind]

    return get


MAPS = Path("/proc/self/maps")  # on Linux
MANY_MAPS = 30_000  # of the 65,530 that a process may have: beyond them the next program to compile crashes


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """XLA maps memory for every compiled program, and a worker compiles thousands. Programs stay in the disk cache."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
