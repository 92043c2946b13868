"""Autoguidance: a model corrected by a weaker one of its kind, on the way from noise to images.

    x0 = x0_weaker + w·(x0_model − x0_weaker)

for times t in an interval (Karras et al. 2024, "Guiding a diffusion model with a bad version of
itself", equation 3; the interval as Kynkäänniemi et al. 2024). Where both models err alike and the
weaker one more, going on in the direction from it to the model mends what they have in common.
Below the interval a picture's brightness and colours are decided, and guidance would make them all
the same. It costs a second evaluation in each step; `lutdeploy distill` teaches a student to do
without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutdeploy.artefacts.tuned_steps import KnownDenoiser
from lutdeploy.config import ModelConfig
from lutdeploy.errors import UsageError
from lutdeploy.sampling import Images, follow
from lutdeploy.schedule import Schedule, Step
from lutdeploy.training.recipes import Guidance


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser that takes any single step, guided by a weaker one with images of the same shape.

    Raises:
        UsageError: the two do not fit together.
    """

    model: KnownDenoiser
    weaker: KnownDenoiser
    how: Guidance

    def __post_init__(self) -> None:
        shapes = self.model.config.image_shape, self.weaker.config.image_shape
        if shapes[0] != shapes[1]:
            raise UsageError(f"the guide makes images {shapes[1]}, the model {shapes[0]}")
        if self.model.identity["model_sha256"] == self.weaker.identity["model_sha256"]:
            raise UsageError("the guide is the model itself; it must be a weaker one")

    @property
    def config(self) -> ModelConfig:
        """Of the model that is guided."""
        return self.model.config

    @property
    def schedule(self) -> Schedule | None:
        """The only schedule that it can follow; None when it follows any."""
        return self.model.schedule or self.weaker.schedule

    @property
    def whole_trajectory(self) -> bool:
        """False: both models are asked in every step."""
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """That of the model, and what guides it, as plain JSON values."""
        how = {"weight": self.how.weight, "interval": list(self.how.interval)}
        return {**self.model.identity, "guide": {**self.weaker.identity, **how}}

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """The guided x0 at (x_t, t): float32 [B, C, S, S] and [B] to [B, C, S, S]."""
        x0 = self.model.predict_x0(x, t)
        low, high = self.how.interval
        inside = (low <= t) & (t <= high)
        if inside.any():
            its = x0[inside]
            weaker = self.weaker.predict_x0(np.ascontiguousarray(x[inside]), t[inside])
            x0[inside] = weaker + np.float32(self.how.weight) * (its - weaker)
        return x0

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """One row of a schedule: (x', x0) with x' = a·x + b·x0 + c·x0_prev."""
        x0 = self.predict_x0(x, np.full(len(x), row.t, np.float32))
        return follow(row, x, x0, x0_prev), x0

    def run(self, noise: Images) -> Images:
        """No graph holds a guided trajectory."""
        raise UsageError("a guided model takes single steps alone")
