"""The PyTorch model as a Denoiser: what every other backend is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lutdeploy.errors import UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.sampling import Images
from lutdeploy.schedule import Schedule, Step


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep torch from rounding float32 products to TF32 or bfloat16 inside the block.

    On Ampere and later GPUs torch convolves float32 in TF32 unless told otherwise, which is 1e-3
    off; ``torch.set_float32_matmul_precision`` does the same to matrix products, on a CPU too.
    The settings are the process's, so the host's own come back at the end of the block.
    """
    backends: Any = torch.backends  # whose modules mypy does not know
    # rnn is here because the older allow_tf32 holds it and conv together.
    places = (
        *(backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        *(backends.mkldnn.conv, backends.mkldnn.matmul),
    )
    before = [place.fp32_precision for place in places]
    if not {"tf32", "bf16"} & set(before):
        yield
        return
    with contextlib.ExitStack() as restore:
        for place, precision in zip(places, before, strict=True):
            restore.callback(setattr, place, "fp32_precision", precision)
        # The older settings first, as parts of torch still read them. They cannot be read, and
        # need not be set, in a process that has used the newer ones.
        with contextlib.suppress(RuntimeError):
            older = torch.get_float32_matmul_precision()
            if older != "highest":
                restore.callback(torch.set_float32_matmul_precision, older)
                torch.set_float32_matmul_precision("highest")
        with contextlib.suppress(RuntimeError):
            if backends.cudnn.allow_tf32:
                restore.callback(setattr, backends.cudnn, "allow_tf32", True)
                backends.cudnn.allow_tf32 = False
        for place in places:
            if place.fp32_precision in ("tf32", "bf16"):
                place.fp32_precision = "ieee"
        yield


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
        autocast = torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled)
        with full_float32(), autocast:
            return self.model(x, t).float()
