"""INT8 for the transformer's matmuls, simulated in PyTorch.

Quantised are the six D×D matmuls of each block, fused into three (q-k-v, out, gated). The rest
stays float, above all the head and the LUT. Both sides are symmetric: weights with a scale per
output channel, activations with one per tensor (Jacob et al. 2018, eq. 1 with zero point 0).
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.fused import fold_norm
from lutdeploy.machine import int8_weight_bits
from lutdeploy.model import Block, LutTransformer

# On each side of 0; −128 is unused, so that both sides have the same scale.
LEVELS = 127
WEIGHT_LEVELS = {8: LEVELS, 7: 64}  # by bits
MATMULS = ("qkv", "out", "gated")
NORMS = {"qkv": "norm1", "gated": "norm2"}  # the LayerNorms that are folded into them


def quantized(values: Tensor, peak: Tensor, levels: int = LEVELS) -> Tensor:
    """Round ``values`` to the integer grid that ends at ``peak``; the result is float again."""
    scale = peak.clamp_min(torch.finfo(torch.float32).tiny) / levels
    return (values / scale).round().clamp(-levels, levels) * scale


class Int8Linear(nn.Module):
    """A linear layer as INT8 computes it: float32 values on int8 grids.

    The scale of the activations is that of the input itself, so it needs no calibration.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        peaks = weight.abs().amax(1, keepdim=True)
        self.register_buffer("weight", quantized(weight, peaks, WEIGHT_LEVELS[int8_weight_bits()]))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(quantized(x, x.abs().amax()), self.weight, self.bias)


def matmul_names(model: LutTransformer) -> tuple[str, ...]:
    """The matmuls that can be quantised: ``blocks.0.qkv``, ``blocks.0.out``, …"""
    return tuple(f"blocks.{k}.{name}" for k in range(len(model.blocks)) for name in MATMULS)


def with_int8_matmuls(model: LutTransformer, names: Collection[str]) -> LutTransformer:
    """A copy of the model that computes the named matmuls as INT8 does."""
    narrow = copy.deepcopy(model).eval().requires_grad_(False)
    for name in names:
        _, k, matmul = name.split(".")
        block = narrow.blocks[int(k)]
        assert isinstance(block, Block)
        linear = getattr(block, matmul)
        weight, bias = linear.weight, linear.bias
        if matmul in NORMS:  # as in the graph, where the input is the LayerNorm without affine
            norm = getattr(block, NORMS[matmul])
            weight, bias = fold_norm(norm, linear)
            plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
            setattr(block, NORMS[matmul], plain)
        setattr(block, matmul, Int8Linear(weight.float(), bias.float()))
    return narrow
