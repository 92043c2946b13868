"""The Inception network that FID is defined by, on the weights of a user's file.

It is the network of the file pt_inception-2015-12-05, with that file's names: Inception v3
(Szegedy et al. 2015) as TensorFlow's 2015 graph computes it, which differs from the paper in
three places: averages leave out the padding, the last block takes a maximum in place of an
average, and images are resized without centring the pixels. torch-fidelity and pytorch-fid
have it too, but need a torchvision built for torch; torch-fidelity executes pickled code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lutdeploy.errors import ArtefactError, ran_out_of_memory

SIDE = 299  # pixels of its input
FEATURES = 2048
CLASSIFIER = {"fc.weight": (1008, FEATURES), "fc.bias": (1008,)}  # in the file, and not used
PARTS = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")

# Branches of the blocks by their side in pixels: layers one after another.
AT_35 = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
TO_17 = ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
AT_17 = ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5")
TO_8 = ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")


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


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Inception:
    """uint8 [B, 3, H, W] to the 2048 pooled features, [B, 2048]."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Take the weights by their names in the file; counts of batches may be among them."""
        self.state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        self._read = set(CLASSIFIER)
        device = next((value.device for value in self.state.values()), None)
        try:
            self(torch.zeros(1, 3, SIDE, SIDE, device=device))  # which needs all of them
            classifier = {name: tuple(self.state[name].shape) for name in CLASSIFIER}
        except KeyError as error:
            raise ArtefactError(f"key {error.args[0]} is missing") from error
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise ArtefactError(f"the shapes do not fit together: {reason}") from error
        if classifier != CLASSIFIER:
            raise ArtefactError(f"the classifier has the shapes {classifier}, not {CLASSIFIER}")
        unknown = [name for name in self.state if name not in self._read]
        if unknown:
            raise ArtefactError(f"key {unknown[0]} is unknown")

    def __call__(self, pixels: Tensor) -> Tensor:
        x = (resize(pixels.float(), SIDE) - 128) / 128
        x = self._layer(x, "Conv2d_1a_3x3", stride=2)
        x = self._layer(x, "Conv2d_2a_3x3", padded=False)
        x = self._layer(x, "Conv2d_2b_3x3")  # [B, 64, 147, 147]
        x = self._layer(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = self._layer(x, "Conv2d_4a_3x3", padded=False)  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._keep_side(x, block, AT_35)  # [B, 288, 35, 35] at the end
        x = self._halve_side(x, "Mixed_6a", TO_17)  # [B, 768, 17, 17]
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._keep_side(x, block, AT_17)
        x = self._halve_side(x, "Mixed_7a", TO_8)  # [B, 1280, 8, 8]
        x = self._at_8(x, _average(x), "Mixed_7b")  # [B, 2048, 8, 8]
        x = self._at_8(x, F.max_pool2d(x, 3, 1, 1), "Mixed_7c")
        return x.mean((2, 3))

    def _layer(self, x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        """Convolution without bias, batch norm, ReLU; with a stride of 2 it is not padded."""
        names = [f"{name}.{part}" for part in PARTS]
        self._read.update(names)
        kernel, mean, variance, weight, bias = (self.state[n] for n in names)
        height, width = kernel.shape[2:]
        padding = (height // 2, width // 2) if padded and stride == 1 else 0
        x = F.conv2d(x, kernel, None, stride, padding)
        return torch.relu(F.batch_norm(x, mean, variance, weight, bias, eps=1e-3))

    def _branches(self, x: Tensor, block: str, *branches: str, stride: int = 1) -> list[Tensor]:
        """What each branch makes of x; its last layer has the stride."""
        ends = []
        for branch in branches:
            end, layers = x, branch.split()
            for layer in layers:
                last = layer == layers[-1]
                end = self._layer(end, f"{block}.branch{layer}", stride if last else 1)
            ends.append(end)
        return ends

    def _keep_side(self, x: Tensor, block: str, branches: tuple[str, ...]) -> Tensor:
        ends = self._branches(x, block, *branches)
        return torch.cat([*ends, *self._branches(_average(x), block, "_pool")], 1)

    def _halve_side(self, x: Tensor, block: str, branches: tuple[str, ...]) -> Tensor:
        ends = self._branches(x, block, *branches, stride=2)
        return torch.cat([*ends, F.max_pool2d(x, 3, 2)], 1)

    def _at_8(self, x: Tensor, pooled: Tensor, block: str) -> Tensor:
        one, threes, twice = self._branches(x, block, "1x1", "3x3_1", "3x3dbl_1 3x3dbl_2")
        ends = [
            one,
            *self._branches(threes, block, "3x3_2a", "3x3_2b"),
            *self._branches(twice, block, "3x3dbl_3a", "3x3dbl_3b"),
            *self._branches(pooled, block, "_pool"),
        ]
        return torch.cat(ends, 1)
