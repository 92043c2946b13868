"""Doubles of what these machines lack: TensorRT and a GPU.

    python -m tests.doubles 11.1.0.106 build RUN …

runs the command line on them in a process of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

import lutdeploy.engines.cuda.device
from tests.doubles.cpu_device import CpuDevice
from tests.doubles.tensorrt_double import Controls, make_tensorrt

FRESH = (
    "lutdeploy.engines.tensorrt.engine",
    "lutdeploy.engines.tensorrt.builder",
)  # they import tensorrt once


def install(
    patch: pytest.MonkeyPatch, version: str, controls: Controls, **device: Any
) -> ModuleType:
    """Put the doubles in place of ``tensorrt`` and of every CUDA device.

    Args:
        patch: what undoes it.
        version: of TensorRT.
        controls: faults and observations.
        device: arguments of every :class:`CpuDevice`.
    """
    trt = make_tensorrt(version, controls)
    patch.setitem(sys.modules, "tensorrt", trt)
    for name in FRESH:
        patch.delitem(sys.modules, name, raising=False)
    patch.setattr(
        lutdeploy.engines.cuda.device, "CudaDevice", lambda name="cuda": CpuDevice(name, **device)
    )
    return trt
