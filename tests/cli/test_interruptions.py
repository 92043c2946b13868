"""Kills, Ctrl-C, full disks, two at once: nothing is lost, and the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lutdeploy.artefacts import files, picture_files
from lutdeploy.artefacts.checkpoint import save_author_file
from lutdeploy.artefacts.run import Run
from tests.command import error_line, fail, succeed
from tests.commands_apart import Command, started
from tests.conftest import golden_model

if os.name != "posix":
    pytest.skip("signals and limits as POSIX has them", allow_module_level=True)

import resource

STEPS, CHECKPOINT = 60, 15
IMAGES = 100
SOON = ("--steps", 1)  # for what needs no time


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, which crawl where another process computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wait_until(happened: Callable[[], bool], process: Command) -> None:
    """Wait for something that a process does, which must not end before."""
    for _ in range(12_000):
        if happened():
            return
        assert process.returncode is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("nothing happened for a minute")


SIGNALS = {"ctrl-c": signal.SIGINT, "terminate": signal.SIGTERM}


def interrupt(process: Command, kind: str = "ctrl-c") -> str:
    """Ctrl-C, or what a scheduler sends; what the process says on stderr."""
    process.send_signal(SIGNALS[kind])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + SIGNALS[kind], stderr
    return stderr


def kill(process: Command) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hidden(folder: Path) -> list[str]:
    """What a writer has left half done below a folder."""
    return [p.name for p in folder.rglob(".*") if p.name != ".lock"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Sampling


@pytest.fixture(scope="module")
def model(golden_runs: Callable[[str], Run]) -> Path:
    return golden_runs("static-tanh-64").model


def sample(model: Path, out: Path, *more: object, picture: bool = False) -> tuple[object, ...]:
    """Arguments that make many images, two at a time; ``more`` overrides them."""
    small = ("-n", IMAGES, "--batch", 2, "--steps", 6)
    return ("sample", model, "--out", out, *small, *(() if picture else ("--no-grid",)), *more)


def pictures(out: Path) -> list[Path]:
    return sorted(out.glob("[0-9]*.png"))


def listed(out: Path) -> list[str]:
    """The pictures that the manifest has whole lines for."""
    names = []
    for line in (out / "manifest.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            names.append(json.loads(line)["image"])
    return names


def states(out: Path) -> dict[str, tuple[int, bytes]]:
    """When each picture was written, and what is in it."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in pictures(out)}


def complete(model: Path, out: Path, *more: object) -> None:
    """The same command makes what is missing, and leaves alone what is there."""
    before = {name: state for name, state in states(out).items() if name in listed(out)}
    count = len(pictures(out))
    result = succeed(*sample(model, out, *more))
    assert f"{len(before)} of {IMAGES} images are there already" in result.stderr
    after = states(out)
    assert len(before) == count < IMAGES == len(after)
    assert {name: after[name] for name in before} == before
    names = listed(out)
    assert sorted(names) == sorted(set(names)) == sorted(after)
    assert hidden(out) == []


@pytest.mark.parametrize("kind", [*SIGNALS, "kill"])
def test_interrupted_sampling_is_completed(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(*sample(model, out)) as process:
        wait_until(lambda: len(pictures(out)) > 4, process)
        if kind == "kill":
            kill(process)
        else:
            line = error_line(interrupt(process, kind))
            there = len(pictures(out))
            assert f"interrupted: {there} of {IMAGES} images are in {out}; the same" in line
    complete(model, out)


@pytest.mark.parametrize(("kind", "file_format"), [("ctrl-c", "npz"), ("kill", "webdataset")])
def test_interrupted_sampling_into_one_file_is_completed(
    kind: str, file_format: str, model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = ("-n", 40, "--format", file_format)
    with started(*sample(model, out, *command)) as process:
        wait_until(lambda: any(p.stat().st_size > 60_000 for p in out.glob(".part-*")), process)
        if kind == "kill":
            kill(process)
        else:
            line = error_line(interrupt(process))
            assert "of 40 images are in" in line and "interrupted: 0 of" not in line
    said = succeed(*sample(model, out, *command)).stderr
    assert "of 40 images are there already" in said
    assert hidden(out) == []
    succeed(*sample(model, whole, *command))
    assert contents(out) == contents(whole)


def test_interrupted_pictures_are_those_of_an_unbroken_run(model: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(*sample(model, whole, "-n", 6))
    with started(*sample(model, broken)) as process:
        wait_until(lambda: len(pictures(broken)) > 2, process)
        kill(process)
    for later in pictures(broken)[3:]:
        later.unlink()
    succeed(*sample(model, broken, "-n", 6))
    for path in pictures(whole):
        assert (broken / path.name).read_bytes() == path.read_bytes()


def test_two_samplers_in_one_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(*sample(model, out)) as process:
        wait_until(lambda: bool(pictures(out)), process)
        process.send_signal(signal.SIGSTOP)  # it holds the folder and goes nowhere meanwhile
        line = fail(2, *sample(model, out))
        assert "out is in use by another `lutdeploy sample`; wait for it to end" in line
        assert "is in use" in fail(2, *sample(model, out, "--overwrite"))
        kill(process)
    complete(model, out)  # the lock has gone with the process


def test_manifest_line_that_was_cut_off(model: Path, tmp_path: Path) -> None:
    succeed(*sample(model, tmp_path, "-n", 4, *SOON))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    (tmp_path / "000003.png").unlink()
    complete(model, tmp_path, *SOON)


def test_picture_that_was_removed(model: Path, tmp_path: Path) -> None:
    succeed(*sample(model, tmp_path, "-n", 4, *SOON))
    (tmp_path / "000001.png").unlink()
    complete(model, tmp_path, *SOON)


def test_what_a_kill_left_of_pictures_is_cleared(model: Path, tmp_path: Path) -> None:
    succeed(*sample(model, tmp_path, "-n", 4, picture=True))
    for name in (".000007.png", ".grid.png.abc", ".manifest.jsonl.abc"):
        (tmp_path / name).write_bytes(b"half")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path)}
    succeed(*sample(model, tmp_path, "-n", 4, picture=True))
    assert hidden(tmp_path) == []
    for path in tmp_path.glob("*"):  # nothing was written a second time
        assert path.name == ".lock" or path.stat().st_mtime_ns == before[path.name]


def test_no_room_for_the_manifest(model: Path, tmp_path: Path) -> None:
    """A real limit, which cuts a line of the manifest in two."""
    with files_limited_to(20_000):
        line = fail(1, *sample(model, tmp_path, *SOON))
    count = len(pictures(tmp_path))
    assert count > 10
    assert os.strerror(errno.EFBIG) in line
    assert f"{count} of {IMAGES} images are in {tmp_path}; the same command makes" in line
    complete(model, tmp_path, *SOON)


def test_full_disk_while_sampling(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = picture_files._write_all

    def fill_up(file: io.FileIO, data: bytes) -> None:
        if "000007" in str(file.name):
            write(file, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(picture_files, "_write_all", fill_up)
        line = fail(1, *sample(model, tmp_path, *SOON))
    assert f"{tmp_path}: No space left on device; " in line
    assert f"{len(pictures(tmp_path))} of {IMAGES} images are in" in line
    complete(model, tmp_path, *SOON)


def test_full_disk_while_drawing_the_grid(model: Path, tmp_path: Path) -> None:
    small = sample(model, tmp_path, "-n", 30, picture=True)
    with files_limited_to(20_000):
        line = fail(1, *small)
    assert f"{tmp_path}/grid.png: {os.strerror(errno.EFBIG)}" in line
    assert hidden(tmp_path) == []
    before = states(tmp_path)
    succeed(*small)
    assert states(tmp_path) == before


# Training


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures."""
    folder = tmp_path_factory.mktemp("cats")
    for k in range(8):
        Image.effect_noise((64, 64), 20 * k).convert("RGB").save(folder / f"{k}.png")
    return folder


def train(cats: Path, out: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a small training; ``more`` overrides them."""
    small = ("--size", "tiny", "--set", "depth=1", "--batch", 4, "--held-out", 0.25)
    often = ("--steps", STEPS, "--checkpoint-every", CHECKPOINT)
    return ("train", "--data", cats, "--out", out, *small, *often, *more)


@pytest.fixture(scope="module")
def unbroken(cats: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that nobody disturbed."""
    run = Run(tmp_path_factory.mktemp("unbroken") / "run")
    succeed(*train(cats, run.path))
    return run


def logged(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in run.log.read_text().splitlines()]


def last_step(run: Run) -> int:
    """The last step in the log of a training that may be going on."""
    try:
        return logged(run)[-1]
    except (OSError, ValueError, IndexError):
        return 0


def resume(cats: Path, run: Run, unbroken: Run) -> None:
    """The same command with --resume ends as the unbroken run did, bit for bit."""
    succeed(*train(cats, run.path, "--resume"))
    for ours, theirs in (
        (run.model, unbroken.model),
        (run.training_state, unbroken.training_state),
    ):
        found, expected = load_file(ours), load_file(theirs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    steps = logged(run)
    assert steps == sorted(set(steps))
    assert set(logged(unbroken)) <= set(steps)
    assert hidden(run.path) == []


@pytest.mark.parametrize("kind", SIGNALS)
def test_signal_while_training(kind: str, cats: Path, unbroken: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    # No checkpoint is due before the end: what is saved is saved because of the signal.
    with started(*train(cats, run.path, "--checkpoint-every", 10_000)) as process:
        wait_until(lambda: last_step(run) >= 10, process)
        said = interrupt(process, kind).splitlines()
    assert said[-1] == f"stopped at a step's end and saved; --resume --out {run.path} continues"
    assert 10 <= last_step(run) < STEPS
    assert run.model.is_file()
    resume(cats, run, unbroken)


def test_kill_while_training(cats: Path, unbroken: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with started(*train(cats, run.path)) as process:
        # Past a checkpoint: the log then holds a step that is trained a second time.
        wait_until(lambda: last_step(run) > CHECKPOINT, process)
        kill(process)
    assert last_step(run) < STEPS
    resume(cats, run, unbroken)


def test_kill_before_the_first_checkpoint(cats: Path, unbroken: Run, tmp_path: Path) -> None:
    run = Run(tmp_path)
    shutil.copy(unbroken.settings, run.settings)
    run.log.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    resume(cats, run, unbroken)


def test_kill_between_the_files_of_a_checkpoint(cats: Path, unbroken: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(unbroken.path, run.path)
    run.model.unlink()  # the state of the last step is there, its model is not
    resume(cats, run, unbroken)


def test_what_a_kill_left_of_a_checkpoint_is_cleared(cats: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    succeed(*train(cats, run.path, "--steps", 2))
    left = (run.path / ".model.safetensors.abc", run.pictures / ".lut-000002.png.abc")
    for path in left:
        path.write_bytes(b"half")
    succeed(*train(cats, run.path, "--steps", 3, "--resume"))
    assert hidden(run.path) == []


def test_two_trainings_in_one_run(cats: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with started(*train(cats, run.path, "--steps", 900)) as process:
        wait_until(lambda: last_step(run) > 0, process)
        process.send_signal(signal.SIGSTOP)
        before = contents(run.path)
        line = fail(2, *train(cats, run.path, "--resume"))
        assert "run is in use by another `lutdeploy train`; wait for it to end" in line
        assert contents(run.path) == before


def test_full_disk_while_training(cats: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    succeed(*train(cats, run.path, "--steps", 2))
    before = contents(run.path)
    again = train(cats, run.path, "--steps", 4, "--resume")
    with files_limited_to(run.training_state.stat().st_size // 2):
        line = fail(1, *again)
    assert f"{run.training_state}: {os.strerror(errno.EFBIG)}" in line
    assert f"--resume --out {run.path} continues" in line
    after = contents(run.path)
    for file in (run.model, run.training_state):
        assert after[file.name] == before[file.name]
    assert hidden(run.path) == []
    succeed(*again)


def test_loss_that_is_not_finite(
    cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lutdeploy.training.losses import Objective

    run = Run(tmp_path)
    arguments = train(cats, run.path, "--held-out", 0)
    succeed(*arguments, "--steps", 4)
    before = contents(run.path)
    calls = 0
    objective = Objective.forward

    def diverge(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = objective(*given)
        return loss * torch.nan if calls == 3 else loss

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "forward", diverge)
        line = fail(1, *arguments, "--resume", "--steps", 9)
    assert "loss is nan at step 7; the last checkpoint is kept; try a lower --lr" in line
    after = contents(run.path)
    for file in (run.model, run.training_state):
        assert after[file.name] == before[file.name]
    succeed(*arguments, "--resume", "--steps", 9)


def test_weights_that_are_not_finite_are_not_saved(
    cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before a checkpoint spoils the weights; its own loss was still finite."""
    from lutdeploy.training.losses import Objective

    run = Run(tmp_path)
    arguments = train(cats, run.path, "--held-out", 0)
    succeed(*arguments, "--steps", 4)
    before = contents(run.path)
    objective = Objective.forward

    def spoil(*given: Any) -> Tensor:
        loss: Tensor = objective(*given)
        return loss + (loss - loss.detach()).abs().sqrt()  # 0, with a gradient of NaN

    monkeypatch.setattr(Objective, "forward", spoil)
    line = fail(1, *arguments, "--resume", "--steps", 5)
    assert "NaN or Inf in " in line
    assert "at step 5; the last checkpoint is kept" in line
    after = contents(run.path)
    for file in (run.model, run.training_state):
        assert after[file.name] == before[file.name]


def test_learning_rate_that_is_too_high(cats: Path, tmp_path: Path) -> None:
    line = fail(1, *train(cats, tmp_path / "run", "--lr", 1e38))
    assert "at step " in line
    assert "the last checkpoint was not written yet; try a lower --lr" in line


# Export and import


def press(*arguments: object, **options: object) -> None:
    signal.raise_signal(signal.SIGINT)


def press_in_a_library(*arguments: object, **options: object) -> None:
    """As NumPy, while it is imported, does with what is raised there."""
    try:
        press()
    except KeyboardInterrupt as error:
        raise ImportError from error


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C means something, though a shell may have told a background job to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


PRESSES = {"ctrl-c": press, "ctrl-c in a library": press_in_a_library}


@pytest.mark.parametrize("kind", [*PRESSES, "full disk"])
def test_export_that_does_not_end(
    kind: str,
    model: Path,
    exported: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tmp_path)
    shutil.copy(model, run.model)
    shutil.copytree(exported(), run.export_folder("step-fp32"))
    before = contents(run.path)
    if kind in PRESSES:  # when the export is nearly done
        monkeypatch.setattr("lutdeploy.engines.export.check.compare", PRESSES[kind])
        with heard():
            line = fail(128 + signal.SIGINT, "export", run.path)
        assert line == "error: interrupted"
    else:
        with files_limited_to(100_000):
            line = fail(1, "export", run.path)
        assert f"step-fp32: {os.strerror(errno.EFBIG)}" in line
    after = contents(run.path)
    after.pop("onnx/.lock", None)
    assert after == before
    assert hidden(run.path) == []


def test_what_a_kill_left_of_an_export_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "step-fp32"
    for folder in (".step-fp32.abc", ".step-fp16.abc", ".old-step-fp32.abc/step-fp32"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text(folder)
    with pytest.raises(KeyboardInterrupt), files.staged(target):
        # Killed between the two renames: the old export comes back first.
        assert (target / "manifest.json").read_text() == ".old-step-fp32.abc/step-fp32"
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step-fp16.abc", "step-fp32"]


def test_full_disk_while_importing(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    shutil.copy(model, run.model)
    save_author_file(golden_model("static-tanh-64"), tmp_path / "author.pth")
    before = contents(run.path)
    arguments = ("import", tmp_path / "author.pth", "--heads", 4, "--out", run.path, "--overwrite")
    with files_limited_to(100_000):
        line = fail(1, *arguments)
    assert f"{run.model}: {os.strerror(errno.EFBIG)}" in line
    after = contents(run.path)
    assert after.pop(".lock") == b""
    assert after == before
    succeed(*arguments)
