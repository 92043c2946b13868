"""The LUT heads (spec steps 7 to 9): from tokens to weights, entries and pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lutdeploy.config import ModelConfig


def activate_weights(logits: Tensor, weights: str) -> Tensor:
    """Spec step 7: LUT weights from logits [..., K], "softmax" (convex) or "tanh"."""
    return logits.softmax(-1) if weights == "softmax" else logits.tanh()


def outer_entries(factors: Tensor, config: ModelConfig) -> Tensor:
    """Spec step 8: a dynamic LUT, one RGB outer product per token.

    Args:
        factors: [B, K, 2·P·C], per channel a row and a column vector.

    Returns:
        [B, K, C·P·P], with LUT[k, c, i, j] = c_row[i]·c_col[j].
    """
    p, c, k = config.patch_size, config.channels, config.entries
    pairs = factors.unflatten(-1, (c, 2, p))  # [B, K, C, 2, P]
    row, column = pairs.split(1, dim=3)  # each [B, K, C, 1, P]
    patches = row.transpose(-1, -2) * column  # [B, K, C, P, P]
    return patches.reshape(-1, k, c * p * p)


def tiles_to_image(tiles: Tensor, config: ModelConfig) -> Tensor:
    """Spec step 9: patches [B, N, C·P·P] in row-major order to images [B, C, S, S]."""
    g, p, c, s = config.grid_size, config.patch_size, config.channels, config.image_size
    grid = tiles.reshape(-1, g, g, c, p, p)  # [B, h, w, C, i, j]
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, s, s)


def image_to_tiles(images: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of :func:`tiles_to_image`: images [B, C, S, S] to [B, N, C·P·P]."""
    g, p, c = config.grid_size, config.patch_size, config.channels
    grid = images.reshape(-1, c, g, p, g, p)  # [B, C, h, i, w, j]
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, g * g, c * p * p)


class StaticLut(nn.Module):
    """A learned LUT [K, C, P, P], the same for every image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p, c, k = config.patch_size, config.channels, config.entries
        self.entries = nn.Parameter(torch.randn(k, c, p, p) * 0.2)

    def forward(self) -> Tensor:
        """The entries as [K, C·P·P]."""
        return self.entries.flatten(1)


class DynamicLut(nn.Module):
    """A LUT computed per image from learned tokens that travel through the blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Parameter(torch.randn(config.entries, config.width) * 0.02)
        self.factors = nn.Linear(config.width, 2 * config.patch_size * config.channels)
        # An entry is a product of two factors, which would start near 0 with the usual small bias.
        nn.init.normal_(self.factors.bias, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """The entries [B, K, C·P·P] from the LUT tokens [B, K, D]."""
        return outer_entries(self.factors(tokens), self.config)
