"""ONNX Runtime on a GPU: bound device buffers and the provider's own CUDA graphs.

Its runs cannot be captured from outside (they may allocate and synchronise), so the provider
captures a graph of each evaluation itself, and :class:`lutdeploy.engines.cuda.loop.DeviceLoop`
enqueues them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.onnxruntime import (
    CUDA,
    OnnxRuntimeDenoiser,
    execution_provider,
    sessions_that_fit,
)
from lutdeploy.errors import BackendError, first_line, ran_out_of_memory
from lutdeploy.signature import graph_signature


class OnnxRuntimeProgram:
    """An export's sessions at one batch size, with every tensor bound to its place.

    The provider replays a graph with the addresses that it captured, so each step's coefficients
    are copied to the same place before it runs.

    Args:
        sessions: holds the sessions, on ``device``.
        device: where the tensors are.
        batch: B.
        steps: of the schedule that a "step" export follows.
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
        self._coefficients = device.empty((steps, len(COEFFICIENTS), batch))
        self._current = [device.empty((batch,)) for _ in COEFFICIENTS]
        # A binding serves the session that made it, and must not outlive it.
        self._bound: WeakKeyDictionary[
            ort.InferenceSession, dict[tuple[int, ...], tuple[Any, Any]]
        ] = WeakKeyDictionary()

    def set_coefficients(self, values: NDArray[np.float32]) -> None:
        """See :class:`lutdeploy.engines.cuda.denoiser.ExportProgram`."""
        with self.device.on(self.device.compute):
            self._coefficients.copy_(torch.from_numpy(values))

    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        """See :class:`lutdeploy.engines.cuda.loop.Program`."""
        index = k if self._graph == "per-step" else 0
        session = self.sessions.session(index)
        if self._graph == "step":
            for place, value in zip(self._current, self._coefficients[k], strict=True):
                place.copy_(value)
        tensors = {"x": x, "x0_prev": x0_prev, "x_next": x_next, "x0": x0}
        key = tuple(tensor.data_ptr() for tensor in tensors.values())
        bound = self._bound.setdefault(session, {})
        if key not in bound:
            if self._graph == "loop":
                tensors = {"noise": x, "image": x_next}
            tensors |= dict(zip(COEFFICIENTS, self._current, strict=True))
            bound[key] = self._bind(session, index, tensors)
        binding, options = bound[key]
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:  # its exceptions derive from RuntimeError or from nothing
            if ran_out_of_memory(error):
                raise
            raise BackendError(
                f"ONNX Runtime failed in evaluation {k}: {first_line(error)[:200]}"
            ) from error
        if not self.sessions.keeps(index):
            self.device.synchronize()  # the session goes now, and its memory with it

    def _bind(
        self, session: ort.InferenceSession, index: int, tensors: dict[str, Tensor]
    ) -> tuple[Any, Any]:
        """Bind every tensor of graph ``index``; the binding and the options to run it with."""
        manifest, binding = self.sessions.manifest, session.io_binding()
        signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, index)
        place = (self.device.torch_device.type, self.device.torch_device.index or 0)
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
        ids = self._graph_ids if self.sessions.keeps(index) else None
        graph_id = next(ids) if ids else -1  # -1: capture nothing
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return binding, options


class OnnxRuntimeDeviceDenoiser(DeviceDenoiser):
    """One export on a GPU in ONNX Runtime.

    Args:
        manifest: of the export folder.
        provider: "cuda", "cuda:N" or an execution provider's name.
        device: the GPU.
    """

    def __init__(self, manifest: Manifest, provider: str, device: CudaDevice) -> None:
        super().__init__(manifest.config, manifest.graph, manifest.schedule, device)
        self._graph_ids = itertools.count(1)
        options = provider_options(execution_provider(provider), device)
        self._sessions = OnnxRuntimeDenoiser(
            manifest,
            provider,
            provider_options=options,
            room=sessions_that_fit(manifest, device.free_memory, widened=False),
        )

    def make_program(self, batch: int, steps: int, alone: bool) -> OnnxRuntimeProgram:
        """See :class:`DeviceDenoiser`."""
        graph_ids = None if alone else self._graph_ids
        return OnnxRuntimeProgram(self._sessions, self.device, batch, steps, graph_ids)

    def close(self) -> None:
        """Free loops and sessions when the GPU has finished."""
        super().close()
        self._sessions.close()

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, provider, export and hashes."""
        return self._sessions.identity


def provider_options(provider: str, device: CudaDevice) -> dict[str, str]:
    """The options of an execution provider on a device.

    Our stream, the provider's own CUDA graphs (addresses and shapes are fixed), and float32
    that is not TF32.
    """
    if provider != CUDA:
        return {}
    return {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream_handle),
        "enable_cuda_graph": "1",
        "use_tf32": "0",
    }
