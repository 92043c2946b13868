"""ONNX Runtime on a GPU: bound device buffers, its own CUDA graphs, its own engine cache.

Its runs cannot be captured from outside (they may allocate and synchronise), so the provider
captures a graph of each evaluation itself, and :class:`lutdeploy.engines.cuda.loop.DeviceLoop`
enqueues them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.onnxruntime import PROVIDERS, OnnxRuntimeDenoiser
from lutdeploy.errors import BackendError
from lutdeploy.signature import graph_signature


class OnnxRuntimeProgram:
    """An export's sessions at one batch size, with every tensor bound to its place.

    A provider replays its graph with the addresses that it saw, so the coefficients of a step
    are copied to one place before it.

    Args:
        sessions: holds the sessions, on ``device``.
        device: where the tensors are.
        batch: B.
        steps: rows of the coefficient schedule of a "step" export.
        graph_ids: numbers for the provider's graphs; None keeps it from capturing.
    """

    def __init__(
        self,
        sessions: OnnxRuntimeDenoiser,
        device: CudaDevice,
        batch: int,
        steps: int,
        graph_ids: Iterator[int] | None,
    ) -> None:
        self.sessions, self.device, self.batch = sessions, device, batch
        self.capturable = False
        self._graph, self._graph_ids = sessions.manifest.graph, graph_ids
        self.evaluations = steps if self._graph == "step" else len(sessions.manifest.graphs)
        self._table = device.empty((steps, len(COEFFICIENTS), batch))
        self._row = [device.empty((batch,)) for _ in COEFFICIENTS]
        self._bound: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def set_coefficients(self, values: NDArray[np.float32]) -> None:
        """See :class:`lutdeploy.engines.cuda.denoiser.ExportProgram`."""
        with self.device.on(self.device.compute):
            self._table.copy_(torch.from_numpy(values))

    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        """See :class:`lutdeploy.engines.cuda.loop.Program`.

        Raises:
            BackendError: what ONNX Runtime says.
        """
        index = k if self._graph == "per-step" else 0
        session = self.sessions.session(index)
        if self._graph == "step":
            for place, row in zip(self._row, self._table[k], strict=True):
                place.copy_(row)
        tensors = {"x": x, "x0_prev": x0_prev, "x_next": x_next, "x0": x0}
        key = (index, *(tensor.data_ptr() for tensor in tensors.values()))
        if key not in self._bound:
            if self._graph == "loop":
                tensors = {"noise": x, "image": x_next}
            tensors |= dict(zip(COEFFICIENTS, self._row, strict=True))
            self._bound[key] = self._bind(session, index, tensors)
        binding, options = self._bound[key]
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:  # its exceptions derive from RuntimeError or from nothing
            first = (str(error).splitlines() or ["?"])[0]
            raise BackendError(f"ONNX Runtime failed in evaluation {k}: {first[:200]}") from error

    def _bind(
        self, session: ort.InferenceSession, index: int, tensors: dict[str, Tensor]
    ) -> tuple[Any, Any]:
        """Every tensor of graph ``index`` at its address, and the options of a run with them."""
        manifest, binding = self.sessions.manifest, session.io_binding()
        signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, index)
        place = (self.device.torch_device.type, self.device.index)
        for bind, specs in (
            (binding.bind_input, signature.inputs),
            (binding.bind_output, signature.outputs),
        ):
            for spec in specs:
                pointer = tensors[spec.name].data_ptr()
                bind(spec.name, *place, np.float32, (self.batch, *spec.row), pointer)
        options = ort.RunOptions()
        # The loop waits for its own events; a wait after each step would empty the queue.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        graph_id = next(self._graph_ids) if self._graph_ids else -1  # -1: no graph of this one
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return binding, options


class OnnxRuntimeDeviceDenoiser(DeviceDenoiser):
    """One export on a GPU in ONNX Runtime.

    Args:
        manifest: of the export folder.
        provider: "cuda", "tensorrt" or an execution provider's name.
        device: the GPU.
        cache: where the TensorRT provider keeps its engines; None: nowhere.

    Raises:
        ArtefactError, BackendError: as :class:`OnnxRuntimeDenoiser`.
    """

    def __init__(
        self, manifest: Manifest, provider: str, device: CudaDevice, cache: Path | None = None
    ) -> None:
        super().__init__(manifest.config, manifest.graph, manifest.schedule, device)
        self._graph_ids = itertools.count(1)

        def options(k: int) -> dict[str, str]:
            return provider_options(PROVIDERS.get(provider, provider), manifest, k, device, cache)

        self._sessions = OnnxRuntimeDenoiser(manifest, provider, provider_options=options)

    def make_program(self, batch: int, steps: int, alone: bool) -> OnnxRuntimeProgram:
        """See :class:`DeviceDenoiser`."""
        ids = None if alone else self._graph_ids
        return OnnxRuntimeProgram(self._sessions, self.device, batch, steps, ids)

    def close(self) -> None:
        """Free loops and sessions when the GPU has finished."""
        super().close()
        self._sessions.close()

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, provider, export and hashes."""
        return self._sessions.identity


def provider_options(
    provider: str, manifest: Manifest, k: int, device: CudaDevice, cache: Path | None
) -> dict[str, str]:
    """What an execution provider is told for graph k of an export.

    Our stream, the provider's own CUDA graphs (addresses and shapes are fixed), float32 that
    is not TF32. TensorRT's engine cache knows graph names and input shapes but no weights, and
    the names of our graphs are all alike, so its prefix carries the export's hash.
    """
    shared = {"device_id": str(device.index), "user_compute_stream": str(device.stream_handle)}
    if provider == PROVIDERS["cuda"]:
        return {**shared, "enable_cuda_graph": "1", "use_tf32": "0"}
    if provider != PROVIDERS["tensorrt"]:
        return {}
    options = {**shared, "trt_cuda_graph_enable": "1"}
    if cache is None:
        return options
    cache.mkdir(parents=True, exist_ok=True)
    return {
        **options,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": f"{manifest.weights_sha256[:16]}-{k:03d}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
