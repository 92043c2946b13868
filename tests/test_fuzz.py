"""Damaged and hostile files: whatever is read ends well or in one line, soon, and in little memory.

`make fuzz` tries many more inputs than the suite does, always others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST
from tests.artefact_files import SAMPLED
from tests.command import invoke
from tests.mutations import (
    OUTSIDE,
    mutated_bytes,
    mutated_json,
    mutated_json_lines,
    mutated_safetensors,
    mutated_zip,
)

if sys.platform != "linux":
    pytest.skip("measures memory as Linux shows it", allow_module_level=True)

PATIENCE = 60  # seconds for one command; these take less than one
SLACK = 48 << 20  # bytes of memory beside the usual and ten times the file

Mutation = Callable[[bytes], st.SearchStrategy[bytes]]


class Changed(bytes):
    """Bytes that Hypothesis does not print: the file is left as it was in the example."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@dataclass(frozen=True)
class Target:
    """A file of an artefact, how it is changed, and a command that reads it."""

    file: str
    mutation: Mutation
    command: tuple[str, ...]
    sealed: bool = False  # the manifest beside it gets the new hash

    @property
    def name(self) -> str:
        return f"{self.command[0]} {self.file}{' sealed' if self.sealed else ''}"


FEW = ("--out", "new", "-n", "1", "--no-grid", "--batch", "1")
SAMPLE = (*FEW, "--export", "step-fp32")
TORCH = (*FEW, "--backend", "torch", "--solver", "euler", "--steps", "1")
AGAIN = (*SAMPLED, "-n", "3")
TRAIN = (
    "train",
    "--resume",
    "--data",
    "faces",
    "--out",
    "trained",
    "--steps",
    "3",
    "--compile",
    "off",
)
FACES = tuple("train --data faces --size tiny --steps 1 --batch 2 --out new".split())
TARGETS = (
    Target("run/model.safetensors", mutated_safetensors, ("inspect", "run")),
    Target("run/model.safetensors", mutated_safetensors, ("sample", "run", *TORCH)),
    Target("run/onnx/step-fp32/manifest.json", mutated_json, ("inspect", "run")),
    Target("run/onnx/step-fp32/manifest.json", mutated_json, ("sample", "run", *SAMPLE)),
    Target("run/onnx/loop-*/manifest.json", mutated_json, ("inspect", "run")),
    Target("run/onnx/step-fp32/step.onnx", mutated_bytes, ("sample", "run", *SAMPLE)),
    Target("run/onnx/step-fp32/step.onnx", mutated_bytes, ("sample", "run", *SAMPLE), sealed=True),
    Target("run/steps.json", mutated_json, ("inspect", "run")),
    Target("run/steps.json", mutated_json, ("sample", "run", *SAMPLE)),
    Target("run/verdicts/*.json", mutated_json, ("inspect", "run")),
    Target("run/verdicts/*.json", mutated_json, ("sample", "run", *SAMPLE)),
    Target("built/engines/[0-9a-f]*.json", mutated_json, ("inspect", "built")),
    Target("built/engines/*.plan", mutated_bytes, ("inspect", "built")),
    Target("trained/train.json", mutated_json, TRAIN),
    Target("trained/train.jsonl", mutated_json_lines, TRAIN),
    Target("trained/training-state.safetensors", mutated_safetensors, TRAIN),
    Target("drawn/manifest.jsonl", mutated_json_lines, ("sample", "run", "--out", "drawn", *AGAIN)),
    Target("drawn/000000.png", mutated_bytes, ("sample", "run", "--out", "drawn", *AGAIN)),
    Target("drawn/000001.png", mutated_bytes, ("inspect", "drawn/000001.png")),
    Target(
        "packed/pictures.npz",
        mutated_zip("images.npy"),
        ("sample", "run", "--out", "packed", "--format", "npz", *AGAIN),
    ),
    Target(
        "shards/*.tar",
        mutated_bytes,
        ("sample", "run", "--out", "shards", "--format", "webdataset", *AGAIN),
    ),
    Target(
        "author.pth",
        mutated_zip("data.pkl"),
        ("import", "author.pth", "--heads", "4", "--out", "new"),
    ),
    Target("faces/0.png", mutated_bytes, FACES),
    Target("faces/1.jpg", mutated_bytes, FACES),
)


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A current folder beside which a file lies that no reader may open."""
    mine = tmp_path_factory.mktemp("fuzz")
    secret = mine / OUTSIDE.removeprefix("../")
    secret.parent.mkdir()
    secret.write_bytes(b"{}")
    (mine / "here").mkdir()
    with contextlib.chdir(mine / "here"):
        yield


_opened: list[str] | None = None  # names of files, while a command is watched


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The names of all files that Python opens meanwhile."""
    global _opened
    if _watch not in _hooks:
        sys.addaudithook(_watch)
        _hooks.append(_watch)
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


_hooks: list[Callable[..., None]] = []  # an audit hook cannot be taken away


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """End what hangs."""

    def ring(number: int, frame: Any) -> None:
        raise AssertionError(f"not done within {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def seal(file: Path) -> None:
    """What somebody does who changes a file of an export on purpose."""
    path = file.parent / MANIFEST
    manifest, data = files.read_json(path), file.read_bytes()
    manifest["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files.write_json(path, manifest)


def fresh(original: Path) -> None:
    """All artefacts as they were."""
    for entry in original.iterdir():
        there = Path(entry.name)
        if there.is_dir():
            shutil.rmtree(there)
        (shutil.copytree if entry.is_dir() else shutil.copy)(entry, there)
    shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_changed_file(target: Target, artefacts: Path) -> None:
    if target.file.startswith("built") and not (artefacts / "built").is_dir():
        pytest.skip("engines are built with TensorRT for RTX, which is not here")
    (source,) = artefacts.glob(target.file)
    original, name = source.read_bytes(), source.relative_to(artefacts)
    for _ in range(2):  # the first loads libraries, the second shows what the command needs
        fresh(artefacts)
        reset_peak()
        usual = -memory("VmRSS")
        result = invoke(*target.command)
        usual += memory("VmHWM")
        assert result.exit_code == 0, result.output
    examples = settings().max_examples // (4 if target.command[0] == "train" else 1)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changed=target.mutation(original).map(Changed))
    def end_well(changed: Changed) -> None:
        fresh(artefacts)
        name.write_bytes(changed)
        if target.sealed:
            seal(name)
        reset_peak()
        before = memory("VmRSS")
        with patience(), watched() as opened:
            result = invoke(*target.command)
        grown = memory("VmHWM") - before
        unexpected = result.exception
        if not isinstance(unexpected, SystemExit | None):
            raise unexpected
        assert result.exit_code in (0, 1, 2), result.output
        if result.exit_code:
            assert result.stderr.splitlines()[-1].startswith("error: "), result.stderr
        assert "Traceback" not in result.stderr
        assert grown < usual + 10 * len(changed) + SLACK, f"{grown / 2**20:.0f} MiB"
        assert os.path.abspath(OUTSIDE) not in map(os.path.abspath, opened)

    end_well()
