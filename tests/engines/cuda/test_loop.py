"""Whole trajectories on a device: the same numbers as step by step, in whatever batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.torch_version import TorchVersion

from lutdeploy import images
from lutdeploy.engines.cuda.device import CaptureError, CudaDevice
from lutdeploy.engines.cuda.loop import DeviceLoop, Loops, run_batches, split_batches, to_pixels
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.sampling import Batch, Images, batch_noise
from tests.doubles.cpu_device import CpuDevice

SHAPE = (3, 4, 4)


class Affine:
    """x' = x/2 + k + 1, x0 = x − x0_prev: what a step reads and writes shows in the end."""

    def __init__(self, evaluations: int, capturable: bool = True) -> None:
        self.evaluations, self.capturable = evaluations, capturable

    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        x_next.copy_(x / 2 + (k + 1) + 0.01 * x0_prev)
        x0.copy_(x - x0_prev)

    def on_the_host(self, noise: Images) -> Images:
        x, x0 = torch.from_numpy(noise), torch.from_numpy(noise)
        for k in range(self.evaluations):
            x, x0 = x / 2 + (k + 1) + 0.01 * x0, x - x0
        return x.numpy()


def loops_of(device: CudaDevice, program: Affine) -> Loops:
    return Loops(lambda batch: DeviceLoop(device, program, batch, SHAPE))


def batches(*sizes: int) -> Iterator[Batch]:
    start = 0
    for size in sizes:
        indices = range(start, start + size)
        yield indices, batch_noise(0, indices, SHAPE)
        start += size


@pytest.mark.parametrize("evaluations", [1, 2, 5])
@pytest.mark.parametrize("capturable", [True, False])
def test_a_loop_gives_what_the_steps_give(evaluations: int, capturable: bool) -> None:
    device, program = CpuDevice(), Affine(evaluations, capturable)
    loops = loops_of(device, program)
    results = list(run_batches(device, loops, batches(4, 4, 4, 3), pixels=False))
    expected = [range(0, 4), range(4, 8), range(8, 12), range(12, 15)]
    assert [indices for (indices, _), _, _ in results] == expected
    for (_, noise), ends, finite in results:
        np.testing.assert_array_equal(ends, program.on_the_host(noise))
        assert finite.all()
    assert device.captures == capturable
    assert device.replays == (4 if capturable else 0), "the last, smaller batch is padded"


@pytest.mark.parametrize("capturable", [True, False])
def test_history_is_composed_on_the_device(capturable: bool) -> None:
    """Where d/c is not 0 a step is given x0_prev + d/c·x0_prev2, as on the host."""
    device, ratios = CpuDevice(), (0.0, 0.0, -0.25, -0.5, 0.0, -0.125)
    program = Affine(len(ratios), capturable)
    noise = batch_noise(0, range(2), SHAPE)
    x, past = torch.from_numpy(noise), [torch.zeros(1), torch.from_numpy(noise)]
    for k, ratio in enumerate(ratios):
        history = past[-1] + ratio * past[-2]
        x, x0 = x / 2 + (k + 1) + 0.01 * history, x - history
        past.append(x0)
    loop = DeviceLoop(device, program, 2, SHAPE, ratios)
    for _ in range(2):  # the second finds in its buffers what the first left there
        found = loop.finish(loop.start(noise, pixels=False))[0]
        np.testing.assert_allclose(found, x.numpy(), rtol=1e-6)


def test_results_are_the_callers_own() -> None:
    device = CpuDevice()
    loops = loops_of(device, Affine(2))
    stream = run_batches(device, loops, batches(2, 2, 2, 2), pixels=False)
    first = next(stream)[1]
    kept = first.copy()
    list(stream)
    np.testing.assert_array_equal(first, kept)


def test_a_stream_that_is_left_early_can_be_started_again() -> None:
    device = CpuDevice()
    loops = loops_of(device, Affine(2))
    for _ in range(3):
        stream = run_batches(device, loops, batches(2, 2, 2, 2), pixels=False)
        next(stream)
        stream.close()  # type: ignore[attr-defined]  # a generator
    assert len(list(run_batches(device, loops, batches(2, 2, 2), pixels=False))) == 3


def test_noise_of_the_next_batch_is_made_before_the_last_one_is_waited_for() -> None:
    device, taken = CpuDevice(), list[int]()

    def watched() -> Iterator[Batch]:
        for k, batch in enumerate(batches(1, 1, 1, 1)):
            taken.append(k)
            yield batch

    next(run_batches(device, loops_of(device, Affine(2)), watched(), pixels=False))
    assert taken == [0, 1, 2]


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=4),
        elements=st.floats(-2, 2, width=32),
    )
)
def test_pixels_have_the_bits_of_the_host(array: Images) -> None:
    np.testing.assert_array_equal(to_pixels(torch.from_numpy(array)), images.to_uint8(array))


def test_pixels_leave_the_device_as_bytes() -> None:
    device, program = CpuDevice(), Affine(1)
    loop = DeviceLoop(device, program, 2, SHAPE)
    noise = batch_noise(0, range(2), SHAPE)
    pixels, _ = loop.finish(loop.start(noise, pixels=True))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, images.to_uint8(program.on_the_host(noise)))


def test_images_that_are_not_finite_are_marked() -> None:
    device = CpuDevice()
    loop = DeviceLoop(device, Affine(3), 4, SHAPE)
    noise = batch_noise(0, range(3), SHAPE)
    noise[1, 2, 3, 3] = np.inf
    for pixels in (True, False):
        assert list(loop.finish(loop.start(noise, pixels))[1]) == [True, False, True]


def test_a_failed_capture_ends_cleanly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    device, program = CpuDevice(capture_fails=True), Affine(3)
    with caplog.at_level(logging.WARNING):
        loop = DeviceLoop(device, program, 2, SHAPE)
    assert not loop.captured
    assert len(caplog.records) == 1
    assert "no CUDA graph for batch 2" in caplog.text
    noise = batch_noise(0, range(2), SHAPE)
    np.testing.assert_array_equal(
        loop.finish(loop.start(noise, False))[0], program.on_the_host(noise)
    )


@pytest.mark.parametrize(
    ("version", "captures"), [("2.11.0", 0), ("2.12.1+cu130", 0), ("2.13.0", 1)]
)
def test_where_a_failed_capture_poisons_the_next_there_is_none(
    version: str, captures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second device stands for another engine of the same process."""
    failures: list[CaptureError] = []
    broken = CpuDevice(capture_fails=True, failures=failures)
    DeviceLoop(broken, Affine(3), 2, SHAPE)
    caplog.clear()
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    device, program = CpuDevice(failures=failures), Affine(3)
    loop = DeviceLoop(device, program, 2, SHAPE)
    assert (loop.captured, device.captures) == (bool(captures), captures)
    assert ("cannot capture after a capture has failed" in caplog.text) == (not captures)
    noise = batch_noise(0, range(2), SHAPE)
    np.testing.assert_array_equal(
        loop.finish(loop.start(noise, False))[0], program.on_the_host(noise)
    )
    assert CudaDevice.failures == [], "the doubles keep theirs to themselves"


def test_loops_are_reused_where_padding_is_cheap() -> None:
    device, made = CpuDevice(), list[int]()

    def make(batch: int) -> DeviceLoop:
        made.append(batch)
        return DeviceLoop(device, Affine(1), batch, SHAPE)

    loops = Loops(make, smallest=2)
    for count in (8, 8, 5, 4, 3, 1, 2):
        assert loops(count).batch >= count
    assert made == [8, 3, 2]


def test_split_batches_keeps_the_order() -> None:
    parts = list(split_batches(batches(5, 2), 2))
    assert [list(indices) for indices, _ in parts] == [[0, 1], [2, 3], [4], [5, 6]]
    whole = np.concatenate([noise for _, noise in batches(5, 2)])
    np.testing.assert_array_equal(np.concatenate([noise for _, noise in parts]), whole)


def test_a_cuda_device_that_is_not_there_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for name in ("cuda", "cuda:3", "cpu"):
        with pytest.raises(BackendError, match=f"no CUDA device '{name}' here"):
            CudaDevice(name)
    with pytest.raises(UsageError, match="write cpu, cuda, cuda:N or mps"):
        CudaDevice("gpu?")


@pytest.mark.gpu
@pytest.mark.parametrize("evaluations", [1, 4, 64])
def test_a_real_device_gives_what_the_host_gives(evaluations: int) -> None:
    device, program = CudaDevice(), Affine(evaluations)
    loops = loops_of(device, program)
    for (_, noise), ends, finite in run_batches(device, loops, batches(4, 4, 3), pixels=False):
        assert finite.all()
        np.testing.assert_allclose(ends, program.on_the_host(noise), rtol=1e-6)
    assert loops(4).captured


@pytest.mark.gpu
def test_a_real_device_survives_a_capture_that_fails() -> None:
    device = CudaDevice()

    class Waits(Affine):
        def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
            super().enqueue(k, x, x0_prev, x_next, x0)
            x.sum().item()

    program = Waits(3)
    loop = DeviceLoop(device, program, 2, SHAPE)
    assert not loop.captured
    noise = batch_noise(0, range(2), SHAPE)
    ends, _ = loop.finish(loop.start(noise, False))
    np.testing.assert_allclose(ends, program.on_the_host(noise), rtol=1e-6)
    later = DeviceLoop(CudaDevice(), Affine(3), 2, SHAPE)
    assert later.captured == (torch.__version__ >= "2.13")
    ends, _ = later.finish(later.start(noise, False))
    np.testing.assert_allclose(ends, program.on_the_host(noise), rtol=1e-6)
