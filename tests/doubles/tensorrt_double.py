"""A test double of what TensorRT needs a GPU for: its runtime. It is NOT TensorRT.

ONNX Runtime computes on the CPU, "device" addresses are those of :class:`CpuDevice`, plans are
ONNX models behind a header. It shows that callers use the API of one version rightly and meet
its failures; it says nothing about what TensorRT computes, or how fast.

The classes below are the behaviour; what a module shows of them is the surface of its version
(``surface.py``).
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from tests.doubles.cpu_device import CpuStream, is_allocated
from tests.doubles.surface import Native, Stored, make_module

VERSIONS = ("10.13", "11.4", "rtx-1.7")
RTX = "tensorrt_rtx"
TAGS = {"tensorrt": b"ftrt", RTX: b"vtrt"}
HEADER_BYTES = 1024  # tag and version as in a plan of TensorRT, then JSON, then the ONNX model
ALIGNMENT = 256  # of tensor addresses and device memory
CACHE_TAG = b"runtime cache of the double: "
DTYPES: dict[int, tuple[str, Any]] = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32),
    onnx.TensorProto.FLOAT16: ("HALF", "f2"),
}


@dataclass
class Controls:
    """Faults to inject and what has been seen; shared by all that a module makes."""

    deserialize_returns_none: bool = False
    context_is_none: bool = False
    profile_false: bool = False
    input_shape_false: bool = False
    tensor_address_false: bool = False
    missing_output_shapes: bool = False  # get_tensor_shape of outputs stays -1
    execute_false_at: int | None = None  # the n-th execute_async_v3, from 0
    perturb: float = 0.0  # added to every output: an engine that is silently wrong
    perturb_from: int = 0  # from this evaluation on that a stream ran
    invalid: tuple[str, ...] = ()  # EngineInvalidityDiagnostics of every plan
    stream_capturable: bool = True
    # Observations.
    errors: list[str] = field(default_factory=list)
    builds: int = 0
    deserialized: int = 0
    executions: int = 0  # calls of execute_async_v3
    evaluations: int = 0  # that a stream ran, replays too
    compiled: int = 0  # kernels that no runtime cache had


def make_tensorrt(version: str, controls: Controls | None = None) -> types.ModuleType:
    """A module to stand in for ``tensorrt`` or ``tensorrt_rtx`` of one of ``VERSIONS``."""
    return make_module(version, BEHAVIOURS, {"_controls": controls or Controls()})


# Plans.


def make_plan(module: str, version: str, model: onnx.ModelProto, **about: Any) -> bytes:
    """A plan for the double.

    Args:
        about: ``profiles``: [min, opt, max] each, none for a static engine; ``architectures``.
    """
    numbers = tuple(map(int, version.split(".")))[:4]
    header = struct.pack("<4sI16x4B", TAGS[module], 0, *numbers)
    header += json.dumps({"version": version, **about}).encode()
    assert len(header) <= HEADER_BYTES
    return header.ljust(HEADER_BYTES) + model.SerializeToString()


@dataclass(frozen=True)
class Tensor:
    """An input or output; −1 stands for the batch of a dynamic engine."""

    name: str
    dtype: str
    kind: Any  # of numpy
    shape: tuple[int, ...]
    is_input: bool

    @classmethod
    def read(cls, value: onnx.ValueInfoProto, is_input: bool) -> Tensor:
        given = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in given.shape.dim)
        return cls(value.name, *DTYPES[given.elem_type], shape, is_input)

    def at(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if size == -1 else size for size in self.shape)


@dataclass
class Execution:
    """What ``execute_async_v3`` enqueues, and a captured graph repeats: addresses, no Python.

    ``places``: address and shape by tensor.
    """

    session: ort.InferenceSession
    places: list[tuple[Tensor, int, tuple[int, ...]]]
    memory: tuple[int, int] | None
    context: weakref.ref[Any]
    controls: Controls

    def __call__(self) -> None:
        assert self.context() is not None, "a context was freed before its work was done"
        arrays = dict(self._arrays())
        assert self.memory is None or is_allocated(*self.memory), "activation memory was freed"
        outputs = [tensor for tensor in arrays if not tensor.is_input]
        feed = {tensor.name: array for tensor, array in arrays.items() if tensor.is_input}
        results = self.session.run([tensor.name for tensor in outputs], feed)
        wrong = self.controls.evaluations >= self.controls.perturb_from and self.controls.perturb
        self.controls.evaluations += 1
        for tensor, result in zip(outputs, results, strict=True):
            arrays[tensor][...] = result + wrong if wrong else result

    def _arrays(self) -> Iterator[tuple[Tensor, NDArray[Any]]]:
        """The memory at each tensor's address."""
        for tensor, address, shape in self.places:
            size = math.prod(shape) * np.dtype(tensor.kind).itemsize
            assert is_allocated(address, size), f"the memory of {tensor.name} was freed"
            memory: Any = (ctypes.c_ubyte * size).from_address(address)
            yield tensor, np.frombuffer(memory, tensor.kind).reshape(shape)


# Behaviour. A class here has the name of the class it stands for.


class Dims(Native):
    def _open(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: Any) -> Any:
        return self._shape[index]


class IHostMemory(Native):
    def _open(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class Runtime(Native):
    engine_host_code_allowed = Stored("bool", False)
    engine_header_size = property(lambda self: HEADER_BYTES)

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def _faults(self, data: bytes) -> tuple[str, ...]:
        if not data.startswith(TAGS[self._trt.__name__]) or len(data) < HEADER_BYTES:
            return ("MALFORMED_ENGINE",)
        if json.loads(data[28:HEADER_BYTES])["version"] != self._trt.__version__:
            return ("VERSION_MISMATCH",)
        return self._controls.invalid

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        trt: Any = self._trt
        faults = self._faults(bytes(buffer))
        bits = sum(int(trt.EngineInvalidityDiagnostics[name]) for name in faults)
        return trt.EngineValidity.INVALID if faults else trt.EngineValidity.VALID, bits

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        data = bytes(serialized_engine)
        faults = self._faults(data)
        if self._controls.deserialize_returns_none or faults:
            self._refuse(f"IRuntime::deserializeCudaEngine: Error Code 1: {', '.join(faults)}")
            return None
        self._controls.deserialized += 1
        return self._new("ICudaEngine", self._logger, data)


class ICudaEngine(Native):
    num_io_tensors = property(lambda self: len(self._tensors))
    num_optimization_profiles = property(lambda self: max(1, len(self._profiles)))

    def _open(self, logger: Any, data: bytes) -> None:
        self._logger, self._model = logger, onnx.load_model_from_string(data[HEADER_BYTES:])
        self._profiles: list[list[int]] = json.loads(data[28:HEADER_BYTES])["profiles"]
        graph = self._model.graph
        inputs = [Tensor.read(value, True) for value in graph.input]
        outputs = [Tensor.read(value, False) for value in graph.output]
        self._tensors = {tensor.name: tensor for tensor in (*outputs, *inputs)}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(data[HEADER_BYTES:], options)

    def _scratch(self, batch: int) -> int:
        """Bytes of activation memory that the double asks for."""
        return sum(4 * math.prod(tensor.at(batch)) for tensor in self._tensors.values())

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes: Any = self._trt.TensorIOMode
        return modes.INPUT if self._tensors[name].is_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType[self._tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> Any:
        return self._new("Dims", self._tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [self._new("Dims", self._tensors[name].at(b)) for b in self._profiles[profile_index]]

    def create_engine_inspector(self) -> Any:
        return self._new("EngineInspector", self._model)

    def create_runtime_config(self) -> Any:
        return self._new("IRuntimeConfig", self._logger)

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        if self._controls.context_is_none:
            self._refuse("IRuntime::createExecutionContext: Error Code 2: OutOfMemory")
            return None
        if runtime_config is not None:
            strategy = runtime_config.get_execution_context_allocation_strategy()
        return self._new("IExecutionContext", self, strategy, runtime_config)


class IRuntimeCache(Native):
    def _open(self, logger: Any) -> None:
        self._logger, self._kernels = logger, set[str]()

    def deserialize(self, blob: bytes) -> bool:
        try:
            kernels = json.loads(bytes(blob).removeprefix(CACHE_TAG))
        except ValueError:
            return self._refuse("IRuntimeCache::deserialize: the cache is of something else")
        self._kernels |= set(kernels)
        return True

    def serialize(self) -> Any:
        return self._new("IHostMemory", CACHE_TAG + json.dumps(sorted(self._kernels)).encode())


class IRuntimeConfig(Native):
    cuda_graph_strategy = Stored("CudaGraphStrategy", "CudaGraphStrategy.DISABLED")
    dynamic_shapes_kernel_specialization_strategy = Stored(
        "DynamicShapesKernelSpecializationStrategy",
        "DynamicShapesKernelSpecializationStrategy.LAZY",
    )

    def _open(self, logger: Any) -> None:
        self._logger, self._cache = logger, None
        self._allocation: Any = self._trt.ExecutionContextAllocationStrategy.STATIC

    def create_runtime_cache(self) -> Any:
        return self._new("IRuntimeCache", self._logger)

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self._cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._allocation


class IExecutionContext(Native):
    engine = property(lambda self: self._engine)
    active_optimization_profile = property(lambda self: self._profile)

    def _open(self, engine: Any, strategy: Any, config: Any) -> None:
        self._engine, self._config, self._logger = engine, config, engine._logger
        self._managed = strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._memory: tuple[int, int] | None = None
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        known = 0 <= profile_index < self._engine.num_optimization_profiles
        if self._controls.profile_false or not known:
            return self._refuse(f"setOptimizationProfileAsync: no profile {profile_index}")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        tensor = self._engine._tensors.get(name)
        profiles = self._engine._profiles
        low, _, high = profiles[self._profile] if profiles else (1, 1, 2**31)
        fitting = tensor is not None and tensor.is_input and low <= shape[0] <= high
        if self._controls.input_shape_false or not fitting or tensor.at(shape[0]) != tuple(shape):
            return self._refuse(
                f"setInputShape: {name} {shape} does not satisfy profile {self._profile}"
            )
        self._shapes[name] = tuple(shape)
        return True

    @property
    def _batch(self) -> int:
        """−1 until every input has its shape."""
        inputs = [tensor for tensor in self._engine._tensors.values() if tensor.is_input]
        batches = {self._shapes.get(t.name, t.shape)[0] for t in inputs}
        return batches.pop() if len(batches) == 1 else -1

    def infer_shapes(self) -> list[str]:
        tensors = self._engine._tensors.values()
        return [t.name for t in tensors if t.is_input and -1 in self._shapes.get(t.name, t.shape)]

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self._engine._tensors[name]
        missing = self._controls.missing_output_shapes and not tensor.is_input
        return self._new("Dims", tensor.at(-1 if missing else self._batch))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._controls.tensor_address_false or name not in self._engine._tensors:
            return self._refuse(f"setTensorAddress: no {name}")
        self._addresses[name] = memory
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self._batch == -1:
            self._refuse("updateDeviceMemorySizeForShapes: input shapes are missing")
            return 0
        return int(self._engine._scratch(self._batch))

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        """Not where kernels may yet be compiled beside the stream."""
        strategies: Any = self._trt.DynamicShapesKernelSpecializationStrategy
        strategy = self._config and self._config.dynamic_shapes_kernel_specialization_strategy
        return self._controls.stream_capturable and strategy == strategies.EAGER

    def _problem(self, stream: CpuStream | None) -> str | None:
        """Why an execution would fail."""
        for tensor in self._engine._tensors.values():
            if -1 in tensor.at(self._batch):
                return f"the shape of {tensor.name} is not known"
            address = self._addresses.get(tensor.name, 0)
            if not address or address % ALIGNMENT:
                return f"the address of {tensor.name} is missing or not aligned"
        if stream is None:
            return "the double has no default stream"
        if self._managed:
            address, size = self._memory or (0, 0)
            if not address or address % ALIGNMENT or size < self._engine._scratch(self._batch):
                return "the device memory is missing, not aligned or too small"
        return None

    def execute_async_v3(self, stream_handle: int) -> bool:
        call, self._controls.executions = self._controls.executions, self._controls.executions + 1
        stream = CpuStream.by_handle.get(stream_handle)
        problem = self._problem(stream)
        if call == self._controls.execute_false_at:
            problem = "Error Code 1: Cask (Cask convolution execution)"
        if problem or stream is None:
            return self._refuse(f"enqueueV3: {problem}")
        self._compile()
        places = [
            (tensor, self._addresses[name], tensor.at(self._batch))
            for name, tensor in self._engine._tensors.items()
        ]
        memory = self._memory if self._managed else None
        stream.put(
            Execution(self._engine._session, places, memory, weakref.ref(self), self._controls)
        )
        return True

    def _compile(self) -> None:
        """Kernels for these shapes, which the runtime cache of TensorRT for RTX keeps."""
        if self._trt.__name__ != RTX:
            return
        kernel = f"{self._engine._model.graph.name} {self._profile} {self._batch}"
        cache = self._config._cache if self._config is not None else None
        if cache is None or kernel not in cache._kernels:
            self._controls.compiled += 1
        if cache is not None:
            cache._kernels.add(kernel)


class EngineInspector(Native):
    """The kinds of layers that engines of TensorRT 10 and 11 were seen to have."""

    def _open(self, model: onnx.ModelProto) -> None:
        self._model = model

    def get_engine_information(self, format: Any) -> str:
        assert format == self._trt.LayerInformationFormat.JSON
        split = int(self._trt.__version__.split(".")[0]) >= 11 or self._trt.__name__ == RTX
        layers = [{"Name": "start", "LayerType": "signal"}, {"Name": "", "LayerType": "shape_call"}]
        layers += [self._layer(k, n, split) for k, n in enumerate(self._model.graph.node)]
        layers += [{"Name": "end", "LayerType": "wait"}]
        names = "I/O Tensors" if split else "Bindings"
        text = json.dumps({"Layers": layers, names: []})
        return text.replace("\\u001e", "\x1e")  # which is no JSON, but what it writes

    def _layer(self, k: int, node: onnx.NodeProto, split: bool) -> dict[str, Any]:
        casts = {tensor.name: tensor.data_type for tensor in self._model.graph.initializer}
        half = onnx.TensorProto.FLOAT16 in (casts.get(name) for name in node.input)
        kind, name = {
            "MatMul": ("fusion", f"__myl_Fc_myl0_{k}"),
            "Gemm": ("gemm", f"{node.name}_myl0_{k}"),
            "Conv": ("CaskConvolution", node.name),
            "Softmax": ("kgen", f"kgen_mha_myl0_{k}"),
        }.get(node.op_type, ("kgen", f"__myl_{node.op_type}_myl0_{k}"))
        spelled = "Half" if half else "Float"
        if split:
            types = {"Format": "Row major linear", "Datatype": spelled}
        elif kind == "CaskConvolution":
            types = {"Format/Datatype": f"Row major linear {'FP16' if half else 'FP32'} format"}
        else:
            types = {"Format/Datatype": spelled}
        return {
            "Name": name,
            "LayerType": kind,
            "Inputs": [{"Name": each, "Dimensions": [], **types} for each in node.input],
            "Metadata": f"[ONNX Layer: {node.name}]\x1e",
        }


BEHAVIOURS: dict[str, type[Native]] = {
    cls.__name__: cls
    for cls in (
        *(Dims, IHostMemory, Runtime, ICudaEngine, IRuntimeCache, IRuntimeConfig),
        *(IExecutionContext, EngineInspector),
    )
}
