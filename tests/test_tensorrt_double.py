"""The double of tensorrt: it refuses what TensorRT refuses and computes what ONNX says."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.doubles.tensorrt_double import GPU_NAME, VERSIONS, Controls, DoubleLacks, make_tensorrt

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


def attention(dtype: int = HALF) -> onnx.ModelProto:
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["z"], name="stem/Conv_1"),
        make("Mul", ["z", "z"], ["q"], name="Mul_1"),
        make("Add", ["q", "z"], ["k"], name="Add_1"),
        make("MatMul", ["q", "k"], ["scores"], name="blocks.0/MatMul_1"),
        make("Softmax", ["scores"], ["p"], name="blocks.0/Softmax_1"),
        make("MatMul", ["p", "k"], ["a"], name="blocks.0/MatMul_2"),
        make("MatMul", ["a", "v"], ["y"], name="head/MatMul_1"),
    ]
    shape: list[int | str] = ["batch", 2, 4, 4]
    weights = {"w": RANDOM.normal(size=(2, 2, 1, 1)), "v": RANDOM.normal(size=(4, 4))}
    return onnx_model(nodes, {"x": shape}, {"y": shape}, dtype, **weights)


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


def test_two_versions_only() -> None:
    with pytest.raises(ValueError, match=r"10\.13\.0\.35 or 11\.1\.0\.106, not 8\.6"):
        make_tensorrt("8.6")


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


def test_what_has_no_behaviour_says_so(double: Double) -> None:
    with pytest.raises(DoubleLacks, match=r"tensorrt\.Builder\.reset"):
        double.builder.reset()
    with pytest.raises(DoubleLacks, match="Refitter"):
        double.trt.Refitter(None, double.logger)
    with pytest.raises(DoubleLacks, match="max_num_tactics"):
        double.builder.create_builder_config().max_num_tactics = 1


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


def test_enums_and_aliases(double: Double) -> None:
    trt = double.trt
    assert trt.float16 is trt.DataType.HALF and trt.float16.itemsize == 2
    assert trt.nptype(trt.float32) is np.float32 and trt.volume((2, 3)) == 6
    assert (
        trt.Logger.INFO == trt.ILogger.INFO == trt.ILogger.Severity.INFO == trt.Logger.Severity(3)
    )
    assert trt.DataType.HALF.name == "HALF" and int(trt.DataType.HALF) == 1
    assert trt.DataType.FLOAT != 0 and len({trt.float32, trt.DataType.FLOAT}) == 1
    assert "NOT TensorRT" in str(make_tensorrt.__globals__["__doc__"]) and "double" in GPU_NAME


def test_loggers_of_our_own(double: Double, capfd: pytest.CaptureFixture[str]) -> None:
    trt, told = double.trt, list[str]()
    base: Any = trt.ILogger

    class Ours(base):  # type: ignore[misc]  # a class of a generated module
        def __init__(self, sink: list[str]) -> None:
            super().__init__()
            self.sink = sink

        def log(self, severity: Any, msg: str) -> None:
            self.sink.append(f"{severity.name} {msg}")
            raise KeyError("C++ lets no exception through")

    class Forgetful(base):  # type: ignore[misc]  # a class of a generated module
        def __init__(self) -> None:
            pass

    assert trt.Runtime(Ours(told)).deserialize_cuda_engine(b"no plan") is None
    assert told == ["ERROR Error Code 1: Serialization (Magic tag does not match.)"]
    assert "Exception caught in log()" in capfd.readouterr().err
    with pytest.raises(TypeError, match=r"ILogger\.__init__\(\) must be called"):
        Forgetful()
    trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"no plan")
    assert capfd.readouterr().err.startswith("[TRT] [E] Error Code 1")


# From ONNX to an engine.


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_an_engine_computes_what_the_graph_says(double: Double, dtype: int) -> None:
    engine = double.engine(double.plan(product(dtype)))
    x, y, done = run(engine, 3, dtype)
    assert done and double.controls.executions == double.controls.builds == 1
    tolerance = 1e-6 if dtype == FLOAT else 2e-2
    np.testing.assert_allclose(y, x.astype(np.float64) @ WEIGHT, atol=tolerance)


def test_network_and_engine_describe_themselves(double: Double) -> None:
    trt, network = double.trt, double.network(product(HALF))
    x, y = network.get_input(0), network.get_output(0)
    assert (network.num_inputs, network.num_outputs, network.num_layers) == (1, 1, 1)
    assert (x.name, x.dtype, tuple(x.shape), y.shape == (-1, 3)) == (
        "x",
        trt.float16,
        (-1, 4),
        True,
    )
    with pytest.raises(AttributeError):
        x.dtype = trt.float32
    engine = double.engine(double.plan(product(HALF)))
    names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
    assert names == ["x", "y"]
    modes = [engine.get_tensor_mode(name) for name in names]
    assert modes == [trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT]
    assert engine.get_tensor_dtype("y") == trt.float16
    assert tuple(engine.get_tensor_shape("y")) == (-1, 3)
    assert engine.get_tensor_profile_shape("x", 0) == [(1, 4), (2, 4), (8, 4)]
    assert engine.num_optimization_profiles == 1 and engine.device_memory_size_v2 > 0
    assert engine.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    assert not engine.refittable and engine.name == "lutdeploy"


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


def test_external_weights(double: Double, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    onnx.save(product(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    network, parser = double.parser()
    assert parser.parse(path.read_bytes(), str(path))
    plan = double.builder.build_serialized_network(network, double.config())
    (tmp_path / "w.bin").unlink()
    x, y, done = run(double.engine(bytes(plan)))
    assert done and np.allclose(y, x @ WEIGHT, atol=1e-6)
    _, parser = double.parser()
    assert not parser.parse(path.read_bytes(), str(path))
    assert "external weights" in parser.get_error(0).desc()


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


def test_inputs_that_differ_in_their_batch(double: Double) -> None:
    shape: list[int | str] = ["batch", 4]
    node = helper.make_node("Add", ["x", "t"], ["y"], name="Add_1")
    model = onnx_model([node], {"x": shape, "t": shape}, {"y": shape}, FLOAT)
    config = double.builder.create_builder_config()
    profile = double.builder.create_optimization_profile()
    for name in ("x", "t"):
        profile.set_shape(name, (1, 4), (2, 4), (8, 4))
    config.add_optimization_profile(profile)
    engine = double.engine(double.plan(model, config))
    context = engine.create_execution_context()
    assert context.set_input_shape("x", (2, 4)) and context.infer_shapes() == ["t"]
    assert context.set_input_shape("t", (3, 4))
    with pytest.raises(RuntimeError, match="infer_shapes error code: -1"):
        context.infer_shapes()
    assert not context.execute_async_v3(STREAM)
    assert "Axis batch is 2, but 3 in input t." in double.errors()


def test_config(double: Double) -> None:
    trt, config = double.trt, double.builder.create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32) and config.flags == 1 << 6
    config.clear_flag(trt.BuilderFlag.TF32)
    assert config.flags == 0
    config.builder_optimization_level = 6
    assert config.builder_optimization_level == 3 and "0 to 5" in double.errors()[0]


# Timing caches, progress.


def test_timing_caches(double: Double) -> None:
    config = double.config()
    assert config.create_timing_cache(b"garbage") is None
    cache = config.create_timing_cache(b"")
    empty = bytes(cache.serialize())
    assert config.set_timing_cache(cache, False) and double.controls.timing_cache_loaded is None
    double.plan(config=config)
    filled = bytes(config.get_timing_cache().serialize())
    assert len(filled) > len(empty)
    assert config.set_timing_cache(config.create_timing_cache(filled), ignore_mismatch=False)
    assert double.controls.timing_cache_loaded == filled
    assert cache.combine(config.create_timing_cache(filled), False)
    double.controls.gpu_name = "another GPU"
    assert not config.set_timing_cache(config.create_timing_cache(filled), False)
    assert config.set_timing_cache(config.create_timing_cache(filled), True)
    fast = double.config()
    fast.builder_optimization_level = 0
    unused = fast.create_timing_cache(b"")
    fast.set_timing_cache(unused, False)
    before = bytes(unused.serialize())
    double.plan(config=fast)
    assert bytes(unused.serialize()) == before


@pytest.mark.parametrize("ends", ["no", "false", "raises"])
def test_progress(double: Double, ends: str, capfd: pytest.CaptureFixture[str]) -> None:
    open_phases, seen = list[str](), list[str]()
    base: Any = double.trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # a class of a generated module
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            assert parent_phase == (open_phases[-1] if open_phases else None)
            open_phases.append(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            seen.append(f"{phase_name} {step}")
            if len(seen) == 3 and ends == "raises":
                raise KeyboardInterrupt("stop")
            return len(seen) < 3 or ends != "false"

        def phase_finish(self, phase_name: str) -> None:
            assert open_phases.pop() == phase_name

    config = double.config()
    config.progress_monitor = Monitor()
    memory = double.builder.build_serialized_network(double.network(product()), config)
    assert (memory is None) == (ends != "no") and not open_phases
    assert len(seen) == (10 if ends == "no" else 3)
    assert ("step_complete(): stop" in capfd.readouterr().err) == (ends == "raises")


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


def test_hardware_compatibility(double: Double) -> None:
    levels = double.trt.HardwareCompatibilityLevel

    def loads_on(level: Any, gpu: str, capability: tuple[int, int]) -> bool:
        config = double.config()
        config.hardware_compatibility_level = level
        double.controls.gpu_name, double.controls.compute_capability = "A", (8, 6)
        plan = double.plan(config=config)
        double.controls.gpu_name, double.controls.compute_capability = gpu, capability
        return double.engine(plan) is not None

    assert loads_on(levels.NONE, "A", (8, 6))
    assert not loads_on(levels.NONE, "B", (8, 6)) and not loads_on(levels.NONE, "A", (8, 9))
    assert loads_on(levels.AMPERE_PLUS, "B", (9, 0))
    assert not loads_on(levels.AMPERE_PLUS, "B", (7, 5))
    assert loads_on(levels.SAME_COMPUTE_CAPABILITY, "B", (8, 6))
    assert not loads_on(levels.SAME_COMPUTE_CAPABILITY, "A", (9, 0))


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


def test_injected_faults(double: Double) -> None:
    controls, engine, calls = double.controls, double.engine(), list[int]()
    controls.execute_false_at, controls.perturb, controls.perturb_from = 1, 0.5, 2
    controls.on_execute = lambda: calls.append(1)
    x, y, done = run(engine)
    assert done and np.allclose(y, x @ WEIGHT, atol=1e-6)
    assert not run(engine)[2]
    x, y, done = run(engine)
    assert done and np.allclose(y, x @ WEIGHT + 0.5, atol=1e-6)
    assert len(calls) == 2 and controls.executions == 3
    context = engine.create_execution_context()
    controls.missing_output_shapes = True
    assert context.set_input_shape("x", (2, 4)) and -1 in tuple(context.get_tensor_shape("y"))
    controls.input_shape_false = controls.tensor_address_false = True
    assert not context.set_input_shape("x", (2, 4)) and not context.set_tensor_address("x", 256)
    controls.build_returns_none = True
    network = double.network(product())
    assert double.builder.build_serialized_network(network, double.config()) is None


# The inspector.


def inspect(double: Double, dtype: int = HALF, verbosity: str = "DETAILED") -> list[Any]:
    config = double.config(row=(2, 4, 4))
    config.profiling_verbosity = double.trt.ProfilingVerbosity[verbosity]
    engine = double.engine(double.plan(attention(dtype), config))
    json_format = double.trt.LayerInformationFormat.JSON
    told = json.loads(engine.create_engine_inspector().get_engine_information(json_format))
    key = "Bindings" if double.trt.__version__ == VERSIONS[0] else "I/O Tensors"
    assert told.keys() == {"Layers", key} and told[key] == ["x", "y"]
    assert engine.num_layers == len(told["Layers"]) or verbosity == "NONE"
    return list(told["Layers"])


def test_inspector(double: Double) -> None:
    conv, pointwise, mha, gemm = inspect(double)
    assert conv["LayerType"] == "CaskConvolution"
    assert conv["Outputs"][0]["Format/Datatype"] == "Row major linear FP16 format"
    assert (pointwise["LayerType"], pointwise["Name"]) == ("kgen", "__myl_MulAdd_myl0_1")
    assert pointwise["Metadata"] == "[ONNX Layer: Mul_1]\x1e[ONNX Layer: Add_1]"
    assert [tensor["Name"] for tensor in pointwise["Inputs"]] == ["z"]
    assert mha["Name"] == "_gemm_mha_v2_myl0_2" and mha["Metadata"].count("ONNX Layer") == 3
    assert gemm["Name"] == "head/MatMul_1_myl0_3" and "f16f16" in gemm["TacticName"]
    shape = {"Name": "a", "Dimensions": [-1, 2, 4, 4], "Format/Datatype": "Half"}
    assert gemm["Inputs"] == [shape]


def test_inspector_of_other_engines(double: Double) -> None:
    assert len(inspect(double, FLOAT)) == 6  # no fused attention in float32
    assert inspect(double, FLOAT)[0]["Outputs"][0]["Format/Datatype"] == "Row major linear FP32"
    assert inspect(double, verbosity="LAYER_NAMES_ONLY")[2] == "_gemm_mha_v2_myl0_2"
    assert inspect(double, verbosity="NONE") == []
    double.controls.inspector = "unfused"
    assert [layer["LayerType"] for layer in inspect(double)[2:]] == ["gemm", "kgen", "gemm", "gemm"]
    double.controls.inspector = "float32"
    told = [layer["Outputs"][0]["Format/Datatype"] for layer in inspect(double)]
    assert told == ["Row major linear FP32", "Half", "Float", "Float"]
    double.controls.inspector = "opaque"
    (layer,) = inspect(double)
    assert layer["Name"] == "{ForeignNode[stem/Conv_1...head/MatMul_1]}"
