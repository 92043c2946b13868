"""The first weights of a model that starts as a copy of its input: x0 = x_t.

A patch transformer that starts from noise spends most of its training on learning to copy.
Here it copies from the first step: the stem writes the principal components of the patches into
the channels that the rotary position turns least, the head reads them, the LUT holds the same
components, and the blocks add nothing yet.

The amplitude of a component is the coefficient that a weight of ±1 paints. Softmax weights
cannot be negative; there entries of both signs hold each component.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.config import ModelConfig
from lutdeploy.lut import DynamicLut, StaticLut, image_to_tiles
from lutdeploy.model import Block, LutTransformer

MAX_IMAGES = 4096  # whose patches are decomposed
AMPLITUDE_DEVIATIONS = 4.0  # amplitude over the standard deviation of a coefficient
MIN_AMPLITUDE = 2.0  # noise at t = 0 has deviation 1
SOFTMAX_ENTRIES = 8  # LUT entries per component where weights are a softmax


def evenly_spaced(indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """At most 4,096 of the training images' indices, spread evenly."""
    count = min(len(indices), MAX_IMAGES)
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 [size, size]: row k is the cosine of frequency k."""
    index = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None])
    cosines[0] /= math.sqrt(2)
    return cosines * math.sqrt(2 / size)


def least_rotated_channels(config: ModelConfig, count: int) -> Tensor:
    """The channels that the rotary position turns least, at most D/2, least first.

    Spec step 4: in each half of the channels the angle falls with the index, so the upper part
    of each half is turned by small angles.
    """
    half = config.width // 2
    upper = torch.arange(half - 1, half - 1 - half // 2, -1)
    return torch.stack([upper, upper + half], dim=1).flatten()[:count]


def principal_directions(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The principal components of patches, float64 [n, C·P·P], about 0, the largest first.

    Returns:
        Orthonormal directions [count, C·P·P], and the patches' deviation along each, [count].
    """
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    return directions.flip(1).T[:count], variances.flip(0)[:count].clamp_min(0).sqrt()


def separable_directions(
    patches: Tensor, config: ModelConfig, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a dynamic LUT, whose entries are outer products in each channel (spec step 8).

    Each direction is a colour times a two-dimensional cosine (DCT-II); the colours are the
    principal components of the pixels.

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
    """Set the weights so that x0 is x_t, within what the LUT's entries and the channels can hold.

    The model is on the CPU, without a dynamic LUT under softmax weights. The patches of the
    images, uint8 [n, C, S, S], are decomposed.
    """
    config = model.config
    patches = image_to_tiles(images.float().div_(127.5).sub_(1), config).flatten(0, 1).double()
    softmax = config.weights == "softmax"
    held = max(1, config.entries // SOFTMAX_ENTRIES) if softmax else config.entries
    count = min(config.entry_values, config.width // 2, held)
    if config.lut == "static":
        directions, deviations = principal_directions(patches, count)
    else:
        directions, factors, deviations = separable_directions(patches, config, count)
    channels = least_rotated_channels(config, count)
    _set_stem(model, directions, channels)
    for block in model.blocks:
        assert isinstance(block, Block)
        for part in (block.out.weight, block.out.bias):
            part.zero_()
        for part in (block.gated.weight, block.gated.bias):
            part[: config.width] = 0  # W0, which the gate is multiplied with
    model.head.weight.zero_()
    model.head.bias.zero_()
    amplitudes = (AMPLITUDE_DEVIATIONS * deviations).clamp_min(MIN_AMPLITUDE)
    if softmax:
        _set_softmax_pairs(model, directions, amplitudes, channels)
        return
    model.head.weight[torch.arange(count), channels] = (1 / amplitudes).float()
    if isinstance(model.lut, StaticLut):
        model.lut.entries.flatten(1)[:count] = (amplitudes[:, None] * directions).float()
    else:
        assert isinstance(model.lut, DynamicLut)
        _set_dynamic_lut(model.lut, factors * amplitudes.sqrt()[:, None])


def _set_stem(model: LutTransformer, directions: Tensor, channels: Tensor) -> None:
    """Make the stem write the patches' coefficients into the channels."""
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
    stem.patch.weight[channels, :c] = directions.float().unflatten(1, (c, p, p))


def _set_softmax_pairs(
    model: LutTransformer, directions: Tensor, amplitudes: Tensor, channels: Tensor
) -> None:
    """Set head and LUT so that softmax weights paint nearly x_t, by pairs of entries.

    The entries of a direction are ±R times the direction, with R the sum of all amplitudes.
    Their prior weights sum to p = amplitude/R, and their logits are ±z, z = coefficient/amplitude.
    What is painted along the direction is amplitude·sinh(z)/Σ p·cosh(z): the coefficient, up to
    terms of z² and higher.
    """
    assert isinstance(model.lut, StaticLut)
    entry = torch.arange(model.config.entries)
    direction, sign = entry // 2 % len(amplitudes), 1 - 2 * (entry % 2)  # [K]
    radius, sharers = amplitudes.sum(), torch.bincount(direction, minlength=len(amplitudes))
    prior = (amplitudes / sharers)[direction] / radius  # [K]
    model.head.weight[entry, channels[direction]] = (sign / amplitudes[direction]).float()
    model.head.bias.copy_(prior.log())
    # Added to the random entries, so that entries of one direction can part in training.
    entries = model.lut.entries.flatten(1)
    entries += (radius * sign[:, None] * directions[direction]).float()
    entries -= (prior / prior.sum()).float() @ entries  # a grey patch stays grey


def _set_dynamic_lut(lut: DynamicLut, factors: Tensor) -> None:
    """Make the LUT tokens, which the blocks leave as they are, give these factors [n, 2·P·C]."""
    torch.nn.init.normal_(lut.tokens, std=0.5)
    tokens = lut.tokens[: len(factors)].double()
    wanted = factors - lut.factors.bias
    lut.factors.weight.copy_((torch.linalg.pinv(tokens) @ wanted).T)
