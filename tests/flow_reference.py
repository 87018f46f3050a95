"""Small random pipelines of flow transformers made with diffusers and transformers, and their parts.

Every block type of the published models is in them, with few channels. Norms, biases and modulations are random too, so
that a swap shows.
"""

from pathlib import Path
from typing import Any

import torch

T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer over letters and a few words: the real class with a small vocabulary, saved in a folder."""
    from transformers import T5TokenizerFast

    words = ["cat", "dog", "eat", "nude", "the", "a"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in words] + [(chr(i), -8.0) for i in range(ord("a"), ord("z") + 1)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return T5TokenizerFast.from_pretrained(str(folder))


def t5(vocabulary: int) -> torch.nn.Module:
    """A T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    return shaken(T5EncoderModel(T5Config(**T5, vocab_size=vocabulary)))


def vae() -> torch.nn.Module:
    """An AutoencoderKL of 16 channels, as SD3 and FLUX have it."""
    import diffusers

    return shaken(diffusers.AutoencoderKL(**VAE))


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with noise on every parameter, ready to be called."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": T5["d_model"],
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20 + 12,
    "out_channels": 16,
    "pos_embed_max_size": 12,
}
TRANSFORMERS = {
    "sd3": SD3,  # SD3 medium's blocks
    "sd35": SD3 | {"qk_norm": "rms_norm"},  # SD3.5 large's
    "sd35m": SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},  # SD3.5 medium's
}


def sd3_transformer(kind: str) -> torch.nn.Module:
    """An SD3Transformer2DModel with the blocks of a published model."""
    import diffusers

    return shaken(diffusers.SD3Transformer2DModel(**TRANSFORMERS[kind]))


def clip(vocabulary: Any, width: int, projected: int) -> torch.nn.Module:
    """A CLIPTextModelWithProjection that reads from the tokenizer `vocabulary`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projected,
        hidden_act="gelu",
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    return shaken(CLIPTextModelWithProjection(config))


def sd3(kind: str = "sd3", *, with_t5: bool = True, seed: int = 0) -> Any:
    """A StableDiffusion3Pipeline."""
    import tempfile

    import diffusers

    from tests.conftest import write_tokenizer

    torch.manual_seed(seed)
    folder = Path(tempfile.mkdtemp())
    tokenizer, tokenizer_3 = write_tokenizer(folder / "clip"), t5_tokenizer(folder / "t5")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(kind),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(tokenizer, 16, 20),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 12, 12),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(len(tokenizer_3)) if with_t5 else None,
        tokenizer_3=tokenizer_3 if with_t5 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
