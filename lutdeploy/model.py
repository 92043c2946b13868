"""The denoiser x0 = f(x_t, t), to be read beside the specification (steps 1 to 9).

Matmuls that read the same input are one matmul here: q, k, v, and the two halves of the gated
layer. So are the 1×1 stem and the patch convolution after it, which are both linear.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.config import ModelConfig
from lutdeploy.lut import DynamicLut, StaticLut, activate_weights, tiles_to_image


def time_frequencies(config: ModelConfig) -> Tensor:
    """Spec step 1: f_i = exp(−i·ln(base)/(h−1)), float32 [h]."""
    h = config.time_frequencies
    exponents = torch.arange(h, dtype=torch.float64) / (h - 1)
    return torch.exp(-math.log(config.time_base) * exponents).float()


def position_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Spec step 4: the cosine and sine tables, each float32 [N, D].

    The first D/2 channels use the row index, the others the column index; each angle
    stands twice in a row (interleaved), while the rotation pairs channel j with j + M/2.
    """
    half = config.width // 2  # M
    freq = config.position_base ** (-2 * torch.arange(half // 2, dtype=torch.float64) / half)
    index = torch.arange(config.grid_size, dtype=torch.float64)
    angles = (index[:, None] * freq).repeat_interleave(2, dim=1)  # [g, M]
    g = config.grid_size
    rows = angles[:, None].expand(g, g, half)
    columns = angles[None, :].expand(g, g, half)
    phi = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [N, D]
    return phi.cos().float(), phi.sin().float()


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Spec step 4: u⊙c + rot(u)⊙s on [..., N, D], each half of the channels on its own."""
    row_a, row_b, column_a, column_b = u.chunk(4, dim=-1)
    rotated = torch.cat([-row_b, row_a, -column_b, column_a], dim=-1)
    return u * cos + rotated * sin


class Stem(nn.Module):
    """Spec steps 1 to 4: from pixels and timestep to positioned tokens."""

    cos: Tensor
    sin: Tensor
    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        stem, patch = config.stem_channels, config.patch_size
        self.time = nn.Linear(2 * config.time_frequencies, stem)
        self.expand = nn.Conv2d(config.channels, stem, 1)
        self.patch = nn.Conv2d(stem, config.width, patch, stride=patch)
        cos, sin = position_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("frequencies", time_frequencies(config), persistent=False)

    def time_embedding(self, t: Tensor) -> Tensor:
        """Spec step 1: t [B] to τ [B, stem_channels]."""
        angles = t[:, None] * self.frequencies  # [B, h]
        return self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def folded_kernel(self) -> Tensor:
        """The two convolutions as one kernel [D, C, P, P] (spec "Exact rewrites")."""
        return torch.einsum("dsij,sc->dcij", self.patch.weight, self.expand.weight.flatten(1))

    def folded_bias(self, tau: Tensor) -> Tensor:
        """What τ [B, stem_channels] and the biases add to every token, [B, D]."""
        summed = self.patch.weight.sum(dim=(2, 3))  # [D, stem]
        assert self.expand.bias is not None
        return F.linear(self.expand.bias + tau, summed, self.patch.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Positioned tokens [B, N, D] from x [B, C, S, S] and t [B]."""
        z = F.conv2d(x, self.folded_kernel(), stride=self.config.patch_size)  # [B, D, g, g]
        bias = self.folded_bias(self.time_embedding(t))
        u = z.flatten(2).transpose(1, 2) + bias[:, None]  # [B, N, D]
        return rotate(u, self.cos, self.sin)


class Block(nn.Module):
    """Spec step 6: attention, then a gated layer of width D, both pre-normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.dropout = 0.0  # set by what trains the model; nothing is dropped in evaluation
        self.norm1 = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.gated = nn.Linear(d, 2 * d)  # W0, then W1

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D/heads]
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        # Written out: at these lengths it trains 1.5 times as fast on a CPU as the fused call.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, N]
        attended = scores.softmax(-1) @ v  # [B, heads, N, D/heads]
        y = x + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        value, gate = self.gated(self.norm2(y)).chunk(2, dim=-1)
        return self.drop(value * F.silu(gate)) + y

    def drop(self, x: Tensor) -> Tensor:
        """Dropout while training, if there is any."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class LutTransformer(nn.Module):
    """The patch transformer that paints with a LUT. See the specification, steps 1 to 9."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.entries)
        self.lut = StaticLut(config) if config.lut == "static" else DynamicLut(config)

    def paint(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass that also returns what it painted with.

        Args:
            x: noisy images x_t, [B, C, S, S].
            t: timesteps in [0, 1], [B]; 0 is pure noise.

        Returns:
            x0 [B, C, S, S]; weights [B, N, K]; LUT [K, C·P·P] or, if dynamic, [B, K, C·P·P].
        """
        n = self.config.image_tokens
        tokens = self.stem(x, t)  # [B, N, D]
        if isinstance(self.lut, DynamicLut):
            extra = self.lut.tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, extra], dim=1)  # [B, N + K, D]
        for block in self.blocks:
            tokens = block(tokens)
        weights = activate_weights(self.head(tokens[:, :n]), self.config.weights)
        lut = self.lut(tokens[:, n:]) if isinstance(self.lut, DynamicLut) else self.lut()
        return tiles_to_image(weights @ lut, self.config), weights, lut

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the clean images x0 [B, C, S, S] from x_t [B, C, S, S] and t [B]."""
        return self.paint(x, t)[0]

    def lut_patches(self, x: Tensor, t: Tensor) -> Tensor:
        """The LUT [K, C, P, P]; a dynamic one as computed for the first image of x."""
        c, p = self.config.channels, self.config.patch_size
        if isinstance(self.lut, StaticLut):
            return self.lut.entries
        return self.paint(x[:1], t[:1])[2][0].unflatten(-1, (c, p, p))
