"""Weight files as mappings from key to tensor. Each tensor is read when it is needed."""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.rename import ConversionError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Names of the weights in the folder of a component or adapter.
FOLDER_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".bin",
    ".bin.index.json",
    ".fp16.bin",
)
FOLDER_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")


# Bytes of a file that are read before they are given back. Pages of a mapped file stay resident until then, and those
# of a whole file would double the memory that loading takes.
MAPPED_BYTES = 1 << 24
# Types in safetensors headers, as NumPy has them; little-endian.
TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}


class TensorFile(Mapping):
    """A .safetensors file as a mapping, memory-mapped, read one tensor at a time. `metadata`: strings of its header.

    A tensor is a read-only view of the file (of a rare type: a copy), so keep a copy of what is kept. At most
    MAPPED_BYTES and the tensor that is read are in memory, and nothing after `release`.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with safe_open(path, framework="numpy") as checked:  # that header and size fit each other
                keys = list(checked.keys())
                self.metadata: dict[str, str] = checked.metadata() or {}
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} is not a readable safetensors file ({error}); it may be truncated: fetch or rebuild it."
            ) from None
        self._tensors = {key: header[key] for key in keys}
        self._start, self._read = 8 + length, 0

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self._tensors[key]
        first, end = entry["data_offsets"]
        dtype = TYPES.get(entry["dtype"])
        if dtype is None:
            with safe_open(self._path, framework="numpy") as file:
                return file.get_tensor(key)
        if self._read > MAPPED_BYTES:
            self.release()
        self._read += end - first
        count = (end - first) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, self._start + first).reshape(entry["shape"])

    def release(self) -> None:
        """Gives back what was read of the file. Views of it stay valid, and are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._read = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Shards(Mapping):
    """Weights in several files, read as one mapping by their index ({"weight_map": {key: file name}})."""

    def __init__(self, index: Path):
        try:
            where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{index} is no index of weight files: {error}.") from None
        outside = sorted({name for name in where.values() if Path(name).name != name})
        if outside:
            raise ConversionError(f"{index} points outside its folder: {', '.join(outside)}.")
        self._files = {name: open_tensors(index.parent / name) for name in sorted(set(where.values()))}
        unlisted = [key for name, file in self._files.items() for key in file if where.get(key) != name]
        absent = [key for key, name in where.items() if key not in self._files[name]]
        if unlisted or absent:
            raise ConversionError(
                f"{index} does not fit its files: {len(absent)} missing: {', '.join(absent)}; "
                f"{len(unlisted)} unexpected: {', '.join(unlisted)}."
            )
        self._where, self._last = where, ""

    def __getitem__(self, key: str) -> Any:
        name = self._where[key]
        last = self._files.get(self._last)
        if name != self._last and isinstance(last, TensorFile):
            last.release()
        self._last = name
        return self._files[name][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class View(Mapping):
    """Some tensors of a state dict under other keys: key -> (key in the state dict, function applied on reading)."""

    def __init__(self, state: Mapping[str, Any], entries: Mapping[str, tuple[str, Callable[[Any], Any]]]):
        self._state, self._entries = state, entries

    def __getitem__(self, key: str) -> Any:
        name, function = self._entries[key]
        return function(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def source(self, key: str) -> str:
        """The key in the state dict, which messages name."""
        return self._entries[key][0]


def subset(state: Mapping[str, Any], keys: list[str]) -> View:
    """The tensors under `keys`, unchanged."""
    return View(state, {key: (key, lambda tensor: tensor) for key in keys})


def open_tensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a weight file, or of the shards of an index.

    Raises FileNotFoundError if it does not exist, ConversionError if it is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    if path.suffix == ".safetensors":
        return TensorFile(path)
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix in PICKLED:
        from convert.pickled import load_pickled

        return load_pickled(path)
    raise ConversionError(f"{path} is no weight file; expected .safetensors, {', '.join(PICKLED)}.")


def metadata(state: Mapping[str, Any]) -> dict[str, str]:
    """The strings in a safetensors header; {} for other files."""
    return state.metadata if isinstance(state, TensorFile) else {}


def preferred(names: Iterable[str]) -> str | None:
    """The weight file to read among the files of a folder; None if there is none.

    safetensors come before pickles, and full precision before fp16.
    """
    held = set(names)
    return next((stem + end for end in FOLDER_ENDINGS for stem in FOLDER_STEMS if stem + end in held), None)


def find_weights(folder: Path) -> Path:
    """The weight file in the folder of one component or adapter, under the names of any library.

    Raises FileNotFoundError if there is none, ConversionError if there are several without a known name.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name.endswith((".safetensors", *PICKLED))]
    if name := preferred(names) or (others[0] if len(others) == 1 else None):
        return folder / name
    if others:
        raise ConversionError(f"{folder} holds several weight files ({', '.join(others)}); pass the one you mean.")
    raise FileNotFoundError(
        f"{folder} holds no weights; expected {', '.join(FOLDER_STEMS[:-1])} or {FOLDER_STEMS[-1]} with the ending "
        ".safetensors or .bin."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ConversionError for other contents."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; a diffusers directory needs it.") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON with sorted keys."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
