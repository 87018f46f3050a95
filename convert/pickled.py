"""Pickled PyTorch files, opened with weights_only=True: nothing in them is ever executed."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.rename import ConversionError


def load_pickled(path: Path) -> Mapping[str, np.ndarray]:
    """A .bin, .pt, .pth or .ckpt state dict as NumPy arrays (bfloat16 becomes float32).

    A `state_dict` wrapper is unwrapped. Raises ConversionError when the file needs more than tensors to open, and
    ModuleNotFoundError naming the extra when torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a pickled PyTorch file, which needs torch: pip install 'spqr-jax[convert]', or convert it "
            "to .safetensors."
        ) from None
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds; each means the file is not plain tensors
        raise ConversionError(
            f"{path} could not be opened as plain tensors, and nothing else in it is executed: {error}"
        ) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ConversionError(f"{path} holds {type(loaded).__name__}, expected a state dict of tensors.")
    return {key: _numpy(tensor) for key, tensor in loaded.items()}


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
