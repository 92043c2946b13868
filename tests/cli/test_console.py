"""What commands say, to terminals of every sort, to logs, and to nobody."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.cli import console, progress
from lutdeploy.training.recipes import TrainSettings, read_settings
from tests.command import fail, succeed

MODELS = [sys.executable, "-m", "lutdeploy.cli", "models"]
BYTES = "caf\udce9"  # the name b"caf\xe9", as Python decodes it
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def test_any_text_can_be_written_in_any_encoding() -> None:
    console.prepare_streams()  # registers the handler
    text, errors = f"64×64 {BYTES} → “é”", console.ENCODING_ERRORS
    assert text.encode("utf-8", errors).startswith("64×64 caf".encode() + b"\xe9 ")
    expected = b"64\\xd764 caf\xe9 \\u2192 \\u201c\\xe9\\u201d"
    assert text.encode("ascii", errors) == expected
    assert text.encode("latin-1", errors).startswith(b"64\xd764 caf\xe9 \\u2192")


@pytest.mark.parametrize(
    "told",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_without_utf_8_gets_its_table(told: dict[str, str]) -> None:
    done = subprocess.run(MODELS, env=os.environ | told, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii() and b"Fr\\xe9chet" in done.stdout


def test_whoever_reads_may_leave() -> None:
    """As `head -1` does: no traceback, at the end of the interpreter neither."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(MODELS, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI does, which no bar may move in
    with progress.progress_bar("loss") as bar:
        task = bar.add_task("train", total=1000, loss="")
        for step in range(1, 801):
            clock[0] = step / 10  # 10 s for each tenth
            bar.update(task, completed=step, loss=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    said = [line.partition(", ")[0].partition(",")[0] for line in lines]
    assert said == [f"train {step} of 1000" for step in (50, *range(100, 900, 100))]
    assert lines[1] == "train 100 of 1000, 10%, loss 100, 0:01:30 left"
    with progress.progress_bar("what") as bar:
        task = bar.add_task("slow", total=1000, what="")
        for step in range(1, 4):
            clock[0] += progress.SELDOM
            bar.update(task, completed=step)
    assert len(capsys.readouterr().err.splitlines()) == 3, "each minute, whatever was done"


def test_a_log_gets_phases_and_how_it_ended(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.phases() as bar:
        task = bar.add_task("build", total=None)
        for phase in ("parse", "parse", "time kernels", "write"):
            clock[0] += progress.OFTEN
            bar.update(task, description=f"build: {phase}")
    assert capsys.readouterr().err.splitlines() == [
        "build: parse",
        "build: time kernels",
        "build: write",
    ]
    with progress.progress_bar("rate") as bar:
        task = bar.add_task("sample", total=4, rate="")
        for done in range(1, 5):
            bar.update(task, completed=done, rate=f"{done} images/s")
    assert capsys.readouterr().err == "sample 4 of 4, 100%, 4 images/s\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize(("kind", "moves"), [("xterm", True), ("dumb", False)])
def test_a_terminal_gets_a_bar_where_it_can_move_one(kind: str, moves: bool) -> None:
    code = (
        "from lutdeploy.cli.progress import phases, progress_bar\n"
        "with progress_bar('rate') as bar:\n"
        "    task = bar.add_task('sample', total=2, rate='')\n"
        "    bar.update(task, advance=2, rate='9 images/s')\n"
        "with phases() as bar:\n"
        "    bar.update(bar.add_task('export', total=None), description='export: trace')\n"
    )
    reader, writer = os.openpty()
    environment = os.environ | {"TERM": kind, "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=writer, env=environment, check=True)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal, to Linux
        while more := os.read(reader, 4096):
            shown += more
    os.close(reader)
    assert ("━".encode() in shown) is moves
    assert (b"2/2" if moves else b"sample 2 of 2, 100%, 9 images/s\r\n") in shown
    assert (b"export: trace" in shown) is moves, "a log has a line of what was done for a while"


@linux
def test_images_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    data, run = tmp_path / BYTES, Run(tmp_path / "run")
    data.mkdir()
    for index in range(4):
        pixels = np.full((16, 16, 3), 60 * index, np.uint8)
        Image.fromarray(pixels).save(data / f"{index}.png")
    words = ("train", "--out", run.path, "--size", "tiny", "--batch", 2, "--set", "image_size=16")
    succeed(*words, "--data", data, "--steps", 1)
    assert read_settings(run).data == str(data)
    assert files.read_record(run.settings, TrainSettings, "").data == str(data)
    succeed(*words, "--resume", "--steps", 2)
    out = tmp_path / f"samples-{BYTES}"
    succeed("sample", run.path, "-n", 2, "--steps", 1, "--out", out)
    assert (out / "grid.png").is_file()


@linux
def test_a_model_cannot_be_where_no_library_finds_it(tmp_path: Path) -> None:
    """Before the work, not after it."""
    out = tmp_path / BYTES
    line = fail(2, "train", "--data", "synthetic", "--out", out)
    assert "bytes that are no text" in line and "rename it" in line
    assert not out.exists()
    assert "no such run" in fail(2, "sample", out)
    out.mkdir()
    assert "bytes that are no text" in fail(2, "sample", out)
