"""The words for a device, the same in every command and in Python: cpu, cuda, cuda:N and mps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lutdeploy.errors import UsageError

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
