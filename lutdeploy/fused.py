"""The network in its inference form: the exact rewrites, and what stays float32 in float16.

The rewrites are those of the specification ("Exact rewrites for inference"), folded in float64
and rounded once: one patch convolution, fused q-k-v and gate matmuls, LayerNorm's affine in the
matmul after it, the time branch as one bias. Exports and the GPU's PyTorch engine are made of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.config import ModelConfig
from lutdeploy.lut import DynamicLut, StaticLut, activate_weights, outer_entries, tiles_to_image
from lutdeploy.model import Block, LutTransformer, Stem

# What a graph of a precision computes in, islands aside. An int8 export is quantised afterwards.
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}


def _constant(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.detach().to(dtype).contiguous(), requires_grad=False)


class Matmul(nn.Module):
    """x·W + b, with W stored as [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _constant(weight.T, dtype)
        self.bias = _constant(bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Fold a LayerNorm's affine into the matmul after it: (weight, bias) in float64."""
    weight, bias = linear.weight.double(), linear.bias.double()
    return weight * norm.weight.double(), bias + weight @ norm.bias.double()


class TimeBias(nn.Module):
    """The whole time branch: from t [B] to the bias of every token, float32 [B, D].

    With ``matmul`` off, its small product is a multiplication and a sum. In TensorRT, GPUs before
    Ampere have no float32 matmul, and half the precision here would cost ten times the rounding
    of the bias itself, in every step alike.
    """

    frequencies: Tensor

    def __init__(self, stem: Stem, matmul: bool = True) -> None:
        super().__init__()
        assert stem.patch.bias is not None and stem.expand.bias is not None
        summed = stem.patch.weight.double().sum(dim=(2, 3))  # [D, stem]
        inner = stem.time.bias.double() + stem.expand.bias.double()  # [stem]
        weight = summed @ stem.time.weight.double()  # [D, 2h]
        self.weight = _constant(weight if matmul else weight.T, torch.float32)
        self.bias = _constant(summed @ inner + stem.patch.bias.double(), torch.float32)
        self.matmul = matmul
        self.register_buffer("frequencies", stem.frequencies.clone())

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies  # [B, h]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [B, 2h]
        if self.matmul:
            return F.linear(embedding, self.weight, self.bias)
        # The sum is over the middle axis: OpenVINO 2026.4 gets one over the last axis wrong.
        return (embedding[..., None] * self.weight).sum(1) + self.bias  # [B, 2h, D] to [B, D]


class FusedStem(nn.Module):
    """One convolution, the time bias, the position; then a dynamic LUT's tokens appended."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: LutTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        stem, quarter = model.stem, model.config.width // 4
        kernel = torch.einsum(
            "dsij,sc->dcij", stem.patch.weight.double(), stem.expand.weight.double().flatten(1)
        )  # [D, C, P, P]
        self.kernel = _constant(kernel, dtype)
        # rot(u) = [−u_b, u_a]: with the sign in the table, what is left swaps quarters.
        sign = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(quarter)
        self.register_buffer("cos", stem.cos.to(dtype))
        self.register_buffer("sin", (stem.sin * sign).to(dtype))
        if isinstance(model.lut, DynamicLut):
            tokens = F.pad(model.lut.tokens.detach(), (0, 0, self.config.image_tokens, 0))
            self.lut_tokens = _constant(tokens, dtype)  # [N + K, D], zero on the image's rows

    def forward(self, x: Tensor, time_bias: Tensor) -> Tensor:
        z = F.conv2d(x.to(self.dtype), self.kernel, stride=self.config.patch_size)  # [B, D, g, g]
        u = z.flatten(2).transpose(1, 2) + time_bias.to(self.dtype)[:, None]  # [B, N, D]
        row_a, row_b, column_a, column_b = u.chunk(4, dim=-1)
        swapped = torch.cat([row_b, row_a, column_b, column_a], dim=-1)
        tokens = u * self.cos + swapped * self.sin
        if self.config.lut == "static":
            return tokens
        # Appending by padding and adding needs no batch size in the graph.
        return F.pad(tokens, (0, 0, 0, self.config.entries)) + self.lut_tokens  # [B, N + K, D]


def attention_scale(config: ModelConfig) -> Tensor:
    """What each output of q, k and v is multiplied by, so that q·k is scaled: float64 [3·D]."""
    scale = torch.ones(3 * config.width, dtype=torch.float64)
    scale[: 2 * config.width] = (config.width // config.heads) ** -0.25
    return scale


class FusedBlock(nn.Module):
    """A transformer block: attention as matmul-softmax-matmul, with q and k already scaled."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dtype = config.heads, dtype
        self.width, self.eps = config.width, config.layer_norm_eps
        weight, bias = fold_norm(block.norm1, block.qkv)
        scale = attention_scale(config)
        self.qkv = Matmul(weight * scale[:, None], bias * scale, dtype)
        self.out = Matmul(block.out.weight, block.out.bias, dtype)
        self.gated = Matmul(*fold_norm(block.norm2, block.gated), dtype)

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (self.width,), eps=self.eps).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))  # [B, N, heads, D/heads]
            for part in self.qkv(self.normalise(x)).chunk(3, dim=-1)
        )
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)  # [B, heads, N, N]
        attended = scores.softmax(-1) @ v.permute(0, 2, 1, 3)  # [B, heads, N, D/heads]
        y = x + self.out(attended.permute(0, 2, 1, 3).flatten(2))
        value, gate = self.gated(self.normalise(y)).chunk(2, dim=-1)
        return y + value * F.silu(gate)


class FusedHead(nn.Module):
    """Tokens and LUT to pixels, float32; the activation of the weights is float32.

    The LUT product is float16 in float16, because GPUs before Ampere have no float32 matmul in
    TensorRT. In bfloat16 it is float32: its 8 bits would show in the picture.
    """

    def __init__(self, model: LutTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.logits = Matmul(model.head.weight, model.head.bias, dtype)

    def forward(self, tokens: Tensor, lut: Tensor) -> Tensor:
        weights = activate_weights(self.logits(tokens).float(), self.config.weights)  # [B, N, K]
        pixels = weights.to(self.dtype) @ lut.to(self.dtype)  # [B, N, C·P·P]
        return tiles_to_image(pixels.float(), self.config)


class FusedLut(nn.Module):
    """A dynamic LUT [B, K, C·P·P] from its tokens [B, K, D]. The outer products are float32."""

    def __init__(self, lut: DynamicLut, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = lut.config
        self.factors = Matmul(lut.factors.weight, lut.factors.bias, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return outer_entries(self.factors(tokens).float(), self.config)


class FusedNetwork(nn.Module):
    """x0 [B, C, S, S] from x [B, C, S, S] and the time bias [B, D]; the core of every graph."""

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        dtype = DTYPES[precision]
        self.config = model.config
        self.stem = FusedStem(model, dtype)
        blocks = (block for block in model.blocks if isinstance(block, Block))
        self.blocks = nn.ModuleList(FusedBlock(b, model.config, dtype) for b in blocks)
        self.head = FusedHead(model, dtype)
        if isinstance(model.lut, StaticLut):
            self.lut: nn.Module | nn.Parameter = _constant(model.lut(), self.head.dtype)
        else:
            self.lut = FusedLut(model.lut, dtype)

    def forward(self, x: Tensor, time_bias: Tensor) -> Tensor:
        tokens = self.stem(x, time_bias)
        for block in self.blocks:
            tokens = block(tokens)
        if isinstance(self.lut, nn.Parameter):
            return self.head(tokens, self.lut)
        n, k = self.config.image_tokens, self.config.entries
        image_tokens, lut_tokens = tokens.split([n, k], dim=1)
        return self.head(image_tokens, self.lut(lut_tokens))


class Sampler(nn.Module):
    """x' = a·x + b·x0 + c·x0_prev, each coefficient [B] or [1]."""

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        x0_prev: Tensor | None,
    ) -> Tensor:
        following = a.reshape(-1, 1, 1, 1) * x + b.reshape(-1, 1, 1, 1) * x0
        if c is None or x0_prev is None:
            return following
        return following + c.reshape(-1, 1, 1, 1) * x0_prev


class StepGraph(nn.Module):
    """The ``step`` graph, see :func:`lutdeploy.signature.step_signature`."""

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        self.time = TimeBias(model.stem, matmul=precision != "fp16")
        self.network = FusedNetwork(model, precision)
        self.sampler = Sampler()

    def forward(
        self, x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor, x0_prev: Tensor
    ) -> tuple[Tensor, Tensor]:
        x0 = self.network(x, self.time(t))
        return self.sampler(x, x0, a, b, c, x0_prev), x0


class FixedStepGraph(nn.Module):
    """A ``per-step`` graph.

    Its step's values are arguments while it is traced, because constants would be folded away;
    the exporter makes initializers of them.
    """

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        self.network = FusedNetwork(model, precision)
        self.sampler = Sampler()

    def forward(
        self,
        x: Tensor,
        time_bias: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None = None,
        x0_prev: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x0 = self.network(x, time_bias)
        return self.sampler(x, x0, a, b, c, x0_prev), x0
