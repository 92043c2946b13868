"""INT8 by post-training quantisation of a ``step`` graph, with ONNX Runtime's quantizer.

The scales come from trajectories of the model itself, from noise to picture. The graph then holds
int8 weights and QuantizeLinear/DequantizeLinear pairs around each quantised matmul, which OpenVINO
and ONNX Runtime turn into int8 kernels. Matmuls that int8 spoils can stay float32.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

import lutdeploy
from lutdeploy.artefacts.quantization_record import Calibration, Quantization, Sensitivity
from lutdeploy.engines.export.graphs import WEIGHTS, WeightsFile
from lutdeploy.errors import ParityError
from lutdeploy.machine import int8_weight_bits
from lutdeploy.model import LutTransformer
from lutdeploy.quantization import matmul_names, with_int8_matmuls
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Images, batch_noise, trajectory
from lutdeploy.schedule import solver_schedule

CALIBRATION_SCHEDULE = solver_schedule("dpmpp-2m", 32)  # a trajectory across all timesteps
CALIBRATION_IMAGES = 8
CALIBRATION_SEED = 2**32  # far from the seeds of pictures and checks
SENSITIVITY_SCHEDULE = solver_schedule("dpmpp-2m", 8)


def export_int8(
    model: LutTransformer, export: Callable[..., Path], note: Callable[[str], None]
) -> Path:
    """Keep ever more of the most sensitive matmuls in float32 until the export passes its check.

    Args:
        model: float32, on the CPU.
        export: :func:`lutdeploy.engines.export.graphs.export_model`, all but ``quantize`` given;
            raises a ParityError where the export does not pass.
        note: told what is tried and what was found.

    Raises:
        ParityError: the export does not pass even with half of the matmuls in float32.
    """
    note("measuring what each matmul costs in int8")
    sensitivity = measure_sensitivity(model, batch_noise(0, range(2), model.config.image_shape))
    ranked = most_sensitive_first(sensitivity)
    failure: ParityError | None = None
    for kept in float_ladder(ranked):
        if failure is not None:
            note(f"{failure}; again with {', '.join(kept)} in float32")
        quantize = partial(quantize_graph, model=model, kept=kept, sensitivity=sensitivity)
        try:
            folder = export(quantize=quantize)
        except ParityError as error:
            failure = error
            continue
        note(f"{len(ranked) - len(kept)} of {len(ranked)} matmuls are int8; most sensitive:")
        for name in ranked[:3]:
            worst, t = max(zip(sensitivity.rms[name], sensitivity.timesteps, strict=True))
            note(f"  {name}: rms error of x0 up to {worst:.2g}, at t = {t:.3g}")
        return folder
    raise ParityError(f"this model does not bear int8: {failure}")


def measure_sensitivity(model: LutTransformer, noise: Images) -> Sensitivity:
    """Quantise one matmul at a time and compare x0 on the model's own trajectory.

    Args:
        model: float32, on the CPU.
        noise: float32 [n, C, S, S], where the trajectory starts.
    """
    rows = SENSITIVITY_SCHEDULE.rows
    states = list(trajectory(TorchDenoiser(model), noise, SENSITIVITY_SCHEDULE))
    rms: dict[str, tuple[float, ...]] = {}
    for name in matmul_names(model):
        narrow = TorchDenoiser(with_int8_matmuls(model, [name]))
        errors = []
        for row, (before, after) in zip(rows, itertools.pairwise(states), strict=True):
            t = np.full(len(noise), row.t, np.float32)
            assert after.x0 is not None
            error = narrow.predict_x0(before.x, t) - after.x0
            errors.append(float(np.sqrt(np.square(error, dtype=np.float64).mean())))
        rms[name] = tuple(errors)
    return Sensitivity(SENSITIVITY_SCHEDULE.times[:-1], rms)


def most_sensitive_first(sensitivity: Sensitivity) -> list[str]:
    """The matmuls by their mean square error over the timesteps."""
    costs = {name: float(np.square(errors).mean()) for name, errors in sensitivity.rms.items()}
    return sorted(costs, key=lambda name: -costs[name])


def _rounded(sensitivity: Sensitivity) -> Sensitivity:
    """The same to three digits, for the manifest."""
    rms = {n: tuple(float(f"{e:.3g}") for e in errors) for n, errors in sensitivity.rms.items()}
    return Sensitivity(sensitivity.timesteps, rms)


def float_ladder(ranked: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What to keep in float32: nothing, then the 1, 2, 4, … most sensitive, up to half."""
    yield ()
    count = 1
    while count <= len(ranked) // 2:
        yield tuple(ranked[:count])
        count *= 2


class TrajectoryReader(CalibrationDataReader):  # type: ignore[misc]  # of an untyped package
    """A ``step`` graph's inputs along the trajectories of a few images, step by step."""

    def __init__(self, model: LutTransformer) -> None:
        self._feeds = _calibration_feeds(model)

    def get_next(self) -> dict[str, Any] | None:
        """The next feed; None at the end."""
        return next(self._feeds, None)


def _calibration_feeds(model: LutTransformer) -> Iterator[dict[str, Any]]:
    noise = batch_noise(CALIBRATION_SEED, range(CALIBRATION_IMAGES), model.config.image_shape)
    states = trajectory(TorchDenoiser(model), noise, CALIBRATION_SCHEDULE)
    for row, state in zip(CALIBRATION_SCHEDULE.rows, states, strict=False):
        values = {"t": row.t, "a": row.a, "b": row.b, "c": row.c}
        yield {
            "x": state.x,
            "x0_prev": state.x if state.x0 is None else state.x0,
            **{name: np.full(len(noise), v, np.float32) for name, v in values.items()},
        }


def quantize_graph(
    graph: Path,
    model: LutTransformer,
    kept: Collection[str] = (),
    sensitivity: Sensitivity | None = None,
) -> Quantization:
    """Quantise a float32 ``step`` graph and its weights file in place.

    Args:
        graph: ``step.onnx`` in a folder that holds nothing but it and its weights file.
        model: what the graph computes.
        kept: matmuls that stay float32, of :func:`lutdeploy.quantization.matmul_names`.
        sensitivity: what ``kept`` was chosen by, for the manifest; None where nothing chose.

    Returns:
        The record for the manifest.
    """
    names = [name for name in matmul_names(model) if name not in kept]
    with tempfile.TemporaryDirectory() as scratch:
        narrow = Path(scratch) / graph.name
        with _quiet():
            quantize_static(
                graph,
                narrow,
                TrajectoryReader(model),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=[f"{name}/MatMul_1" for name in names],
                per_channel=True,
                reduce_range=int8_weight_bits() == 7,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],  # sums stay float
                },
            )
        quantized = ir.from_proto(onnx.load(narrow))
    quantized.producer_name = "lutdeploy"
    quantized.producer_version = lutdeploy.__version__
    quantized.metadata_props.clear()
    with WeightsFile(graph.parent / WEIGHTS) as weights:
        weights.move(quantized)
        ir.save(quantized, graph)
    return Quantization(
        int8=tuple(names),
        float32=tuple(sorted(kept)),
        calibration=Calibration(
            CALIBRATION_IMAGES, CALIBRATION_SEED, CALIBRATION_SCHEDULE.describe()
        ),
        sensitivity=_rounded(sensitivity) if sensitivity else None,
        onnxruntime=onnxruntime.__version__,
        weight_bits=int8_weight_bits(),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer, which advises on the root logger to optimise the graph beforehand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
