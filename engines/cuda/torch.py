"""PyTorch on a GPU: whole trajectories, captured, in half or full precision.

It runs the network that is exported, with its rewrites and float32 islands.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.errors import UsageError
from lutdeploy.fused import StepGraph
from lutdeploy.model import LutTransformer
from lutdeploy.reference import full_float32

PRECISIONS = ("fp32", "fp16", "bf16")


def _compiled(module: StepGraph) -> Any:
    """The module under torch.compile, without Inductor's advice to use TF32."""
    compiled = torch.compile(module, dynamic=False)

    def call(*tensors: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
            return compiled(*tensors)

    return call


class TorchProgram:
    """The ``step`` graph's module at one batch size.

    Args:
        module: a StepGraph on the device, compiled or not.
        device: where it runs.
        batch: B.
        steps: of the schedule.
        capturable: whether the loop should be captured in a CUDA graph.
    """

    def __init__(
        self, module: Any, device: CudaDevice, batch: int, steps: int, capturable: bool
    ) -> None:
        self.batch, self.evaluations, self.capturable = batch, steps, capturable
        self._module, self._device = module, device
        self._coefficients = device.empty((steps, len(COEFFICIENTS), batch))

    def set_coefficients(self, values: NDArray[np.float32]) -> None:
        """See :class:`lutdeploy.engines.cuda.denoiser.ExportProgram`."""
        with self._device.on(self._device.compute):
            self._coefficients.copy_(torch.from_numpy(values))

    @torch.inference_mode()
    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        """See :class:`lutdeploy.engines.cuda.loop.Program`."""
        with full_float32():
            following, prediction = self._module(x, *self._coefficients[k], x0_prev)
        x_next.copy_(following)
        x0.copy_(prediction)


class TorchDeviceDenoiser(DeviceDenoiser):
    """A model in PyTorch on a device, a whole trajectory at a time.

    Args:
        model: float32, on the CPU.
        device: where it runs.
        precision: one of ``PRECISIONS``.
        model_sha256: of the model's file, for the identity.
        compile: use torch.compile.
        graph: capture the trajectory in a CUDA graph.
    """

    def __init__(
        self,
        model: LutTransformer,
        device: CudaDevice,
        precision: str = "fp16",
        model_sha256: str = "",
        compile: bool = False,
        graph: bool = True,
    ) -> None:
        super().__init__(model.config, "step", None, device)
        self.precision, self.model_sha256, self._graph = precision, model_sha256, graph
        if precision not in PRECISIONS:
            raise UsageError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
        module = StepGraph(model, precision).eval().to(device.torch_device)
        self._module = _compiled(module) if compile else module

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, device with precision, and the model's hash."""
        return {
            "backend": "torch",
            "device": f"{self.device.word} {self.precision}",
            "export": None,
            "engine_sha256": self.model_sha256,
            "model_sha256": self.model_sha256,
        }

    def make_program(self, batch: int, steps: int, alone: bool) -> TorchProgram:
        """See :class:`DeviceDenoiser`."""
        capturable = self._graph and not alone
        return TorchProgram(self._module, self.device, batch, steps, capturable)
