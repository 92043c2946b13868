"""OpenVINO on the CPU: an exported graph behind the Denoiser protocol.

An int8 export computes its quantised matmuls in int8 and the rest in float32 or bfloat16; other
exports run in float32 or bfloat16. The compiled graph says which precision its matmuls really have.

bfloat16 is OpenVINO's own conversion of the whole graph, islands included, which is why it has
limits of its own in :mod:`lutdeploy.parity`. Graphs are compiled each time they are opened: that
takes less than a second, and OpenVINO's cache of compiled graphs runs a damaged blob unchecked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.engines.export_denoiser import ExportDenoiser
from lutdeploy.errors import ArtefactError, BackendError, UsageError
from lutdeploy.machine import thread_limit
from lutdeploy.sampling import Images

DEVICE = "CPU"
HINTS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
# What OpenVINO calls the layers that hold the model's matmuls, and the types they run in.
MATMUL_LAYERS = ("FullyConnected", "MatMul", "Convolution")
RUNTIME_TYPES = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("i8", "u8")}
DTYPES = {"f32": "float32", "f16": "float16"}


class OpenVinoDenoiser(ExportDenoiser):
    """One export in OpenVINO. The files are verified before anything runs.

    Args:
        manifest: of the export folder.
        device: "cpu".
        precision: of the arithmetic, "fp32" or "bf16"; of an int8 export, of all but its int8
            matmuls. A precision that this CPU lacks is a BackendError, never another precision.
        threads: of one inference; OpenVINO's own choice by default, where all cores are ours.
    """

    backend = "openvino"

    def __init__(
        self,
        manifest: Manifest,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        if device != "cpu":
            raise BackendError(f"backend openvino runs on cpu alone, not on {device!r}")
        if precision not in HINTS:
            raise UsageError(
                f"precision {precision}: backend openvino computes in {' or '.join(HINTS)}"
            )
        self._core = ov.Core()
        self._int8 = manifest.precision == "int8"
        offered = self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        for needed in (precision, *(("int8",) if self._int8 else ())):
            if CAPABILITIES[needed] not in offered:
                raise BackendError(
                    f"this CPU does not compute in {needed}: OpenVINO offers {', '.join(offered)}"
                )
        super().__init__(manifest)
        self.precision = precision
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
        }
        if (count := threads or thread_limit()) is not None:
            self._settings["INFERENCE_NUM_THREADS"] = count
        self._requests: dict[int, Any] = {}
        self._request(0)

    def close(self) -> None:
        """Free the compiled graphs."""
        self._requests.clear()

    @property
    def place(self) -> str:
        return f"{DEVICE} {runs_in(self.manifest, self.precision)}"

    def _request(self, k: int) -> Any:
        """The compiled graph k, ready to infer."""
        if k in self._requests:
            return self._requests[k]
        path = self.graph_file(k)
        compiled = self._compile(path)
        runs = compiled.get_property("INFERENCE_PRECISION_HINT")
        if runs != HINTS[self.precision]:
            raise BackendError(f"OpenVINO would compute in {runs}, not in {self.precision}")
        self._check_precision(compiled, path)
        signature = self.signature(k)
        inputs = [_describe(p, [spec.name for spec in signature.inputs]) for p in compiled.inputs]
        outputs = [
            _describe(p, [spec.name for spec in signature.outputs]) for p in compiled.outputs
        ]
        signature.check_graph(inputs, outputs, str(path))
        self._requests[k] = compiled.create_infer_request()
        return self._requests[k]

    def _check_precision(self, compiled: Any, path: Path) -> None:
        """Raise a BackendError unless the compiled graph's matmuls run in the wanted precision."""
        types = Counter(
            _runtime_info(layer, "runtimePrecision")
            for layer in compiled.get_runtime_model().get_ops()
            if _runtime_info(layer, "layerType") in MATMUL_LAYERS
        )
        precision = "int8" if self._int8 else self.precision
        found = sum(types[name] for name in RUNTIME_TYPES[precision])
        wanted = types.total()
        if self.manifest.quantization is not None:
            wanted = len(self.manifest.quantization.int8)
        if found != wanted or not wanted:
            raise BackendError(
                f"OpenVINO runs {found} of the {wanted} {precision} matmuls of {path} in "
                f"{precision} here: {dict(types)}"
            )

    def _compile(self, path: Path) -> Any:
        try:
            return self._core.compile_model(str(path), DEVICE, self._settings)
        except RuntimeError as error:
            raise ArtefactError(f"OpenVINO cannot compile {path}: {_reason(error)}") from error

    def infer(self, k: int, feed: dict[str, Images]) -> list[Images]:
        """See :class:`ExportDenoiser`."""
        request = self._request(k)
        try:
            results = request.infer(feed, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed in {self.manifest.graphs[k]}: {_reason(error)}; if memory "
                "ran out, try a smaller --batch"
            ) from error
        # The request writes its next results into the same memory.
        return [np.array(results[spec.name]) for spec in self.signature(k).outputs]


def runs_in(manifest: Manifest, precision: str) -> str:
    """The name by which :mod:`lutdeploy.parity` judges an export that runs in ``precision``."""
    if manifest.precision != "int8":
        return precision
    return "int8" if precision == "fp32" else f"int8-{precision}"


def _describe(port: Any, names: Sequence[str]) -> tuple[str, str, tuple[str | int | None, ...]]:
    """A compiled graph's input or output: its name, dtype and shape.

    A port carries the names of everything that it was fused with, so the name is the one that
    is among ``names``.
    """
    own = port.get_names()
    name = next((name for name in names if name in own), "/".join(sorted(own)))
    shape = [None if d.is_dynamic else d.get_length() for d in port.get_partial_shape()]
    dtype = port.get_element_type().get_type_name()
    return name, DTYPES.get(dtype, dtype), tuple(shape)


def _runtime_info(layer: Any, key: str) -> str:
    info = layer.get_rt_info()
    return info[key].astype(str) if key in info else ""


def _reason(error: BaseException) -> str:
    """The last line of OpenVINO's message; those before name places in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "?"
