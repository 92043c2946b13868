"""INT8 by post-training quantisation of a ``step`` graph, with ONNX Runtime's quantizer.

Scales come from the model's own trajectories, from noise to picture. The graph then holds int8
weights and QuantizeLinear/DequantizeLinear pairs around each quantised product, which OpenVINO
and ONNX Runtime turn into int8 kernels.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator
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
from lutdeploy.engines.export.graphs import WEIGHTS, WeightsFile
from lutdeploy.model import LutTransformer
from lutdeploy.quantization import CALIBRATION, Sensitivity, product_names
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import batch_noise, trajectory

CALIBRATION_IMAGES = 8
CALIBRATION_SEED = 2**32  # far from the seeds of pictures and checks


class TrajectoryReader(CalibrationDataReader):  # type: ignore[misc]  # of an untyped package
    """A ``step`` graph's inputs along the trajectory of a few images, step by step."""

    def __init__(self, model: LutTransformer) -> None:
        self._feeds = self._walk(model)

    @staticmethod
    def _walk(model: LutTransformer) -> Iterator[dict[str, Any]]:
        noise = batch_noise(CALIBRATION_SEED, range(CALIBRATION_IMAGES), model.config.image_shape)
        states = trajectory(TorchDenoiser(model), noise, CALIBRATION)
        for row, state in zip(CALIBRATION.rows, states, strict=False):
            values = {"t": row.t, "a": row.a, "b": row.b, "c": row.c}
            yield {
                "x": state.x,
                "x0_prev": state.x if state.x0 is None else state.x0,
                **{name: np.full(len(noise), v, np.float32) for name, v in values.items()},
            }

    def get_next(self) -> dict[str, Any] | None:
        """The next feed; None at the end."""
        return next(self._feeds, None)


def quantize_graph(
    graph: Path,
    model: LutTransformer,
    kept: Collection[str] = (),
    sensitivity: Sensitivity | None = None,
) -> dict[str, Any]:
    """Quantise a float32 ``step`` graph in its place, its weights file with it.

    Args:
        graph: ``step.onnx`` in a folder with its weights file alone.
        model: what the graph computes.
        kept: products that stay float32 (:func:`lutdeploy.quantization.product_names`).
        sensitivity: what ``kept`` was chosen by, for the record; None where nothing chose.

    Returns:
        The record for the manifest, plain JSON values.
    """
    names = [name for name in product_names(model) if name not in kept]
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
    return {
        "int8_products": names,
        "float32_products": sorted(kept),
        "calibration": {
            "images": CALIBRATION_IMAGES,
            "seed": CALIBRATION_SEED,
            "solver": CALIBRATION.describe(),
        },
        **({"sensitivity": sensitivity.to_dict()} if sensitivity else {}),
        "onnxruntime": onnxruntime.__version__,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice, on the root logger, to optimise the graph beforehand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
