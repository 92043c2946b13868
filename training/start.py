"""What a model starts from: noise, or a copy of what it sees, x0 = x_t.

A patch transformer that starts from noise spends most of its training on learning to copy:
near t = 1 the clean image is all but there, and it still paints a blur of it. Here the copy is
there from the first step. The patches' main directions are written into channels that the
rotary position leaves alone; the head reads them, the LUT holds the same directions, and the
blocks add nothing yet. What is left to learn is how x0 differs from x_t.

Softmax weights mix entries and add none. There each direction is held by entries of both signs,
all as long as the directions' reach together, and the weights of a pair lean from one to the other.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.config import ModelConfig
from lutdeploy.lut import DynamicLut, StaticLut, image_to_tiles
from lutdeploy.model import Block, LutTransformer
from lutdeploy.training.dct import dct_matrix

IMAGES = 4096  # whose patches count
HEADROOM = 4.0  # standard deviations of a coefficient that a weight of ±1 reaches
SMALLEST = 2.0  # of what a weight of ±1 reaches; noise at t = 0 has deviation 1
CONVEX_ENTRIES = 8  # of softmax weights to a direction


def spread(indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """Some of the training images' indices, evenly."""
    count = min(len(indices), IMAGES)
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


def quiet_channels(config: ModelConfig, count: int) -> Tensor:
    """The channels that the rotary position turns least, at most D/2, least first.

    Spec step 4: in each half of the channels the angle falls with the index, and the upper
    part of a half keeps its own content, turned by small angles.
    """
    half = config.width // 2
    upper = torch.arange(half - 1, half - 1 - half // 2, -1)
    return torch.stack([upper, upper + half], dim=1).flatten()[:count]


def principal_directions(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The patches' main directions about 0, orthonormal, the longest first.

    Args:
        patches: float64 [n, C·P·P].
        count: how many, at most C·P·P.

    Returns:
        Directions [count, C·P·P] and the deviation of the patches along each, [count].
    """
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    return directions.flip(1).T[:count], variances.flip(0)[:count].clamp_min(0).sqrt()


def separable_directions(
    patches: Tensor, config: ModelConfig, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of directions that are an outer product in each channel (spec step 8).

    Each is a colour times a two-dimensional cosine (DCT-II); the colours are the main
    directions of the pixels.

    Returns:
        Directions [count, C·P·P]; their rows and columns as the LUT takes them, [count,
        2·P·C]; the deviations [count].
    """
    c, p = config.channels, config.patch_size
    cosines = dct_matrix(p)
    pixels = patches.unflatten(1, (c, p * p)).transpose(1, 2).reshape(-1, c)
    colours, _ = principal_directions(pixels, c)  # [C, C]
    u, v, colour = torch.cartesian_prod(*map(torch.arange, (p, p, c))).T
    rows = colours[colour][:, :, None] * cosines[u][:, None]  # [n, C, P]
    columns = cosines[v][:, None].expand(-1, c, -1)  # [n, C, P]
    directions = (rows[..., None] * columns[..., None, :]).flatten(1)  # [n, C·P·P]
    deviations = (patches @ directions.T).square().mean(0).sqrt()
    kept = deviations.argsort(descending=True)[:count]
    factors = torch.stack([rows, columns], dim=2)[kept].flatten(1)  # [count, C·2·P]
    return directions[kept], factors, deviations[kept]


@torch.no_grad()
def start_as_copy(model: LutTransformer, images: Tensor) -> None:
    """Set the weights so that x0 is x_t, as far as the LUT and the channels reach.

    Args:
        model: on the CPU; not one with a dynamic LUT and softmax weights.
        images: uint8 [n, C, S, S], whose patches tell the directions.
    """
    config = model.config
    patches = image_to_tiles(images.float().div_(127.5).sub_(1), config).flatten(0, 1).double()
    convex = config.weights == "softmax"
    held = max(1, config.entries // CONVEX_ENTRIES) if convex else config.entries
    count = min(config.entry_values, config.width // 2, held)
    if config.lut == "static":
        directions, deviations = principal_directions(patches, count)
    else:
        directions, factors, deviations = separable_directions(patches, config, count)
    channels = quiet_channels(config, count)
    _write(model, directions, channels)
    for block in model.blocks:
        assert isinstance(block, Block)
        for part in (block.out.weight, block.out.bias):
            part.zero_()
        for part in (block.gated.weight, block.gated.bias):
            part[: config.width] = 0  # W0, which the gate is multiplied with
    model.head.weight.zero_()
    model.head.bias.zero_()
    reach = (HEADROOM * deviations).clamp_min(SMALLEST)  # of a weight of ±1
    if convex:
        _lean(model, directions, reach, channels)
        return
    model.head.weight[torch.arange(count), channels] = (1 / reach).float()
    if isinstance(model.lut, StaticLut):
        model.lut.entries.flatten(1)[:count] = (reach[:, None] * directions).float()
    else:
        assert isinstance(model.lut, DynamicLut)
        _compute(model.lut, factors * reach.sqrt()[:, None])


def _write(model: LutTransformer, directions: Tensor, channels: Tensor) -> None:
    """Let the stem write the patches' coefficients into the channels."""
    c, p = model.config.channels, model.config.patch_size
    stem = model.stem
    # The first C of the stem's channels are the pixels', whatever the time.
    stem.expand.weight[:c] = torch.eye(c)[:, :, None, None]
    for part in (stem.expand.bias, stem.time.weight, stem.time.bias):
        assert part is not None
        part[:c] = 0
    stem.patch.weight[channels] = 0
    assert stem.patch.bias is not None
    stem.patch.bias[channels] = 0
    kernels = directions.float().unflatten(1, (c, p, p))
    stem.patch.weight[channels, :c] = kernels


def _lean(model: LutTransformer, directions: Tensor, reach: Tensor, channels: Tensor) -> None:
    """Let softmax weights lean to one entry of a pair or the other, and x0 be x_t nearly.

    A direction's entries are ±R times itself, R the sum of all reach; their weights share its part
    of that sum, p = reach/R, and their logits are ±z, z = coefficient/reach. What is painted along
    it is reach·sinh(z)/Σ p·cosh(z), which is the coefficient but for terms of z² and higher.
    """
    assert isinstance(model.lut, StaticLut)
    entry = torch.arange(model.config.entries)
    which, sign = entry // 2 % len(reach), 1 - 2 * (entry % 2)
    radius, sharers = reach.sum(), torch.bincount(which, minlength=len(reach))
    prior = (reach / sharers)[which] / radius  # [K]
    model.head.weight[entry, channels[which]] = (sign / reach[which]).float()
    model.head.bias.copy_(prior.log())
    # Onto the noise that they start with, by which those of one direction can part.
    entries = model.lut.entries.flatten(1)
    entries += (radius * sign[:, None] * directions[which]).float()
    entries -= (prior / prior.sum()).float() @ entries  # nothing seen, nothing painted


def _compute(lut: DynamicLut, factors: Tensor) -> None:
    """Let the LUT tokens, which the blocks do not change yet, give these factors [n, 2·P·C]."""
    torch.nn.init.normal_(lut.tokens, std=0.5)
    tokens = lut.tokens[: len(factors)].double()
    wanted = factors - lut.factors.bias
    lut.factors.weight.copy_((torch.linalg.pinv(tokens) @ wanted).T)
