"""The Inception network that FID is defined by, for the weights of a user's file.

It is the network of the file pt_inception-2015-12-05, with that file's names: Inception v3
(Szegedy et al. 2015) as TensorFlow's 2015 graph computes it, which differs from the paper in
three places: averages leave out the padding, the last block takes a maximum in place of an
average, and images are resized without centring the pixels. torch-fidelity and pytorch-fid
have it too, but need torchvision, whose compiled part loads beside few builds of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels of its input
CLASSES = 1008


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padded: bool
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


@dataclass(frozen=True)
class Layer:
    """A convolution of a branch; with a stride of 2 it is not padded."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A branch: layers one after another; a pair of layers stands side by side, joined.
Branch = tuple[Layer | tuple[Layer, Layer], ...]


class Mixed(nn.Module):
    """Branches side by side, the pooled input among them, joined along the channels.

    Args:
        inputs: channels.
        branches: of convolutions.
        pool: "average" or "maximum" over 3×3, then a 1×1 convolution to ``pooled``
            channels; "shrink", a maximum at every second place and no convolution.
    """

    def __init__(
        self, inputs: int, branches: tuple[Branch, ...], pool: str, pooled: int = 0
    ) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            width = inputs
            for part in branch:
                layers = part if isinstance(part, tuple) else (part,)
                for layer in layers:
                    made = Convolution(
                        width, layer.outputs, layer.kernel, layer.stride, layer.stride == 1
                    )
                    self.add_module(layer.name, made)
                width = sum(layer.outputs for layer in layers)
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, (1, 1), 1, True)

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for branch in self.branches:
            y = x
            for part in branch:
                layers = part if isinstance(part, tuple) else (part,)
                y = torch.cat([self.get_submodule(layer.name)(y) for layer in layers], 1)
            ends.append(y)
        if self.pool == "shrink":
            return torch.cat([*ends, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "maximum":
            y = F.max_pool2d(x, 3, 1, 1)
        else:
            y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*ends, self.branch_pool(y)], 1)


def _at_35(inputs: int, pooled: int) -> Mixed:
    fives = (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5)))
    threes = (
        Layer("branch3x3dbl_1", 64),
        Layer("branch3x3dbl_2", 96, (3, 3)),
        Layer("branch3x3dbl_3", 96, (3, 3)),
    )
    return Mixed(inputs, ((Layer("branch1x1", 64),), fives, threes), "average", pooled)


def _to_17(inputs: int) -> Mixed:
    threes = (
        Layer("branch3x3dbl_1", 64),
        Layer("branch3x3dbl_2", 96, (3, 3)),
        Layer("branch3x3dbl_3", 96, (3, 3), 2),
    )
    return Mixed(inputs, ((Layer("branch3x3", 384, (3, 3), 2),), threes), "shrink")


def _at_17(inputs: int, width: int) -> Mixed:
    sevens = (
        Layer("branch7x7_1", width),
        Layer("branch7x7_2", width, (1, 7)),
        Layer("branch7x7_3", 192, (7, 1)),
    )
    twice = (
        Layer("branch7x7dbl_1", width),
        Layer("branch7x7dbl_2", width, (7, 1)),
        Layer("branch7x7dbl_3", width, (1, 7)),
        Layer("branch7x7dbl_4", width, (7, 1)),
        Layer("branch7x7dbl_5", 192, (1, 7)),
    )
    return Mixed(inputs, ((Layer("branch1x1", 192),), sevens, twice), "average", 192)


def _to_8(inputs: int) -> Mixed:
    threes = (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2))
    sevens = (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, (3, 3), 2),
    )
    return Mixed(inputs, (threes, sevens), "shrink")


def _at_8(inputs: int, pool: str) -> Mixed:
    threes = (
        Layer("branch3x3_1", 384),
        (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
    )
    twice = (
        Layer("branch3x3dbl_1", 448),
        Layer("branch3x3dbl_2", 384, (3, 3)),
        (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
    )
    return Mixed(inputs, ((Layer("branch1x1", 320),), threes, twice), pool, 192)


def resize(x: Tensor, side: int) -> Tensor:
    """[B, C, H, W] to [B, C, side, side] as TensorFlow 1 does it: bilinear, pixel i of the
    result lies at i·H/side, and nothing is smoothed when an image shrinks."""
    for axis in (2, 3):
        length = x.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (length / side)
        low = at.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        share = (at - low).unsqueeze(1) if axis == 2 else at - low
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)
    return x


class Inception(nn.Module):
    """uint8 [B, 3, H, W] to the 2048 pooled features, [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), 1, False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), 1, True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1), 1, False)
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), 1, False)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _at_17(768, 128)
        self.Mixed_6c = _at_17(768, 160)
        self.Mixed_6d = _at_17(768, 160)
        self.Mixed_6e = _at_17(768, 192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)  # in the file, and of no use here

    def forward(self, pixels: Tensor) -> Tensor:
        x = (resize(pixels.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean((2, 3))
