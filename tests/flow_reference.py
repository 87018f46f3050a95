"""Small random pipelines of flow transformers made with diffusers and transformers, and their parts.

Every block type of the published models is in them, with few channels. Norms, biases and modulations are random too, so
that a swap shows.
"""

from pathlib import Path
from typing import Any

import torch

T5: dict[str, Any] = {
    "d_model": 24,
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
