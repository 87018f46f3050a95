"""The Inception network of 2015-12-05, which defines the Fréchet inception distance, to ONNX.

It is not torchvision's Inception v3. It has 1008 classes, no auxiliary head, 3x3 average pools that do not count
padding, and in the pool branch of the last block a maximum pool. Weights: pt_inception-2015-12-05-6726825d.pth of
pytorch-fid and torch-fidelity (Apache-2.0), whose parameter names are used here. The features are the global average,
2048 numbers.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from convert.graphs.graph import Exported, export_graph, exporter, source_of, write_json

Size = int | tuple[int, int]


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU."""

    def __init__(self, channels_in: int, channels_out: int, size: Size, *, stride: int = 1, padding: Size = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def row(channels_in: int, channels_out: int, size: int) -> BasicConv2d:
    """A 1 x size convolution that keeps the image's size."""
    return BasicConv2d(channels_in, channels_out, (1, size), padding=(0, size // 2))


def column(channels_in: int, channels_out: int, size: int) -> BasicConv2d:
    """A size x 1 convolution that keeps the image's size."""
    return BasicConv2d(channels_in, channels_out, (size, 1), padding=(size // 2, 0))


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 mean over the pixels of the image; padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def halve(x: torch.Tensor) -> torch.Tensor:
    """3x3 maximum with stride 2."""
    return F.max_pool2d(x, 3, stride=2)


class InceptionA(nn.Module):
    """35 x 35 block: 1x1, 5x5, twice 3x3, pool."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(channels, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class InceptionB(nn.Module):
    """35 to 17: 3x3, twice 3x3, maximum pool."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], 1)


class InceptionC(nn.Module):
    """17 x 17 block: 1x1, 7x7 as a row and a column, twice that, pool."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(channels, inner, 1)
        self.branch7x7_2 = row(inner, inner, 7)
        self.branch7x7_3 = column(inner, 192, 7)
        self.branch7x7dbl_1 = BasicConv2d(channels, inner, 1)
        self.branch7x7dbl_2 = column(inner, inner, 7)
        self.branch7x7dbl_3 = row(inner, inner, 7)
        self.branch7x7dbl_4 = column(inner, inner, 7)
        self.branch7x7dbl_5 = row(inner, 192, 7)
        self.branch_pool = BasicConv2d(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], 1)


class InceptionD(nn.Module):
    """17 to 8: 3x3, 7x7 then 3x3, maximum pool."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(channels, 192, 1)
        self.branch7x7x3_2 = row(192, 192, 7)
        self.branch7x7x3_3 = column(192, 192, 7)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halve(x)], 1)


class InceptionE(nn.Module):
    """8 x 8 block: 1x1, 3x3 split into row and column, 3x3 then split, pool: average, in the last block maximum."""

    def __init__(self, channels: int, *, last: bool):
        super().__init__()
        self.last = last
        self.branch1x1 = BasicConv2d(channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(channels, 384, 1)
        self.branch3x3_2a = row(384, 384, 3)
        self.branch3x3_2b = column(384, 384, 3)
        self.branch3x3dbl_1 = BasicConv2d(channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = row(384, 384, 3)
        self.branch3x3dbl_3b = column(384, 384, 3)
        self.branch_pool = BasicConv2d(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else average_pool(x)
        threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *threes, *doubles, self.branch_pool(pooled)], 1)


class Inception2015(nn.Module):
    """float [N, 3, 299, 299] in [-1, 1] -> features [N, 2048]. `fc` (1008 classes) is loaded and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, last=False)
        self.Mixed_7c = InceptionE(2048, last=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def load_inception(path: str | os.PathLike) -> Inception2015:
    """The network with the weights of pt_inception-2015-12-05-6726825d.pth (a state dict, opened with weights_only).

    Raises ValueError if the file is another network's, torchvision's among them.
    """
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a PyTorch state dict ({' '.join(str(error).split())[:200]})") from error
    network = Inception2015().eval()
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path}: not the 2015-12-05 Inception weights (1008 classes; torchvision's is another network): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return network


def export_inception(path: str | os.PathLike, out_dir: str | os.PathLike, *, mode: str = "pytorch-fid") -> Exported:
    """Writes out_dir/inception.onnx (pixels [N, 3, 299, 299] -> features [N, 2048]) and its sidecar.

    mode: the default preprocessing, which the sidecar names. The graph is the same for all modes.
    """
    out = Path(out_dir) / "inception.onnx"
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(4)) * 2 - 1
    exported = export_graph(load_inception(path), pixels, out, output_name="features")
    record = {"model": "Inception 2015-12-05", "kind": "features", "mode": mode, "source": source_of(path)}
    write_json(out.with_suffix(".json"), record | {"exporter": exporter(exported.error)})
    return exported
