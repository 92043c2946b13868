"""What the manifest of an int8 export says of its quantisation."""

from __future__ import annotations

import msgspec


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trajectories that the scales of the activations come from."""

    images: int
    seed: int
    solver: str  # the schedule's description


class Sensitivity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each matmul costs when it alone is INT8: the rms error of x0 at each timestep."""

    timesteps: tuple[float, ...]
    rms: dict[str, tuple[float, ...]]  # by matmul


class Quantization(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    kw_only=True,
    rename={"int8": "int8_products", "float32": "float32_products"},
):
    """Which matmuls of the blocks are int8, and how they were chosen and calibrated."""

    int8: tuple[str, ...]
    float32: tuple[str, ...]  # for their sensitivity
    calibration: Calibration
    sensitivity: Sensitivity | None = None  # None where nothing chose
    onnxruntime: str  # version
    weight_bits: int = 8  # 7: for processors without int8 dot products, and right on all others
