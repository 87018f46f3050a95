"""CLIP (for CLIPScore and Q16) from a transformers directory to ONNX graphs."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convert.graphs.graph import Exported, export_graph, exporter, source_of, write_json
from judges.q16 import read_prompts


class ClipVision(nn.Module):
    """pixel_values [N, 3, S, S] -> image_embeds [N, D], not normalised."""

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.tower(pixel_values=pixel_values).pooler_output)


class ClipText(nn.Module):
    """input_ids [T, L] -> text_embeds [T, D], not normalised, pooled at the end token by the model's own rule.

    There is no attention mask: attention is causal, and padding comes after the pooled token.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projection = model.text_model, model.text_projection

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.projection(self.tower(input_ids=input_ids).pooler_output)


def export_clip(
    directory: str | os.PathLike, out_dir: str | os.PathLike, *, model: str | None = None
) -> list[Exported]:
    """Exports a transformers CLIPModel directory: text.onnx, vision.onnx, tokenizer.json and clip_score.json."""
    clip, tokenizer = load_clip(directory)
    out = Path(out_dir)
    length = clip.config.text_config.max_position_embeddings
    ids = torch.randint(0, clip.config.text_config.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[:, length // 2 :] = tokenizer.bos_token_id, tokenizer.eos_token_id
    exported = [
        export_clip_vision(clip, out),
        export_graph(ClipText(clip), ids, out / "text.onnx", input_name="input_ids", output_name="text_embeds"),
    ]
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    legacy = clip.config.text_config.eos_token_id == 2  # CLIP's first configs: pooled at the largest id instead
    record = clip_sidecar(directory, clip, model) | {
        "context_length": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_rule": "largest id" if legacy else "first eos_token_id",
        "exporter": exporter(max(item.error for item in exported)),
    }
    write_json(out / "clip_score.json", record)
    return exported


def export_q16(
    directory: str | os.PathLike, prompts: str | os.PathLike, out_dir: str | os.PathLike, *, model: str | None = None
) -> list[Exported]:
    """Exports Q16: vision.onnx of a transformers CLIPModel directory, prompts.npy (float32 [2, D]) and q16.json."""
    clip, _ = load_clip(directory, with_tokenizer=False)
    learned = read_prompts(prompts)
    if learned.shape != (2, clip.config.projection_dim):
        raise ValueError(
            f"{prompts}: prompts {list(learned.shape)} do not fit {directory}, whose embeddings have "
            f"{clip.config.projection_dim} numbers; use the prompts learned for this CLIP"
        )
    exported = export_clip_vision(clip, Path(out_dir))
    np.save(Path(out_dir) / "prompts.npy", learned.astype(np.float32))
    record = clip_sidecar(directory, clip, model) | {
        "prompts": source_of(prompts),
        "exporter": exporter(exported.error),
    }
    write_json(Path(out_dir) / "q16.json", record)
    return [exported]


def export_clip_vision(clip: Any, out: Path) -> Exported:
    """vision.onnx: pixel_values [N, 3, S, S] -> image_embeds [N, D]."""
    size = clip.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    return export_graph(
        ClipVision(clip), pixels, out / "vision.onnx", input_name="pixel_values", output_name="image_embeds"
    )


def load_clip(directory: str | os.PathLike, *, with_tokenizer: bool = True) -> tuple[Any, Any]:
    """A local transformers CLIPModel in float32 with plain attention, and its tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    require_directory(directory)
    clip = CLIPModel.from_pretrained(directory, local_files_only=True, attn_implementation="eager", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True) if with_tokenizer else None
    return clip.eval(), tokenizer


def clip_sidecar(directory: str | os.PathLike, clip: Any, model: str | None) -> dict[str, Any]:
    """The fields of a CLIP graph's sidecar: model id, image size, and normalisation as in the preprocessor config."""
    config = Path(directory) / "preprocessor_config.json"
    given = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return {
        "model": model or clip.config.name_or_path or str(directory),
        "image_size": clip.config.vision_config.image_size,
        "mean": given.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": given.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
    }


def require_directory(path: str | os.PathLike) -> None:
    """Raises ValueError unless `path` is a local directory with a config.json."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: expected a local transformers directory with config.json; download the model first")
