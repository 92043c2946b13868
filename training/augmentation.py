"""Images mirrored, scaled, shifted and turned, on the device that trains.

The network is told how an image was scaled, shifted and turned, so that it learns to paint
only upright ones at inference, where it is told "not at all" (Karras et al. 2022, appendix
F.2). Mirrored faces are faces: nothing is told.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARAMETERS = 5  # log2 of the scale, cosine − 1, sine, right and down; all 0 at identity
SCALE = 0.2  # standard deviation of log2 of the scale
TURN = math.radians(15)  # standard deviation of the angle
SHIFT = 0.125  # standard deviation of each shift, of the image's side


def mirror(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mirror a ``share`` of the images x [B, C, S, S], left to right."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < share
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def affine(x: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scale, turn and shift a ``share`` of the images; what comes into view is reflected.

    Args:
        x: [B, C, S, S].
        share: in [0, 1].
        generator: on the images' device.

    Returns:
        The images, and [B, PARAMETERS] for the network.
    """
    chosen = torch.rand(len(x), generator=generator, device=x.device) < share
    normal = torch.randn(len(x), 4, generator=generator, device=x.device) * chosen[:, None]
    scale, angle = (SCALE * normal[:, 0]).exp2(), TURN * normal[:, 1]
    shift = SHIFT * normal[:, 2:]
    cos, sin = angle.cos(), angle.sin()
    # A pixel q shows what was at p, with q = scale · turned(p + shift), in halves of the side.
    turned = torch.stack([cos, sin, -sin, cos], dim=-1) / scale[:, None]
    from_where = torch.cat([turned.reshape(-1, 2, 2), -2 * shift[:, :, None]], dim=-1)
    grid = F.affine_grid(from_where, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    told = torch.cat([scale.log2()[:, None], (cos - 1)[:, None], sin[:, None], shift], dim=-1)
    return torch.where(chosen[:, None, None, None], moved, x), told
