"""The float32 reference is float32 whatever its process asks of torch, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser
from lutdeploy.reference import TorchDenoiser, full_float32
from lutdeploy.sampling import batch_noise
from tests.conftest import golden_model
from tests.doubles.cpu_device import CpuDevice

BACKENDS: Any = torch.backends
PLACES = (
    *(BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul),
    *(BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul),
)
REDUCED = {"tf32", "bf16"}


def state() -> list[Any]:
    """All that says how float32 is multiplied; None where torch refuses to say."""

    def read(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:  # the older and the newer settings differ
            return None

    found = [place.fp32_precision for place in PLACES]
    found += [read(torch.get_float32_matmul_precision), read(lambda: BACKENDS.cudnn.allow_tf32)]
    return [*found, read(lambda: BACKENDS.cuda.matmul.allow_tf32)]


def newer() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"


HOSTS: dict[str, Callable[[], None]] = {
    "torch's defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "newer settings": newer,
    "no TF32 anywhere": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process with settings of its own, undone at the end."""
    before = [place.fp32_precision for place in PLACES]
    HOSTS[request.param]()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for place, precision in zip(PLACES, before, strict=True):
        place.fp32_precision = precision


def test_nothing_is_rounded_inside_and_all_is_as_before_after(host: None) -> None:
    before = state()
    with full_float32():
        assert not REDUCED & set(state())
        assert torch.get_float32_matmul_precision() == "highest"
    assert state() == before
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert state() == before


def test_an_engine_computes_inside(host: None) -> None:
    """The reference and the engine for a GPU, in float32 and for their float32 islands."""
    seen: list[list[Any]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(state())

    before, x = state(), batch_noise(0, range(1), (3, 64, 64))
    reference = TorchDenoiser(golden_model("static-tanh-64"))
    reference.model.register_forward_pre_hook(watch)
    expected = reference.predict_x0(x, np.zeros(1, np.float32))
    for precision in ("fp32", "fp16"):
        model = golden_model("static-tanh-64")
        with TorchDeviceDenoiser(model, CpuDevice(), precision) as engine:
            engine._module.register_forward_pre_hook(watch)
            found = engine.predict_x0(x, np.zeros(1, np.float32))
            assert np.abs(found - expected).max() < (1e-4 if precision == "fp32" else 3e-2)
    assert len(seen) == 3
    assert not any(REDUCED & set(inside) for inside in seen)
    assert state() == before
