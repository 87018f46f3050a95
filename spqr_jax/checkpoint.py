"""Pytrees of arrays on disk, through Orbax: written under a temporary name and renamed, so what exists is whole."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from spqr_jax import params as params_lib


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write nested dicts of arrays at `path`, replacing what is there. Raises OSError when the disk refuses."""
    path = path.absolute()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Flat names keep list positions ("0", "1") strings on the way back.
    ocp.save(partial, {k: jax.numpy.asarray(v) for k, v in params_lib.flatten(tree).items()})
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, as NumPy arrays. Raises FileNotFoundError, or ValueError naming a damaged directory."""
    path = path.absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a saved checkpoint.")
    try:
        flat = ocp.load(path)
    except Exception as error:  # Orbax raises many kinds for damaged files
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from None
    return params_lib.unflatten({key: np.asarray(value) for key, value in flat.items()})
