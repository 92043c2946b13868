"""What a machine says of itself, and what of it this process may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from lutdeploy import machine as machines
from lutdeploy.machine import (
    Machine,
    memory_bytes,
    processors,
    this_machine,
    thread_limit,
)


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


class Container:
    """A /proc/PID and a /sys/fs/cgroup in a folder; ``groups`` are lines of /proc/PID/cgroup."""

    def __init__(self, folder: Path, *groups: str) -> None:
        self.process, self.cgroups = folder / "proc", folder / "cgroup"
        self.process.mkdir(parents=True)
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in groups))

    def mount(self, kind: str, place: str = "", options: str = "rw", root: str = "/") -> None:
        with (self.process / "mountinfo").open("a") as file:
            file.write(f"22 1 8:1 / / rw - ext4 /dev/root rw\n31 22 0:30 {root} ")
            file.write(f"{self.cgroups / place} rw shared:9 - {kind} {kind} {options}\n")

    def limit(self, name: str, value: object) -> None:
        path = self.cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 cores with two logical processors each, all of them ours."""
    monkeypatch.setattr(machines, "_allowed", lambda: set(range(16)))
    monkeypatch.setattr(machines, "_cores", lambda logical: len({n % 8 for n in logical}))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


@pytest.mark.usefixtures("sixteen")
def test_a_machine_without_limits(tmp_path: Path) -> None:
    unlimited = Container(tmp_path / "v2", "0::/user.slice/session.scope")
    unlimited.mount("cgroup2")
    unlimited.limit("user.slice/session.scope/cpu.max", "max 100000")
    unlimited.limit("user.slice/memory.max", "max")
    for process in (unlimited.process, tmp_path / "no such system"):
        assert processors(process) == 16
        assert memory_bytes(process) == psutil.virtual_memory().total
        assert thread_limit(process) is None, "the runtimes know best"


@pytest.mark.usefixtures("sixteen")
def test_limits_of_version_2_and_of_what_is_around(tmp_path: Path) -> None:
    pod = Container(tmp_path, "0::/pod/box")
    pod.mount("cgroup2")
    pod.limit("pod/box/cpu.max", "max 100000")
    pod.limit("pod/cpu.max", "250000 100000")
    pod.limit("pod/box/memory.max", 2**30)
    pod.limit("pod/memory.max", 2**31)
    assert processors(pod.process) == thread_limit(pod.process) == 3, "2.5, rounded up"
    assert memory_bytes(pod.process) == 2**30


@pytest.mark.usefixtures("sixteen")
def test_limits_of_version_1_inside_a_container(tmp_path: Path) -> None:
    """Its cgroup is the root of what it sees, though its name is that outside."""
    box = Container(tmp_path, "4:memory:/docker/f00", "2:cpu,cpuacct:/docker/f00", "0::/")
    box.mount("cgroup", "cpu,cpuacct", "rw,cpu,cpuacct", root="/docker/f00")
    box.mount("cgroup", "memory", "rw,memory", root="/docker/f00")
    box.mount("cgroup2", "unified")
    box.limit("cpu,cpuacct/cpu.cfs_period_us", 100_000)
    box.limit("cpu,cpuacct/cpu.cfs_quota_us", 50_000)
    box.limit("memory/memory.limit_in_bytes", 2**28)
    assert processors(box.process) == thread_limit(box.process) == 1
    assert memory_bytes(box.process) == 2**28
    box.limit("cpu,cpuacct/cpu.cfs_quota_us", -1)
    box.limit("memory/memory.limit_in_bytes", 9223372036854771712)
    assert thread_limit(box.process) is None
    assert memory_bytes(box.process) == psutil.virtual_memory().total


@pytest.mark.usefixtures("sixteen")
def test_a_thread_for_each_core_that_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_allowed", lambda: {0, 1, 8, 9})
    assert processors(tmp_path) == 4
    assert thread_limit(tmp_path) == 2


PRINT_THREADS = """
import onnx
from lutdeploy import machine
machine.limit_threads()
import torch
from lutdeploy.engines.onnxruntime import CPU, open_session
probe = '<ir_version: 10, opset_import: ["": 20]> p (float[1] x) => (float[1] y) { y = Abs(x) }'
session = open_session(onnx.parser.parse_model(probe).SerializeToString(), CPU)
print(machine.processors(), torch.get_num_threads())
print(session.get_session_options().intra_op_num_threads)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="has no affinity")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor is all there is")
def test_runtimes_keep_to_the_processors_of_the_process() -> None:
    one = min(os.sched_getaffinity(0))
    narrow = f"import os\nos.sched_setaffinity(0, {{{one}}})\n"
    environment = {name: os.environ[name] for name in os.environ if "THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", narrow + PRINT_THREADS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.split() == ["1", "1", "1"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="writes a shell script")
def test_a_compiler_that_is_there_and_does_not_work(tmp_path: Path) -> None:
    """In a process of its own: PyTorch remembers what it finds of a compiler."""
    said = "x.cpp:1: fatal error: Python.h: out of memory, cannot allocate"
    (tmp_path / "g++").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    words = [
        "--data",
        "synthetic",
        "--size",
        "tiny",
        "--compile",
        "on",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lutdeploy.cli", "train", *words],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: torch.compile does not work here: {said}; --compile off ")
    assert not (tmp_path / "run").exists()
