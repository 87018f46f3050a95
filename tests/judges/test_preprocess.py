"""The resizers against the libraries whose numbers they stand for."""

import numpy as np
import pytest
from PIL import Image

from judges.preprocess import InputSpec, interpolation_matrix, prepare, resize

RNG = np.random.default_rng(0)
SIZES = [(64, 48), (40, 200), (17, 31)]


def pictures(size, count=2):
    return RNG.integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_is_torch_interpolate(size):
    torch = pytest.importorskip("torch")
    images = pictures(size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(pixels, (37, 29), mode="bilinear", align_corners=False).numpy()
    assert np.abs(resize(images, (37, 29), "bilinear") - expected).max() < 1e-3  # of 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "filter_"), [("bilinear_antialias", "BILINEAR"), ("bicubic_antialias", "BICUBIC")])
def test_antialiased_is_pillow_in_floating_point(size, mode, filter_):
    images = pictures(size)
    for image, found in zip(images, resize(images, (37, 29), mode), strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            expected = np.asarray(plane.resize((29, 37), getattr(Image.Resampling, filter_))).clip(0, 255)
            assert np.abs(found[channel] - expected).max() < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_tf1_bilinear_by_its_definition(size):
    """TensorFlow 1's resize_bilinear, align_corners=False: source coordinate i * in / out, neighbour clamped."""
    image = pictures(size, 1)[0].astype(np.float64)
    height, width = size
    found = resize(image.astype(np.uint8)[None], (37, 29), "bilinear_tf1")[0]
    for i, j in [(0, 0), (36, 28), (11, 5), (20, 17)]:
        y, x = i * height / 37, j * width / 29
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - x0)
        bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - x0)
        assert np.abs(found[:, i, j] - (top + (bottom - top) * (y - y0))).max() < 1e-3


@pytest.mark.parametrize("mode", ["bilinear", "bilinear_tf1", "bilinear_antialias", "bicubic_antialias"])
def test_weights_sum_to_one_and_same_size_is_identity(mode):
    assert np.allclose(interpolation_matrix(100, 33, mode).sum(axis=1), 1, atol=1e-6)
    assert np.allclose(interpolation_matrix(33, 100, mode).sum(axis=1), 1, atol=1e-6)
    assert np.allclose(interpolation_matrix(20, 20, mode), np.eye(20), atol=1e-7)


def test_normalisation_and_layout():
    images = pictures((4, 6))
    spec = InputSpec(None, "none", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "NHWC")
    expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    assert np.abs(prepare(images, spec) - expected).max() < 1e-5
    assert np.abs(prepare(images, spec._replace(layout="NCHW")) - expected.transpose(0, 3, 1, 2)).max() < 1e-5
