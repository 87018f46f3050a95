"""Pipelines as diffusers directories: model_index.json and one folder per component."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert import rename
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.pipeline import MODEL_CLASSES, Pipeline

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
LIBRARIES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}

# Fields of model_index.json that change pictures, kept as configs["model_index"].
PIPELINE_OPTIONS = ("force_zeros_for_empty_prompt",)


class TensorFile(Mapping):
    """A .safetensors file as a mapping, read by memory map one tensor at a time."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")
            self._keys = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise rename.ConversionError(
                f"{path} is not a readable safetensors file ({error}); it may be truncated: fetch or rebuild it."
            ) from None

    def __getitem__(self, key: str) -> np.ndarray:
        return self._file.get_tensor(key)

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def load_pipeline(directory: Path, *, dtype: str = "float32") -> Pipeline:
    """Read a diffusers directory (safetensors, or .bin through torch with weights_only).

    Raises FileNotFoundError naming the missing file, ConversionError for weights that do not fit.
    """
    index = read_json(directory / "model_index.json")
    params, definitions, configs, tokenizers = {}, {}, {}, {}
    for component in MODEL_CLASSES:
        if index.get(component, [None])[0] is None:
            continue
        folder = directory / component
        configs[component] = read_json(folder / "config.json")
        definitions[component], skeleton = pipeline_lib.define(component, configs[component])
        state = component_weights(folder, WEIGHT_FILES[component])
        params[component] = rename.from_torch(state, skeleton, component=component, source=str(folder), dtype=dtype)
    missing = {"unet", "vae", "text_encoder"} - set(params)
    if missing:
        raise rename.ConversionError(f"{directory}/model_index.json names no {', '.join(sorted(missing))}.")
    configs["scheduler"] = read_json(directory / "scheduler" / "scheduler_config.json")
    configs["model_index"] = {name: index[name] for name in PIPELINE_OPTIONS if name in index}
    for tokenizer in ("tokenizer", "tokenizer_2") if "text_encoder_2" in params else ("tokenizer",):
        tokenizers[tokenizer] = load_tokenizer(directory / tokenizer)
    return Pipeline(params, definitions, configs, tokenizers, name=str(directory))


def load_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; a diffusers directory needs its tokenizer.")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that must exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; a diffusers directory needs it.") from None
    except json.JSONDecodeError as error:
        raise rename.ConversionError(f"{path} is not valid JSON: {error}.") from None


def component_weights(folder: Path, stem: str) -> Mapping[str, Any]:
    """The weights of one component: safetensors before .bin, full precision before the fp16 variant."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).exists():
            return TensorFile(folder / name)
    for name in (f"{stem}.bin", f"{stem}.fp16.bin", "pytorch_model.bin", "pytorch_model.fp16.bin"):
        if (folder / name).exists():
            from convert.pickled import load_pickled

            return load_pickled(folder / name)
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors (or .bin); the weights are missing.")


def save_diffusers(pipeline: Pipeline, directory: str | os.PathLike) -> None:
    """Write a directory that diffusers' StableDiffusionPipeline (or XL) loads with identical output."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if pipeline_lib.is_sdxl(pipeline) else "StableDiffusionPipeline",
        "_diffusers_version": "0.40.0",
        "scheduler": ["diffusers", pipeline.configs["scheduler"].get("_class_name", "PNDMScheduler")],
    }
    if not pipeline_lib.is_sdxl(pipeline):
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    index |= pipeline.configs.get("model_index", {})
    for component, params in pipeline.params.items():
        folder = directory / component
        folder.mkdir(exist_ok=True)
        save_file(rename.into_torch(params), folder / f"{WEIGHT_FILES[component]}.safetensors", {"format": "pt"})
        write_json(folder / "config.json", pipeline.configs[component])
        index[component] = LIBRARIES[component]
    for name, tokenizer in pipeline.tokenizers.items():
        tokenizer.save_pretrained(str(directory / name))
        index[name] = LIBRARIES[name]
    (directory / "scheduler").mkdir(exist_ok=True)
    write_json(directory / "scheduler" / "scheduler_config.json", pipeline.configs["scheduler"])
    write_json(directory / "model_index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
