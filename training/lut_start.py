"""What a LUT starts from: noise, or the training images' own patches.

Patches of natural images lie close to a few directions, so a LUT that starts from those
leaves the network to learn what to paint, not first what to paint with.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.config import ModelConfig
from lutdeploy.lut import StaticLut, image_to_tiles
from lutdeploy.model import LutTransformer

IMAGES = 4096  # whose patches count
HEADROOM = 4.0  # standard deviations of a component that a weight of ±1 reaches


def principal_entries(images: Tensor, config: ModelConfig) -> Tensor:
    """The patches' principal components about 0, longest first, each times its deviation.

    Weights of unit scale then paint patches as they are spread. More entries than a patch has
    numbers repeat the components with the sign changed.

    Args:
        images: uint8 [n, C, S, S].
        config: of a static LUT.

    Returns:
        [K, C, P, P] float32.
    """
    patches = image_to_tiles(images.float().div_(127.5).sub_(1), config).flatten(0, 1)
    moments = (patches.T @ patches).double() / len(patches)  # [C·P·P, C·P·P]
    variances, directions = torch.linalg.eigh(moments)
    deviations = variances.flip(0).clamp_min(0).sqrt()
    scaled = HEADROOM * deviations[:, None] * directions.flip(1).T  # [C·P·P, C·P·P]
    signed = torch.cat([scaled, -scaled]).repeat(-(-config.entries // (2 * len(scaled))), 1)
    entries = signed[: config.entries].float()
    return entries.reshape(-1, config.channels, config.patch_size, config.patch_size)


def sampled_entries(images: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Patches drawn from the images, as [K, C, P, P] float32; for weights that are convex.

    Args:
        images: uint8 [n, C, S, S].
        config: of a static LUT.
        generator: on the CPU.
    """
    chosen = torch.randint(len(images), (config.entries,), generator=generator)
    patches = image_to_tiles(images[chosen].float().div_(127.5).sub_(1), config)
    place = torch.randint(patches.shape[1], (config.entries,), generator=generator)
    entries = patches[torch.arange(config.entries), place]
    return entries.reshape(-1, config.channels, config.patch_size, config.patch_size)


def spread(indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """Some of the training images' indices, evenly."""
    count = min(len(indices), IMAGES)
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


@torch.no_grad()
def start_from_patches(model: LutTransformer, images: Tensor, seed: int) -> None:
    """Set a static LUT: principal patches for tanh weights, drawn ones for convex weights.

    A dynamic LUT, which is computed, stays as it is.

    Args:
        model: on the CPU.
        images: uint8 [n, C, S, S].
        seed: of the patches drawn.
    """
    if not isinstance(model.lut, StaticLut):
        return
    if model.config.weights == "tanh":
        entries = principal_entries(images, model.config)
    else:
        generator = torch.Generator().manual_seed(seed)
        entries = sampled_entries(images, model.config, generator)
    model.lut.entries.copy_(entries)
