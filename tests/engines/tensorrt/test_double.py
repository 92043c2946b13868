"""What the doubles must catch, so that tests on them prove something."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lutdeploy.engines.cuda.device import CaptureError
from lutdeploy.engines.tensorrt.library import open_log
from tests.doubles.cpu_device import CpuDevice
from tests.doubles.surface import DoubleLacks
from tests.doubles.tensorrt_double import VERSIONS, Controls, make_plan, make_tensorrt

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def product() -> onnx.ModelProto:
    """y = x·WEIGHT, at any batch."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 4), ("y", 3))
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="head/MatMul_1")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(WEIGHT, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


class Double:
    """An engine of the product on a device, and the usual ways to it."""

    def __init__(self, version: str = "11.4") -> None:
        self.controls, self.device = Controls(), CpuDevice()
        self.trt: Any = make_tensorrt(version, self.controls)
        self.runtime = self.trt.Runtime(open_log(self.trt))
        name, profiles = self.trt.__name__, [[1, 2, 4], [5, 8, 8]]
        self.plan = make_plan(name, self.trt.__version__, product(), profiles=profiles)
        self.engine = self.runtime.deserialize_cuda_engine(self.plan)
        self.x = self.device.empty((2, 4)).fill_(1)
        self.y = self.device.empty((2, 3))

    def context(self) -> Any:
        context = self.engine.create_execution_context()
        assert context.set_input_shape("x", (2, 4)) and context.infer_shapes() == []
        self.bind(context, self.x, self.y)
        return context

    @staticmethod
    def bind(context: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        assert context.set_tensor_address("x", x.data_ptr())
        assert context.set_tensor_address("y", y.data_ptr())

    def enqueue(self, context: Any) -> bool:
        return bool(context.execute_async_v3(self.device.stream_handle))


def expected(x: float) -> NDArray[Any]:
    return np.full((2, 4), x, np.float32) @ WEIGHT


@pytest.mark.parametrize("version", VERSIONS)
def test_only_the_surface_of_its_version_is_there(version: str) -> None:
    double = Double(version)
    trt, engine, context = double.trt, double.engine, double.context()
    rtx = version.startswith("rtx")
    assert hasattr(context, "is_stream_capturable") == rtx
    assert hasattr(double.runtime, "get_engine_validity") == rtx
    assert hasattr(trt, "IRuntimeCache") == rtx == hasattr(trt, "CudaGraphStrategy")
    assert hasattr(type(engine), "device_memory_size") == (version == "10.13")
    calls: list[Callable[[], Any]] = [
        lambda: context.set_input_shape(name="x", dims=(2, 4)),
        lambda: context.set_input_shape("x", np.array((2, 4))),
        lambda: context.set_device_memory(double.x.data_ptr()),
        lambda: context.execute_async_v3(1.5),
        lambda: engine.create_execution_context(2),
        lambda: engine.get_tensor_name("x"),
        lambda: trt.Runtime(),
        lambda: trt.ICudaEngine(),
        lambda: setattr(double.runtime, "engine_host_code_allowed", 1),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    for owner, name in ((context, "shape"), (engine, "num_io_tensors")):
        with pytest.raises(AttributeError):
            setattr(owner, name, 1)
    with pytest.raises(DoubleLacks):
        engine.serialize()


def test_the_host_does_not_wait() -> None:
    double = Double()
    context = double.context()
    assert double.enqueue(context)
    assert double.y.isnan().all(), "nothing has run yet"
    double.x.fill_(2)  # too early
    double.device.synchronize()
    assert np.array_equal(double.y.numpy(), expected(2)) and not np.array_equal(
        double.y.numpy(), expected(1)
    )


@pytest.mark.parametrize("what", ["x", "y", "context", "memory"])
def test_what_is_freed_too_early_is_caught(what: str) -> None:
    double = Double()
    strategy = double.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = double.engine.create_execution_context(strategy)
    assert context.set_input_shape("x", (2, 4))
    double.bind(context, double.x, double.y)
    memory = double.device.empty((context.update_device_memory_size_for_shapes(),), torch.uint8)
    context.set_device_memory(memory.data_ptr(), memory.nbytes)
    assert double.enqueue(context)
    if what == "context":
        del context
    elif what == "memory":
        del memory
    else:
        delattr(double, what)
    gc.collect()
    with pytest.raises(AssertionError, match="freed"):
        double.device.synchronize()


def test_a_missing_wait_shows() -> None:
    device = CpuDevice()
    for waits in (True, False):
        source, target, event = torch.ones(3), device.empty((3,)), device.event()
        on_device = device.empty((3,))
        with device.on(device.upload):
            on_device.copy_(source, non_blocking=True)
            event.record(device.upload)
        with device.on(device.compute):
            if waits:
                device.compute.wait_event(event)
            target.copy_(on_device + 1)
        device.synchronize()
        assert bool((target == 2).all()) == waits


def test_a_replay_has_the_addresses_of_its_capture_and_runs_no_python() -> None:
    double, calls = Double(), []
    context = double.context()

    def work() -> None:
        calls.append(1)
        with double.device.on(double.device.compute):
            assert double.enqueue(context)
            double.y.mul_(10)

    replay = double.device.capture(work)
    assert double.y.isnan().all() and double.controls.evaluations == 0, "a capture runs nothing"
    double.bind(context, double.device.empty((2, 4)), double.device.empty((2, 3)))
    for value in (1, 3):
        double.x.fill_(value)
        replay()
        double.device.synchronize()
        assert np.array_equal(double.y.numpy(), 10 * expected(value))
    assert calls == [1] and double.controls.executions == 1 and double.controls.evaluations == 2


@pytest.mark.parametrize("waits", [torch.Tensor.item, torch.Tensor.cpu, lambda _: None])
def test_a_wait_ends_a_capture(waits: Callable[[torch.Tensor], Any]) -> None:
    device = CpuDevice()
    value = device.empty((1,))

    def work() -> None:
        with device.on(device.compute):
            value.add_(1)
            waits(value)
        if waits.__name__ == "<lambda>":
            device.synchronize()

    with pytest.raises(CaptureError, match="when stream is capturing"):
        device.capture(work)
    assert device.captures == 0


def test_profiles_and_device_memory_are_asked_for() -> None:
    double = Double()
    context = double.context()
    assert not context.set_input_shape("x", (5, 4)) and not context.set_input_shape("x", (2, 5))
    stream = double.device.stream_handle
    assert not context.set_optimization_profile_async(2, stream)
    assert context.set_optimization_profile_async(1, stream)
    assert context.infer_shapes() == ["x"] and not double.enqueue(context)
    assert not context.set_input_shape("x", (4, 4)) and context.set_input_shape("x", (8, 4))
    assert tuple(context.get_tensor_shape("y")) == (8, 3)
    strategy = double.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = double.engine.create_execution_context(strategy)
    assert context.set_input_shape("x", (2, 4))
    double.bind(context, double.x, double.y)
    assert not double.enqueue(context)
    context.set_device_memory(double.x.data_ptr(), 8)
    assert not double.enqueue(context)
    assert "device memory" in double.controls.errors[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_plans_that_do_not_load(version: str) -> None:
    double = Double(version)
    other = Double("10.13" if version != "10.13" else "11.4")
    for data in (b"", double.plan[:100], b"x" + double.plan[1:], other.plan):
        assert double.runtime.deserialize_cuda_engine(data) is None
    double.controls.deserialize_returns_none = True
    assert double.runtime.deserialize_cuda_engine(double.plan) is None
