"""PyTorch on a device in half or full precision, eager or compiled.

It runs the network that is exported, with its rewrites and float32 islands, so it shows what a
GPU does without TensorRT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.fused import StepGraph
from lutdeploy.model import LutTransformer


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
        following, prediction = self._module(x, *self._coefficients[k], x0_prev)
        x_next.copy_(following)
        x0.copy_(prediction)


class TorchDeviceDenoiser(DeviceDenoiser):
    """A model in PyTorch on a device, a whole trajectory at a time.

    Args:
        model: float32, on the CPU.
        device: where it runs.
        precision: "fp16" with the export's islands, or "fp32".
        compile: use torch.compile.
        graph: capture the trajectory in a CUDA graph.
    """

    def __init__(
        self,
        model: LutTransformer,
        device: CudaDevice,
        precision: str = "fp16",
        compile: bool = False,
        graph: bool = True,
    ) -> None:
        super().__init__(model.config, "step", None, device)
        self._graph = graph
        module = StepGraph(model, precision).to(device.torch_device).eval()
        self._module = torch.compile(module, dynamic=False) if compile else module

    def make_program(self, batch: int, steps: int, alone: bool) -> TorchProgram:
        """See :class:`DeviceDenoiser`."""
        capturable = self._graph and not alone
        return TorchProgram(self._module, self.device, batch, steps, capturable)
