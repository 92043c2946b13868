"""`lutdeploy package web`: what is in the folder, and what is refused."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.tuned_steps import Entry, Measured, TunedSteps
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.engines.packaging import exports, web
from lutdeploy.schedule import DISTILLED, Schedule, fitted_schedule, solver_schedule
from tests.command import fail, succeed

Exports = Callable[..., Path]
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(exported: Exports, tmp_path: Path) -> MakeRun:
    """A run of the test's own with both ``step`` exports."""

    def make(preset: str = "static-tanh-64") -> Run:
        run = Run(tmp_path / "cats")
        for precision in ("fp32", "fp16"):
            source = exported(preset, "step", precision)
            shutil.copytree(source, run.export_folder(source.name))
        shutil.copy(source.parent.parent / MODEL, run.model)
        return run

    return make


def fit_schedule(run: Run) -> None:
    """Give a run a fitted schedule of two steps."""
    euler = solver_schedule("euler", 2)
    entry = Entry(Measured(fitted_schedule(euler.rows), 0.1), Measured(euler, 0.2))
    TunedSteps(files.sha256(run.model), 0, 1, 0, "euler-256", (entry,)).write(run.tuned_steps)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def facts(folder: Path) -> Any:
    return json.loads((folder / web.FACTS).read_text())


def test_the_folder_is_whole_and_its_hashes_are_right(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "site"
    fit_schedule(run)
    result = succeed("package", "web", run.path, "--out", out)
    assert result.stdout.strip() == str(out)
    page, there = facts(out), contents(out)
    assert sorted(there) == page["contents"]
    assert {path.name for path in web.PAGE.iterdir()} < set(there)
    assert page["model"]["sha256"] == files.sha256(run.model)
    assert page["model"]["parameters"] == sum(p.numel() for p in load_model(run.model).parameters())
    assert [engine["backend"] for engine in page["engines"]] == ["webgpu", "wasm"]
    for engine in page["engines"]:
        manifest = read_manifest(run.export_folder(f"step-{engine['precision']}"))
        assert engine["export_sha256"] == manifest.weights_sha256
        for kind in ("graph", "weights"):
            file = engine["files"][kind]
            data = there[file["url"]]
            assert (file["bytes"], file["integrity"]) == (len(data), web.integrity(data))
        for kind in ("script", "wasm"):
            file = engine["files"][kind]
            assert file["url"].startswith(
                "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"
            )
            name = file["url"].rsplit("/", 1)[1]
            assert (file["bytes"], file["integrity"]) == web.RUNTIME[name]
    names = [schedule["name"] for schedule in page["schedules"]]
    assert names == ["fitted-2", "dpmpp-2m-16", "dpmpp-2m-32", "euler-64"]
    assert "python -m http.server" in there[web.README].decode()
    assert "cdn.jsdelivr.net" in there[web.README].decode()
    assert "Microsoft" in there["LICENSES.txt"].decode()
    assert not list(tmp_path.glob(".*")), "no lock or stage is left beside it"


def test_rows_and_check_are_lutdeploys(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "site"
    succeed("package", "web", run.path, "--out", out)
    page = facts(out)
    assert page["schedules"][0]["name"] == "euler-64", "what `sample` follows without a fitted one"
    told = {schedule["name"]: schedule["rows"] for schedule in page["schedules"]}
    rows = solver_schedule("dpmpp-2m", 16).rows
    assert told["dpmpp-2m-16"] == [[r.t, r.a, r.b, r.c, r.history_ratio] for r in rows]
    export = run.export_folder("step-fp32")
    painted = lutdeploy.sample(lutdeploy.load(export, "onnxruntime"), 1)
    expected = np.frombuffer(base64.b64decode(page["check"]), np.uint8)
    assert np.array_equal(expected, images.to_uint8(painted).ravel())


def test_equal_bytes_and_an_earlier_page_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "site"
    succeed("package", "web", run.path, "--out", out)
    succeed("package", "web", run.path, "--out", tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")
    fit_schedule(run)
    succeed("package", "web", run.path, "--out", out)
    assert contents(out) != contents(tmp_path / "again")
    assert sorted(contents(out)) == facts(out)["contents"]


def test_the_lut(preset: str, make_run: MakeRun, tmp_path: Path) -> None:
    """A static one is the model's; a dynamic one that of an image, which the page says."""
    run, out = make_run(preset), tmp_path / "site"
    fit_schedule(run)
    succeed("package", "web", run.path, "--out", out)
    drawn = images.decode_png((out / web.LUT).read_bytes())
    model = load_model(run.model)
    config = model.config
    if config.lut == "static":
        entries = model.lut_patches(None, None).numpy()  # type: ignore[arg-type]
        assert np.array_equal(drawn, images.lut_sheet(entries))
    else:
        columns = (drawn.shape[1] + 4) // (4 * (config.patch_size + 1))
        rows = (drawn.shape[0] + 4) // (4 * (config.patch_size + 1))
        assert columns * rows == config.entries
        assert drawn.std() > 20
    assert facts(out)["config"]["lut"] == config.lut


def test_exports_are_made_where_there_are_none(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "site"
    shutil.rmtree(run.export_folder("step-fp16"))
    result = succeed("package", "web", run.path, "--out", out)
    assert "step-fp16 is made and checked against PyTorch" in result.stderr
    made = read_manifest(run.export_folder("step-fp16"))
    assert [v.export for v in read_verdicts(run)] == ["step-fp16"]
    assert (out / "step-fp16" / made.graphs[0]).is_file()


def test_an_export_of_earlier_weights_is_made_again(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    manifest = run.export_folder("step-fp32") / MANIFEST
    right = manifest.read_bytes()
    files.write_json(manifest, {**json.loads(right), "source_sha256": "0" * 64})
    again = []

    def export(run: Run, precision: str, *others: object) -> None:
        again.append(precision)
        manifest.write_bytes(right)

    monkeypatch.setattr(exports, "_export", export)
    succeed("package", "web", run.path, "--out", tmp_path / "site")
    assert again == ["fp32"]


def fail_verdict(run: Run, precision: str) -> None:
    succeed("parity", run.path, "--export", f"step-{precision}", "--steps", 2, "-n", 1)
    verdict = next(v for v in read_verdicts(run) if v.export == f"step-{precision}")
    store_verdict(run, msgspec.structs.replace(verdict, passed=False))


def test_what_failed_parity_is_not_packaged(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "site"
    fail_verdict(run, "fp16")
    result = succeed("package", "web", run.path, "--out", out)
    assert "step-fp16 failed parity" in result.stderr
    assert "the page computes in WebAssembly alone" in result.stderr
    assert [engine["backend"] for engine in facts(out)["engines"]] == ["wasm"]
    fail_verdict(run, "fp32")
    assert "step-fp32 failed parity" in fail(1, "package", "web", run.path, "--out", out)


def test_schedules_of_other_weights_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    fit_schedule(run)
    record = files.read_json(run.tuned_steps)
    files.write_json(run.tuned_steps, {**record, "model_sha256": "0" * 64})
    result = succeed("package", "web", run.path, "--out", tmp_path / "site")
    assert "left out" in result.stderr
    assert facts(tmp_path / "site")["schedules"][0]["name"] == "euler-64"


def test_a_distilled_model_has_its_own_schedule_alone() -> None:
    own = Schedule(DISTILLED, 1.0, solver_schedule("euler", 2).rows, "tuned")
    assert web.offered([own]) == [own]
    assert web.schedule_facts(own)["options"] == "", "`sample` follows it without being told"


def test_a_foreign_folder_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    package = ("package", "web", run.path, "--out")
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert "is a file; --out names a folder" in fail(2, *package, taken)
    assert "model.safetensors, which this command did not make" in fail(2, *package, run.path)
    out = tmp_path / "site"
    succeed(*package, out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    before = contents(out)
    assert "notes/mine.txt, which this command did not make" in fail(2, *package, out)
    (out / web.FACTS).write_text("{")
    assert "which this command did not make" in fail(2, *package, out)
    assert contents(out) == {**before, web.FACTS: b"{"}


def test_the_runtime_is_copied_if_it_is_the_right_one(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, runtime = make_run(), tmp_path / "site", tmp_path / "package"
    package = ("package", "web", run.path, "--out", out, "--runtime", runtime)
    assert "no such folder; --runtime names one of onnxruntime-web" in fail(2, *package)
    (runtime / "dist").mkdir(parents=True)
    line = fail(1, *package)
    assert "is missing; `npm pack onnxruntime-web@1.30.0` gets the right ones" in line
    for name in web.RUNTIME:
        (runtime / "dist" / name).write_bytes(name.encode())
    assert "another hash than that of onnxruntime-web 1.30.0" in fail(1, *package)
    assert not out.exists()
    right = {name: (len(name), web.integrity(name.encode())) for name in web.RUNTIME}
    monkeypatch.setattr(web, "RUNTIME", right)
    succeed(*package)
    for name in web.RUNTIME:
        assert (out / "runtime" / name).read_bytes() == name.encode()
    urls = {file["url"] for e in facts(out)["engines"] for file in e["files"].values()}
    assert urls <= set(contents(out)), "nothing comes from elsewhere"
    assert "comes from this folder" in (out / web.README).read_text()


def test_a_full_disk_leaves_the_earlier_page(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(), tmp_path / "site"
    succeed("package", "web", run.path, "--out", out)
    before = contents(tmp_path)

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write_json", full)
    assert os.strerror(errno.ENOSPC) in fail(1, "package", "web", run.path, "--out", out)
    assert contents(tmp_path) == before


def test_what_is_no_run(exported: Exports, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "site")
    assert "no such run" in fail(2, "package", "web", tmp_path / "none", *out)
    alone = tmp_path / "alone" / "step"
    shutil.copytree(exported(), alone)
    assert "belongs to no run folder" in fail(2, "package", "web", alone, *out)
    assert not (tmp_path / "site").exists()


def test_a_damaged_export_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    weights = run.export_folder("step-fp32") / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    line = fail(1, "package", "web", run.path, "--out", tmp_path / "site")
    assert "hash mismatch" in line and "export again" in line
