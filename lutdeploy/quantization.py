"""INT8 for the transformer's products: what it costs, simulated in PyTorch.

Quantised are the six D×D products of each block, fused into three (q-k-v, out, gated); all else,
the head and the LUT above all, stays float. Both sides are symmetric: weights with a scale per
output channel, activations with one per tensor (Jacob et al. 2018, eq. 1 with zero point 0).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.fused import fold_norm
from lutdeploy.model import Block, LutTransformer
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Images, trajectory
from lutdeploy.schedule import Schedule, solver_schedule

LEVELS = 127  # of each sign; −128 is left out, so that both signs have the same scale
PRODUCTS = ("qkv", "out", "gated")
NORMS = {"qkv": "norm1", "gated": "norm2"}
CALIBRATION = solver_schedule("dpmpp-2m", 32)  # a trajectory across all timesteps
SENSITIVITY = solver_schedule("dpmpp-2m", 8)


def quantized(values: Tensor, peak: Tensor) -> Tensor:
    """``values`` on the int8 grid whose end is ``peak``, as floats again."""
    scale = peak.clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return (values / scale).round().clamp(-LEVELS, LEVELS) * scale


class Int8Linear(nn.Module):
    """A linear layer as INT8 computes it: float32 values on int8 grids.

    The activations' scale is that of the input itself, so no calibration has a part in it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", quantized(weight, weight.abs().amax(1, keepdim=True)))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(quantized(x, x.abs().amax()), self.weight, self.bias)


def product_names(model: LutTransformer) -> tuple[str, ...]:
    """What can be quantised: ``blocks.0.qkv``, ``blocks.0.out``, …"""
    return tuple(f"blocks.{k}.{name}" for k in range(len(model.blocks)) for name in PRODUCTS)


def with_int8_products(model: LutTransformer, names: Collection[str]) -> LutTransformer:
    """A copy of the model that computes the named products as INT8 does."""
    narrow = copy.deepcopy(model).eval().requires_grad_(False)
    for name in names:
        _, k, product = name.split(".")
        block = narrow.blocks[int(k)]
        assert isinstance(block, Block)
        linear = getattr(block, product)
        weight, bias = linear.weight, linear.bias
        if product in NORMS:  # folded, as in the graph: what is quantised is the plain LayerNorm
            norm = getattr(block, NORMS[product])
            weight, bias = fold_norm(norm, linear)
            plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
            setattr(block, NORMS[product], plain)
        setattr(block, product, Int8Linear(weight.float(), bias.float()))
    return narrow


@dataclass(frozen=True)
class Sensitivity:
    """What each product costs when it alone is INT8: rms error of x0, by product and step."""

    schedule: Schedule
    errors: dict[str, tuple[float, ...]]  # one for each step of the schedule

    def ranked(self) -> list[str]:
        """The products, the most sensitive (by its mean square over the steps) first."""
        costs = {name: float(np.square(row).mean()) for name, row in self.errors.items()}
        return sorted(costs, key=lambda name: -costs[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "timesteps": [row.t for row in self.schedule.rows],
            "rms": {name: [float(f"{e:.3g}") for e in row] for name, row in self.errors.items()},
        }


def measure_sensitivity(model: LutTransformer, noise: Images) -> Sensitivity:
    """Quantise one product at a time and compare x0 on the model's own trajectory.

    Args:
        model: float32, on the CPU.
        noise: float32 [n, C, S, S], where the trajectory starts.
    """
    schedule = SENSITIVITY
    states = list(trajectory(TorchDenoiser(model), noise, schedule))
    errors: dict[str, tuple[float, ...]] = {}
    for name in product_names(model):
        narrow = TorchDenoiser(with_int8_products(model, [name]))
        row = []
        for step, before, after in zip(schedule.rows, states[:-1], states[1:], strict=True):
            t = np.full(len(noise), step.t, np.float32)
            assert after.x0 is not None
            error = narrow.predict_x0(before.x, t) - after.x0
            row.append(float(np.sqrt(np.square(error, dtype=np.float64).mean())))
        errors[name] = tuple(row)
    return Sensitivity(schedule, errors)


def float_ladder(ranked: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What to keep in float32, ever more: none, the most sensitive, two, four … up to half."""
    yield ()
    count = 1
    while count <= len(ranked) // 2:
        yield tuple(ranked[:count])
        count *= 2
