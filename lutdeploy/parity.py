"""Does a denoiser paint what the reference paints? Three levels, one verdict.

1. step: one step on identical inputs, at several timesteps.
2. trajectory: from identical noise, the drift after every step.
3. picture: the final images, clipped: PSNR.

A denoiser that also streams whole trajectories on its device is judged by the end of those, since
`lutdeploy sample` uses them.

Where the limits come from:

- fp32: rounding alone, 1e-4 absolute on images of unit scale after a whole trajectory.
- fp16: the cost of half precision on this very model, measured by running PyTorch's own
  (torch.autocast, float16) on the same inputs. An export may err three times as much, and its
  pictures must reach 40 dB.
- bf16: likewise with bfloat16. Its three bits less cost 18 dB: PyTorch's own pictures reach 42 dB
  on the embedded model, so the limit is 35 dB.
- int8: likewise with the INT8 of :mod:`lutdeploy.quantization`, simulated in PyTorch. int8-bf16
  is that with all else in bfloat16.

What is not finite fails everywhere.
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
from lutdeploy.quantization import matmul_names, with_int8_matmuls
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Denoiser, Images, StreamingDenoiser, batch_noise, trajectory
from lutdeploy.schedule import Schedule, Step, solver_schedule

FLOAT32_LIMIT = 1e-4  # absolute, on images of unit scale
NARROW_FACTOR = 3.0  # how many times the error of PyTorch's own narrow precision may be
# In dB; 80 dB is an error of 2e-4 in every pixel.
MIN_PSNR = {"fp32": 80.0, "fp16": 40.0, "bf16": 35.0, "int8": 35.0, "int8-bf16": 35.0}
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8-bf16": torch.bfloat16}
TIMESTEPS = tuple(k / 10 for k in range(10))


@dataclass(frozen=True)
class Difference:
    """How far two image batches differ. Infinite where anything is not finite."""

    max_abs: float
    rms: float
    psnr: float  # dB, of the images clipped to [−1, 1], range 2
    cosine: float


def difference(candidate: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Compare [..., C, S, S] arrays of one shape."""
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
    """One comparison: passed where ``value`` is on the right side of ``limit``."""

    level: str  # "step", "trajectory" or "picture"
    what: str
    measure: str  # "max abs", "rms" or "PSNR dB"
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        # PyTorch's own half precision overflowed where a limit is infinite, which proves nothing.
        if math.isnan(self.value) or not math.isfinite(self.limit):
            return False
        return self.value >= self.limit if self.measure == "PSNR dB" else self.value <= self.limit

    @property
    def nearness(self) -> float:
        """value/limit of an error; infinite for a failed check."""
        if not self.passed:
            return math.inf
        return self.value / self.limit if self.limit else 0.0


@dataclass(frozen=True)
class Report:
    """The checks of one denoiser, the drift of its trajectory and the difference at its end."""

    precision: str
    schedule: Schedule
    images: int
    checks: tuple[Check, ...]
    drift: tuple[float, ...]  # rms after each step; of a loop graph only at the end
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
        """The report on a denoiser that was refused before it was compared."""
        nothing = Difference(math.inf, math.inf, -math.inf, -1.0)
        return cls(precision, schedule, 0, (), (), nothing)


def limits_of(expected: NDArray[Any], narrow: NDArray[Any] | None) -> tuple[float, float]:
    """The limits of (max abs, rms) for arrays that should equal ``expected``.

    ``narrow`` is what PyTorch's own narrow precision makes of the same inputs; None for float32.
    """
    if narrow is not None:
        cost = difference(narrow, expected)
        return NARROW_FACTOR * cost.max_abs, NARROW_FACTOR * cost.rms
    scale = max(1.0, float(np.sqrt(np.square(expected, dtype=np.float64).mean())))
    return FLOAT32_LIMIT * scale, FLOAT32_LIMIT * scale


def steps_to_check(schedule: Schedule | None) -> list[Step]:
    """The steps of level 1: eleven of an engine's only schedule, or every tenth of t."""
    if schedule is None:
        last = solver_schedule("euler", 64).rows[-1].t
        return [Step(t, 0.5, 0.75, -0.25) for t in (*TIMESTEPS, last)]
    rows = schedule.rows
    picked = sorted({round(k * (len(rows) - 1) / 10) for k in range(11)})
    return [rows[k] for k in picked]


@dataclass(frozen=True)
class StepCase:
    """One step that an engine should compute: inputs, what is right, and the limits."""

    row: Step
    x: Images
    x0_prev: Images
    expected: dict[str, Images]  # "x_next" and "x0"
    limits: dict[str, float]  # of the largest absolute error of each


def step_cases(
    reference: Denoiser, narrow: TorchDenoiser | None, rows: Sequence[Step], noise: Images
) -> Iterator[StepCase]:
    """A case for each row, from inputs that the reference made.

    x_t is t·x0 + (1−t)·noise, with x0 the reference's prediction from the noise alone.
    """
    x0_prev = reference.predict_x0(noise, np.zeros(len(noise), np.float32))
    for row in rows:
        x = np.float32(row.t) * x0_prev + np.float32(1 - row.t) * noise
        expected = reference.step(x, row, x0_prev)
        narrowed = narrow.step(x, row, x0_prev) if narrow else (None, None)
        limits = [limits_of(right, cost)[0] for right, cost in zip(expected, narrowed, strict=True)]
        names = ("x_next", "x0")
        yield StepCase(
            *(row, x, x0_prev),
            dict(zip(names, expected, strict=True)),
            dict(zip(names, limits, strict=True)),
        )


def check_steps(
    reference: Denoiser, candidate: Denoiser, narrow: TorchDenoiser | None, noise: Images
) -> Iterator[Check]:
    """Level 1: both outputs of one step."""
    for case in step_cases(reference, narrow, steps_to_check(candidate.schedule), noise):
        outputs = candidate.step(case.x, case.row, case.x0_prev)
        for (name, expected), found in zip(case.expected.items(), outputs, strict=True):
            value, limit = difference(found, expected).max_abs, case.limits[name]
            yield Check("step", f"{name} at t = {case.row.t:.4g}", "max abs", value, limit)


def _states(denoiser: Denoiser, noise: Images, schedule: Schedule) -> list[Images]:
    """x after each step; NaN from the step on where sampling failed."""
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
    """The end of the trajectory as the denoiser streams it; NaN where that failed."""
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
        model = with_int8_matmuls(model, matmul_names(model))
    return TorchDenoiser(model, autocast=AUTOCAST.get(precision))


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
        model: what both compute. What a narrow precision costs it in PyTorch sets the limits.
        candidate: what is judged.
        precision: "fp32", "fp16", "bf16", "int8" or "int8-bf16", which decides the limits.
        schedule: the trajectory; by default the candidate's own, else 64 Euler steps.
        noise: [n, C, S, S]; by default that of images 0 to 3 of seed 0.
        levels: which levels to run; a loop graph has no "step".
        reference: what is right; by default the PyTorch model in float32.
    """
    reference = reference or TorchDenoiser(model)
    narrow = narrow_reference(model, precision)
    schedule = schedule or candidate.schedule or solver_schedule("euler", 64)
    if noise is None:
        noise = batch_noise(0, range(4), model.config.image_shape)
    checks: list[Check] = []
    if "step" in levels and not candidate.whole_trajectory:
        checks += check_steps(reference, candidate, narrow, noise)
    drift: list[Check] = []
    final = Difference(0.0, 0.0, math.inf, 1.0)
    if "trajectory" in levels or "picture" in levels:
        found = _states(candidate, noise, schedule)
        expected = _states(reference, noise, schedule)[-len(found) :]
        narrowed = (
            _states(narrow, noise, schedule)[-len(found) :] if narrow else [None] * len(found)
        )
        states = zip(found, expected, narrowed, strict=True)
        for step, (x, x_expected, x_narrow) in enumerate(states, schedule.steps - len(found) + 1):
            _, limit = limits_of(x_expected, x_narrow)
            rms = difference(x, x_expected).rms
            drift.append(Check("trajectory", f"drift after step {step}", "rms", rms, limit))
        streaming = candidate if isinstance(candidate, StreamingDenoiser) else None
        ends = _streamed(streaming, noise, schedule, False) if streaming else found[-1]
        final = difference(ends, expected[-1])
        limit, _ = limits_of(expected[-1], narrowed[-1])
        if "trajectory" in levels:
            # One check for all steps: the first that fails, else the nearest to its limit.
            checks.append(max(drift, key=lambda check: check.nearness))
            checks.append(Check("trajectory", "final state", "max abs", final.max_abs, limit))
        if "picture" in levels:
            checks.append(Check("picture", "images", "PSNR dB", final.psnr, MIN_PSNR[precision]))
            if streaming and math.isfinite(final.max_abs):
                pixels = _streamed(streaming, noise, schedule, True).astype(np.int16)
                apart = float(np.abs(pixels - to_uint8(ends)).max())
                checks.append(Check("picture", "pixels made on the device", "max abs", apart, 1.0))
    rms_drift = tuple(check.value for check in drift)
    return Report(precision, schedule, len(noise), tuple(checks), rms_drift, final)
