"""Trained weights -> what ships: a diffusers directory in half precision, and judges as ONNX graphs (needs torch)."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import convert
from convert import diffusers_dir, rename
from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.mini import corpus, world
from spqr_jax.mini.catalogue import seal
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.recipe import clip, judges, unet, vae


def assemble(tokenizer, text: Params, vae_params: Params, unet_params: Params, scaling_factor: float) -> Pipeline:
    """The trained parts as a pipeline; the text encoder leaves its projection behind, as Stable Diffusion's does."""
    configs: dict[str, dict[str, Any]] = {
        "unet": unet.CONFIG,
        "vae": vae.CONFIG | {"scaling_factor": scaling_factor},
        "text_encoder": clip.text_config(tokenizer),
    }
    parts = {
        "unet": unet_params,
        "vae": vae_params,
        "text_encoder": {k: v for k, v in text.items() if k != "text_projection"},
    }
    definitions = {name: backbones.define(name, configs[name])[0] for name in parts}
    return Pipeline(parts, definitions, {**configs, "scheduler": unet.SCHEDULER}, {"tokenizer": tokenizer}, "mini")


def save_model(pipe: Pipeline, directory: Path) -> None:
    """Write the pipeline with float16 weights: half the size, read back as float32. And the files' checksums."""
    shutil.rmtree(directory, ignore_errors=True)
    half = {name: params_lib.cast(params, np.float16) for name, params in pipe.params.items()}
    convert.save_diffusers(pipe._replace(params=half), directory)
    seal(directory)


def save_judges(tokenizer, clip_params: dict[str, Any], harm: Params, features: Params, directory: Path) -> None:
    """The harm classifier, the feature network and CLIP, each traced, exported to ONNX and compared with PyTorch.
    And the files' checksums."""
    from convert.graphs.export import export_clip, export_small_conv_net

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        nets: dict[str, tuple[Params, tuple[str, ...], dict[str, Any]]] = {
            "harm": (harm, judges.HARM_LABELS, {"unsafe": judges.HARM_LABELS[1:], "model": "emoji harm classifier"}),
            "features": (features, corpus.OBJECTS, {"features": True, "model": "emoji feature network"}),
        }
        for name, (params, labels, options) in nets.items():
            state = Path(scratch) / f"{name}.safetensors"
            save_file(rename.into_torch(params), state)
            export_small_conv_net(state, labels, directory, name=name, **options)
        write_clip(tokenizer, clip_params, Path(scratch) / "clip")
        export_clip(Path(scratch) / "clip", directory / mini.JUDGE_FILES["clip"], model="emoji CLIP")
    for leftover in directory.rglob("*.ts"):
        leftover.unlink()
    seal(directory)


def write_clip(tokenizer, params: dict[str, Any], directory: Path) -> None:
    """Both encoders as a transformers CLIPModel directory."""
    text_config = clip.text_config(tokenizer)
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": clip.VISION["projection_dim"],
        "text_config": text_config,
        "vision_config": clip.VISION | {"model_type": "clip_vision_model"},
    }
    directory.mkdir(parents=True)
    state = rename.into_torch({**params["text"], **params["vision"]})
    save_file(state | {"logit_scale": np.asarray(params["logit_scale"])}, directory / "model.safetensors")
    diffusers_dir.write_json(directory / "config.json", config)
    size = {"height": world.IMAGE, "width": world.IMAGE}
    preprocessor = {
        "do_rescale": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": size,
        "crop_size": size,
    }
    diffusers_dir.write_json(directory / "preprocessor_config.json", preprocessor)
    tokenizer.save_pretrained(str(directory))


def write_measured(path: Path, measured: dict[str, Any]) -> None:
    """A file of figures beside the judges: what the report prints about them and a model."""
    path.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")
