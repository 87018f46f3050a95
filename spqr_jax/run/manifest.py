"""manifest.json: everything that determines the results of a run, and where it ran."""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import jax

from spqr_jax import config as config_lib
from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir
from spqr_jax.run import identity, names, protocol
from spqr_jax.run.stages import Run

PACKAGES = ("spqr-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "onnxruntime", "numpy", "transformers")


def write_manifest(run: Run, command: Sequence[str]) -> None:
    """Write the manifest of a run that this command started."""
    manifest: dict[str, Any] = {
        "protocol": protocol.statement(run.config)._asdict() | {"label": protocol.statement(run.config).label},
        "config": config_lib.as_dict(run.config),
        "command": " ".join(["python", *command]),
        "versions": versions(),
        "devices": sorted({f"{device.platform}: {device.device_kind}" for device in jax.devices()}),
        "sha256": identity.as_dict(run.inputs),
        "judges": run.jury.identities(),
        **names.measured(run.config),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, default=str)
    storage.write_text(Workdir(run.workdir).manifest, text + "\n")


def versions() -> dict[str, str]:
    """Package -> its version, for the packages that a result can depend on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
