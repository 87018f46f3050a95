"""The 2015-12-05 Inception network: structure, weights file, ONNX against PyTorch, preprocessing modes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image

from convert.graphs.inception import Inception2015, average_pool, export_inception, load_inception
from judges.inception import MODES, Inception
from judges.preprocess import prepare

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)


def random_network() -> Inception2015:
    """Random weights that keep activations alive through 94 layers, and batch statistics that are not trivial."""
    torch.manual_seed(0)
    network = Inception2015().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network


def test_names_and_shapes_are_those_of_the_published_file():
    """torchvision's Inception v3 has 27,161,264 parameters: 3,326,696 in the auxiliary head, 2,049,000 in fc, the rest
    in the trunk, which is the same here."""
    state = Inception2015().state_dict()
    trunk = sum(
        v.numel() for k, v in state.items() if not k.startswith("fc.") and "running" not in k and "num_" not in k
    )
    assert trunk == 27_161_264 - 3_326_696 - 2_049_000
    assert list(state["fc.weight"].shape) == [1008, 2048]
    assert list(state["Mixed_6c.branch7x7dbl_4.conv.weight"].shape) == [160, 160, 7, 1]
    assert list(state["Mixed_7b.branch3x3dbl_3a.bn.running_var"].shape) == [384]


def test_padding_is_left_out_of_the_average():
    assert torch.equal(average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_other_weights_are_refused(tmp_path):
    state = Inception2015().state_dict()
    state["fc.weight"] = torch.zeros(1000, 2048)
    torch.save(state, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match="not the 2015-12-05 Inception weights"):
        load_inception(tmp_path / "torchvision.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.pth: not a PyTorch state dict"):
        load_inception(tmp_path / "page.pth")


@pytest.mark.slow
def test_onnx_equals_torch_in_every_mode(tmp_path):
    network = random_network()
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    exported = export_inception(tmp_path / "pt_inception.pth", tmp_path)
    assert exported.error < 1e-3
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels / 255, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = network(2 * resized - 1).numpy()
    found = Inception.open(exported.path, batch_size=2)
    assert found.mode == "pytorch-fid" and np.abs(found(PICTURES) - expected).max() < 1e-3 * max(1, expected.max())
    for mode in ("torch-fidelity", "clean-fid"):
        other = Inception.open(exported.path, mode=mode)
        assert other.identity["options"]["mode"] == mode
        assert np.abs(other(PICTURES) - expected).max() > 1e-2  # modes are not interchangeable


def test_clean_fid_preprocessing_by_its_recipe():
    image = PICTURES[0]
    planes = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC) for c in range(3)
    ]
    expected = (np.stack([np.asarray(plane).clip(0, 255) for plane in planes]) - 128) / 128
    assert np.abs(prepare(image[None], MODES["clean-fid"])[0] - expected).max() < 1e-4


def tensorflow1_bilinear(image: np.ndarray, side: int) -> np.ndarray:
    """float64 [H, W, 3] -> [side, side, 3] as TensorFlow 1's kernel ResizeBilinear computes it.

    Output i looks at input i * H / side, without a half-pixel shift; the last row and column have no neighbour after
    them.
    """

    def axis(size):
        centres = np.arange(side) * size / side
        low = np.floor(centres).astype(int)
        return low, np.minimum(low + 1, size - 1), centres - low

    (top, bottom, y), (left, right, x) = axis(image.shape[0]), axis(image.shape[1])
    x, y = x[None, :, None], y[:, None, None]
    upper = image[top][:, left] + (image[top][:, right] - image[top][:, left]) * x
    lower = image[bottom][:, left] + (image[bottom][:, right] - image[bottom][:, left]) * x
    return upper + (lower - upper) * y


SIZES = [(60, 80), (512, 512), (640, 427), (299, 299), (31, 900), (1, 5)]


@pytest.mark.parametrize("size", SIZES)
def test_torch_fidelity_preprocessing_by_its_recipe(size):
    image = np.random.default_rng(7).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = (tensorflow1_bilinear(image.astype(np.float64), 299) - 128) / 128
    assert np.abs(prepare(image[None], MODES["torch-fidelity"])[0].transpose(1, 2, 0) - expected).max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_torch_fidelity_preprocessing_by_its_own_code(size):
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity")
    file = Path(spec.submodule_search_locations[0]) / "interpolate_compat_tensorflow.py"
    spec = importlib.util.spec_from_file_location("interpolate", file)  # the package itself needs torchvision
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    images = np.random.default_rng(8).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resized = theirs.interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False)
    assert (
        np.abs(prepare(images, MODES["torch-fidelity"]) - ((resized - 128) / 128).numpy()).max() < 3e-4
    )  # their coordinates are float32


def test_pytorch_fid_preprocessing_by_its_recipe():
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255
    expected = 2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False) - 1
    assert np.abs(prepare(PICTURES, MODES["pytorch-fid"]) - expected.numpy()).max() < 5e-5
