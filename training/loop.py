"""The training loop: a generator of progress, with checkpoints that survive kill −9.

All randomness of a step is a function of (seed, step), so the state to resume from is the
weights, their averages, what the optimisers keep and the step number.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.errors import NonFiniteError, UsageError
from lutdeploy.model import LutTransformer
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


def _begin(run: Run, state: TrainingState) -> None:
    """Clear what a kill left, and bring the run's files to the state's step."""
    for path in (run.settings, run.model, run.training_state, run.log):
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
    """Train, yielding after every step.

    Args:
        run: where everything is written; the caller holds its lock.
        processes: those that train together; this one alone, on the CPU, by default.
        resume: continue from the run's training state, if it has one yet.
        should_stop: asked after every step; true in any process saves and ends.
        peak: FLOP/s of matrix products in the settings' precision, of all processes together.
    """
    cadence = cadence or Cadence()
    processes = processes or Processes("cpu")
    place, part = processes.device, processes.part(settings.batch)
    perceptual = load_perceptual(place) if settings.perceptual == "lpips" else None
    chosen, held = data.split(settings.held_out, settings.seed)
    resumes = resume and run.training_state.is_file()
    first = None  # images for the first weights; a state that is read needs none
    if settings.start == "copy" and settings.init is None and not resumes:
        first = torch.from_numpy(data.images[evenly_spaced(chosen)])
    state = TrainingState(settings, place, perceptual, first, resumes)
    if resumes:
        state.restore(run, len(chosen))
        if settings.steps < state.step:
            raise UsageError(f"--steps {settings.steps}: {run.path} has {state.step} steps already")
    processes.wait()  # until all have read what the first writes next
    if processes.writes:
        _begin(run, state)
    pixels, held_pixels = on_device(data.images, place), data.images[held[:HELD_OUT_IMAGES]]
    batches = batch_indices(len(chosen), settings.batch, settings.seed, state.step)
    compute = processes.join(state.objective)
    if settings.compile:
        compute = torch.compile(compute, dynamic=False)  # type: ignore[assignment]
    clock = _Clock(settings, peak, state.step)

    while state.step < settings.steps:
        step = state.step
        generator = _step_generator(settings.seed, step, place)
        index = torch.from_numpy(chosen[next(batches)])
        x = mirror(_floats(pixels[index], place), settings.flip, generator)
        t = sample_timesteps(len(x), settings, generator)
        noise = torch.randn(x.shape, generator=generator, device=place)
        if settings.dropout:  # its masks depend on the step and the process alone
            torch.manual_seed(generator.initial_seed() + processes.rank)
        loss_tensor = compute(x[part], noise[part], t[part])
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
            if len(held) and (ends or state.step % cadence.held_out == 0):
                losses = (
                    held_out_loss(average, held_pixels, settings, place, perceptual)
                    for average in state.averages
                )
                held_out = state.choose(list(losses))
            if processes.writes:
                if ends or state.step % cadence.checkpoint == 0:
                    state.save(run, len(chosen))
                if ends or state.step % cadence.picture == 0:
                    write_pictures(state, run)
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
