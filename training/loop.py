"""The training loop: a generator of progress, with checkpoints that survive kill −9.

All randomness of a step is a function of (seed, step), so the state to resume from is
the weights, the EMA, the optimiser's moments and the step number.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutdeploy import bundle, checkpoint, images
from lutdeploy.errors import ArtefactError, ConfigError, NonFiniteError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import batch_noise, trajectory
from lutdeploy.solvers import step_table
from training.data import ImageSet, batch_indices
from training.losses import Perceptual, load_perceptual, objective, sample_timesteps
from training.recipes import TrainSettings

HELD_OUT_IMAGES = 256
HELD_OUT_SEED = 1
PICTURE_IMAGES = 8


@dataclass(frozen=True)
class Schedule:
    """How often what is written, in steps; the last step always writes."""

    checkpoint: int = 500
    picture: int = 500
    held_out: int = 250
    log: int = 10


@dataclass(frozen=True)
class Progress:
    """After ``step`` steps. ``held_out`` is the EMA's last held-out loss, if any."""

    step: int
    loss: float
    held_out: float | None
    images_per_second: float
    saved: bool


class TrainingState:
    """Weights, EMA, optimiser and step: all that a resumed run needs."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.step = 0
        self.model = LutTransformer(settings.model).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                yield f"{kind}/{name}", self.optimizer.state[parameter][kind]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        named = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        named |= {f"ema/{name}": value for name, value in self.ema.state_dict().items()}
        return named | dict(self._moments())

    def save(self, run: bundle.Run, images: int) -> None:
        """Write the state, then the model people use; each atomically.

        Raises:
            NonFiniteError: NaN or Inf in the state; nothing is written.
        """
        tensors = {name: value.detach().cpu() for name, value in self.tensors().items()}
        for name, value in tensors.items():  # the loss shows it only one step later
            if not value.isfinite().all():
                raise NonFiniteError(f"NaN or Inf in {name} at step {self.step}; {_kept(run)}")
        metadata = {"step": str(self.step), "images": str(images)}
        bundle.write_atomic(run.training_state, save(tensors, metadata))
        self.save_model(run)

    def save_model(self, run: bundle.Run) -> None:
        """Write the model people use: the EMA."""
        about = {"origin": "lutdeploy train", "step": self.step, "data": self.settings.data}
        checkpoint.save_model(self.ema, run.model, about=about)

    def restore(self, run: bundle.Run, images: int) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: damaged, or of a model of another shape.
            UsageError: the number of training images is another.
        """
        path = run.training_state
        for parameter in self.model.parameters():  # moments exist only after a first step
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                metadata = file.metadata()
                if int(metadata["images"]) != images:
                    raise UsageError(
                        f"the data now has {images} images for training, {run.path} was trained "
                        f"on {metadata['images']}: a resumed run needs the same images"
                    )
                self.step = int(metadata["step"])
                for name, value in self.tensors().items():
                    value.copy_(file.get_tensor(name))
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            raise ArtefactError(f"{path} is damaged or of another run: {error}") from error
        for state in self.optimizer.state.values():
            state["step"].fill_(float(self.step))


def resumable_settings(run: bundle.Run) -> TrainSettings:
    """The settings that a run was started with.

    Raises:
        ArtefactError: no such run, or damaged settings.
    """
    if not run.settings.is_file():
        raise ArtefactError(f"{run.path} holds no training run to resume; start one without it")
    try:
        return TrainSettings.from_dict(bundle.read_json(run.settings))
    except (ConfigError, AttributeError) as error:
        raise ArtefactError(f"{run.settings} is damaged: {error}") from error


def _kept(run: bundle.Run) -> str:
    """What is left of a run that diverged, and what to do."""
    kept = "is kept" if run.model.is_file() else "was not written yet"
    return f"the last checkpoint {kept}; try a lower --lr or --precision fp32"


def _step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    words = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


def _to_pixels(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [B, C, S, S] to float32 in [−1, 1] on the device."""
    return torch.from_numpy(pixels).to(device).float().div_(127.5).sub_(1)


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
    generator = _step_generator(HELD_OUT_SEED, 0, device)
    total, pixels = 0.0, pixels[:HELD_OUT_IMAGES]
    for start in range(0, len(pixels), settings.batch):
        x = _to_pixels(pixels[start : start + settings.batch], device)
        t = sample_timesteps(len(x), settings, generator)
        noise = torch.randn(x.shape, generator=generator, device=device)
        total += objective(model, x, noise, t, settings, perceptual).item() * len(x)
    return total / len(pixels)


def write_pictures(state: TrainingState, run: bundle.Run) -> None:
    """Trajectory, LUT and Gram pictures of the EMA model at the current step."""
    model, step = state.ema, state.step
    device = next(model.parameters()).device
    denoiser = TorchDenoiser(model, str(device))
    noise = batch_noise(0, range(PICTURE_IMAGES), model.config.image_shape)
    states = [s.x for s in trajectory(denoiser, noise, step_table("euler", 64))]
    at = torch.full((1,), 0.5, device=device)
    with torch.no_grad():  # a dynamic LUT is drawn as computed half-way to the first sample
        entries = model.lut_patches(torch.from_numpy(states[32][:1]).to(device), at)
    lut = entries.detach().float().cpu().numpy()
    for name, picture in (
        ("trajectory", images.trajectory_rows(states)),
        ("lut", images.lut_sheet(lut)),
        ("gram", images.gram_picture(lut)),
    ):
        path = run.pictures / f"{name}-{step:06d}.png"
        bundle.write_atomic(path, images.encode_png(picture))


def _cut_log(run: bundle.Run, step: int) -> None:
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
    bundle.write_atomic(run.log, "".join(kept).encode())


def train(
    settings: TrainSettings,
    data: ImageSet,
    run: bundle.Run,
    *,
    device: str = "cpu",
    resume: bool = False,
    schedule: Schedule | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train, yielding after every step.

    Args:
        settings: what decides the numbers.
        data: from :mod:`training.data`.
        run: where everything is written; the caller holds its lock.
        device: a torch device.
        resume: continue from the run's training state, if it has one yet.
        schedule: how often to write.
        should_stop: asked after every step; true saves and ends.

    Raises:
        NonFiniteError: NaN or Inf in the loss or the state; the last checkpoint stays as it is.
        BackendError: the perceptual loss cannot be loaded.
        ArtefactError: a damaged training state.
        UsageError: it has more steps already, or other images.
    """
    schedule = schedule or Schedule()
    for path in (run.settings, run.model, run.training_state, run.log):
        bundle.clear_leftovers(run.path, path.name)
    bundle.clear_leftovers(run.pictures, "*.png")
    place = torch.device(device)
    perceptual = load_perceptual(place) if settings.perceptual == "lpips" else None
    state = TrainingState(settings, place)
    chosen, held = data.split(settings.held_out, settings.seed)
    if resume and run.training_state.is_file():
        state.restore(run, len(chosen))
        if settings.steps < state.step:
            raise UsageError(f"--steps {settings.steps}: {run.path} has {state.step} steps already")
        state.save_model(run)  # a kill between the two files leaves it one checkpoint behind
    bundle.write_json(run.settings, settings.to_dict())
    _cut_log(run, state.step)
    held_pixels = data.images[held[:HELD_OUT_IMAGES]]
    batches = batch_indices(len(chosen), settings.batch, settings.seed, state.step)
    compute = torch.compile(objective, dynamic=False) if settings.compile else objective
    parameters: list[Tensor] = list(state.model.parameters())
    averages: list[Tensor] = list(state.ema.parameters())
    held_out: float | None = None
    logged, clock, paused = state.step, time.perf_counter(), 0.0
    rate = 0.0

    with run.log.open("a", encoding="utf-8") as log:
        while state.step < settings.steps:
            step = state.step
            generator = _step_generator(settings.seed, step, place)
            x = _to_pixels(data.images[chosen[next(batches)]], place)
            mirrored = torch.rand(len(x), generator=generator, device=place) < settings.flip
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
            t = sample_timesteps(len(x), settings, generator)
            noise = torch.randn(x.shape, generator=generator, device=place)

            loss_tensor = compute(state.model, x, noise, t, settings, perceptual)
            loss = loss_tensor.item()
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss is {loss} at step {step + 1}; {_kept(run)}")
            state.optimizer.zero_grad(set_to_none=True)
            loss_tensor.backward()
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for group in state.optimizer.param_groups:
                group["lr"] = settings.learning_rate(step)
            state.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - settings.ema_decay(step))
            state.step += 1

            stop = should_stop() or state.step == settings.steps
            aside = time.perf_counter()
            fresh_held_out = len(held) > 0 and (stop or state.step % schedule.held_out == 0)
            if fresh_held_out:
                held_out = held_out_loss(state.ema, held_pixels, settings, place, perceptual)
            if stop or state.step % schedule.checkpoint == 0:
                state.save(run, len(chosen))
            if stop or state.step % schedule.picture == 0:
                write_pictures(state, run)
            paused += time.perf_counter() - aside
            if stop or fresh_held_out or state.step % schedule.log == 0:
                seconds = max(time.perf_counter() - clock - paused, 1e-9)
                rate = (state.step - logged) * settings.batch / seconds
                logged, clock, paused = state.step, time.perf_counter(), 0.0
                line: dict[str, Any] = {
                    "step": state.step,
                    "loss": loss,
                    "lr": settings.learning_rate(step),
                    "images_per_second": round(rate, 1),
                }
                if fresh_held_out:
                    line["held_out_loss"] = held_out
                log.write(json.dumps(line) + "\n")
                log.flush()
            yield Progress(state.step, loss, held_out, rate, stop)
            if stop:
                return
