"""Several processes that train one model: the same result as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.run import Run
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.training.processes import Launch, Processes, launch, open_processes
from tests.command import fail, succeed

SETTINGS = ("--size", "tiny", "--set", "depth=1", "--set", "warmup=3", "--held-out", "0.2")
LENGTH = ("--steps", "6", "--batch", "8", "--checkpoint-every", "3", "--ema", "0.5")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`lutdeploy train` in two processes; one thread each, without GPUs."""
    code = "from lutdeploy.cli import cli; cli()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += ["--nproc-per-node", "2", sys.executable, "-c", code]
    command += ["train", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_processes_end_where_one_ends(tmp_path: Path) -> None:
    """Weights and losses at the same global batch, a resumed run included."""
    pytest.importorskip("accelerate", reason="training in processes needs Accelerate")
    one, two = (Run(tmp_path / name) for name in ("one", "two"))
    (tmp_path / "data").mkdir()
    for index in range(40):
        Image.effect_noise((64, 64), 5 * index).save(tmp_path / "data" / f"{index}.png")
    begin = ("--data", str(tmp_path / "data"), *SETTINGS, *LENGTH, "--out")
    succeed("train", "--device", "cpu", *begin, one.path)
    joined = train(*begin, str(two.path))
    assert joined.returncode == 0, joined.stderr
    assert "2 processes" in joined.stderr
    assert joined.stdout.split() == [str(two.model)], "one process speaks for both"
    resume = ("--resume", "--steps", "8", "--out")
    succeed("train", *resume, one.path)
    more = train(*resume, str(two.path))
    assert more.returncode == 0, more.stderr
    weights = [load_model(run.model).state_dict() for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=2e-5)
    logs = [[json.loads(line) for line in run.log.read_text().splitlines()] for run in (one, two)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [6, 8]
    for mine, theirs in zip(*logs, strict=True):
        for name in ("loss", "held_out_loss"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    several = Processes("cpu")
    several.rank, several.count = 1, 3
    assert several.part(9) == slice(3, 6)
    with pytest.raises(UsageError, match=r"--batch 8 cannot be divided among 3 .* --batch 9 can"):
        several.part(8)


def test_alone_is_alone_whatever_a_platform_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for alone in ({}, {"RANK": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "3"}):
        with monkeypatch.context() as patch:
            for name, value in alone.items():
                patch.setenv(name, value)
            assert launch() == Launch(0, 1, 0) and launch().is_first
            assert type(open_processes("cpu")) is Processes


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: it is no number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "RANK=1, WORLD_SIZE=2, LOCAL_RANK=: several"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2, WORLD_SIZE=2"),
    ],
)
def test_processes_that_cannot_be_told_apart(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        launch()


def test_a_rank_of_a_platform_does_not_open_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Platforms set RANK for a process that is alone."""
    run = Run(tmp_path)
    run.model.write_bytes(b"weights")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    line = fail(2, "train", "--data", "synthetic", "--out", tmp_path)
    assert "already holds a run" in line
    assert run.model.read_bytes() == b"weights"


def test_several_processes_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--device cuda:1: torchrun gives each process a GPU"):
        open_processes("cuda:1")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BackendError, match=r"lutdeploy\[distributed\]"):
        open_processes("cpu")
