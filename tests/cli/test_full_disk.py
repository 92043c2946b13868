"""A disk without room: every command ends in one line, and what was there stays as it was."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import invoke

SIZE = 16 << 20  # bytes
NO_SPACE = os.strerror(errno.ENOSPC)
TINY = ("--size", "tiny", "--steps", "2", "--batch", "4")
SHORT = ("--export", "step-fp32", "--solver", "euler", "--steps", "2")
COMMANDS = {
    "sample": ("sample", "run", *SHORT, "-n", "2", "--out", "out"),
    "sample npz": ("sample", "run", *SHORT, "-n", "2", "--out", "out", "--format", "npz"),
    "sample more": (
        "sample",
        "run",
        *SHORT[:3],
        "euler",
        "--steps",
        "1",
        "-n",
        "4",
        "--out",
        "drawn",
    ),
    "export": ("export", "run"),
    "author's format": ("export", "run", "--author-format", "author.pth"),
    "import": ("import", "{elsewhere}/author.pth", "--heads", "4", "--out", "imported"),
    "import over": (
        "import",
        "{elsewhere}/author.pth",
        "--heads",
        "4",
        "--out",
        "run",
        "--overwrite",
    ),
    "package triton": ("package", "triton", "run", *SHORT, "--out", "out"),
    "parity": ("parity", "run", *SHORT),
    "tune-steps": ("tune-steps", "run", "--steps", "3", "--images", "2", "--backend", "torch"),
    "train": ("train", "--data", "{elsewhere}/faces", "--out", "new", *TINY),
    "resume": (
        "train",
        "--resume",
        "--data",
        "{elsewhere}/faces",
        "--out",
        "trained",
        "--steps",
        "4",
    ),
    "build": ("build", "run", "--backend", "tensorrt-rtx", "--architecture", "8.9"),
}


@pytest.fixture
def full(artefacts: Path, tmp_path: Path) -> Iterator[Path]:
    """The current folder: artefacts on a small file system of its own without a free byte."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs Linux and root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    done = subprocess.run(mounted, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    try:
        for name in ("run", "trained", "drawn"):
            shutil.copytree(artefacts / name, disk / name)
        with pytest.raises(OSError, match=NO_SPACE), (disk / "filler").open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but locks, which are empty, and the empty pictures of a sampler."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if data}


@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk(
    command: str, full: Path, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "build":
        pytest.importorskip("tensorrt_rtx", reason="builds with TensorRT for RTX")
    monkeypatch.chdir(full)
    before = contents(full)
    arguments = [part.format(elsewhere=artefacts) for part in COMMANDS[command]]
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and NO_SPACE in last
    assert contents(full) == before
