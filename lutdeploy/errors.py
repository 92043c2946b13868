"""The errors that lutdeploy raises on purpose; the command line prints each as one line.

A message says what is wrong, with the values, and what to do about it.
"""

import contextlib
import sys
from collections.abc import Iterator

# How the message of PyTorch's CPU allocator begins. It raises a plain RuntimeError; this place in
# its source, which no other message begins with, is what tells it from others.
CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:"
CUDA_MEMORY = 2  # cudaErrorMemoryAllocation
# What not every installation has: a module, its name for people, and the extra that brings it.
OPTIONAL = {
    "torch": ("PyTorch", "train"),
    "onnx": ("ONNX", "train"),
    "onnx_ir": ("ONNX IR", "train"),
    "onnxscript": ("ONNX Script", "train"),
    "openvino": ("OpenVINO", "openvino"),
    "huggingface_hub": ("Hugging Face's huggingface_hub", "hub"),
    "ray": ("Ray", "ray"),
    "fsspec": ("fsspec", "cloud"),
    "s3fs": ("s3fs", "cloud"),
}


class LutDeployError(Exception):
    """The base of them all. The command line exits with ``exit_code``."""

    exit_code = 1


class UsageError(LutDeployError):
    """A request that cannot be met: a wrong value or combination, or nothing there."""

    exit_code = 2


class ConfigError(UsageError):
    """An impossible configuration of a model, a schedule or a training."""


class ArtefactError(LutDeployError):
    """A file that is damaged, foreign, or not what its manifest says."""


class BackendError(LutDeployError):
    """A backend, execution provider or device that is missing or misbehaves."""


class NonFiniteError(LutDeployError):
    """NaN or Inf in a loss, a state or a picture."""


class ParityError(LutDeployError):
    """Two denoisers that must agree do not."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers ask a process to end; it unwinds as Ctrl-C does."""


@contextlib.contextmanager
def needing(what: str) -> Iterator[None]:
    """Say what to install where ``what`` needs a package that is not installed.

    Raises:
        BackendError: an import of one of ``OPTIONAL`` failed inside the block.
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module not in OPTIONAL:
            raise
        name, extra = OPTIONAL[module]
        missing = isinstance(error, ModuleNotFoundError)
        state = "is not installed" if missing else f"does not load here ({first_line(error)})"
        raise BackendError(
            f"{what} needs {name}, which {state}: pip install 'lutdeploy[{extra}]'"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: by its type, since anybody has the words.

    ONNX Runtime and OpenVINO have no type for it; their errors never count.
    """
    if isinstance(error, MemoryError):  # of Python and NumPy
        return True
    torch = sys.modules.get("torch")  # not there: nothing of it was raised
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if torch is not None and isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_MEMORY
    return type(error) is RuntimeError and str(error).startswith(CPU_ALLOCATOR)
