"""The sidecar of a graph: `judge.json` beside `judge.onnx` describes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from judges.session import JudgeError, file_sha256


def sidecar_path(graph: Path) -> Path:
    """The path of a graph's sidecar: the same name with .json."""
    return graph.with_suffix(".json")


def read_sidecar(path: Path, *, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The sidecar at `path`. Raises JudgeError if it is missing, is no JSON object, or lacks a required field."""
    if not path.is_file():
        raise JudgeError(f"{path}: no such file; a graph needs this description beside it (see docs/judges.md)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JudgeError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise JudgeError(f"{path}: expected a JSON object, found {type(data).__name__}")
    missing = [name for name in required if name not in data]
    if missing:
        raise JudgeError(f"{path}: fields missing: {', '.join(missing)}; it has {', '.join(data) or 'none'}")
    return data


def require_files(directory: Path, names: Sequence[str], kind: str) -> None:
    """Raise JudgeError with the names of files that are not in `directory`. kind: of `python -m convert judges`."""
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise JudgeError(
            f"{directory}: no {', '.join(missing)}; export it with `python -m convert judges --kind {kind}`"
        )


def sidecar_identity(path: Path) -> dict[str, str]:
    """The sidecar's identity for the manifest: file name and sha256."""
    return {"sidecar": path.name, "sidecar_sha256": file_sha256(path)}
