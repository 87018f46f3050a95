"""LlavaGuard (LLaVA-OneVision in transformers' layout) to three ONNX graphs, with the files that a judge needs.

    vision_encoder.onnx        pixel_values [V, 3, S, S] -> image_features [V, L, D]
    embed_tokens.onnx          input_ids [B, T] -> inputs_embeds [B, T, D]
    decoder_model_merged.onnx  inputs_embeds [B, T, D], attention_mask [B, P + T], position_ids [B, T],
                               past_key_values.{i}.key|value [B, G, P, K] -> logits [B, 1, vocabulary] of the last token
                               only, present.{i}.key|value [B, G, P + T, K]
    image_newline.npy          the learned end of a row of image tokens [D]
    tokenizer.json, llavaguard.json

Names of graphs, inputs and outputs are those of transformers.js. The decoder's forward pass is written out here (Qwen2:
RMS norm, rotary positions, grouped queries), since that of transformers cannot be traced with a cache. Every export
compares it with transformers'.

Letters: V views, S their side, L tokens of a view, D width, B batch, T new tokens, P past tokens, G key-value heads, K
head size.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convert.graphs.clip import require_directory
from convert.graphs.graph import Axes, Exported, export_checked, export_graph, exporter, write_json

IMAGE, POLICY = "<image>", "{policy}"
PROMPT = f"<|im_start|>user\n{IMAGE}\n{POLICY}<|im_end|>\n<|im_start|>assistant\n"


class VisionEncoder(nn.Module):
    """pixel_values [V, 3, S, S] -> projected features [V, L, D], from the layer that the model reads."""

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layer = model.config.vision_feature_layer
        self.skip = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        return self.projector(states[self.layer][:, self.skip :])


class Decoder(nn.Module):
    """The language model with its cache as plain tensors. The mask is transformers': causal, without padding."""

    def __init__(self, model: Any):
        super().__init__()
        self.language, self.lm_head = model.model.language_model, model.lm_head
        config = model.config.text_config
        self.groups, self.heads = config.num_key_value_heads, config.num_attention_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        length, total = inputs_embeds.shape[1], attention_mask.shape[1]
        queries = torch.arange(length) + (total - length)
        allowed = (torch.arange(total)[None, :] <= queries[:, None])[None] & attention_mask[:, None, :].bool()
        bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None, None]  # [B, 1, 1, T, P + T]
        rotation = self.rotation(position_ids)
        hidden, present = inputs_embeds, []
        for i, layer in enumerate(self.language.layers):
            attended, *cache = self.attend(layer, hidden, bias, rotation, past[2 * i], past[2 * i + 1])
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            present += cache
        return self.lm_head(self.language.norm(hidden[:, -1:])), *present

    def rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines float32 [B, 1, T, K] of the rotary positions."""
        rotary = self.language.rotary_emb
        angles = position_ids[..., None].float() * rotary.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def attend(
        self,
        layer: Any,
        hidden: torch.Tensor,
        bias: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer's attention: output [B, T, D], keys and values [B, G, P + T, K]."""
        batch, length = hidden.shape[:2]
        states, attention = layer.input_layernorm(hidden), layer.self_attn
        query = rotate(self.split(attention.q_proj(states), self.heads), rotation)
        key = torch.cat([past_key, rotate(self.split(attention.k_proj(states), self.groups), rotation)], dim=2)
        value = torch.cat([past_value, self.split(attention.v_proj(states), self.groups)], dim=2)
        query = query.reshape(batch, self.groups, self.heads // self.groups, length, self.size)
        scores = query @ key[:, :, None].transpose(-1, -2) * self.size**-0.5
        weights = (scores.float() + bias).softmax(dim=-1).to(value.dtype)
        mixed = (weights @ value[:, :, None]).reshape(batch, self.heads, length, self.size)
        return attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), key, value

    def split(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """[B, T, heads * K] -> [B, heads, T, K]."""
        return states.reshape(states.shape[0], states.shape[1], heads, self.size).transpose(1, 2)


def rotate(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions on [B, heads, T, K]: the two halves of K are the two coordinates."""
    cosines, sines = (values.to(states.dtype) for values in rotation)
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


def export_llavaguard(
    directory: str | os.PathLike, out_dir: str | os.PathLike, *, dtype: str = "float32", model: str | None = None
) -> list[Exported]:
    """Exports a local transformers LlavaOnevision directory.

    dtype: "float32" or "float16"; graphs must agree with PyTorch within 1e-3 or 5e-2. model: name to record.
    Raises ValueError if the language model is not Qwen2 or uses sliding windows.
    """
    llava, tokenizer = load_llava(directory)
    frequencies = llava.model.language_model.rotary_emb.inv_freq.clone()
    llava = llava.to(getattr(torch, dtype))
    llava.model.language_model.rotary_emb.inv_freq = frequencies  # float16 would blur late positions
    out = Path(out_dir)
    exported = export_graphs(llava, out, dtype)
    np.save(out / "image_newline.npy", llava.model.image_newline.detach().float().numpy())
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    record = sidecar(Path(directory), llava, tokenizer, model)
    layers, error = llava.config.text_config.num_hidden_layers, max(graph.error for graph in exported)
    write_json(out / "llavaguard.json", record | {"dtype": dtype, "layers": layers, "exporter": exporter(error)})
    return exported


def export_graphs(llava: Any, out: Path, dtype: str) -> list[Exported]:
    """The three graphs in the folder `out`, each compared with PyTorch."""
    tolerance, size = (1e-3 if dtype == "float32" else 5e-2), llava.config.vision_config.image_size
    pixels = random((2, 3, size, size), dtype, seed=5)
    ids = torch.arange(6).reshape(2, 3)
    return [
        export_graph(
            VisionEncoder(llava),
            pixels,
            out / "vision_encoder.onnx",
            input_name="pixel_values",
            output_name="image_features",
            tolerance=tolerance,
        ),
        export_checked(
            llava.model.language_model.embed_tokens,
            (ids,),
            (torch.arange(20).reshape(4, 5),),
            out / "embed_tokens.onnx",
            {"input_ids": {0: "batch", 1: "tokens"}},
            {"inputs_embeds": {0: "batch", 1: "tokens"}},
            tolerance=tolerance,
        ),
        export_decoder(llava, out / "decoder_model_merged.onnx", dtype, tolerance),
    ]


def export_decoder(llava: Any, path: Path, dtype: str, tolerance: float) -> Exported:
    """The decoder's graph. The module is first compared with transformers' own forward pass on a padded prompt."""
    decoder = Decoder(llava).eval()
    layers, width = llava.config.text_config.num_hidden_layers, llava.config.text_config.hidden_size
    check_against_transformers(llava, decoder, tolerance)
    names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs: Axes = {
        "inputs_embeds": {0: "batch", 1: "tokens"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "tokens"},
    }
    inputs |= {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names}
    outputs: Axes = {"logits": {0: "batch"}} | {f"present.{name}": {0: "batch", 2: "total"} for name in names}

    def feeds(batch: int, tokens: int, past: int, seed: int) -> tuple[torch.Tensor, ...]:
        mask = torch.ones(batch, past + tokens, dtype=torch.int64)
        cache = [random((batch, decoder.groups, past, decoder.size), dtype, seed + 1 + i) for i in range(2 * layers)]
        positions = (torch.arange(tokens) + past).expand(batch, tokens)
        return random((batch, tokens, width), dtype, seed), mask, positions, *cache

    return export_checked(decoder, feeds(2, 3, 2, 6), feeds(3, 4, 0, 99), path, inputs, outputs, tolerance=tolerance)


def check_against_transformers(llava: Any, decoder: Decoder, tolerance: float) -> None:
    """Raises ValueError unless the decoder gives the last logits of transformers, also in a row with left padding."""
    embeds = random((2, 7, llava.config.text_config.hidden_size), str(llava.dtype).removeprefix("torch."), seed=7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    empty = torch.zeros(2, decoder.groups, 0, decoder.size, dtype=embeds.dtype)
    with torch.no_grad():
        states = llava.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        expected = llava.lm_head(states.last_hidden_state[:, -1]).double()
        caches = [empty] * (2 * len(decoder.language.layers))
        found = decoder(embeds, mask, positions, *caches)[0][:, 0].double()
    error = (found - expected).abs().max().item()
    if not error <= tolerance * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"the decoder differs from transformers' by {error:.2e}: this language model is not plain Qwen2"
        )


def load_llava(directory: str | os.PathLike) -> tuple[Any, Any]:
    """A local LlavaOnevisionForConditionalGeneration in float32 with plain attention, and its tokenizer."""
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    require_directory(directory)
    llava = LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, local_files_only=True, attn_implementation="eager", dtype=torch.float32
    ).eval()
    text = llava.config.text_config
    if text.model_type != "qwen2" or getattr(text, "use_sliding_window", False):
        raise ValueError(
            f"{directory}: expected a Qwen2 language model without sliding windows, found {text.model_type}"
        )
    return llava, AutoTokenizer.from_pretrained(directory, local_files_only=True)


def sidecar(directory: Path, llava: Any, tokenizer: Any, model: str | None) -> dict[str, Any]:
    """The fields of the sidecar: prompt, token ids, sizes, grids and normalisation, read beside the weights."""
    config, given = llava.config, read_json(directory / "preprocessor_config.json")
    ends = llava.generation_config.eos_token_id or tokenizer.eos_token_id
    return {
        "model": model or config.name_or_path or str(directory),
        "prompt": chat_prompt(tokenizer, directory),
        "image_token": IMAGE,
        "image_token_id": config.image_token_id,
        "eos_token_ids": ends if isinstance(ends, list) else [ends],
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "grids": given.get("image_grid_pinpoints", config.image_grid_pinpoints),
        "max_patches": int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        "mean": given.get("image_mean", [0.5, 0.5, 0.5]),  # SigLIP's; transformers' class default is CLIP's
        "std": given.get("image_std", [0.5, 0.5, 0.5]),
    }


def chat_prompt(tokenizer: Any, directory: Path) -> str:
    """The prompt with places for image and policy: from the chat template beside the weights, or upstream's."""
    file = directory / "chat_template.jinja"
    template = (
        file.read_text(encoding="utf-8")
        if file.is_file()
        else read_json(directory / "chat_template.json").get("chat_template")
    )
    template = template or tokenizer.chat_template
    if not template:
        return PROMPT
    content = [{"type": "image"}, {"type": "text", "text": POLICY}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file, or {} if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def random(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Normal noise of standard deviation 0.5, a function of `seed`."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (noise * 0.5).to(getattr(torch, dtype))
