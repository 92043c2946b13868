"""The denoiser laid out as its author wrote it, from the specification alone.

Activations are maps [B, D, H, W] throughout (H = W = 8, or H = 1 and W = N once there are LUT
tokens), every linear layer is a 1×1 convolution, and nothing is fused: the stem runs at every
pixel, q, k, v are three convolutions and the gated layer two. That makes it the baseline of the
speed measurements, and a second reading of the specification that shares no code with
``lutdeploy.model``. Its module names are the author's, so his state dicts load as they are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.artefacts.checkpoint import to_author_state
from lutdeploy.config import ModelConfig
from lutdeploy.model import LutTransformer
from lutdeploy.reference import TorchDenoiser


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """A linear layer over channels, at every place of a map."""
    return nn.Conv2d(inputs, outputs, kernel_size=1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, D, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Position(nn.Module):
    """Spec step 4: the first half of the channels turns with the row, the second with the column.

    The angles stand in interleaved pairs, the rotation is one of halves, as in the original.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, half: int, grid: int, base: float) -> None:
        super().__init__()
        freq = base ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)  # [half / 2]
        index = torch.arange(grid, dtype=torch.float64)
        phi = torch.outer(freq.repeat_interleave(2), index)  # [half, grid]
        self.register_buffer("cos", phi.cos().float(), persistent=False)
        self.register_buffer("sin", phi.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, grid, grid] to the same."""
        by_row, by_column = x.chunk(2, dim=1)
        return torch.cat(
            [
                self.turn(by_row, self.cos[:, :, None], self.sin[:, :, None]),
                self.turn(by_column, self.cos[:, None, :], self.sin[:, None, :]),
            ],
            dim=1,
        )

    @staticmethod
    def turn(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """u⊙c + rot(u)⊙s over the channels of u [B, half, grid, grid]."""
        first, second = u.chunk(2, dim=1)
        return u * cos + torch.cat([-second, first], dim=1) * sin


class Attention(nn.Module):
    """Attention over all places of a map [B, D, H, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Sequential(pointwise(width, width))
        self.k = nn.Sequential(pointwise(width, width))
        self.v = nn.Sequential(pointwise(width, width))
        self.fc = nn.Sequential(pointwise(width, width))

    def split(self, x: Tensor) -> Tensor:
        """[B, D, H, W] to [B, heads, H·W, D/heads]."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        out = F.scaled_dot_product_attention(q, k, v)  # scale (D/heads)^−½ is its default
        return self.fc(out.transpose(2, 3).reshape(x.shape))


class GatedLayer(nn.Module):
    """W0·x ⊙ SiLU(W1·x) on a map [B, D, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffw_0 = pointwise(width, width)
        self.ffw_1 = pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffw_0(x) * F.silu(self.ffw_1(x))


class TransformerBlock(nn.Module):
    """Spec step 6 on a map [B, D, H, W]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.attn = Attention(width, config.heads)
        self.ffw = nn.Sequential(GatedLayer(width))
        self.norm1 = ChannelNorm(width, eps=eps)
        self.norm2 = ChannelNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attn(self.norm1(x))
        return y + self.ffw(self.norm2(y))


class AppendTokens(nn.Module):
    """Spec step 5 of a dynamic LUT: learned tokens behind the image's, in one row."""

    def __init__(self, width: int, entries: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, width, 1, entries) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] to [B, D, 1, H·W + K]."""
        row = x.flatten(2).unsqueeze(2)
        return torch.cat([row, self.tokens.expand(len(x), -1, -1, -1)], dim=3)


class OriginalModel(nn.Module):
    """x0 = f(x_t, t) in the author's layout, any preset."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, stem = config.width, config.stem_channels
        self.time_mlp = nn.Sequential(nn.Linear(2 * config.time_frequencies, stem))
        self.expand = pointwise(config.channels, stem)
        # The author's Sequential also holds layers without weights, hence the gaps in the names.
        layers: dict[str, nn.Module] = {
            "1": nn.Conv2d(stem, width, config.patch_size, stride=config.patch_size),
            "2": Position(width // 2, config.grid_size, config.position_base),
        }
        tail: list[nn.Module] = [TransformerBlock(config) for _ in range(config.depth)]
        if config.lut == "dynamic":
            tail.insert(0, AppendTokens(width, config.entries))
        layers |= {str(number): layer for number, layer in enumerate(tail, start=6)}
        self.backbone = nn.Sequential(OrderedDict(layers))
        self.projection = pointwise(width, config.entries)
        if config.lut == "dynamic":
            self.lut_projection = nn.Linear(width, 2 * config.channels * config.patch_size)
        else:
            shape = (config.entries, config.channels, config.patch_size, config.patch_size)
            self.lut = nn.Parameter(torch.randn(shape) * 0.2)

    def time_embedding(self, t: Tensor) -> Tensor:
        """Spec step 1: t [B] to τ [B, stem_channels]."""
        h = self.config.time_frequencies
        index = torch.arange(h, dtype=torch.float32, device=t.device)
        freq = torch.exp(-index * math.log(self.config.time_base) / (h - 1))
        angles = t[:, None] * freq
        return self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1))

    def weights(self, tokens: Tensor) -> Tensor:
        """Spec step 7: maps [B, D, g, g] to LUT weights [B, K, g, g]."""
        logits = self.projection(tokens)
        return logits.softmax(dim=1) if self.config.weights == "softmax" else logits.tanh()

    def entries(self, tokens: Tensor) -> Tensor:
        """Spec step 8: LUT tokens [B, D, 1, K] to a LUT of each image [B, K, C, P, P]."""
        factors = self.lut_projection(tokens.squeeze(2).transpose(1, 2))  # [B, K, 2·P·C]
        pairs = factors.unflatten(2, (self.config.channels, 2, self.config.patch_size))
        return torch.einsum("blci,blcj->blcij", pairs[:, :, :, 0], pairs[:, :, :, 1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 [B, C, S, S] from x_t [B, C, S, S] and t [B]."""
        z = self.expand(x) + self.time_embedding(t)[:, :, None, None]  # [B, stem, S, S]
        out = self.backbone(z)
        if self.config.lut == "static":
            patches = torch.einsum("blhw,lcij->bchiwj", self.weights(out), self.lut)
        else:
            n, g = self.config.image_tokens, self.config.grid_size
            image_tokens = out[:, :, 0, :n].unflatten(2, (g, g))
            lut = self.entries(out[:, :, :, n:])
            patches = torch.einsum("blhw,blcij->bchiwj", self.weights(image_tokens), lut)
        return patches.reshape(x.shape)


class OriginalDenoiser(TorchDenoiser):
    """The original's network in eager PyTorch, float32, with the weights of ours."""

    def __init__(self, model: LutTransformer) -> None:
        original: Any = OriginalModel(model.config)
        original.load_state_dict(to_author_state(model), strict=True)
        super().__init__(original)
