"""One process, or several started by torchrun that train one model together.

Every process draws the whole batch and computes its part of it, so that the result does not
depend on their number. Accelerate joins them and averages their gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from lutdeploy.errors import BackendError, LutDeployError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is; alone, where nothing is said."""

    rank: int = 0  # among all
    count: int = 1
    local_rank: int = 0  # among those on this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0


class Processes:
    """One process on its own."""

    rank = 0
    count = 1
    local_rank = 0

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

    def tell(self, value: T) -> T:
        """The first process's value, in every process."""
        return value

    def by_first(self, work: Callable[[], None]) -> None:
        """Let the first process do it; an error on purpose is raised in every one."""
        failed: LutDeployError | None = None
        if self.writes:
            try:
                work()
            except LutDeployError as error:
                failed = error
        failed = self.tell(failed)
        if failed is not None:
            raise failed

    def wait(self) -> None:
        """Wait until every process has reached this call."""


class JoinedProcesses(Processes):
    """One of several, joined by Accelerate: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, device: str, launched: Launch) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise BackendError(
                "training in several processes needs the distributed extra "
                f"(pip install 'lutdeploy[distributed]'): {error}"
            ) from error
        self._accelerator: Accelerator = Accelerator(cpu=device == "cpu")
        if self._accelerator.num_processes != launched.count:
            raise BackendError(
                f"{self._accelerator.num_processes} of {launched.count} processes were joined; "
                "torchrun starts them"
            )
        self.rank, self.count = launched.rank, launched.count
        self.local_rank = launched.local_rank
        self.device = self._accelerator.device

    def join(self, module: nn.Module) -> nn.Module:
        return cast(nn.Module, self._accelerator.prepare_model(module))

    def mean(self, values: Tensor) -> Tensor:
        return cast(Tensor, self._accelerator.reduce(values, "mean"))

    def tell(self, value: T) -> T:
        from accelerate.utils import broadcast_object_list

        return cast(T, broadcast_object_list([value])[0])

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def launch() -> Launch:
    """How this process was started, from the variables that torchrun sets.

    A platform may set some of them for a process that is alone.

    Raises:
        UsageError: there are several processes, and they cannot be told apart.
    """
    if _variable("WORLD_SIZE", 1) <= 1:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, count, local_rank = (_variable(name, -1) for name in names)
    if not (0 <= rank < count and 0 <= local_rank <= rank):
        told = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise UsageError(
            f"{told}: several processes are started by torchrun, which sets all three; "
            "`env -u WORLD_SIZE lutdeploy train …` trains in one process"
        )
    return Launch(rank, count, local_rank)


def _variable(name: str, default: int) -> int:
    """A number from the environment; the default where it is empty or not there."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError as error:
        raise UsageError(
            f"{name}={text}: it is no number; torchrun sets it, or unset it"
        ) from error


def open_processes(device: str) -> Processes:
    """This process on a device, joined with the others where torchrun started several."""
    launched = launch()
    if launched.count > 1 and device not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {device}: torchrun gives each process a GPU of its own; write cuda, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    return JoinedProcesses(device, launched) if launched.count > 1 else Processes(device)
