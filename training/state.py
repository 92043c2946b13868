"""All that a resumed run needs: weights, averages, moments, the number of steps."""

from __future__ import annotations

import copy

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutdeploy.artefacts import checkpoint, files
from lutdeploy.artefacts.run import Run
from lutdeploy.errors import ArtefactError, NonFiniteError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.training import optimizers
from lutdeploy.training.losses import Objective, Perceptual
from lutdeploy.training.recipes import TrainSettings
from lutdeploy.training.start import start_as_copy


class TrainingState:
    """What training changes."""

    def __init__(
        self,
        settings: TrainSettings,
        device: torch.device,
        perceptual: Perceptual | None = None,
        images: Tensor | None = None,
    ) -> None:
        """Start as a copy from ``images``, uint8 [n, C, S, S]; None where it is restored."""
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.step = 0
        model = LutTransformer(settings.model)
        if settings.start == "copy" and images is not None:
            start_as_copy(model, images)
        self.averages = [
            copy.deepcopy(model).to(device).eval().requires_grad_(False) for _ in settings.ema
        ]
        self.chosen = 0  # the average that people use
        self.objective = Objective(model, settings, perceptual).to(device)
        self.optimizers = optimizers.open_optimizers(self.objective, settings)
        # Looked up once: walking the modules takes its time in every step.
        self.parameters: list[Tensor] = list(self.objective.parameters())
        self._averaged: list[Tensor] = list(model.parameters())
        self._averages: list[list[Tensor]] = [list(a.parameters()) for a in self.averages]

    @property
    def model(self) -> LutTransformer:
        """The weights that the optimiser moves."""
        return self.objective.model

    @property
    def ema(self) -> LutTransformer:
        """The chosen average."""
        return self.averages[self.chosen]

    @torch.no_grad()
    def advance(self, lr: float) -> None:
        """A step of the optimisers by the gradients that are there, then of the averages."""
        optimizers.step(self.optimizers, lr)
        for decay, average in zip(self.settings.ema, self._averages, strict=True):
            torch._foreach_lerp_(
                average, self._averaged, 1 - self.settings.ema_decay(decay, self.step)
            )
        self.step += 1

    def choose(self, held_out: list[float]) -> float:
        """Take the average of the lowest held-out loss, which is returned."""
        self.chosen = min(range(len(held_out)), key=held_out.__getitem__)
        return held_out[self.chosen]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        named = dict(self.objective.state_dict())
        for decay, average in zip(self.settings.ema, self.averages, strict=True):
            named |= {f"ema-{decay:g}/{name}": v for name, v in average.state_dict().items()}
        names = {parameter: name for name, parameter in self.objective.named_parameters()}
        return named | dict(optimizers.moments(self.optimizers, names))

    def save(self, run: Run, images: int) -> None:
        """Write the state, then the models people use; each atomically.

        Raises:
            NonFiniteError: NaN or Inf in the state; nothing is written.
        """
        tensors = {name: value.detach().cpu() for name, value in self.tensors().items()}
        for name, value in tensors.items():  # the loss shows it only one step later
            if not value.isfinite().all():
                raise NonFiniteError(f"NaN or Inf in {name} at step {self.step}; {kept(run)}")
        metadata = {"step": str(self.step), "images": str(images), "chosen": str(self.chosen)}
        files.write_atomic(run.training_state, save(tensors, metadata))
        self.save_models(run)

    def save_models(self, run: Run) -> None:
        """Write the chosen average as the run's model and, if there are several, each."""
        about = {"origin": "lutdeploy train", "step": self.step, "data": self.settings.data}
        if len(self.averages) > 1:
            for decay, average in zip(self.settings.ema, self.averages, strict=True):
                checkpoint.save_model(average, run.average(decay), about={**about, "ema": decay})
        chosen = self.settings.ema[self.chosen]
        checkpoint.save_model(self.ema, run.model, about={**about, "ema": chosen})

    def restore(self, run: Run, images: int) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: damaged, or of a model of another shape.
            UsageError: the number of training images is another.
        """
        path = run.training_state
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                metadata = file.metadata()
                if int(metadata["images"]) != images:
                    raise UsageError(
                        f"the data now has {images} images for training, {run.path} was trained "
                        f"on {metadata['images']}: a resumed run needs the same images"
                    )
                self.step, self.chosen = int(metadata["step"]), int(metadata["chosen"])
                optimizers.prepare(self.optimizers, self.step)
                for name, value in self.tensors().items():
                    value.copy_(file.get_tensor(name))
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            raise ArtefactError(f"{path} is damaged or of another run: {error}") from error


def kept(run: Run) -> str:
    """What is left of a run that diverged, and what to do."""
    left = "is kept" if run.model.is_file() else "was not written yet"
    return f"the last checkpoint {left}; try a lower --lr or --precision fp32"
