"""The PyTorch model as a Denoiser: what every other backend is compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lutdeploy.errors import UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.sampling import Images
from lutdeploy.schedule import Schedule, Step


class TorchDenoiser:
    """A LutTransformer behind the Denoiser protocol.

    Args:
        model: moved to ``device`` and used in eval mode.
        device: a torch device.
        autocast: run the network under torch.autocast of this dtype, which is PyTorch's own
            half precision; None runs it in float32.
    """

    schedule: Schedule | None = None
    whole_trajectory = False

    def __init__(
        self, model: LutTransformer, device: str = "cpu", autocast: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device)
        self.model, self.config = model.to(self.device).eval(), model.config
        self.autocast = autocast

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        return self._x0(self._tensor(x), self._tensor(t)).cpu().numpy()

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        state = self._tensor(x)
        x0 = self._x0(state, torch.full((len(x),), row.t, device=self.device))
        following = row.a * state + row.b * x0
        if row.c and x0_prev is not None:
            following += row.c * self._tensor(x0_prev)
        return following.cpu().numpy(), x0.cpu().numpy()

    def run(self, noise: Images) -> Images:
        """Raise a UsageError: the model holds no schedule of its own."""
        raise UsageError("the PyTorch model holds no trajectory; sample it with a schedule")

    def _tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device)

    @torch.inference_mode()
    def _x0(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled):
            return self.model(x, t).float()
