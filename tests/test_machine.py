"""What a machine says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import torch

from lutdeploy.machine import Machine, this_machine


def test_it_says_what_is_here_in_plain_json() -> None:
    machine = this_machine()
    assert machine.cpu and machine.processors >= 1 and machine.memory_bytes > 2**28
    assert machine.versions["torch"] == torch.__version__
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine
    assert machine.cpu in machine.describe()
    assert f"torch {torch.__version__}" in machine.describe_versions()


def test_the_fingerprint_changes_with_what_decides_speed_and_with_nothing_else() -> None:
    machine = this_machine()
    versions = machine.versions
    for same in (
        replace(machine, memory_bytes=1),
        replace(machine, versions={**versions, "numpy": "1", "python": "3"}),
    ):
        assert same.fingerprint() == machine.fingerprint()
    for other in (
        replace(machine, cpu="another"),
        replace(machine, processors=999),
        replace(machine, gpus=("one",)),
        replace(machine, versions={**versions, "torch": "1"}),
        replace(machine, versions={**versions, "tensorrt": "10"}),
    ):
        assert other.fingerprint() != machine.fingerprint()
    json.dumps(machine.fingerprint())
