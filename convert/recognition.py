"""Recognising a source by its keys, before anything is converted."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert import adapters, hub, kinds, ldm, single_file
from convert.rename import ConversionError
from convert.tensors import find_weights, metadata, open_tensors, read_json


class Recognised(NamedTuple):
    """kind: one of `convert.kinds`. detail: the contents in words."""

    kind: str
    detail: str


class Source(NamedTuple):
    """An opened source.

    Attributes:
        path: the file or directory.
        recognised: its kind.
        state: its tensors; none for a diffusers directory.
        config: the config.json or adapter_config.json beside it, or None.
    """

    path: Path
    recognised: Recognised
    state: Mapping[str, Any]
    config: dict[str, Any] | None


def recognise(source: str | os.PathLike) -> Recognised:
    """The kind that `convert.load` finds in `source`.

    Raises FileNotFoundError, or ConversionError for a source that cannot be loaded.
    """
    return open_source(source).recognised


def open_source(source: str | os.PathLike) -> Source:
    """Opens a file or directory and recognises it. Tensors are read later. Raises as `recognise`."""
    text = os.fspath(source)
    path = hub.fetch(text) if text.startswith(hub.PREFIX) else Path(source)
    if path.is_dir() and (path / "model_index.json").exists():
        index = read_json(path / "model_index.json")
        detail = f"diffusers directory of a {index.get('_class_name', 'pipeline')}"
        return Source(path, Recognised(kinds.PIPELINE, detail), {}, None)
    if not path.exists():
        asked = f' To download it, write "{hub.PREFIX}{text}".' if text.count("/") == 1 and not path.suffix else ""
        raise FileNotFoundError(f"{path} does not exist; expected a diffusers directory or a weight file.{asked}")
    weights = _weights_of(path) if path.is_dir() else path
    state = open_tensors(weights)
    recognised = _tell(weights, state)
    return Source(path, recognised, state, _config_beside(path, weights, recognised.kind))


def _weights_of(folder: Path) -> Path:
    try:
        return find_weights(folder)
    except FileNotFoundError:
        raise ConversionError(
            f"{folder} is not a diffusers directory (no model_index.json), and holds no weight file either."
        ) from None


def _config_beside(path: Path, weights: Path, kind: str) -> dict[str, Any] | None:
    """The config.json of a component's directory, or the adapter_config.json beside an adapter; None without one."""
    config = weights.parent / "adapter_config.json" if kind == kinds.LORA else path / "config.json"
    return read_json(config) if config.exists() else None


def _tell(path: Path, state: Mapping[str, Any]) -> Recognised:
    kind, count = kinds.kind_of(state), f"{len(state):,} tensors"
    if kind == kinds.LORA:
        prompts = metadata(state).get("prompts")
        if prompts is not None:
            return Recognised(kinds.SPM, f"{adapters.describe(state)}; against {json.dumps(prompts)}")
        return Recognised(kind, adapters.describe(state))
    if kind == kinds.COMPVIS:
        return Recognised(kind, f"single file {single_file.describe(state)}")
    if kind == kinds.VAE and any(ldm.is_vae_key(key) for key in state):
        return Recognised(kind, f"{count} under CompVis names")
    if kind == kinds.UNKNOWN:
        shown = ", ".join(list(state)[:8]) or "nothing"
        raise ConversionError(
            f"{path} is of no kind that can be loaded: it holds {count} ({shown}{', ...' if len(state) > 8 else ''}); "
            "expected a UNet, VAE, text encoder, CompVis checkpoint, LoRA or SPM adapter."
        )
    return Recognised(kind, count)
