"""Does a denoiser paint what the reference paints? Three levels, one verdict.

1. step: one step on identical inputs, at several timesteps.
2. trajectory: from identical noise, the drift after every step.
3. picture: the final images, clipped: max abs, PSNR, cosine.

A denoiser that also walks the trajectory by itself, on its device, is judged by the end of
that: it is what `lutdeploy sample` uses.

Where the limits come from. float32: rounding alone, 1e-4 absolute on images of unit scale
after a whole trajectory. fp16: what half precision costs on this very model, measured by
running PyTorch's own (torch.autocast, float16) on the same inputs; an export may err three
times as much, and its pictures must reach 40 dB. bf16: likewise with bfloat16, whose three bits
less are 18 dB: PyTorch's own pictures reach 42 dB on the embedded model, so the limit is 35 dB.
int8: likewise with the INT8 of :mod:`lutdeploy.quantization`, simulated in PyTorch; int8-bf16 is
that with all else in bfloat16.
Anything not finite fails everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lutdeploy.errors import NonFiniteError
from lutdeploy.images import to_uint8
from lutdeploy.model import LutTransformer
from lutdeploy.quantization import product_names, with_int8_products
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Denoiser, Images, StreamingDenoiser, batch_noise, trajectory
from lutdeploy.schedule import Schedule, Step, solver_schedule

FLOAT32_LIMIT = 1e-4  # absolute, on images of unit scale
HALF_FACTOR = 3.0
# dB; 80 dB: 2e-4 in every pixel
MIN_PSNR = {"fp32": 80.0, "fp16": 40.0, "bf16": 35.0, "int8": 35.0, "int8-bf16": 35.0}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8-bf16": torch.bfloat16}
TIMESTEPS = tuple(k / 10 for k in range(10))


@dataclass(frozen=True)
class Difference:
    """How far two image batches are apart. Infinite where anything is not finite."""

    max_abs: float
    rms: float
    psnr: float  # dB, of the images clipped to [−1, 1], range 2
    cosine: float


def difference(candidate: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Compare [..., C, S, S] arrays of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes {candidate.shape} and {reference.shape} differ")
    ours, theirs = candidate.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Difference(math.inf, math.inf, -math.inf, -1.0)
    error = ours - theirs
    clipped = np.clip(ours, -1, 1) - np.clip(theirs, -1, 1)
    mse = float(np.square(clipped).mean())
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return Difference(
        max_abs=float(np.abs(error).max()),
        rms=float(np.sqrt(np.square(error).mean())),
        psnr=math.inf if mse == 0 else 10 * math.log10(4 / mse),
        cosine=float((ours * theirs).sum()) / norms if norms else float(norms == 0),
    )


@dataclass(frozen=True)
class Check:
    """One comparison: passed when ``value`` is finite and on the right side of ``limit``."""

    level: str  # "step", "trajectory" or "picture"
    what: str
    measure: str  # "max abs", "rms" or "PSNR dB"
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        # A limit is infinite when PyTorch's own half precision overflows: no evidence.
        if math.isnan(self.value) or not math.isfinite(self.limit):
            return False
        return self.value >= self.limit if self.measure == "PSNR dB" else self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """All checks of one denoiser, the drift of its trajectory, and the final difference."""

    precision: str
    schedule: Schedule
    images: int
    checks: tuple[Check, ...]
    drift: tuple[float, ...]  # rms after each step; of a loop graph the end alone
    final: Difference

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def failures(self) -> list[str]:
        """A line for each failed check."""
        return [
            f"{c.level}, {c.what}: {c.measure} {c.value:.3g}, limit {c.limit:.3g}"
            for c in self.checks
            if not c.passed
        ]

    @classmethod
    def without_checks(cls, precision: str, schedule: Schedule) -> Report:
        """Of a denoiser that was refused before it was compared."""
        nothing = Difference(math.inf, math.inf, -math.inf, -1.0)
        return cls(precision, schedule, 0, (), (), nothing)


def _limits(reference: NDArray[Any], half: NDArray[Any] | None) -> tuple[float, float]:
    """The limits of (max abs, rms) for arrays that should equal ``reference``.

    ``half`` is what the narrow precision makes of the same inputs in PyTorch, None for float32.
    """
    if half is not None:
        cost = difference(half, reference)
        return HALF_FACTOR * cost.max_abs, HALF_FACTOR * cost.rms
    scale = max(1.0, float(np.sqrt(np.square(reference, dtype=np.float64).mean())))
    return FLOAT32_LIMIT * scale, FLOAT32_LIMIT * scale


def _step_rows(candidate: Denoiser) -> list[Step]:
    """Rows for level 1: those of its own schedule, or every tenth of t with all coefficients."""
    if candidate.schedule is None:
        last = solver_schedule("euler", 64).rows[-1].t
        return [Step(t, 0.5, 0.75, -0.25) for t in (*TIMESTEPS, last)]
    rows = candidate.schedule.rows
    picked = sorted({round(k * (len(rows) - 1) / 10) for k in range(11)})
    return [rows[k] for k in picked]


def check_steps(
    reference: Denoiser, candidate: Denoiser, half: TorchDenoiser | None, noise: Images
) -> Iterator[Check]:
    """Level 1: both outputs of one step, from inputs that the reference made.

    x_t is t·x0 + (1−t)·noise, with x0 the reference's prediction from the noise alone.
    """
    x0_prev = reference.predict_x0(noise, np.zeros(len(noise), np.float32))
    for row in _step_rows(candidate):
        x = np.float32(row.t) * x0_prev + np.float32(1 - row.t) * noise
        expected = reference.step(x, row, x0_prev)
        found = candidate.step(x, row, x0_prev)
        halves = half.step(x, row, x0_prev) if half else (None, None)
        for name, ours, theirs, lossy in zip(
            ("x_next", "x0"), found, expected, halves, strict=True
        ):
            limit, _ = _limits(theirs, lossy)
            value = difference(ours, theirs).max_abs
            yield Check("step", f"{name} at t = {row.t:.4g}", "max abs", value, limit)


def _states(denoiser: Denoiser, noise: Images, schedule: Schedule) -> list[Images]:
    """x after each step; filled with NaN from where the sampler gave up."""
    states: list[Images] = []
    try:
        for state in trajectory(denoiser, noise, schedule):
            if state.step:
                states.append(state.x)
    except NonFiniteError:
        missing = (1 if denoiser.whole_trajectory else schedule.steps) - len(states)
        states += [np.full_like(noise, np.nan)] * missing
    return states


def _streamed(
    denoiser: StreamingDenoiser, noise: Images, schedule: Schedule, pixels: bool
) -> NDArray[Any]:
    """The end of the trajectory as the denoiser walks it by itself; NaN where it gave up."""
    try:
        parts = [e for _, e in denoiser.stream([(range(len(noise)), noise)], schedule, pixels)]
    except NonFiniteError:
        return np.full_like(noise, np.nan)
    return np.concatenate(parts)


def narrow_reference(model: LutTransformer, precision: str) -> TorchDenoiser | None:
    """PyTorch's own fp16 or bf16, its simulated int8, or both; None for fp32."""
    if precision == "fp32":
        return None
    if precision.startswith("int8"):
        model = with_int8_products(model, product_names(model))
    return TorchDenoiser(model, autocast=HALVES.get(precision))


def compare(
    model: LutTransformer,
    candidate: Denoiser,
    precision: str,
    schedule: Schedule | None = None,
    noise: Images | None = None,
    levels: Sequence[str] = ("step", "trajectory", "picture"),
    reference: Denoiser | None = None,
) -> Report:
    """Compare a denoiser with a float32 reference on the CPU.

    Args:
        model: what both compute; what a narrow precision costs it in PyTorch sets the limits.
        candidate: what is judged.
        precision: "fp32", "fp16", "bf16", "int8" or "int8-bf16", which decides the limits.
        schedule: the trajectory; by default the candidate's own, else 64 Euler steps.
        noise: [n, C, S, S]; by default that of images 0 to 3 of seed 0.
        levels: which levels to run; a loop graph has no "step".
        reference: what is right; by default the PyTorch model in float32.
    """
    reference = reference or TorchDenoiser(model)
    half = narrow_reference(model, precision)
    schedule = schedule or candidate.schedule or solver_schedule("euler", 64)
    if noise is None:
        noise = batch_noise(0, range(4), model.config.image_shape)
    checks: list[Check] = []
    if "step" in levels and not candidate.whole_trajectory:
        checks += check_steps(reference, candidate, half, noise)
    drift: list[float] = []
    final = Difference(0.0, 0.0, math.inf, 1.0)
    if "trajectory" in levels or "picture" in levels:
        found = _states(candidate, noise, schedule)
        expected = _states(reference, noise, schedule)[-len(found) :]
        lossy = _states(half, noise, schedule)[-len(found) :] if half else [None] * len(found)
        first = schedule.steps - len(found) + 1
        worst: Check | None = None
        for k, (ours, theirs, other) in enumerate(zip(found, expected, lossy, strict=True), first):
            _, limit = _limits(theirs, other)
            drift.append(difference(ours, theirs).rms)
            check = Check("trajectory", f"drift after step {k}", "rms", drift[-1], limit)
            # Of 64 steps one is kept: the first that fails, else the nearest to its limit.
            if worst is None or (worst.passed and _nearness(check) > _nearness(worst)):
                worst = check
        streaming = candidate if isinstance(candidate, StreamingDenoiser) else None
        ends = _streamed(streaming, noise, schedule, False) if streaming else found[-1]
        final = difference(ends, expected[-1])
        limit, _ = _limits(expected[-1], lossy[-1])
        if "trajectory" in levels and worst is not None:
            checks.append(worst)
            checks.append(Check("trajectory", "final state", "max abs", final.max_abs, limit))
        if "picture" in levels:
            checks.append(Check("picture", "images", "PSNR dB", final.psnr, MIN_PSNR[precision]))
            if streaming and math.isfinite(final.max_abs):
                pixels = _streamed(streaming, noise, schedule, True).astype(np.int16)
                apart = float(np.abs(pixels - to_uint8(ends)).max())
                checks.append(Check("picture", "pixels made on the device", "max abs", apart, 1.0))
    return Report(precision, schedule, len(noise), tuple(checks), tuple(drift), final)


def _nearness(check: Check) -> float:
    """value/limit, infinite for a failed check."""
    if not check.passed:
        return math.inf
    return check.value / check.limit if check.limit else 0.0
