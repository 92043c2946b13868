"""ONNX Runtime: an exported graph behind the Denoiser protocol."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.device import parse_device
from lutdeploy.engines.export_denoiser import ExportDenoiser
from lutdeploy.errors import (
    ArtefactError,
    BackendError,
    UsageError,
    first_line,
    ran_out_of_memory,
)
from lutdeploy.machine import memory_bytes, thread_limit
from lutdeploy.sampling import Images

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# As of ONNX Runtime 1.31 it links TensorRT 10 and ignores ``gpu_graph_id``: every evaluation
# replays the graph that was captured first.
TENSORRT = "TensorrtExecutionProvider"
MATMUL_OPERATORS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "Attention", "MultiHeadAttention")
WARNINGS, FATAL = 2, 4  # ONNX Runtime's log severities
SESSION_OVERHEAD = 1.2  # memory of a session over that of its float32 weights
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def execution_provider(device: str) -> str:
    """The execution provider of "cpu", "cuda" or "cuda:N"; its own name is taken as it is.

    Raises:
        UsageError: TensorRT's provider.
        BackendError: not offered by the installed onnxruntime; lists what is.
    """
    if device in ("tensorrt", TENSORRT):
        raise UsageError(
            "ONNX Runtime's TensorRT provider replays the wrong captured CUDA graph and cannot "
            "load with today's TensorRT; use --backend tensorrt (`lutdeploy build`)"
        )
    with contextlib.suppress(UsageError):  # what is no device may be a provider
        device = parse_device(device).kind
    provider = PROVIDERS.get(device, device)
    offered = [name for name in ort.get_available_providers() if name != TENSORRT]
    if provider not in offered:
        instead = "; put onnxruntime-gpu in the place of onnxruntime" if provider == CUDA else ""
        raise BackendError(
            f"ONNX Runtime has no {provider} here; there are {', '.join(offered)}{instead}"
        )
    return provider


def open_session(
    graph: Path | bytes,
    provider: str,
    threads: int | None = None,
    unrolled: bool = False,
    provider_options: Mapping[str, str] | None = None,
    shared_arena: bool = False,
) -> ort.InferenceSession:
    """A session that runs on ``provider`` and nowhere else.

    ``get_available_providers`` also lists providers whose libraries cannot load; a session
    then falls back to the CPU with a log line. So this asks the session itself where it runs,
    and where each of its matmuls runs.

    Args:
        graph: a file, or a model's bytes.
        provider: an execution provider's name.
        threads: of one operator; the physical cores that are ours by default.
        unrolled: the graph has many thousand nodes. Planning the reuse of its buffers takes
            time quadratic in that (24 s instead of 2 s for 16 steps of a small model) and
            saves no measurable memory. On the CPU its optimisers are left out too: they take
            a third of the session's start (64 steps at ``seed`` size), change the result by
            rounding alone, and made no measurable difference to the speed.
        provider_options: of the execution provider.
        shared_arena: on the CPU, compute in memory that all such sessions share. An arena
            keeps what a session's largest batch took: 50 MB for each of 64 steps of a small
            model at batch 64, though one runs at a time.

    Raises:
        BackendError: the provider did not come up, or left a matmul to the CPU.
        ArtefactError: ONNX Runtime cannot load the graph.
    """
    if provider == CUDA:
        load_cuda_libraries()
    options = ort.SessionOptions()
    options.log_severity_level = FATAL  # the exceptions below say the same
    options.enable_mem_reuse = not unrolled
    if unrolled and provider == CPU:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if shared_arena and provider == CPU:
        _register_cpu_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.intra_op_num_threads = threads or thread_limit() or 0  # 0: the physical cores
    source = str(graph) if isinstance(graph, Path) else graph
    ort.set_default_logger_severity(FATAL)
    try:
        chosen = [(provider, dict(provider_options or {}))]
        session = ort.InferenceSession(source, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # its exceptions derive from RuntimeError or from nothing
        if ran_out_of_memory(error):
            raise
        # Drop the place in ONNX Runtime's source, which comes first.
        first = re.sub(r"^\S+\.cc:\d+ .*?\) (?=[A-Z])", "", first_line(error))
        if provider != CPU:
            raise BackendError(f"{provider} cannot run here, {CPU} can: {first[:200]}") from error
        raise ArtefactError(f"ONNX Runtime cannot load the graph: {first}") from error
    finally:
        ort.set_default_logger_severity(WARNINGS)
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"{provider} was asked for, but its libraries cannot load here; this session "
            f"would run on {', '.join(session.get_providers())}"
        )
    misplaced = misplaced_matmuls(session, provider) if provider != CPU else []
    if misplaced:
        raise BackendError(
            f"{provider} left {len(misplaced)} matmuls to other providers: "
            f"{', '.join(misplaced[:5])}"
        )
    return session


def load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from wherever a pip package brings them, for the CUDA provider.

    torch loads those that it was installed with, and ONNX Runtime those of NVIDIA's wheels, where
    torch has none or other versions. What it prints of those it does not find is left out, since
    opening the session says the same.
    """
    import torch  # noqa: F401

    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


@functools.cache
def _register_cpu_arena() -> None:
    """Give the process the arena that sessions with ``session.use_env_allocators`` share."""
    kinds, memory = ort.OrtAllocatorType, ort.OrtMemType.DEFAULT
    arena = ort.OrtMemoryInfo("Cpu", kinds.ORT_ARENA_ALLOCATOR, 0, memory)
    ort.create_and_register_allocator(arena, None)


def misplaced_matmuls(session: ort.InferenceSession, provider: str) -> list[str]:
    """The matmuls of a session that another provider than ``provider`` runs."""
    return [
        f"{node.name or node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type in MATMUL_OPERATORS
    ]


def sessions_that_fit(manifest: Manifest, memory: int, widened: bool) -> int:
    """How many sessions of a ``per-step`` export half of some memory holds.

    Each holds its own copy of the weights, in the layout of its kernels.

    Args:
        manifest: of the export.
        memory: in bytes.
        widened: float16 weights are held in float32, as the CPU's kernels do.
    """
    weights = sum(
        file.bytes for name, file in manifest.files.items() if name not in manifest.graphs
    )
    in_memory = max(1, weights * (2 if widened and manifest.precision == "fp16" else 1))
    return max(1, int(memory / 2 / (SESSION_OVERHEAD * in_memory)))


class OnnxRuntimeDenoiser(ExportDenoiser):
    """One export in ONNX Runtime. The files are verified before anything runs.

    A ``per-step`` export has a session for each step: 0.12 GB each at ``seed`` size. Those for
    which there is no room are opened again whenever their step comes.

    Args:
        manifest: of the export folder.
        device: "cpu", "cuda", "cuda:N" or an execution provider's name.
        threads: of one operator; the physical cores that are ours by default.
        provider_options: of the execution provider.
        room: how many sessions to keep; as many as half of the memory that is ours by default.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        manifest: Manifest,
        device: str = "cpu",
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        room: int | None = None,
    ) -> None:
        self.provider = execution_provider(device)
        super().__init__(manifest)
        self.threads, self._provider_options = threads, provider_options
        self._sessions: dict[int, ort.InferenceSession] = {}
        if room is None:
            several = len(manifest.graphs) > 1
            room = sessions_that_fit(manifest, memory_bytes(), widened=True) if several else 1
        self._room = room
        self.session(0)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()

    @property
    def place(self) -> str:
        return self.provider

    def session(self, k: int) -> ort.InferenceSession:
        """The session of graph k, opened when it is first asked for."""
        if k in self._sessions:
            return self._sessions[k]
        path = self.graph_file(k)
        session = open_session(
            path,
            self.provider,
            self.threads,
            self.whole_trajectory,
            self._provider_options,
            shared_arena=self.manifest.graph == "per-step",
        )
        inputs, outputs = (
            [(a.name, DTYPES.get(a.type, a.type), tuple(a.shape)) for a in arguments]
            for arguments in (session.get_inputs(), session.get_outputs())
        )
        self.signature(k).check_graph(inputs, outputs, str(path))
        if len(self._sessions) < self._room:
            self._sessions[k] = session
        return session

    def keeps(self, k: int) -> bool:
        """Whether the session of graph k, once opened, stays."""
        return k in self._sessions

    def infer(self, k: int, feed: dict[str, Images]) -> list[Images]:
        """See :class:`ExportDenoiser`."""
        session = self.session(k)
        try:
            outputs: list[Images] = session.run(None, feed)
        except Exception as error:  # as in open_session
            if ran_out_of_memory(error):
                raise
            raise BackendError(
                f"ONNX Runtime failed in {self.manifest.graphs[k]}: {first_line(error)[:200]}; "
                "if memory ran out, try a smaller --batch"
            ) from error
        return outputs
