"""The models that benchmarks run: the shipped one, and random weights in Stable Diffusion's sizes."""

from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import mini


class Workload(NamedTuple):
    """How a model is used: images a batch, sampling steps, guidance, scheduler (our name), prompts' length in tokens,
    image side in fine-tuning and samples a step there, and the devices that ours splits a CPU into."""

    batch: int
    steps: int
    guidance: float
    scheduler: str
    tokens: int
    training_side: int
    training_batch: int
    cpu_devices: int


WORKLOADS = {
    "tiny": Workload(2, 4, 7.5, "pndm", 77, 32, 4, 1),
    "mini": Workload(16, 12, 4.0, "dpmpp", 32, 32, 16, 2),
    "sd15": Workload(1, 20, 7.5, "pndm", 77, 256, 1, 1),
}
# A field that is not here has diffusers' default, which is SD1.5's.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "sample_size": 32,
        },
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "sample_size": 512,
        },
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
}


def directory(name: str, scratch: Path) -> Path:
    """A diffusers directory of the model, made in `scratch` by a process of its own where the package has none."""
    if name == "mini":
        return mini.model_path()
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_make, args=(name, scratch / name))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"making the {name} model in {scratch} failed; is there space (sd15: 4.3 GB)?")
    return scratch / name


def _make(name: str, target: Path) -> None:
    """Random weights as PyTorch draws them; the tokenizer is the emoji world's, which any text encoder can take."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    config, length = CONFIGS[name], WORKLOADS[name].tokens
    tokenizer = CLIPTokenizer.from_pretrained(str(mini.model_path() / "tokenizer"), model_max_length=length)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": 49408, "max_position_embeddings": length, "hidden_act": "quick_gelu", **ids}
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**config["unet"]),
        vae=diffusers.AutoencoderKL(**config["vae"], latent_channels=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **config["text_encoder"])),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(target)


def prompts(count: int) -> list[str]:
    """So many different prompts of the emoji world."""
    return [prompt.prompt for prompt in mini.prompts("benign", count, 0)]


def evaluations(workload: Workload) -> int:
    """UNet evaluations of a sample; PNDM without Runge-Kutta steps takes one more than it has steps."""
    return workload.steps + (workload.scheduler == "pndm")
