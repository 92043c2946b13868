"""The training loop: a generator of progress, with checkpoints that survive kill −9.

:func:`learn` is the loop for whatever is learnt, a :class:`Task`; :func:`train` is that for
denoising images.

All randomness of a step is a function of (seed, step), so the state to resume from is the
weights, their averages, what the optimisers keep and the step number.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.errors import NonFiniteError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.schedule import Schedule
from lutdeploy.training import pictures
from lutdeploy.training.data import ImageSet, batch_indices
from lutdeploy.training.losses import Objective, Perceptual, load_perceptual, sample_timesteps
from lutdeploy.training.processes import Processes
from lutdeploy.training.recipes import TrainSettings
from lutdeploy.training.start import evenly_spaced
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


class Progress(msgspec.Struct, omit_defaults=True):
    """A step that is done; of some steps it is a line of train.jsonl."""

    step: int
    loss: float
    lr: float
    images_per_second: float
    of_peak: float | None = None  # FLOP/s of the model's matrix products over the machine's peak
    held_out_loss: float | None = None  # of the chosen average, where it was computed


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
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


def mirror(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mirror a ``share`` of the images x [B, C, S, S], left to right."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < share
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


@torch.no_grad()
def held_out_loss(
    model: LutTransformer,
    pixels: NDArray[np.uint8],
    settings: TrainSettings,
    device: torch.device,
    perceptual: Perceptual | None = None,
) -> float:
    """The objective on held-out images, uint8 [n, C, S, S], with fixed timesteps and noise."""
    objective = Objective(model, settings, perceptual).to(device)
    generator = step_generator(HELD_OUT_SEED, 0, device)
    total, pixels = 0.0, pixels[:HELD_OUT_IMAGES]
    for start in range(0, len(pixels), HELD_OUT_BATCH):
        x = _floats(torch.from_numpy(pixels[start : start + HELD_OUT_BATCH]), device)
        t = sample_timesteps(len(x), settings, generator)
        noise = torch.randn(x.shape, generator=generator, device=device)
        total += objective(x, noise, t).item() * len(x)
    return total / len(pixels)


class Task(Protocol):
    """What a run learns. Batches are functions of (seed, step) and the model alone."""

    count: int  # of what it learns from; a resumed run needs as many
    schedule: Schedule  # of the pictures made while training

    def record(self, run: Run) -> None:
        """Note in the run what it learns from."""

    def objective(self, model: LutTransformer, settings: TrainSettings) -> nn.Module:
        """The module around the model that computes the loss of a batch."""

    def batches(self, model: LutTransformer, start: int) -> Iterator[tuple[Tensor, ...]]:
        """What the objective takes, from a step on: whole batches, [B, …] each."""

    def held_out(self, model: LutTransformer) -> float | None:
        """How far off a model is on what is never trained on; None where nothing is held out."""


class Denoising:
    """Images, noise and timesteps, as the recipe draws them."""

    schedule = pictures.REFERENCE

    def __init__(self, settings: TrainSettings, data: ImageSet, device: torch.device) -> None:
        self._settings, self._data, self._device = settings, data, device
        self.chosen, held = data.split(settings.held_out, settings.seed)
        self.count = len(self.chosen)
        self._pixels = on_device(data.images, device)
        self._held = data.images[held[:HELD_OUT_IMAGES]]
        lpips = settings.perceptual == "lpips"
        self._perceptual = load_perceptual(device) if lpips else None

    def record(self, run: Run) -> None:
        if self._data.sha256:
            self._data.write_list(run.images)

    def objective(self, model: LutTransformer, settings: TrainSettings) -> nn.Module:
        return Objective(model, settings, self._perceptual)

    def batches(self, model: LutTransformer, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Clean images x, noise, timesteps t [B]."""
        settings, place = self._settings, self._device
        indices = batch_indices(self.count, settings.batch, settings.seed, start)
        for step, index in enumerate(indices, start):
            generator = step_generator(settings.seed, step, place)
            pixels = self._pixels[torch.from_numpy(self.chosen[index])]
            x = mirror(_floats(pixels, place), settings.flip, generator)
            t = sample_timesteps(len(x), settings, generator)
            yield x, torch.randn(x.shape, generator=generator, device=place), t

    def held_out(self, model: LutTransformer) -> float | None:
        if not len(self._held):
            return None
        return held_out_loss(model, self._held, self._settings, self._device, self._perceptual)


def write_pictures(state: TrainingState, run: Run, schedule: Schedule) -> None:
    """Pictures of the chosen average at the current step."""
    for name, picture in pictures.of_model(state.ema, schedule).items():
        path = run.pictures / f"{name}-{state.step:06d}.png"
        files.write_atomic(path, images.encode_png(picture))


def _begin(run: Run, state: TrainingState) -> None:
    """Clear what a kill left, and bring the run's files to the state's step."""
    for path in (run.settings, run.images, run.model, run.training_state, run.log):
        files.clear_leftovers(run.path, path.name)
    files.clear_leftovers(run.pictures, "*.png")
    files.clear_leftovers(run.averages, "*.safetensors")
    if state.step:
        state.save_models(run)  # a kill between the files leaves them one checkpoint behind
    files.write_json(run.settings, state.settings)
    if run.log.is_file():
        lines = []
        for line in run.log.read_bytes().splitlines():
            with contextlib.suppress(*files.BAD_JSON):  # a line that a kill left half written
                if msgspec.json.decode(line, type=Progress).step <= state.step:
                    lines.append(line + b"\n")
        files.write_atomic(run.log, b"".join(lines))


def train(
    settings: TrainSettings,
    data: ImageSet,
    run: Run,
    *,
    processes: Processes | None = None,
    resume: bool = False,
    cadence: Cadence | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    peak: float | None = None,
) -> Iterator[Progress]:
    """Learn to denoise images, yielding after every step; see :func:`learn`."""
    processes = processes or Processes("cpu")
    task = Denoising(settings, data, processes.device)
    first = None  # images for the first weights; a state that is read needs none
    if settings.start == "copy" and settings.init is None and not _resumes(run, resume):
        first = torch.from_numpy(data.images[evenly_spaced(task.chosen)])
    yield from learn(
        settings,
        task,
        run,
        processes=processes,
        resume=resume,
        cadence=cadence or Cadence(),
        should_stop=should_stop,
        peak=peak,
        images=first,
    )


def _resumes(run: Run, resume: bool) -> bool:
    return resume and run.training_state.is_file()


def learn(
    settings: TrainSettings,
    task: Task,
    run: Run,
    *,
    processes: Processes,
    resume: bool,
    cadence: Cadence,
    should_stop: Callable[[], bool],
    peak: float | None = None,
    images: Tensor | None = None,
) -> Iterator[Progress]:
    """Learn a task, yielding after every step.

    Args:
        run: where everything is written; the caller holds its lock.
        processes: those that train together.
        resume: continue from the run's training state, if it has one yet.
        should_stop: asked after every step; true in any process saves and ends.
        peak: FLOP/s of matrix products in the settings' precision, of all processes together.
        images: for a start as a copy, uint8 [n, C, S, S].
    """
    place, part = processes.device, processes.part(settings.batch)
    resumes = _resumes(run, resume)
    state = TrainingState(settings, place, task.objective, images, resumes)
    if resumes:
        state.restore(run, task.count)
        if settings.steps < state.step:
            raise UsageError(f"--steps {settings.steps}: {run.path} has {state.step} steps already")
    processes.wait()  # until all have read what the first writes next
    if processes.writes:
        task.record(run)  # first, since the settings make it a run
        _begin(run, state)
    batches = task.batches(state.model, state.step)
    compute = processes.join(state.objective)
    if settings.compile:
        compute = torch.compile(compute, dynamic=False)  # type: ignore[assignment]
    clock = _Clock(settings, peak, state.step)

    while state.step < settings.steps:
        step = state.step
        batch = next(batches)
        if settings.dropout:  # its masks depend on the step and the process alone
            seed = step_generator(settings.seed, step, place).initial_seed()
            torch.manual_seed(seed + processes.rank)
        loss_tensor = compute(*(of_all[part] for of_all in batch))
        loss_tensor.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.parameters, settings.clip_norm)
        state.advance()
        asked = torch.full_like(loss_tensor, float(should_stop()))
        loss, stop = processes.mean(torch.stack([loss_tensor.detach(), asked])).tolist()
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss is {loss} at step {step + 1}; {kept(run)}")

        ends = bool(stop) or state.step == settings.steps
        held_out = None
        with clock.paused():
            if ends or state.step % cadence.held_out == 0:
                losses = [task.held_out(average) for average in state.averages]
                held_out = state.choose([loss for loss in losses if loss is not None])
            if processes.writes:
                if ends or state.step % cadence.checkpoint == 0:
                    state.save(run, task.count)
                if ends or state.step % cadence.picture == 0:
                    write_pictures(state, run, task.schedule)
        logged = ends or held_out is not None or state.step % cadence.log == 0
        if logged:
            clock.read(state.step)
        progress = Progress(
            step=state.step,
            loss=loss,
            lr=settings.learning_rate(step),
            images_per_second=clock.images_per_second,
            of_peak=clock.of_peak,
            held_out_loss=held_out,
        )
        if logged and processes.writes:
            with run.log.open("ab") as log:
                log.write(msgspec.json.encode(progress) + b"\n")
        yield progress
        if ends:
            processes.wait()  # until the first has written everything
            return


class _Clock:
    """Images a second since the last reading, without the pauses."""

    def __init__(self, settings: TrainSettings, peak: float | None, step: int) -> None:
        self.settings, self.peak = settings, peak
        self.images_per_second = 0.0
        self.of_peak: float | None = None
        self._step, self._start, self._pauses = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - start

    def read(self, step: int) -> None:
        now = time.perf_counter()
        seconds = max(now - self._start - self._pauses, 1e-9)
        rate = (step - self._step) * self.settings.batch / seconds
        self.images_per_second = round(rate, 1)
        if self.peak is not None:
            self.of_peak = round(self.settings.training_flops() * rate / self.peak, 3)
        self._step, self._start, self._pauses = step, now, 0.0
