"""The two TensorRTs behind one API: ``tensorrt``, and ``tensorrt_rtx`` for GeForce and RTX cards.

A module is chosen by the name of its backend and handed on as ``trt``. Names that only one of
them has stand behind :func:`is_rtx`.
"""

from __future__ import annotations

import importlib
from typing import Any

from lutdeploy.errors import BackendError, first_line

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
TITLES = {TENSORRT: "TensorRT", RTX: "TensorRT for RTX"}
MODULES = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}
INSTALL = {
    TENSORRT: "docs/tensorrt.md says how to install it",
    RTX: "pip install 'lutdeploy[tensorrt-rtx]'",
}
# What `lutdeploy build` compiles for where there is no GPU: Ampere, Ada and Blackwell. Turing
# (7.5) compiles half precision only.
RTX_ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0")


def load_tensorrt(backend: str) -> Any:
    """Import the module of a backend.

    Raises:
        BackendError: it is not installed or does not load; says how to get it.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{TITLES[backend]} does not load here ({first_line(error)}); {INSTALL[backend]}"
        ) from error


def is_rtx(trt: Any) -> bool:
    """Whether a module is TensorRT for RTX."""
    return bool(trt.__name__ == MODULES[RTX])


def open_log(trt: Any) -> Any:
    """A ``trt.ILogger`` that keeps the errors it is told; see :func:`last_error`."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # tensorrt has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from any of its threads."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return ErrorLog()


def last_error(errors: list[str]) -> str:
    """The last of the errors in one line; that there was none, if so."""
    return " ".join(errors[-1].split()) if errors else "TensorRT gave no reason"
