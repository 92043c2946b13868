"""What PNGs say of themselves, and the picture that this makes again."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lutdeploy import __version__, images
from lutdeploy.artefacts import files, picture_files, shipped
from lutdeploy.artefacts.run import MODEL, Run
from tests.command import fail, succeed

FEW = ("--steps", 2, "--solver", "euler")
TOLD = {
    **{"model_sha256": "0" * 64, "solver": "euler", "steps": 4, "shift": 1.0, "seed": 0},
    "index": 1,
}


@pytest.fixture
def run(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """runs/cats in the current folder."""
    monkeypatch.chdir(tmp_path)
    source, run = exported(), Run(Path("runs/cats"))
    shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    return run


def texts(data: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(data)) as picture:
        return dict(picture.text)  # type: ignore[attr-defined]


def inspected(path: Path) -> Any:
    return json.loads(succeed("inspect", path, "--json").stdout)


def png(path: Path, **told: str) -> Path:
    path.write_bytes(images.encode_png(np.zeros((8, 8, 3), np.uint8), told))
    return path


def test_a_picture_says_what_made_it_and_that_makes_it_again(run: Run) -> None:
    succeed("sample", run.path, "-n", 3, "--out", "a", "--seed", 7, "--shift", 2.5, *FEW)
    first = Path("a/000002.png")
    assert texts(first.read_bytes())["Software"] == f"lutdeploy {__version__}"
    found = inspected(first)
    assert (found["index"], found["seed"], found["shift"]) == (2, 7, 2.5)
    assert found["model_sha256"] == files.sha256(run.model)
    program, *arguments = found["command"].split()
    assert program == "lutdeploy"
    succeed(*arguments, "--out", "b", "--batch", 2)
    assert Path("b/000002.png").read_bytes() == first.read_bytes()
    shown = succeed("inspect", first).stdout
    assert "image 2 of seed 7, euler-2, shift 2.5" in shown
    assert found["command"] in shown


def test_the_same_picture_is_the_same_bytes_in_a_shard(run: Run) -> None:
    for kind in ("png", "webdataset"):
        succeed("sample", run.path, "-n", 2, "--out", kind, "--format", kind, *FEW)
    with tarfile.open("webdataset/000000.tar") as shard:
        for name in ("000000.png", "000001.png"):
            member = shard.extractfile(name)
            assert member is not None
            assert member.read() == Path("png", name).read_bytes()


def test_sheets_say_of_which_pictures_they_are(run: Run) -> None:
    succeed("sample", run.path, "-n", 3, "--out", "a", "--trajectory", *FEW)
    assert inspected(Path("a/grid.png"))["images"] == [0, 2]
    assert "the noise and steps of images 0 to 2" in succeed("inspect", "a/trajectory.png").stdout
    assert inspected(Path("a/trajectory.png"))["command"].endswith("-n 3 --trajectory")


def test_folders_of_before_are_completed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("png", "webdataset"):
        line = ("sample", run.path, "--out", kind, "--format", kind, *FEW)
        with monkeypatch.context() as before:
            before.setattr(picture_files, "picture_chunks", lambda settings, i: [b""] * len(i))
            succeed(*line, "-n", 2)
        succeed(*line, "-n", 4)
    assert "does not say what made it" in fail(1, "inspect", "png/000001.png")
    assert inspected(Path("png/000003.png"))["index"] == 3
    with tarfile.open("webdataset/000000.tar") as shard:
        pictures = [member for member in shard if member.name.endswith(".png")]
        told = [texts(shard.extractfile(member).read()) for member in pictures]  # type: ignore[union-attr]
    assert [sorted(found) for found in told] == [[], [], *[["Software", "lutdeploy"]] * 2]


def test_the_model_is_named_where_it_is_known(tmp_path: Path) -> None:
    told = {**TOLD, "model_sha256": files.sha256(shipped.model_path())}
    found = inspected(png(tmp_path / "a.png", lutdeploy=json.dumps(told)))
    assert found["command"].startswith(f"lutdeploy sample --model {shipped.DEFAULT} ")
    unknown = inspected(png(tmp_path / "b.png", lutdeploy=json.dumps(TOLD)))
    assert (
        unknown["command"]
        == "lutdeploy sample RUN --seed 0 --solver euler --steps 4 --first 1 -n 1"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"solver": "euler; rm -rf ."},
        {"model_sha256": "x" * 64},
        {"seed": -1},
        {"index": None},
        {"images": [0, 3]},
        {"steps": "4"},
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """So that nobody's file puts words into a command line that is shown."""
    path = png(tmp_path / "a.png", lutdeploy=json.dumps({**TOLD, **change}))
    assert "its text 'lutdeploy' is damaged" in fail(1, "inspect", path)


def test_other_files(tmp_path: Path) -> None:
    assert "does not say what made it" in fail(1, "inspect", png(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "is no PNG" in fail(1, "inspect", tmp_path / "b.png")
    path = png(tmp_path / "c.png", lutdeploy=json.dumps(TOLD), Software="\x1b[31mred\n")
    assert r"made with \x1b[31mred\n" in succeed("inspect", path).stdout
