"""Opening ONNX graphs with ONNX Runtime. Every fault of a file is one line with its remedy.

A provider that is asked for and missing is an error; the CPU never takes its place silently. The default is the CPU,
since the accelerator belongs to generation.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}
EXTERNAL_SUFFIXES = (".onnx_data", ".onnx.data", ".data")


class JudgeError(RuntimeError):
    """A judge that cannot be opened. The message names the file, its fault, and the remedy."""


class SessionOptions(TypedDict, total=False):
    """Keyword arguments of `open_session`, which every judge's `.open` takes too and passes on."""

    providers: str | Sequence[str] | None
    threads: int | None
    gpu_mem_limit: int | None


class OpenOptions(SessionOptions, total=False):
    """What every judge's `.open` takes beside options of its own. batch_size: images in one run of the graph."""

    batch_size: int


class Tensor(NamedTuple):
    """One input or output of a graph. Axes of `shape` without a fixed length are strings or None."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: Any


class Session:
    """An opened graph. `run(feeds)` casts every feed to the type of its input (float16 or float32 for pixels)."""

    def __init__(self, path: Path, runtime: onnxruntime.InferenceSession):
        self.path = path
        self.runtime = runtime
        self.inputs = {value.name: tensor(value) for value in runtime.get_inputs()}
        self.outputs = {value.name: tensor(value) for value in runtime.get_outputs()}
        self.provider = runtime.get_providers()[0]
        self.metadata = dict(runtime.get_modelmeta().custom_metadata_map)
        self.sha256 = file_sha256(path)

    def run(self, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
        """Runs the graph on input name -> array; returns the named outputs, default all of them."""
        return self.runtime.run(outputs, {name: self.cast(name, value) for name, value in feeds.items()})

    def cast(self, name: str, value: np.ndarray) -> np.ndarray:
        """`value` as a contiguous array of the type that input `name` takes."""
        return np.ascontiguousarray(value, dtype=self.inputs[name].dtype)

    def require(self, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> "Session":
        """The session itself. Raises JudgeError unless the graph has these inputs and outputs."""
        for kind, wanted, found in (("input", inputs, self.inputs), ("output", outputs, self.outputs)):
            missing = [name for name in wanted if name not in found]
            if missing:
                raise JudgeError(
                    f"{self.path}: the graph has no {kind} named {', '.join(missing)}; "
                    f"its {kind}s are {', '.join(found)}. Export it again or name the right {kind} in its sidecar."
                )
        return self

    def identity(self) -> dict[str, Any]:
        """The graph's identity for the manifest: file name, sha256 (also of external data beside it) and provider."""
        external = {name: file_sha256(self.path.with_name(name)) for name in external_data(self.path)}
        return {"file": self.path.name, "sha256": self.sha256, "provider": self.provider} | (
            {"external_sha256": external} if external else {}
        )


def open_session(
    path: str | os.PathLike,
    *,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
    gpu_mem_limit: int | None = None,
) -> Session:
    """Opens the ONNX graph at `path`.

    providers: "cpu" (default), "cuda", a full name of ONNX Runtime, or several in order of preference, of which the
    first must be usable. threads: threads within an operation, default all cores. gpu_mem_limit: bytes that CUDA's
    arena may take, so that the judge can share a device with JAX. Raises JudgeError for a file that is missing,
    truncated or not ONNX, for missing external data, and for a missing provider.
    """
    path = Path(path)
    if not path.is_file():
        raise JudgeError(
            f"{path}: no such file; give the path of an ONNX graph (see docs/judges.md for where to get it)"
        )
    wanted = provider_names(providers)
    require_available(wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave generation its cores
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        runtime = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=[with_options(name, gpu_mem_limit) for name in wanted]
        )
    except Exception as error:
        raise JudgeError(explain(path, error)) from error
    if runtime.get_providers()[0] != wanted[0]:
        raise JudgeError(
            f"{path}: {wanted[0]} was asked for but the session runs on {runtime.get_providers()[0]}; the provider "
            f"failed to load (driver or CUDA libraries missing). Install them, or ask for providers='cpu'."
        )
    return Session(path, runtime)


def provider_names(providers: str | Sequence[str] | None) -> list[str]:
    """Full ONNX Runtime names of `providers`; None means the CPU."""
    names = [providers] if isinstance(providers, str) else list(providers or ["cpu"])
    return [PROVIDERS.get(name.lower(), name) for name in names]


def require_available(wanted: list[str]) -> None:
    """Raises JudgeError if the installed ONNX Runtime lacks a provider, and says which packages clash."""
    available = onnxruntime.get_available_providers()
    missing = [name for name in wanted if name not in available]
    if not missing:
        if PROVIDERS["cuda"] in wanted and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed, where the loader would not
        return
    raise JudgeError(
        f"ONNX Runtime {onnxruntime.__version__} has no {', '.join(missing)} (it has {', '.join(available)}). "
        "The packages onnxruntime and onnxruntime-gpu share one import directory and the last installed wins: "
        "uninstall both, install onnxruntime-gpu alone (and nudenet with --no-deps), or ask for providers='cpu'."
    )


def with_options(provider: str, gpu_mem_limit: int | None) -> Any:
    """A provider with its options. CUDA's arena grows only by the bytes that are needed, up to the limit."""
    if provider != PROVIDERS["cuda"]:
        return provider
    limit = {} if gpu_mem_limit is None else {"gpu_mem_limit": str(gpu_mem_limit)}
    return provider, {"arena_extend_strategy": "kSameAsRequested"} | limit


def explain(path: Path, error: Exception) -> str:
    """One line that says why ONNX Runtime failed to load `path`, with the remedy."""
    detail = in_one_line(error)
    if "xternal data" in detail or "external_data" in detail:
        return f"{path}: its external data file is missing or cut short; copy it beside the graph ({detail})"
    if "INVALID_PROTOBUF" in detail or "No graph was found" in detail:
        size = path.stat().st_size
        return f"{path}: not an ONNX graph, or truncated ({size} bytes); copy or export the file again"
    return f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({detail})"


def in_one_line(error: Exception) -> str:
    """The message of `error` in one line; every run of white space becomes one blank."""
    return " ".join(str(error).split())


def external_data(path: Path) -> list[str]:
    """Names of the external data files beside a graph, looked for under the usual names."""
    names = [path.stem + suffix for suffix in EXTERNAL_SUFFIXES]
    return [name for name in names if path.with_name(name).is_file()]


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor(value: Any) -> Tensor:
    """A graph's input or output as a Tensor. An unknown element type counts as float32."""
    return Tensor(value.name, tuple(value.shape), DTYPES.get(value.type, np.float32))
