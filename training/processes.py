"""One process, or several started by torchrun that train one model together.

Every process draws the whole batch and computes its part of it, so that the result does not
depend on their number. Accelerate joins them and averages their gradients.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lutdeploy.errors import BackendError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """One process on its own."""

    rank = 0
    count = 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """The part of a batch that this process computes."""
        if batch % self.count:
            raise UsageError(
                f"--batch {batch} cannot be divided among {self.count} processes evenly; "
                f"--batch {-(-batch // self.count) * self.count} can"
            )
        size = batch // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def join(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are the mean of all processes'."""
        return module

    def mean(self, values: Tensor) -> Tensor:
        """Of all processes."""
        return values

    def wait(self) -> None:
        """Wait until every process has reached this call."""


class JoinedProcesses(Processes):
    """One of several, joined by Accelerate: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise BackendError(
                "training in several processes needs the distributed extra "
                f"(pip install 'lutdeploy[distributed]'): {error}"
            ) from error
        self._accelerator: Accelerator = Accelerator(cpu=device == "cpu")
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.device = self._accelerator.device

    def join(self, module: nn.Module) -> nn.Module:
        return cast(nn.Module, self._accelerator.prepare_model(module))

    def mean(self, values: Tensor) -> Tensor:
        return cast(Tensor, self._accelerator.reduce(values, "mean"))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def open_processes(device: str) -> Processes:
    """This process on a device, joined with the others where torchrun started several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {device}: torchrun gives each process a GPU of its own; write cuda, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    return JoinedProcesses(device) if several else Processes(device)
