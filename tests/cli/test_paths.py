"""Runs and exports where people have them: behind links, moved, or where nothing can be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.verdicts import read_verdicts
from tests.command import fail, succeed

if os.name != "posix":
    pytest.skip("links and mounts as POSIX has them", allow_module_level=True)

ReadOnly = Callable[[Path], Path]
BACKENDS = ("torch", "onnxruntime", *(["openvino"] if find_spec("openvino") else []))
FEW = ("-n", 1, "--steps", 2)


@pytest.fixture
def run(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of the test's own, with a step export."""
    export = exported()
    made = Run(tmp_path / "cats")
    shutil.copytree(export, made.export_folder(export.name))
    shutil.copy(export.parent.parent / MODEL, made.model)
    return made.path


def linked(folder: Path, place: Path) -> Path:
    """The folder as a cache of downloads keeps it: every file a link to a blob."""
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = place / "blobs" / f"{number:02}" / "blob"
        blob.parent.mkdir(parents=True)
        shutil.copy(file, blob)
        link = place / "snapshots" / "main" / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return place / "snapshots" / "main"


def hard_linked(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place, copy_function=os.link))


@pytest.mark.parametrize("copy", [linked, hard_linked])
def test_links_work_where_the_hashes_hold(
    copy: Callable[[Path, Path], Path],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found = copy(run, tmp_path / "cache")
    assert "files verified by sha256" in succeed("inspect", found).stdout
    for backend in BACKENDS:
        made = []
        for place in (run, found):
            out = tmp_path / f"{place.name}-{backend}"
            succeed("sample", place, "--backend", backend, *FEW, "--out", out)
            made.append((out / "000000.png").read_bytes())
        assert made[0] == made[1]
    succeed("parity", found, *FEW)
    assert list(scratch.iterdir()) == [], "copies for a runtime are gone with it"
    if find_spec("tensorrt_rtx"):
        said = succeed("build", found, "--backend", "tensorrt-rtx", "--dry-run").stdout
        assert "would build" in said


def test_what_is_written_beside_links_leaves_their_files_alone(run: Path, tmp_path: Path) -> None:
    """Writing replaces a link, not what it leads to; what grows becomes a file of its own."""
    pictures = tmp_path / "pictures"
    succeed("sample", run, *FEW, "--out", pictures)
    for copy in (linked, hard_linked):
        for number, folder in enumerate((run, pictures)):
            before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            place = tmp_path / f"{copy.__name__}-{number}"
            found = copy(folder, place)
            kept = {p: p.read_bytes() for p in place.glob("blobs/*/blob")}
            if folder == run:
                succeed("parity", found, *FEW)
                succeed("import", run / MODEL, "--out", found, "--overwrite")
            else:
                succeed("sample", run, "-n", 3, "--steps", 2, "--out", found)
                assert len((found / "manifest.jsonl").read_text().splitlines()) > 1
            for path, data in (before | kept).items():
                assert path.read_bytes() == data, path


def test_an_export_moved_or_reached_by_a_link(run: Path, tmp_path: Path) -> None:
    export = Run(run).export_folder("step-fp32")
    alone = Path(shutil.copytree(export, tmp_path / "alone"))
    succeed("sample", alone, *FEW, "--out", tmp_path / "a")
    line = fail(2, "parity", alone, *FEW)
    assert f"{alone} has no {MODEL} beside it to compare with" in line
    (tmp_path / "link").symlink_to(export)  # leads back to its run
    other = Run(tmp_path / "other")
    other.exports_folder.mkdir(parents=True)
    (other.export_folder("step-fp32")).symlink_to(alone)  # stands in a run
    other.model.symlink_to(Run(run).model)
    for path in (tmp_path / "link", other.export_folder("step-fp32")):
        succeed("sample", path, "--backend", "torch", *FEW, "--out", tmp_path / f"s-{path.name}")
        succeed("parity", path, *FEW)
    assert all(read_verdicts(made) for made in (Run(run), other))


def test_links_to_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    line = fail(2, "sample", tmp_path / "gone")
    assert "gone is a link to nowhere, which is not there" in line
    model = Run(run).model
    model.unlink()
    model.symlink_to("../blobs/4d7a")
    line = fail(2, "inspect", run)
    assert f"holds no {MODEL}: it is a link to ../blobs/4d7a, which is not there" in line


def test_a_run_where_nothing_can_be_written(run: Path, read_only: ReadOnly, tmp_path: Path) -> None:
    read_only(run)
    for backend in ("auto", *BACKENDS):
        succeed("sample", run, "--backend", backend, *FEW, "--out", tmp_path / backend)
    assert "files verified by sha256" in succeed("inspect", run).stdout
    result = succeed("parity", run, *FEW)
    assert "warning: this verdict is not kept: " in result.stderr
    assert result.stdout == "parity: passed\n"
    succeed("export", run, "--author-format", tmp_path / "a.pth")
    line = fail(1, "export", run, "--author-format", run / "a.pth")
    assert line.startswith(f"error: {run / 'a.pth'}: ")
    elsewhere = "is not writable; work on a copy of it elsewhere"
    assert fail(2, "export", run) == f"error: {run / 'onnx'} {elsewhere}"
    for command in ("bench", "tune-steps"):
        assert fail(2, command, run) == f"error: {run} {elsewhere}"
    line = fail(2, "sample", run, *FEW, "--out", run / "pictures")
    assert "choose another --out" in line
    line = fail(2, "import", tmp_path / "a.pth", "--out", run, "--overwrite")
    assert line == f"error: {run} is not writable; choose another --out"
