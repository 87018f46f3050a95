"""Pipelines as diffusers directories: model_index.json and one folder per component."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from convert import components, families, rename, text_encoder
from convert.families import COMPONENTS
from convert.tensors import find_weights, open_tensors, read_json, write_json
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

SHARD_BYTES = 5 * 10**9  # as transformers cuts its files
# Fields of model_index.json that change images, kept as configs["model_index"].
PIPELINE_OPTIONS = ("force_zeros_for_empty_prompt",)


def load_pipeline(directory: Path, *, dtype: str = "float32") -> Pipeline:
    """Reads a diffusers directory: safetensors, or .bin with torch and weights_only=True.

    Raises FileNotFoundError with the missing file, ConversionError with the faults of all components.
    """
    index = read_json(directory / "model_index.json")
    named = [name for name in COMPONENTS if index.get(name, [None])[0] is not None]
    configs = {name: read_json(directory / name / "config.json") for name in named}
    _check_components(directory, configs)
    # All files are opened before any is read, so that a missing shard is found at once.
    states = {name: open_tensors(find_weights(directory / name)) for name in named}
    params, definitions, tokenizers = {}, {}, {}
    errors: list[str] = []
    for name, state in states.items():
        definitions[name], skeleton = components.define(name, configs[name])
        with rename.collect(errors):
            read = text_encoder.t5 if "shared" in skeleton else rename.from_torch
            params[name] = read(state, skeleton, component=name, source=str(directory / name), dtype=dtype)
    rename.raise_all(errors)
    configs["scheduler"] = read_json(directory / "scheduler" / "scheduler_config.json")
    configs["model_index"] = {name: index[name] for name in PIPELINE_OPTIONS if name in index}
    for name in (name for name in params if COMPONENTS[name].tokenizer):
        tokenizer, kind = COMPONENTS[name].tokenizer, families.tokenizer_class(name, configs[name])
        tokenizers[tokenizer] = load_tokenizer(directory / tokenizer, kind)
    return Pipeline(params, definitions, configs, tokenizers, name=str(directory))


def _check_components(directory: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Raise ConversionError unless the components are those of a known architecture."""
    missing = [name for name in families.NEEDED if name not in configs]
    if not set(families.DENOISERS) & set(configs):
        missing.append(families.DENOISERS[0])
    if missing:
        raise rename.ConversionError(f"{directory}/model_index.json names no {', '.join(missing)}.")
    try:
        backbones.of(Pipeline({name: {} for name in configs}, {}, configs, {}, name=f"{directory}/model_index.json"))
    except ValueError as error:
        raise rename.ConversionError(str(error)) from None


def load_tokenizer(folder: Path, kind: str = "CLIPTokenizer"):
    """The tokenizer of transformers' class `kind` in a folder.

    Raises FileNotFoundError if the folder is missing, or without the file that this class is read from.
    """
    import transformers

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; a diffusers directory needs its tokenizer.")
    if kind != "CLIPTokenizer" and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, which {kind} is read from; fetch it beside the others."
        )
    return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)


def save_diffusers(pipeline: Pipeline, directory: str | os.PathLike) -> None:
    """Writes a directory that diffusers' pipeline of this kind loads with identical output.

    It is completed in a temporary folder first, so that a run that breaks off leaves no part of it. Files and folders
    of the same names are replaced. Raises ValueError for a pipeline with an attachment.
    """
    if pipeline.attached:
        raise ValueError(
            f"{pipeline.name}: a diffusers directory has no place for an attachment; add its delta "
            "to the UNet (spqr_jax.sampling.attached.delta.add), and leave its guidance to the sampler."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        written = _write(pipeline, Path(scratch))
        for path in written:
            if (directory / path.name).is_dir():
                shutil.rmtree(directory / path.name)
            path.replace(directory / path.name)


def save_weights(params: Params, folder: Path, stem: str, *, limit: int = SHARD_BYTES) -> None:
    """One safetensors file `stem`, or numbered shards with their index if the weights have more bytes than `limit`.

    Only the tensors of one shard are in memory at once, beside the weights themselves.
    """
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for path, leaf in params_lib.flatten(params).items():
        size += leaf.nbytes
        if shards[-1] and size > limit:
            shards.append({})
            size = leaf.nbytes
        shards[-1][path] = leaf
    total, where = len(shards), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        state = rename.into_torch(params_lib.unflatten(shard))
        save_file(state, folder / name, {"format": "pt"})
        where |= dict.fromkeys(state, name)
    if total > 1:
        index = {"metadata": {"total_size": params_lib.nbytes(params)}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _write(pipeline: Pipeline, directory: Path) -> list[Path]:
    """Writes the files and folders of a diffusers directory; returns their paths, model_index.json last."""
    index: dict[str, Any] = {
        "_class_name": backbones.of(pipeline).pipeline_class,
        "_diffusers_version": "0.40.0",
        "scheduler": ["diffusers", pipeline.configs["scheduler"].get("_class_name", "PNDMScheduler")],
    }
    if backbones.of(pipeline) == STABLE_DIFFUSION:  # diffusers expects these entries of SD1 and SD2 alone
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for name in set(backbones.of(pipeline).optional) - set(pipeline.params):
        index |= {name: [None, None], COMPONENTS[name].tokenizer: [None, None]}
    index |= pipeline.configs.get("model_index", {})
    for component, params in pipeline.params.items():
        folder = directory / component
        folder.mkdir()
        save_weights(params, folder, COMPONENTS[component].weights)
        write_json(folder / "config.json", pipeline.configs[component])
        index[component] = [COMPONENTS[component].library, backbones.class_name(component, pipeline.configs[component])]
    for name, tokenizer in pipeline.tokenizers.items():
        tokenizer.save_pretrained(str(directory / name))
        encoder = name.replace("tokenizer", "text_encoder")
        index[name] = ["transformers", families.tokenizer_class(encoder, pipeline.configs[encoder])]
    (directory / "scheduler").mkdir()
    write_json(directory / "scheduler" / "scheduler_config.json", pipeline.configs["scheduler"])
    write_json(directory / "model_index.json", index)
    return [
        *(directory / name for name in (*pipeline.params, *pipeline.tokenizers, "scheduler")),
        directory / "model_index.json",
    ]
