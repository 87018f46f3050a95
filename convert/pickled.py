"""Pickled PyTorch files. They are opened with weights_only=True, so nothing in them is executed."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.rename import ConversionError


class PickledTensors(Mapping):
    """PyTorch tensors as NumPy arrays, converted one at a time (bfloat16 becomes float32)."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def __getitem__(self, key: str) -> np.ndarray:
        import torch

        tensor = self._tensors[key].detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_pickled(path: Path) -> Mapping[str, np.ndarray]:
    """A .bin, .pt, .pth or .ckpt state dict as NumPy arrays (bfloat16 becomes float32), memory-mapped where possible.

    A state dict inside the entry `state_dict` is taken out of it. Raises ConversionError for a file that holds anything
    beside tensors, or that would unpack to more bytes than it has. Raises ModuleNotFoundError with the extra to install
    if torch is missing.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a pickled PyTorch file, which needs torch: pip install 'spqr-jax[convert]', or convert it "
            "to .safetensors."
        ) from None
    archive = zipfile.is_zipfile(path)
    if archive:
        _refuse_bombs(path)
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch raises many kinds; each means the file is not plain tensors
        raise ConversionError(
            f"{path} could not be opened as plain tensors, and nothing else in it is executed: {_reason(error)}"
        ) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds {type(loaded).__name__}, expected a state dict of tensors.")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(
            f"{path} holds {type(loaded).__name__}, expected a state dict of tensors; none are: {', '.join(others)}."
        )
    odd = [str(key) for key, tensor in loaded.items() if not _plain(tensor)]
    if odd:
        raise ConversionError(
            f"{path}: sparse, or larger than the data in the file, expected plain tensors: {', '.join(odd)}."
        )
    return PickledTensors({str(key): tensor for key, tensor in loaded.items()})


def _refuse_bombs(path: Path) -> None:
    """Raises ConversionError for compressed or overlapping records, which can unpack without bound.

    PyTorch stores every record once and uncompressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ConversionError(f"{path} could not be opened: {error}.") from None
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    unpacked, size = sum(record.file_size for record in records), path.stat().st_size
    if packed or unpacked > size:
        raise ConversionError(
            f"{path} unpacks to {unpacked:,} bytes from {size:,} ({len(packed)} compressed records), as a zip bomb "
            "does; PyTorch writes its files uncompressed."
        )


def _plain(tensor: Any) -> bool:
    """Whether a tensor is dense and no larger than its memory. A stride of zero makes gigabytes out of one number."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """The reason why torch could not load a file, without its advice to load it unsafely."""
    text = str(error)
    needs = re.findall(r"GLOBAL ([\w.]+)", text)
    if needs:
        return f"it needs {', '.join(dict.fromkeys(needs))}. Use the .safetensors file of the same weights."
    return text.split("(1)")[0].splitlines()[0] if text else type(error).__name__
