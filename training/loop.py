"""The training loop: a generator of progress, with checkpoints that survive kill −9.

All randomness of a step is a function of (seed, step), so the state to resume from is
the weights, the EMA, the optimiser's moments and the step number.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.errors import ArtefactError, ConfigError, NonFiniteError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.training import augmentation, pictures
from lutdeploy.training.data import ImageSet, batch_indices
from lutdeploy.training.losses import Objective, Perceptual, load_perceptual, sample_timesteps
from lutdeploy.training.processes import Processes
from lutdeploy.training.recipes import TrainSettings
from lutdeploy.training.start import spread
from lutdeploy.training.state import TrainingState, kept

HELD_OUT_IMAGES = 256
HELD_OUT_BATCH = 64
HELD_OUT_SEED = 1


@dataclass(frozen=True)
class Cadence:
    """How often what is written, in steps; the last step always writes."""

    checkpoint: int = 500
    picture: int = 500
    held_out: int = 250
    log: int = 10


@dataclass(frozen=True)
class Progress:
    """After ``step`` steps. ``held_out`` is the chosen average's last held-out loss, if any."""

    step: int
    loss: float
    held_out: float | None
    images_per_second: float
    of_peak: float | None  # FLOP/s of the model's products over the machine's peak, if known
    saved: bool


def resumable_settings(run: Run) -> TrainSettings:
    """The settings that a run was started with.

    Raises:
        ArtefactError: no such run, or damaged settings.
    """
    if not run.settings.is_file():
        raise ArtefactError(f"{run.path} holds no training run to resume; start one without it")
    try:
        return TrainSettings.from_dict(files.read_json(run.settings))
    except (ConfigError, AttributeError) as error:
        raise ArtefactError(f"{run.settings} is damaged: {error}") from error


def _step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    words = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


def on_device(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The images as uint8 [n, C, S, S]: on a GPU, if they fill no more than half of its memory."""
    images = torch.from_numpy(pixels)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return images.to(device)
    return images


def _floats(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, C, S, S] to float32 in [−1, 1] on the device."""
    return pixels.to(device).float().div_(127.5).sub_(1)


@torch.no_grad()
def held_out_loss(
    model: LutTransformer,
    pixels: NDArray[np.uint8],
    settings: TrainSettings,
    device: torch.device,
    perceptual: Perceptual | None = None,
) -> float:
    """The objective on held-out images with fixed timesteps and noise.

    Args:
        pixels: uint8 [n, C, S, S]; the first 256 are used.
    """
    objective = Objective(model, settings, perceptual).to(device)
    generator = _step_generator(HELD_OUT_SEED, 0, device)
    total, pixels = 0.0, pixels[:HELD_OUT_IMAGES]
    for start in range(0, len(pixels), HELD_OUT_BATCH):
        x = _floats(torch.from_numpy(pixels[start : start + HELD_OUT_BATCH]), device)
        t = sample_timesteps(len(x), settings, generator)
        noise = torch.randn(x.shape, generator=generator, device=device)
        total += objective(x, noise, t).item() * len(x)
    return total / len(pixels)


def write_pictures(state: TrainingState, run: Run) -> None:
    """Pictures of the chosen average at the current step."""
    for name, picture in pictures.of_model(state.ema).items():
        path = run.pictures / f"{name}-{state.step:06d}.png"
        files.write_atomic(path, images.encode_png(picture))


def _cut_log(run: Run, step: int) -> None:
    """Drop log lines past ``step``, and a line that a kill left half written."""
    if not run.log.is_file():
        return
    kept = []
    for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write_atomic(run.log, "".join(kept).encode())


def train(
    settings: TrainSettings,
    data: ImageSet,
    run: Run,
    *,
    device: str = "cpu",
    processes: Processes | None = None,
    resume: bool = False,
    cadence: Cadence | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    peak: float | None = None,
) -> Iterator[Progress]:
    """Train, yielding after every step.

    Args:
        settings: what decides the numbers.
        data: from :mod:`lutdeploy.training.data`.
        run: where everything is written; the caller holds its lock.
        device: a torch device.
        processes: those that train together; this one alone by default.
        resume: continue from the run's training state, if it has one yet.
        cadence: how often to write.
        should_stop: asked after every step; true in any process saves and ends.
        peak: FLOP/s of matrix products in the settings' precision, of all processes together.

    Raises:
        NonFiniteError: NaN or Inf in the loss or the state; the last checkpoint stays as it is.
        BackendError: the perceptual loss cannot be loaded.
        ArtefactError: a damaged training state.
        UsageError: it has more steps already, or other images; a batch that the processes
            cannot share evenly.
    """
    cadence = cadence or Cadence()
    processes = processes or Processes(device)
    place, part = processes.device, processes.part(settings.batch)
    perceptual = load_perceptual(place) if settings.perceptual == "lpips" else None
    chosen, held = data.split(settings.held_out, settings.seed)
    resumes = resume and run.training_state.is_file()
    seen = None  # what a state that is read does not need
    if settings.start == "copy" and not resumes:
        seen = torch.from_numpy(data.images[spread(chosen)])
    state = TrainingState(settings, place, perceptual, seen)
    if resumes:
        state.restore(run, len(chosen))
        if settings.steps < state.step:
            raise UsageError(f"--steps {settings.steps}: {run.path} has {state.step} steps already")
    processes.wait()  # all have read what the first may now write
    if processes.writes:
        _begin(run, state)
    pixels, held_pixels = on_device(data.images, place), data.images[held[:HELD_OUT_IMAGES]]
    batches = batch_indices(len(chosen), settings.batch, settings.seed, state.step)
    compute = processes.join(state.objective)
    if settings.compile:
        compute = torch.compile(compute, dynamic=False)  # type: ignore[assignment]
    held_out: float | None = None
    clock = _Clock(settings, peak, state.step)

    while state.step < settings.steps:
        step = state.step
        generator = _step_generator(settings.seed, step, place)
        index = torch.from_numpy(chosen[next(batches)])
        x = augmentation.mirror(_floats(pixels[index], place), settings.flip, generator)
        t = sample_timesteps(len(x), settings, generator)
        noise = torch.randn(x.shape, generator=generator, device=place)
        batch = [x, noise, t]
        if settings.affine:
            batch[0], told = augmentation.affine(x, settings.affine, generator)
            batch.append(told)
        if settings.dropout:  # of this step and this part, not of what was drawn before
            torch.manual_seed(generator.initial_seed() + processes.rank)
        loss_tensor = compute(*(values[part] for values in batch))
        loss_tensor.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.parameters, settings.clip_norm)
        state.advance(settings.learning_rate(step))
        asked = torch.full_like(loss_tensor, float(should_stop()))
        loss, stop = processes.mean(torch.stack([loss_tensor.detach(), asked])).tolist()
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss is {loss} at step {step + 1}; {kept(run)}")

        ends = bool(stop) or state.step == settings.steps
        with clock.paused():
            fresh = len(held) > 0 and (ends or state.step % cadence.held_out == 0)
            if fresh:
                held_out = state.choose(
                    [
                        held_out_loss(average, held_pixels, settings, place, perceptual)
                        for average in state.averages
                    ]
                )
            if processes.writes:
                if ends or state.step % cadence.checkpoint == 0:
                    state.save(run, len(chosen))
                if ends or state.step % cadence.picture == 0:
                    write_pictures(state, run)
        if ends or fresh or state.step % cadence.log == 0:
            clock.read(state.step)
            if processes.writes:
                rates = {"images_per_second": round(clock.images_per_second, 1)}
                if clock.of_peak is not None:
                    rates["of_peak"] = round(clock.of_peak, 3)
                line = {"step": state.step, "loss": loss, "lr": settings.learning_rate(step)}
                _log(run, {**line, **rates, **({"held_out_loss": held_out} if fresh else {})})
        yield Progress(state.step, loss, held_out, clock.images_per_second, clock.of_peak, ends)
        if ends:
            processes.wait()  # for what is being written
            return


def _begin(run: Run, state: TrainingState) -> None:
    """Clear what a kill left, and bring the run's files to the state's step."""
    for path in (run.settings, run.model, run.training_state, run.log):
        files.clear_leftovers(run.path, path.name)
    files.clear_leftovers(run.pictures, "*.png")
    files.clear_leftovers(run.averages, "*.safetensors")
    if state.step:
        state.save_models(run)  # a kill between the files leaves them one checkpoint behind
    files.write_json(run.settings, state.settings.to_dict())
    _cut_log(run, state.step)


def _log(run: Run, line: dict[str, Any]) -> None:
    with run.log.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


class _Clock:
    """Images a second since the last reading, without the pauses."""

    def __init__(self, settings: TrainSettings, peak: float | None, step: int) -> None:
        self.settings, self.peak = settings, peak
        self.images_per_second = 0.0
        self.of_peak: float | None = None
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step, self._start, self._pauses = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - start

    def read(self, step: int) -> None:
        seconds = max(time.perf_counter() - self._start - self._pauses, 1e-9)
        self.images_per_second = (step - self._step) * self.settings.batch / seconds
        if self.peak is not None:
            flops = self.settings.training_flops() * self.images_per_second
            self.of_peak = flops / self.peak
        self._restart(step)
