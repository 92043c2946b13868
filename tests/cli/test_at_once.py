"""Commands that work on one run at the same time: each ends well or says who is in its way."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.command import fail, invoke, succeed
from tests.commands_apart import started

SHORT = ("--solver", "euler", "--steps", "2")
COMMANDS = {
    "train": ("train", "--resume", "--out", "run", "--data", "faces", "--steps", "12"),
    "export": ("export", "run"),
    "tune-steps": ("tune-steps", "run", "--backend", "torch", "--steps", "2", "--images", "2"),
    "sample": ("sample", "run", "--backend", "torch", *SHORT, "-n", "8", "--out", "out"),
    "sample too": ("sample", "run", "--backend", "torch", *SHORT, "-n", "8", "--out", "out"),
}


@pytest.mark.slow
def test_many_commands_on_one_run(
    artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, copy in (("trained", "run"), ("faces", "faces")):
        shutil.copytree(artefacts / name, tmp_path / copy)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(started(*arguments)) for name, arguments in COMMANDS.items()
        }
        looks = []
        while any(process.returncode is None for process in running.values()):
            looks.append(invoke("inspect", "run"))  # a reader sees whole files at every moment
            time.sleep(0.2)
        said = {name: process.communicate()[1] for name, process in running.items()}
    for name, process in running.items():
        last = (said[name].splitlines() or [""])[-1]
        assert process.returncode in (0, 1, 2), (name, last)
        assert process.returncode == 0 or last.startswith("error: "), (name, last)
    assert running["train"].returncode == 0
    for look in looks:
        assert isinstance(look.exception, SystemExit | None), look.exception
        assert look.exit_code == 0, look.stderr
    assert [p.name for p in Path("run").rglob(".*") if not p.name.endswith(".lock")] == []
    succeed("export", "run")  # whatever the others left, the same commands complete it
    succeed("sample", "run", "--overwrite", *SHORT, "-n", "8", "--out", "out")
    succeed("inspect", "run")


def test_tasks_of_an_array_in_one_folder(tmp_path: Path) -> None:
    """Four at once; a fifth command finds nothing to make, and leaves what one command would."""
    command = ("sample", "--model", "static-tanh-64-small", "--solver", "euler", "--steps", "1")
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(started(*command, "--first", 8 * task, "-n", 8, "--out", out))
            for task in range(4)
        ]
        for process in running:
            assert process.communicate()[1].count("error") == process.returncode == 0
    assert "32 of 32 images are there already" in succeed(*command, "-n", 32, "--out", out).stderr
    succeed(*command, "-n", 32, "--out", whole)
    assert subprocess.run(["diff", "-r", out, whole], check=False).returncode == 0
    for option in ("--gif", "--trajectory", "--overwrite"):
        assert "leave out" in fail(2, *command, "--first", 8, "--out", out, option)
