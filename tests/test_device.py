"""The words for a device."""

from __future__ import annotations

import pytest

from lutdeploy.device import Device, parse_device
from lutdeploy.errors import UsageError


@pytest.mark.parametrize(
    ("word", "device", "name"),
    [
        ("cpu", Device("cpu"), "cpu"),
        ("mps", Device("mps"), "mps"),
        ("cuda", Device("cuda", 0), "cuda:0"),
        ("cuda:0", Device("cuda", 0), "cuda:0"),
        ("cuda:12", Device("cuda", 12), "cuda:12"),
    ],
)
def test_words(word: str, device: Device, name: str) -> None:
    assert parse_device(word) == device
    assert str(device) == name
    assert parse_device(name) == device


@pytest.mark.parametrize(
    "word", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1 ", "cuda:x", "cpu:0"]
)
def test_other_words_are_a_usage_error(word: str) -> None:
    with pytest.raises(UsageError, match="is no device; write cpu, cuda, cuda:N or mps"):
        parse_device(word)
