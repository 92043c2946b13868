"""All that a resumed run needs: weights, averages, optimiser state, the number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lutdeploy.artefacts import checkpoint, files
from lutdeploy.artefacts.run import Run, decay_name
from lutdeploy.artefacts.target import find_model
from lutdeploy.errors import ArtefactError, NonFiniteError, UsageError, ran_out_of_memory
from lutdeploy.model import LutTransformer
from lutdeploy.training.losses import Objective
from lutdeploy.training.optimizers import open_optimizers, restore, state_tensors
from lutdeploy.training.recipes import TrainSettings
from lutdeploy.training.start import start_as_copy


class Position(msgspec.Struct, frozen=True):
    """How far a training is: the metadata of its saved state."""

    step: int
    images: int  # trained on
    chosen: int  # index of the average that is the run's model


def read_position(run: Run) -> Position:
    """How far a run's saved state is."""
    try:
        with safe_open(run.training_state, "pt") as file:
            return msgspec.convert(file.metadata(), Position, strict=False)
    except (SafetensorError, OSError, msgspec.ValidationError) as error:
        raise _damaged(run, error) from error


def _damaged(run: Run, error: Exception) -> ArtefactError:
    return ArtefactError(f"{run.training_state} is damaged or of another run: {error}")


def first_weights(settings: TrainSettings) -> LutTransformer:
    """The model that ``settings.init`` names.

    Raises:
        ArtefactError: it has changed since the run was set up.
    """
    assert settings.init is not None
    path = find_model(settings.init)
    if files.sha256(path) != settings.init_sha256:
        raise ArtefactError(f"{path} is not the model any more that this run was to begin with")
    return checkpoint.load_model(path).train().requires_grad_()


class TrainingState:
    """What training changes."""

    def __init__(
        self,
        settings: TrainSettings,
        device: torch.device,
        objective: Callable[[LutTransformer, TrainSettings], nn.Module] = Objective,
        images: Tensor | None = None,
        resumes: bool = False,
    ) -> None:
        """Make the first weights, unless they are restored later (``resumes``).

        ``objective`` makes the module around the model that computes a batch's loss; ``images``
        are for a start as a copy, uint8 [n, C, S, S].
        """
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.step = 0
        self.model = LutTransformer(settings.model)
        if settings.init is not None and not resumes:
            self.model = first_weights(settings)
        elif settings.start == "copy" and images is not None:
            start_as_copy(self.model, images)
        self.averages = [
            copy.deepcopy(self.model).to(device).eval().requires_grad_(False) for _ in settings.ema
        ]
        self.chosen = 0  # index of the average that is the run's model
        self.objective = objective(self.model, settings).to(device)
        self.optimizers = open_optimizers(self.objective, settings)
        # Looked up once: walking the modules takes its time in every step.
        self.parameters: list[Tensor] = list(self.model.parameters())
        self._averages: list[list[Tensor]] = [list(a.parameters()) for a in self.averages]

    @property
    def ema(self) -> LutTransformer:
        """The chosen average."""
        return self.averages[self.chosen]

    @torch.no_grad()
    def advance(self) -> None:
        """A step of the optimisers by the gradients that are there, then of the averages."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for decay, average in zip(self.settings.ema, self._averages, strict=True):
            torch._foreach_lerp_(
                average, self.parameters, 1 - self.settings.ema_decay(decay, self.step)
            )
        self.step += 1

    def choose(self, held_out: list[float]) -> float | None:
        """Take the average of the lowest held-out loss, which is returned; None of none."""
        if not held_out:
            return None
        self.chosen = min(range(len(held_out)), key=held_out.__getitem__)
        return held_out[self.chosen]

    def weights(self) -> dict[str, Tensor]:
        """The model and its averages, by name."""
        named = dict(self.objective.state_dict())
        for decay, average in zip(self.settings.ema, self.averages, strict=True):
            states = average.state_dict().items()
            named |= {f"{decay_name(decay)}/{name}": value for name, value in states}
        return named

    def save(self, run: Run, images: int) -> None:
        """Write the state, then the models people use, each atomically.

        Where a number is NaN or Inf nothing is written, and an error says what is left.
        """
        tensors = self.weights() | state_tensors(self.optimizers)
        tensors = {name: value.detach().cpu() for name, value in tensors.items()}
        for name, value in tensors.items():  # the loss shows it only one step later
            if not value.isfinite().all():
                raise NonFiniteError(f"NaN or Inf in {name} at step {self.step}; {kept(run)}")
        metadata = {"step": str(self.step), "images": str(images), "chosen": str(self.chosen)}
        files.write_atomic(run.training_state, save(tensors, metadata))
        self.save_models(run)

    def save_models(self, run: Run) -> None:
        """Write the chosen average as the run's model and, if there are several, each."""
        data = Path(self.settings.data).name  # not its path, as models are given away
        about = {**self.settings.origin(), "step": self.step, "data": data}
        if len(self.averages) > 1:
            for decay, average in zip(self.settings.ema, self.averages, strict=True):
                checkpoint.save_model(average, run.average(decay), about={**about, "ema": decay})
        chosen = self.settings.ema[self.chosen]
        checkpoint.save_model(self.ema, run.model, about={**about, "ema": chosen})

    def restore(self, run: Run, images: int) -> None:
        """Read what :meth:`save` wrote; it must have been trained on as many images."""
        position = read_position(run)
        if position.images != images:
            raise UsageError(
                f"the data now has {images} images for training, {run.path} was trained "
                f"on {position.images}: a resumed run needs the same images"
            )
        self.step, self.chosen = position.step, position.chosen
        try:
            tensors = load_file(run.training_state)
            with torch.no_grad():
                for name, value in self.weights().items():
                    value.copy_(tensors.pop(name))
            restore(self.optimizers, tensors, self.step)
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            if ran_out_of_memory(error):
                raise
            raise _damaged(run, error) from error


def kept(run: Run) -> str:
    """What is left of a run that diverged, and what to do."""
    left = "is kept" if run.model.is_file() else "was not written yet"
    return f"the last checkpoint {left}; try a lower --lr or --precision fp32"
