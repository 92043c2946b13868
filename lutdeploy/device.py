"""The words for a device, the same in every command and in Python: cpu, cuda, cuda:N and mps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lutdeploy.errors import BackendError, UsageError

WORDS = "cpu, cuda, cuda:N or mps"


@dataclass(frozen=True)
class Device:
    """A device as it was asked for, whether or not it is there."""

    kind: str  # "cpu", "cuda" or "mps"
    index: int = 0  # N of cuda:N

    def __str__(self) -> str:
        """The full name, which torch takes as well: "cuda" is "cuda:0"."""
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind


def parse_device(word: str) -> Device:
    """The device that a word means.

    Raises:
        UsageError: no such word; says which there are.
    """
    found = re.fullmatch(r"(cpu|mps)|cuda(?::(\d{1,4}))?", word, re.ASCII)
    if found is None:
        raise UsageError(f"{word!r} is no device; write {WORDS}")
    return Device(found[1]) if found[1] else Device("cuda", int(found[2] or 0))


def find_device(word: str) -> Device:
    """The device that a word means, which is there.

    Raises:
        UsageError: no such word.
        BackendError: torch sees no such device here; says which it sees.
    """
    device = parse_device(word)
    if device.kind == "cpu":
        return device
    import torch

    if device.kind == "mps":
        there = ["mps"] if torch.backends.mps.is_available() else []
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = [str(Device("cuda", k)) for k in range(count)]
    if str(device) not in there:
        raise BackendError(
            f"no {device.kind.upper()} device {word!r} here; torch sees "
            f"{', '.join(there) or 'none'}; see `lutdeploy doctor`"
        )
    return device
