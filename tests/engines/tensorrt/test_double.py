"""The double of tensorrt: it refuses what TensorRT refuses and computes what ONNX says."""

from __future__ import annotations

import gc
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.doubles.tensorrt_double import VERSIONS, Controls, make_tensorrt

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(4, 3))
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
STREAM = 1  # any handle but that of the default stream


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    dtype: int,
    **weights: NDArray[Any],
) -> onnx.ModelProto:
    def values(specs: dict[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, dtype, list(s)) for n, s in specs.items()]

    kind = helper.tensor_dtype_to_np_dtype(dtype)
    tensors = [numpy_helper.from_array(w.astype(kind), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "lutdeploy", values(inputs), values(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def product(dtype: int = FLOAT) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="head/MatMul_1")
    return onnx_model([node], {"x": ["batch", 4]}, {"y": ["batch", 3]}, dtype, w=WEIGHT)


class Double:
    """The module of one version, and the usual ways through it."""

    def __init__(self, version: str) -> None:
        self.controls = Controls()
        self.trt: Any = make_tensorrt(version, self.controls)
        self.logger = self.trt.Logger(self.trt.Logger.INTERNAL_ERROR)
        self.builder = self.trt.Builder(self.logger)
        self.runtime = self.trt.Runtime(self.logger)

    def parser(self, flags: int | None = None) -> tuple[Any, Any]:
        typed = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self.builder.create_network(typed if flags is None else flags)
        return network, self.trt.OnnxParser(network, self.logger)

    def network(self, model: onnx.ModelProto) -> Any:
        network, parser = self.parser()
        assert parser.parse(model.SerializeToString()), self.errors()
        return network

    def config(self, name: str = "x", row: tuple[int, ...] = (4,), most: int = 8) -> Any:
        profile = self.builder.create_optimization_profile()
        profile.set_shape(name, (1, *row), (2, *row), (most, *row))
        config = self.builder.create_builder_config()
        assert config.add_optimization_profile(profile) == 0
        return config

    def plan(self, model: onnx.ModelProto | None = None, config: Any = None) -> bytes:
        network = self.network(model or product())
        memory = self.builder.build_serialized_network(network, config or self.config())
        assert memory is not None, self.errors()
        return bytes(memory)

    def engine(self, plan: bytes | None = None) -> Any:
        return self.runtime.deserialize_cuda_engine(self.plan() if plan is None else plan)

    def errors(self) -> list[str]:
        return [text for severity, text in self.controls.log if severity == "ERROR"]


@pytest.fixture(params=VERSIONS)
def double(request: pytest.FixtureRequest) -> Double:
    return Double(str(request.param))


def aligned(shape: Sequence[int], dtype: int = FLOAT) -> NDArray[Any]:
    """Zeros at an address that TensorRT takes."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size].view(kind).reshape(shape)


def bind(context: Any, x: NDArray[Any], y: NDArray[Any]) -> None:
    assert context.set_input_shape("x", x.shape)
    assert context.set_tensor_address("x", x.ctypes.data)
    assert context.set_tensor_address("y", y.ctypes.data)


def run(engine: Any, batch: int = 2, dtype: int = FLOAT) -> tuple[NDArray[Any], NDArray[Any], bool]:
    x, y = aligned((batch, 4), dtype), aligned((batch, 3), dtype)
    x[:] = RANDOM.normal(size=x.shape)
    context = engine.create_execution_context()
    bind(context, x, y)
    return x, y, context.execute_async_v3(STREAM)


# The surface.


def test_unknown_names(double: Double) -> None:
    trt, config = double.trt, double.builder.create_builder_config()
    for owner in (trt, trt.Builder, trt.BuilderFlag, double.builder, config):
        with pytest.raises(AttributeError):
            _ = owner.max_workspace_size
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 1
    with pytest.raises(AttributeError):
        _ = double.builder.gpu_allocator  # write-only
    with pytest.raises(TypeError):
        with double.builder:  # the deprecated context managers
            pass


def test_argument_lists(double: Double) -> None:
    trt, config = double.trt, double.builder.create_builder_config()
    for call in (
        lambda: double.builder.create_network(0, 1),
        lambda: double.builder.create_network(flag=0),
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit=1),
        lambda: config.set_timing_cache(config.create_timing_cache(b"")),
        lambda: config.set_flag(int(trt.BuilderFlag.TF32)),
        lambda: trt.Builder(),
        lambda: trt.Builder("logger"),
        lambda: trt.IBuilderConfig(),
        lambda: setattr(config, "profiling_verbosity", 2),
    ):
        with pytest.raises(TypeError):
            call()
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 20)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20


def test_versions_differ() -> None:
    old, new = (make_tensorrt(version) for version in VERSIONS)
    assert [trt.__version__ for trt in (old, new)] == list(VERSIONS)
    assert int(old.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 1
    assert int(new.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 0
    assert [int(trt.BuilderFlag.VERSION_COMPATIBLE) for trt in (old, new)] == [13, 12]
    assert "FP16" in old.BuilderFlag.__members__ and "FP16" not in new.BuilderFlag.__members__
    assert hasattr(old, "IInt8Calibrator") and not hasattr(new, "IInt8Calibrator")
    assert hasattr(new, "IAttention") and not hasattr(old, "IAttention")
    assert hasattr(old.OnnxParser, "supports_model") and not hasattr(
        new.OnnxParser, "supports_model"
    )
    new_parser = new.OnnxParser.set_builder_config
    assert callable(new_parser) and not hasattr(old.OnnxParser, "set_builder_config")


# From ONNX to an engine.


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_an_engine_computes_what_the_graph_says(double: Double, dtype: int) -> None:
    engine = double.engine(double.plan(product(dtype)))
    x, y, done = run(engine, 3, dtype)
    assert done and double.controls.executions == double.controls.builds == 1
    tolerance = 1e-6 if dtype == FLOAT else 2e-2
    np.testing.assert_allclose(y, x.astype(np.float64) @ WEIGHT, atol=tolerance)


def test_plans_are_buffers_and_deterministic(double: Double) -> None:
    network = double.network(product())
    memory = double.builder.build_serialized_network(network, double.config())
    assert memory.nbytes == len(bytes(memory)) == memoryview(memory).nbytes
    for refused in (len, iter, lambda m: m[0], lambda m: m + b""):
        with pytest.raises(TypeError):
            refused(memory)
    with pytest.raises(AttributeError):
        memory.decode()
    assert bytes(memory) == double.plan()
    assert struct.unpack_from("<II", memory) == (0x74727466, 0)
    assert ".".join(map(str, bytes(memory)[24:28])) == double.trt.__version__


def test_parser_errors(double: Double) -> None:
    def failures(data: bytes) -> list[tuple[str, str, str]]:
        _, parser = double.parser()
        assert not parser.parse(data)
        found = [parser.get_error(k) for k in range(parser.num_errors)]
        return [(e.node_name(), e.node_operator(), e.code().name) for e in found]

    assert failures(b"no model") == [("", "", "MODEL_DESERIALIZE_FAILED")]
    assert failures(b"") == [("", "", "INVALID_GRAPH")]
    model = product()
    model.graph.node[0].op_type = "BitShift"
    name = "head/MatMul_1"
    assert failures(model.SerializeToString()) == [(name, "BitShift", "UNSUPPORTED_NODE")]
    integers = product(TensorProto.INT32).SerializeToString()
    assert failures(integers) == [(name, "MatMul", "UNSUPPORTED_NODE_DATATYPE")]
    mixed = product()
    mixed.graph.input[0].type.tensor_type.elem_type = HALF
    assert failures(mixed.SerializeToString())[0][2] == "INVALID_GRAPH"
    double.controls.parser_errors = [("a", "B", "c")]
    assert failures(product().SerializeToString()) == [("a", "B", "UNSUPPORTED_NODE")]
    attention_since_1014 = double.parser()[1].supports_operator("Attention")
    assert attention_since_1014 == (double.trt.__version__ == VERSIONS[1])


def test_weakly_typed_networks(double: Double) -> None:
    network, parser = double.parser(flags=0)
    assert parser.parse(product().SerializeToString())
    memory = double.builder.build_serialized_network(network, double.config())
    assert (memory is None) == (double.trt.__version__ == VERSIONS[0])
    assert ["weakly typed" in text for text in double.errors()] == [True] * (memory is None)


def test_profiles(double: Double) -> None:
    profile = double.builder.create_optimization_profile()
    with pytest.raises(RuntimeError, match="opt is inconsistent"):
        profile.set_shape("x", (2, 4), (1, 4), (8, 4))
    network = double.network(product())
    for config, text in (
        (double.builder.create_builder_config(), "no optimization profile"),
        (double.config("X"), "no shapes for the dynamic input x"),
        (double.config(row=(5,)), "gives input x"),
        (double.config(row=(4, 4)), "gives input x"),
    ):
        assert double.builder.build_serialized_network(network, config) is None
        assert text in double.errors()[-1]
    engine = double.engine()
    context = engine.create_execution_context()
    assert context.infer_shapes() == ["x"] and tuple(context.get_tensor_shape("y")) == (-1, 3)
    assert not context.set_input_shape("x", (9, 4)) and not context.set_input_shape("z", (1, 4))
    assert context.set_input_shape("x", (8, 4)) and context.infer_shapes() == []
    assert tuple(context.get_tensor_shape("y")) == (8, 3)
    assert context.active_optimization_profile == 0


# What does not load, what does not run.


def test_plans_that_do_not_load(double: Double) -> None:
    plan = double.plan()
    other = Double(next(v for v in VERSIONS if v != double.trt.__version__))
    assert other.engine(plan) is None and "expecting library version" in other.errors()[0]
    for damaged in (b"", plan[:40], b"x" + plan[1:], plan[:-1] + b"x", plan[:-1]):
        assert double.engine(damaged) is None
    assert double.engine(plan) is not None and double.controls.deserialized == 1
    double.controls.deserialize_returns_none = True
    assert double.engine(plan) is None


def test_executions_that_fail(double: Double) -> None:
    engine = double.engine()
    context = engine.create_execution_context()
    x, y = aligned((2, 4)), aligned((2, 3))
    assert not context.execute_async_v3(STREAM)
    bind(context, x, y)
    assert context.execute_async_v3(stream_handle=STREAM)
    assert not context.execute_async_v3(0)
    assert context.set_tensor_address("y", y.ctypes.data + 4)
    assert not context.execute_async_v3(STREAM)
    assert [text.rpartition(" of ")[2] for text in double.errors()] == [
        "x has not been set.",
        "The double refuses executions on the default stream.",
        "y is not aligned to 256 bytes.",
    ]


def test_device_memory_of_our_own(double: Double) -> None:
    strategy = double.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    engine = double.engine()
    context = engine.create_execution_context(strategy)
    x, y = aligned((2, 4)), aligned((2, 3))
    bind(context, x, y)
    assert not context.execute_async_v3(STREAM)
    needed = context.update_device_memory_size_for_shapes()
    memory = aligned((needed,))
    context.set_device_memory(memory.ctypes.data, needed - 1)
    assert not context.execute_async_v3(STREAM)
    context.set_device_memory(memory.ctypes.data, needed)
    assert context.execute_async_v3(STREAM)
    assert context.set_input_shape("x", (8, 4))
    assert context.update_device_memory_size_for_shapes() == engine.device_memory_size_v2 > needed


def test_ownership(double: Double) -> None:
    engine = double.engine()
    context = engine.create_execution_context()
    assert context.engine is engine
    del engine
    gc.collect()
    assert not context.execute_async_v3(STREAM) and "engine of this context" in double.errors()[-1]
    engine = double.engine()
    del double.runtime
    gc.collect()
    assert engine.create_execution_context() is None and "Runtime" in double.errors()[-1]
