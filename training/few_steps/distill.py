"""Distillation to few steps: a student does in one step what its teacher does in several.

The teacher follows a fitted schedule in K segments, each of which can begin anywhere because its
history begins anew there. Composed, the rows of a segment are z' = a·z + Σ w·x0, with a the product
of theirs. The student learns the one prediction

    X = (z' − a·z) / (1 − a)

at (z, t) of the segment's beginning. X is a mixture of the teacher's predictions, so it is an
image, and the student's K steps z' = a·z + (1−a)·x0 are the teacher's if it paints X exactly. The
last row has a = 0. Nothing but the weights differs from other models.

First it learns from paths of the teacher that are kept on disk; in the last steps from where its
own steps lead it, with the teacher going on from there. Related: progressive distillation (Salimans
and Ho 2022), multistep consistency models (Heek et al. 2024).

An error of X reaches the end at about its size, whatever the segment (docs/solvers.md), so all
segments count alike.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.errors import UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.sampling import (
    Denoiser,
    Images,
    State,
    batch_noise,
    follow,
    noise_batches,
    resume,
    trajectory,
)
from lutdeploy.schedule import DISTILLED, Schedule, Step, fitted_schedule
from lutdeploy.training.data import batch_indices
from lutdeploy.training.few_steps.fit import Problem, fit_segments, segments_work
from lutdeploy.training.loop import HELD_OUT_BATCH, step_generator
from lutdeploy.training.recipes import (
    DataSplit,
    Distilled,
    Guidance,
    TrainSettings,
    train_settings,
)

TEACHER_STEPS = 16  # at least, and at least two a segment
FIT_IMAGES = 16
FIT_SEED = 1  # as of tune-steps
DRAW_BATCH = 64
HELD_OUT_PATHS = 256
ON_POLICY = 0.5  # of the steps

# What differs from recipe "modern": the weights are good already.
RECIPE = {
    "optimizer": "adamw",
    "lr": 3e-4,
    "warmup": 100,
    "ema": (0.99, 0.998),
    "start": "noise",  # in whose place the teacher's weights come
    "gram_weight": 0.0,
    "flip": 0.0,
    "velocity_floor": None,
    "t_mean": None,
    "held_out": 0.0,
}


def teacher_rows(
    engine: Denoiser, segments: int, on_progress: Callable[[float], None]
) -> tuple[Step, ...]:
    """The rows of the teacher: as many in each segment, the history beginning anew in each."""
    rows = max(2, -(-TEACHER_STEPS // segments))
    done, total = 0, 256 * FIT_IMAGES + segments_work(segments, rows, FIT_IMAGES)

    def on_work(images: int) -> None:
        nonlocal done
        done += images
        on_progress(min(1.0, done / total))

    noise = batch_noise(FIT_SEED, range(FIT_IMAGES), engine.config.image_shape)
    return fit_segments(Problem.of(engine, noise, on_work=on_work), segments, rows).rows


def student_schedule(rows: Sequence[Step], segments: int) -> Schedule:
    """The student's schedule: a row for each of the teacher's segments."""
    per = len(rows) // segments
    parts = [rows[start : start + per] for start in range(0, len(rows), per)]
    kept = [math.prod(row.a for row in part) for part in parts]
    return Schedule(
        DISTILLED,
        1.0,
        tuple(Step(part[0].t, a, 1 - a, 0.0) for part, a in zip(parts, kept, strict=True)),
        "tuned",
    )


def student_settings(
    teacher: Path,
    identity: dict[str, Any],
    rows: tuple[Step, ...],
    segments: int,
    paths: int,
    images: DataSplit | None,
    guidance: Guidance | None = None,
    **fields: Any,
) -> TrainSettings:
    """The settings of a student.

    Args:
        teacher: its model file, which must be what the engine computes.
        identity: of the engine that walks the paths.
        rows: from :func:`teacher_rows`.
        segments: the student's steps.
        paths: to learn from; some more are held out.
        images: what the teacher was trained on, if it says so.
        guidance: of the teacher.
        fields: of :class:`TrainSettings`; None is the recipe's value or the default.
    """
    config, about = read_metadata(teacher)
    distilled = Distilled(
        teacher=about.get("name")
        or (teacher.parent.name if teacher.name == MODEL else teacher.stem),
        engine=identity,
        rows=rows,
        schedule=student_schedule(rows, segments),
        paths=paths,
        held_out=max(1, min(HELD_OUT_PATHS, paths // 8)),
        on_policy=ON_POLICY,
        images=images,
        guidance=guidance,
    )
    settings = train_settings(
        config,
        data=(images.data if images else None) or f"paths of {distilled.teacher}",
        init=str(teacher),
        init_sha256=str(identity["model_sha256"]),
        **{**RECIPE, **{name: value for name, value in fields.items() if value is not None}},
    )
    return settings.changed(recipe="distill", distilled=msgspec.to_builtins(distilled))


def require_same_engine(run: Run, settings: TrainSettings, identity: dict[str, Any]) -> None:
    """Refuse to go on with another engine than that which drew the first paths."""
    assert settings.distilled is not None
    was = settings.distilled.engine
    for name, value in was.items():
        if identity.get(name) != value:
            raise UsageError(
                f"the paths of {run.path} are by another engine: {name} {value}, not "
                f"{identity.get(name)}. Name that engine with --backend, --export and --precision "
                f"(it was {was['backend']} on {was['device']}, export {was['export']}), or begin "
                "anew with another --out"
            )


def noise_seed(seed: int) -> int:
    """Of the paths' noise: none that anybody samples with, so that samples show unseen noise."""
    return int(np.random.SeedSequence((seed, 0xD157)).generate_state(1, np.uint64)[0])


def target(row: Step, z: Images, z_next: Images) -> Images:
    """X, with which a row of the student leads from z to z_next."""
    return np.asarray((z_next - np.float32(row.a) * z) / np.float32(row.b), np.float32)


class Paths:
    """The teacher's paths as the student's targets: float16 [n, K, C, S, S], in a file of the run.

    Path i depends on (seed, i) and the engine alone. The states follow from noise and targets. The
    file grows a batch at a time, and what a kill left half written is drawn again.
    """

    def __init__(self, run: Run, settings: TrainSettings) -> None:
        assert settings.distilled is not None
        self.of: Distilled = settings.distilled
        self.file, self.seed = run.paths, noise_seed(settings.seed)
        self.total = self.of.paths + self.of.held_out  # those held out are the last
        self.image = settings.model.image_shape
        self.shape = (self.of.schedule.steps, *self.image)
        self._bytes = 2 * math.prod(self.shape)

    def draw(self, teacher: Denoiser) -> Iterator[int]:
        """Draw what is missing; yields how many are there, first and after every batch."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        there = min(self.file.stat().st_size // self._bytes, self.total)
        done = there if there == self.total else there - there % DRAW_BATCH
        os.truncate(self.file, done * self._bytes)
        needed, free = (self.total - done) * self._bytes, shutil.disk_usage(self.file.parent).free
        if needed > free:
            raise UsageError(
                f"{self.total - done} paths need {needed / 1e9:.1f} GB, {self.file.parent} has "
                f"{free / 1e9:.1f} GB; choose fewer --paths or another --out"
            )
        yield done
        per, schedule = len(self.of.rows) // self.shape[0], fitted_schedule(self.of.rows)
        with self.file.open("ab") as file:
            for indices, z in noise_batches(
                self.seed, range(done, self.total), DRAW_BATCH, self.image
            ):
                targets = np.empty((len(z), *self.shape), np.float16)
                for state in trajectory(teacher, z, schedule, indices):
                    k, within = divmod(state.step, per)
                    if k and not within:
                        targets[:, k - 1] = target(self.of.schedule.rows[k - 1], z, state.x)
                        z = state.x
                file.write(targets.tobytes())
                file.flush()
                yield indices[-1] + 1

    def open(self) -> NDArray[np.float16]:
        """All of them, mapped from the file."""
        return np.memmap(self.file, np.float16, "r", shape=(self.total, *self.shape))


class Spectrum:
    """The cosine transform of images [n, C, S, S], and how much each frequency of it counts.

    Each half octave of frequencies is divided by the root of its amplitude: what the eye sees is
    faint, and plain squares would give it away.
    """

    def __init__(self, images: Images) -> None:
        side = images.shape[-1]
        k, i = np.arange(side)[:, None], np.arange(side)
        basis = np.cos(np.pi * (i + 0.5) * k / side) * np.sqrt(2 / side)  # orthonormal DCT-II
        basis[0] /= np.sqrt(2)
        self.basis = basis.astype(np.float32)
        power = np.square(self(images)).mean((0, 1))
        radius = np.hypot(k, i)
        edges = [-1.0, *(side * 2.0 ** np.arange(-5, 0.6, 0.5))]  # half octaves, to side·√2
        bands = [(radius > low) & (radius <= high) for low, high in itertools.pairwise(edges)]
        density = sum(band * power[band].mean() for band in bands if band.any()) + 1e-12
        weight = density**-0.25
        weight *= np.sqrt(power.sum() / (weight**2 * power).sum())
        self.weight = weight.astype(np.float32)  # [S, S]

    def __call__(self, images: Images) -> Images:
        return self.basis @ images @ self.basis.T


class TargetLoss(nn.Module):
    """The error of x0 in the cosine transform, half of it plain, half as a spectrum weighs it."""

    def __init__(self, model: LutTransformer, settings: TrainSettings, spectrum: Spectrum) -> None:
        super().__init__()
        self.model, self._bf16 = model, settings.precision == "bf16"
        weight = np.square(spectrum.weight)
        self.register_buffer("basis", torch.from_numpy(spectrum.basis), persistent=False)
        emphasis = torch.from_numpy((1 + weight / weight.mean()) / 2)
        self.register_buffer("emphasis", emphasis, persistent=False)

    def forward(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Of states z [B, C, S, S] at times t [B], whose targets are x [B, C, S, S]."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self._bf16):
            x0 = self.model(z, t).float()
        return ((self.basis @ (x0 - x) @ self.basis.T).square() * self.emphasis).mean()


class Distilling:
    """What a student learns, a :class:`lutdeploy.training.loop.Task`.

    In each batch every segment has its part of the images.
    """

    def __init__(
        self, settings: TrainSettings, paths: Paths, teacher: Denoiser, device: torch.device
    ) -> None:
        self._settings, self._device, self._teacher = settings, device, teacher
        self._paths, self._seed, self._image = paths.open(), paths.seed, paths.image
        self._rows = paths.of.rows
        self.count, self.schedule = paths.of.paths, paths.of.schedule
        self._spectrum = Spectrum(self._paths[self.count :, -1].astype(np.float32))
        self._on_policy_from = round(settings.steps * (1 - paths.of.on_policy))

    def record(self, run: Run) -> None:
        """Nothing: the paths and the list of the teacher's images are there already."""

    def objective(self, model: LutTransformer, settings: TrainSettings) -> nn.Module:
        return TargetLoss(model, settings, self._spectrum)

    def batches(self, model: LutTransformer, start: int) -> Iterator[tuple[Tensor, ...]]:
        """States, times, targets."""
        batch, seed, steps = self._settings.batch, self._settings.seed, self.schedule.steps
        segment = np.arange(batch) % steps
        t = torch.tensor([self.schedule.rows[k].t for k in segment], device=self._device)
        for step, index in enumerate(batch_indices(self.count, batch, seed, start), start):
            if step < self._on_policy_from:
                z, x = self._of_paths(index, segment)
            else:
                generator = step_generator(seed, step, torch.device("cpu"))
                noise = torch.randn((batch, *self._image), generator=generator).numpy()
                z, x = self._on_policy(model, noise, segment)
            yield torch.from_numpy(z).to(self._device), t, torch.from_numpy(x).to(self._device)

    def _of_paths(
        self, index: NDArray[np.intp], segment: NDArray[np.intp]
    ) -> tuple[Images, Images]:
        """State and target of a segment of each of these paths."""
        z = batch_noise(self._seed, index.tolist(), self._image)
        targets = self._paths[index].astype(np.float32)  # [B, K, C, S, S]
        for k, row in enumerate(self.schedule.rows[:-1]):
            on = segment > k
            z[on] = follow(row, z[on], targets[on, k])
        return z, targets[np.arange(len(index)), segment]

    def _on_policy(
        self, model: LutTransformer, z: Images, segment: NDArray[np.intp]
    ) -> tuple[Images, Images]:
        """Where the student's steps lead from noise, and its targets from there."""
        for k, row in enumerate(self.schedule.rows[:-1]):
            on = segment > k
            x0 = self._predict(model, z[on], row.t, self._settings.precision)
            z[on] = follow(row, z[on], x0)
        x, per = np.empty_like(z), len(self._rows) // self.schedule.steps
        for k, row in enumerate(self.schedule.rows):
            (its,) = np.nonzero(segment == k)
            until = fitted_schedule(self._rows[: per * (k + 1)])
            *_, last = resume(self._teacher, State(per * k, z[its], None), until, its.tolist())
            x[its] = target(row, z[its], last.x)
        return z, x

    @torch.no_grad()
    def _predict(
        self, model: LutTransformer, z: Images, t: float, precision: str = "fp32"
    ) -> Images:
        at = torch.full((len(z),), t, device=self._device)
        bf16 = precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            x0 = model(torch.from_numpy(z).to(self._device), at)
        return np.asarray(x0.float().cpu().numpy())

    def held_out(self, model: LutTransformer) -> float:
        """RMS between the ends of student and teacher, over the paths that are held out."""
        total, ends = 0.0, self._paths[:, -1]
        for start in range(self.count, len(ends), HELD_OUT_BATCH):
            indices = range(start, min(start + HELD_OUT_BATCH, len(ends)))
            z = batch_noise(self._seed, indices, self._image)
            for row in self.schedule.rows:
                x0 = self._predict(model, z, row.t)
                z = follow(row, z, x0)
            total += float(np.square(z - ends[indices[0] : indices[-1] + 1]).sum())
        return math.sqrt(total / ends[self.count :].size)
