"""What a model starts from: noise, or a copy of what it sees, x0 = x_t.

A patch transformer that starts from noise spends most of its training on learning to copy:
near t = 1 the clean image is all but there, and it still paints a blur of it. Here the copy is
there from the first step. The patches' main directions are written into channels that the
rotary position leaves alone; the head reads them, the LUT holds the same directions, and the
blocks add nothing yet. What is left to learn is how x0 differs from x_t.

Softmax weights mix entries and add none, so an exact copy would need entries of hundreds of
times a patch's size, which glare wherever a weight is a little off. There the entries start as
enlarged patches of the images, and a short fit of head and LUT alone finds the best x0 of a patch
by itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.config import ModelConfig
from lutdeploy.lut import DynamicLut, StaticLut, image_to_tiles
from lutdeploy.model import Block, LutTransformer
from training.dct import dct_matrix

IMAGES = 4096  # whose patches count
HEADROOM = 4.0  # standard deviations of a coefficient that a weight of ±1 reaches
SMALLEST = 2.0  # of what a weight of ±1 reaches; noise at t = 0 has deviation 1
FIT_STEPS, FIT_PATCHES, FIT_LR = 400, 2048, 2e-2  # of convex weights: Adam, cosine decay
FIT_SCALE = 6.0  # of the patches as entries: far apart, weights change gently with a logit
FIT_TEMPERATURE = 128.0  # of squared distances to the entries, as the first logits have them
FIT_FLOOR = 0.05  # the error's weight is 1/max(1−t, floor)², that of the velocity


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
    count = min(config.entry_values, config.width // 2, *(() if convex else (config.entries,)))
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
    if convex:
        _fit(model, patches.float(), directions.float(), channels)
        return
    reach = (HEADROOM * deviations).clamp_min(SMALLEST)  # of a weight of ±1
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


def _fit(model: LutTransformer, patches: Tensor, directions: Tensor, channels: Tensor) -> None:
    """Fit head and LUT to paint clean patches from noisy ones, each by itself, at t ~ U(0, 1)."""
    assert isinstance(model.lut, StaticLut)
    k = model.config.entries
    entries = FIT_SCALE * patches[torch.randint(len(patches), (k,))]
    weight = entries @ directions.T / FIT_TEMPERATURE
    bias = entries.square().sum(1) / (-2 * FIT_TEMPERATURE)
    fitted = [part.requires_grad_() for part in (entries, weight, bias)]
    adam = torch.optim.Adam(fitted, lr=FIT_LR, betas=(0.9, 0.95))
    for step in range(FIT_STEPS):
        adam.param_groups[0]["lr"] = FIT_LR * 0.5 * (1 + math.cos(math.pi * step / FIT_STEPS))
        x = patches[torch.randint(len(patches), (FIT_PATCHES,))]
        t = torch.rand(FIT_PATCHES, 1)
        seen = (t * x + (1 - t) * torch.randn_like(x)) @ directions.T
        with torch.enable_grad():
            painted = F.linear(seen, weight, bias).softmax(-1) @ entries
            loss = ((painted - x) / (1 - t).clamp_min(FIT_FLOOR)).square().mean()
            loss.backward()
        adam.step()
        adam.zero_grad()
    model.lut.entries.copy_(entries.view_as(model.lut.entries))
    model.head.weight[:, channels] = weight
    model.head.bias.copy_(bias)


def _compute(lut: DynamicLut, factors: Tensor) -> None:
    """Let the LUT tokens, which the blocks do not change yet, give these factors [n, 2·P·C]."""
    torch.nn.init.normal_(lut.tokens, std=0.5)
    tokens = lut.tokens[: len(factors)].double()
    wanted = factors - lut.factors.bias
    lut.factors.weight.copy_((torch.linalg.pinv(tokens) @ wanted).T)
