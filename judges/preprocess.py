"""From images to a network's input, with the resizers that published numbers were made with.

A resize is a product with two matrices, [h, H] and [w, W]. The modes differ in the entries of these matrices; nearest
and clip leave the work to Pillow:

- none                no resizing; another size is an error
- nearest             Pillow's NEAREST: the input pixel under the centre of each output pixel (Keras, NudeNet v2)
- bilinear            half-pixel centres, no antialiasing  (torch interpolate, pytorch-fid)
- bilinear_tf1        asymmetric coordinates i * H/h       (TensorFlow 1, torch-fidelity)
- bilinear_antialias  Pillow's BILINEAR in floating point
- bicubic_antialias   Pillow's BICUBIC in floating point, clipped to 0..255 and not rounded (clean-fid)
- clip                Pillow's BICUBIC on uint8: the shorter side to the size, then a crop of the centre (CLIP's own)

Letters: N images, H x W their size, h x w the network's size.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from judges.answers import check_choice
from judges.session import JudgeError, Session

RESIZES = ("none", "nearest", "bilinear", "bilinear_tf1", "bilinear_antialias", "bicubic_antialias", "clip")
LAYOUTS = ("NCHW", "NHWC")


class InputSpec(NamedTuple):
    """The input of a network: (value / 255 - mean) / std in each of three channels.

    Attributes:
        size: (h, w); None if the network takes images of any size.
        resize: one of RESIZES.
        mean, std: one number a channel, for values in 0..1.
        layout: one of LAYOUTS.
        name: the graph's input; None if it has only one.
    """

    size: tuple[int, int] | None = None
    resize: str = "bilinear"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    layout: str = "NCHW"
    name: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> "InputSpec":
        """The `input` object of a sidecar. Raises JudgeError naming the sidecar, `where`, and the wrong field."""
        unknown = set(data) - set(cls._fields)
        if unknown:
            raise JudgeError(f"{where}: unknown input field {min(unknown)!r}; known: {', '.join(cls._fields)}")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        spec = cls(**fields)
        try:
            check_choice("input.resize", spec.resize, RESIZES)
            check_choice("input.layout", spec.layout, LAYOUTS)
        except ValueError as error:
            raise JudgeError(f"{where}: {error}") from None
        if len(spec.mean) != 3 or len(spec.std) != 3 or not all(value > 0 for value in spec.std):
            raise JudgeError(f"{where}: input.mean and input.std need three numbers each, std above 0")
        if spec.size is not None and (len(spec.size) != 2 or min(spec.size) < 1):
            raise JudgeError(f"{where}: input.size must be [height, width], found {spec.size}")
        return spec


def prepare(images: np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, h, w] (or [N, h, w, 3] if spec.layout is NHWC), resized and normalised."""
    pixels = resize(images, spec.size, spec.resize)
    std = np.array(spec.std, np.float64)
    scale = (1 / (255 * std)).astype(np.float32)[:, None, None]
    offset = (np.array(spec.mean, np.float64) / std).astype(np.float32)[:, None, None]
    pixels = pixels * scale - offset
    return pixels if spec.layout == "NCHW" else np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def resize(images: np.ndarray, size: tuple[int, int] | None, mode: str) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, h, w] in 0..255. Raises ValueError if mode is none and the size differs."""
    if mode == "clip" and size is not None:
        images = np.stack([clip_crop(image, size[0]) for image in images])
    if mode == "nearest" and size is not None:
        images = np.stack([nearest(image, size) for image in images])
    found = images.shape[1:3]
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32)
    if size is None or found == tuple(size):
        return pixels
    if mode == "none":
        raise ValueError(f"images are {list(found)}, the network takes {list(size)} and its sidecar forbids resizing")
    rows = interpolation_matrix(found[0], size[0], mode)
    columns = interpolation_matrix(found[1], size[1], mode)
    resized = rows @ pixels @ columns.T
    return np.clip(resized, 0, 255) if mode == "bicubic_antialias" else resized


@functools.lru_cache(maxsize=32)
def interpolation_matrix(size_in: int, size_out: int, mode: str) -> np.ndarray:
    """float32 [size_out, size_in]: row i holds the weights of the input pixels in output pixel i (they sum to 1)."""
    scale = size_in / size_out
    out = np.arange(size_out, dtype=np.float64)[:, None]
    pixels = np.arange(size_in, dtype=np.float64)[None, :]
    if mode.endswith("antialias"):
        kernel = cubic if mode.startswith("bicubic") else triangle
        weights = kernel((pixels + 0.5 - (out + 0.5) * scale) / max(scale, 1.0))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    centre = out * scale if mode == "bilinear_tf1" else (out + 0.5) * scale - 0.5
    return triangle(pixels - np.clip(centre, 0, size_in - 1)).astype(np.float32)


def triangle(x: np.ndarray) -> np.ndarray:
    """Linear interpolation kernel."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel with Pillow's a = -0.5 (OpenCV and torch use -0.75)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3] of `size` (h, w), every pixel one of the image's own."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.NEAREST))


def clip_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: shorter side to `size` (bicubic, antialiased), centre crop."""
    height, width = image.shape[:2]
    shortest = min(height, width)
    resized = (math.floor(size * width / shortest), math.floor(size * height / shortest))
    pixels = Image.fromarray(image)
    if resized != (width, height):
        pixels = pixels.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    return np.asarray(pixels)[top : top + size, left : left + size]


def input_name(session: Session, spec: InputSpec) -> str:
    """The graph's input for images: the one that the sidecar names, or the only one. Raises JudgeError without one."""
    if spec.name is not None:
        session.require(inputs=(spec.name,))
        return spec.name
    if len(session.inputs) != 1:
        raise JudgeError(
            f"{session.path}: inputs are {', '.join(session.inputs)}; name one as input.name in its sidecar"
        )
    return next(iter(session.inputs))
