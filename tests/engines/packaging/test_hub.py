"""`lutdeploy package hub`, and what takes the folder: locally, from the cache, from a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData

import lutdeploy
from lutdeploy.artefacts import files, hub, shipped
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.target import find_model, find_run
from lutdeploy.artefacts.tuned_steps import Entry, Measured, TunedSteps
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.engines.packaging.hub import RECORD, SAMPLES
from lutdeploy.schedule import fitted_schedule, solver_schedule
from tests.command import fail, succeed
from tests.hub_double import COMMIT, files_of, fill_cache, serving

Exported = Callable[..., Path]
METRICS = {
    "images": 18,
    **{"frechet_distance": 50.5, "kernel_distance": 0.25, "kernel_distance_std": 0.01},
    **{"precision": 0.5, "recall": 0.25, "density": 0.75, "coverage": 1.0},
}
# Runs command lines in one process: [[exit code, stdout, stderr], …] as JSON.
RUNNER = """
import json, sys
from click.testing import CliRunner
from lutdeploy.cli import cli
done = [CliRunner().invoke(cli, line) for line in json.load(sys.stdin)]
json.dump([[r.exit_code, r.stdout, r.stderr] for r in done], sys.stdout)
"""


@pytest.fixture(scope="module")
def packaged(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with a checked export and a fitted schedule of two steps, and its folder for the Hub.

    Nobody changes them.
    """
    place = tmp_path_factory.mktemp("packaged")
    source, run = exported(), Run(place / "cats")
    shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    euler = solver_schedule("euler", 2)
    entry = Entry(Measured(fitted_schedule(euler.rows), 0.1), Measured(euler, 0.2))
    TunedSteps(files.sha256(run.model), 0, 1, 0, "euler-256", (entry,)).write(run.tuned_steps)
    succeed("parity", run.path, "-n", 1)
    succeed("package", "hub", run.path, "--out", place / "hub", "--license", "cc-by-4.0")
    return run, place / "hub"


@pytest.fixture
def run(packaged: tuple[Run, Path], tmp_path: Path) -> Run:
    """A copy of the run, to be changed."""
    return Run(shutil.copytree(packaged[0].path, tmp_path / "cats"))


def evaluated(run: Run, **settings: Any) -> None:
    """An evaluation.json as `lutdeploy evaluate` writes it."""
    said = {
        "model_sha256": files.sha256(run.model),
        **{"solver": "euler", "steps": 64, "shift": 1.0, "split": "of /home/me/faces"},
        **settings,
    }
    names = {"frechet_distance": "FID", "kernel_distance": "KID"}
    rows = [{"what": "samples", "against": "18 real", "metrics": METRICS}] * 2
    files.write_json(
        run.path / "evaluation.json",
        {"format": 1, "settings": said, "names": names, "rows": rows, "alarms": []},
    )


def read_card(folder: Path) -> ModelCard:
    """Hugging Face's own parser reads the card, and refuses an unknown shape of its figures."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    again = ModelCard(f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    assert again.data.to_dict() == card.data.to_dict()
    return card


def test_the_folder_holds_the_model_its_export_and_its_samples(packaged: tuple[Run, Path]) -> None:
    run, out = packaged
    assert sorted(files_of(out)) == json.loads((out / RECORD).read_text())["contents"]
    assert (out / MODEL).read_bytes() == run.model.read_bytes()
    manifest = read_manifest(out / "onnx" / "step-fp32")
    manifest.verify()
    (verdict,) = read_verdicts(Run(out))
    assert verdict.engine_sha256 == manifest.weights_sha256
    config, _ = read_metadata(run.model)
    told = json.loads((out / "config.json").read_text())
    assert {name: told[name] for name in config.to_dict()} == config.to_dict()
    pictures = [name for name in files_of(out) if name.startswith("samples/0")]
    assert len(pictures) == SAMPLES


def test_the_samples_are_those_of_the_folder_itself(
    packaged: tuple[Run, Path], tmp_path: Path
) -> None:
    _, out = packaged
    said = succeed("sample", out, "-n", SAMPLES, "--out", tmp_path / "s").stderr
    assert "fitted-2" in said
    assert "has not judged" not in said, "the verdict came with it"
    made = {name: p.read_bytes() for name, p in files_of(tmp_path / "s").items() if name[0] != "."}
    assert made == {name: p.read_bytes() for name, p in files_of(out / "samples").items()}


def test_the_card_is_what_the_hub_reads(packaged: tuple[Run, Path]) -> None:
    _, out = packaged
    card = read_card(out)
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.license) == ("lutdeploy", "cc-by-4.0")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert "onnx" in (data.tags or [])
    assert (data.eval_results, data.model_name) == (None, None), "nothing was measured"
    assert "## Figures" in card.text, "but the fitted schedule was"
    assert "| fitted-2 | 0.1 | euler-2 | 0.2 |" in card.text
    assert "hf://OWNER/NAME" in card.text


def test_figures_are_those_of_the_evaluation(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    evaluated(run)
    succeed("package", "hub", run.path, "--out", out, "--repo", "me/tabbies")
    data = read_card(out).data
    assert isinstance(data, ModelCardData)
    assert data.model_name == "tabbies"
    found = {result.metric_type: result for result in data.eval_results or []}
    assert found["fid"].metric_value == METRICS["frechet_distance"]
    assert found["prdc_recall"].metric_value == METRICS["recall"]
    assert found["fid"].metric_name == "FID, euler-64"
    assert found["fid"].metric_args == {"pictures": 18, "schedule": "euler-64"}
    text = (out / "README.md").read_text()
    assert "lutdeploy sample hf://me/tabbies" in text
    assert "/home/me" not in text, "where the images lie is nobody's business"


@pytest.mark.parametrize(
    "stale",
    [
        {"model_sha256": "0" * 64},
        {"solver": "fitted", "steps": 2, "grid": "tuned", "times_sha256": "0" * 64},
        {"solver": "dpmpp-2m", "steps": 16, "grid": "tuned", "times_sha256": "0" * 64},
    ],
)
def test_figures_of_something_else_are_left_out(
    stale: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    evaluated(run, **stale)
    succeed("package", "hub", run.path, "--out", tmp_path / "hub")
    data = read_card(tmp_path / "hub").data
    assert isinstance(data, ModelCardData)
    assert data.eval_results is None


def test_the_packages_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its licence and its figures are known; those of steps that it no longer has are left out."""
    monkeypatch.chdir(tmp_path)
    succeed("package", "hub", "--model", shipped.DEFAULT, "--out", "hub")
    data = read_card(Path("hub")).data
    assert isinstance(data, ModelCardData)
    assert data.license == "mit"
    facts, known = shipped.facts(shipped.DEFAULT), {"euler-64", "fitted-4"}
    results = data.eval_results or []
    assert {(r.metric_args or {})["schedule"] for r in results} <= known
    first = next(result for result in results if result.metric_type == "frechet_distance")
    assert first.metric_value == facts["reference_metrics"]["frechet_distance"]


def test_equal_bytes_and_an_earlier_folder_is_replaced(
    packaged: tuple[Run, Path], tmp_path: Path
) -> None:
    run, out = packaged
    again = tmp_path / "hub"
    line = ("package", "hub", run.path, "--out", again)
    succeed(*line, "--license", "cc-by-4.0")
    assert {n: p.read_bytes() for n, p in files_of(again).items()} == {
        n: p.read_bytes() for n, p in files_of(out).items()
    }
    said = succeed(*line).stderr
    assert "warning: the card states no licence" in said
    assert "license" not in (again / "README.md").read_text().partition("\n---\n")[0]
    assert not list(tmp_path.glob(".*")), "no lock or stage is left beside it"
    (again / "notes.txt").write_text("mine")
    assert "holds notes.txt, which this command did not make" in fail(2, *line)


def test_what_is_wrong_is_said(
    packaged: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = packaged
    line = ("package", "hub", run.path, "--out", tmp_path / "hub")
    assert "--repo names OWNER/NAME" in fail(2, *line, "--repo", "cats")
    assert "--license takes an identifier" in fail(2, *line, "--license", "My own")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    shipped_one = ("package", "hub", "--model", shipped.DEFAULT, "--out", tmp_path / "hub")
    for words in (line, shipped_one, ("sample", "hf://me/cats"), ("inspect", "hf://me/cats")):
        assert "pip install 'lutdeploy[hub]'" in fail(1, *words)
    assert list(tmp_path.iterdir()) == [], "neither the folder nor a run for the model"


def test_a_failed_export_is_not_packaged(run: Run, tmp_path: Path) -> None:
    for verdict in read_verdicts(run):
        store_verdict(run, msgspec.structs.replace(verdict, passed=False))
    assert "failed parity" in fail(1, "package", "hub", run.path, "--out", tmp_path / "hub")


def elsewhere(place: Path, *lines: tuple[object, ...], **variables: str) -> list[tuple[str, str]]:
    """Command lines in a process of its own, whose huggingface_hub reads the environment.

    Their last lines, of stdout and of stderr.
    """
    variables = {"HF_HOME": str(place / "home"), **variables}
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([[str(word) for word in line] for line in lines]),
        cwd=place,
        env={**keep, "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = [
        [(text.splitlines() or [""])[-1] for text in pair] for _, *pair in json.loads(done.stdout)
    ]
    return [(out, error) for out, error in last]


def test_downloads_in_the_cache(
    packaged: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are links into blobs; nothing is written there, and no network is needed."""
    _, out = packaged
    snapshot = fill_cache(out, tmp_path / "home", "me/cats")
    before = {name: (p.is_symlink(), p.read_bytes()) for name, p in files_of(snapshot).items()}
    address, few = "hf://me/cats", ("-n", 1, "--no-grid")
    found = elsewhere(
        tmp_path,
        ("sample", address, *few, "--out", "a"),
        ("sample", snapshot, *few, "--out", "b"),
        ("sample", f"{address}@{COMMIT}", *few, "--out", "c"),
        ("sample", f"{address}@v2", *few),
        ("sample", "hf://me/dogs", *few),
        ("sample", "hf://me", *few),
        HF_HUB_OFFLINE="1",
    )
    assert [out for out, _ in found[:3]] == ["a", "b", "c"], found
    expected = (out / "samples" / "000000.png").read_bytes()
    assert (tmp_path / "a" / "000000.png").read_bytes() == expected
    assert (tmp_path / "b" / "000000.png").read_bytes() == expected
    for (_, error), start in zip(found[3:5], ("hf://me/cats@v2", "hf://me/dogs"), strict=True):
        assert error.startswith(f"error: {start} is not, or not whole, in the cache")
    assert found[5][1].startswith("error: hf://me: an address on the Hub is hf://OWNER/NAME")
    monkeypatch.chdir(tmp_path)
    assert succeed("parity", snapshot, "-n", 1, "--seed", 5).stdout.strip() == "parity: passed"
    (verdict,) = read_verdicts(Run(Path("runs/cats")))
    assert verdict != read_verdicts(Run(snapshot))[0], "what is found goes into a run"
    after = {name: (p.is_symlink(), p.read_bytes()) for name, p in files_of(snapshot).items()}
    assert after == before
    assert all(link for link, _ in after.values())


def test_downloads_from_a_server(packaged: tuple[Run, Path], tmp_path: Path) -> None:
    _, out = packaged
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('["bert"]')
    (foreign / MODEL).write_bytes(bytes(1000))
    with serving({"me/cats": out, "me/bert": foreign}) as (endpoint, fetched):
        found = elsewhere(
            tmp_path,
            ("sample", "hf://me/cats", "-n", 1, "--no-grid", "--out", "a"),
            ("inspect", "hf://me/cats@v2"),
            ("inspect", "hf://me/dogs"),
            ("inspect", "hf://me/bert"),
            HF_ENDPOINT=endpoint,
        )
    assert found[0][0] == "a", found
    expected = (out / "samples" / "000000.png").read_bytes()
    assert (tmp_path / "a" / "000000.png").read_bytes() == expected
    assert found[1][1] == "error: hf://me/cats@v2: the repository has no such revision"
    assert found[2][1].startswith("error: hf://me/dogs: no such repository, or a private one")
    assert found[3][1].startswith("error: hf://me/bert has no config.json of lutdeploy")
    wanted = ("config", "model", "onnx", "steps", "verdicts")
    assert sorted(fetched) == sorted(
        ["config.json", *(name for name in files_of(out) if name.startswith(wanted))]
    ), "no samples; of what is none of ours, the config alone"
    (said,) = elsewhere(tmp_path, ("inspect", "hf://me/new"), HF_ENDPOINT=endpoint)
    assert "the Hub cannot be reached" in said[1], "the server is gone"


def test_python_and_inspect_take_an_address(
    packaged: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = packaged
    monkeypatch.setattr(hub, "download", lambda address, note: out)
    with lutdeploy.load("hf://me/cats", "onnxruntime") as engine:
        found = lutdeploy.sample(engine, 1, steps=2)
    with lutdeploy.load(run.path, "onnxruntime") as engine:
        assert np.array_equal(found, lutdeploy.sample(engine, 1, steps=2))
    assert "fitted schedules: fitted-2" in succeed("inspect", "hf://me/cats").stdout
    assert find_model("hf://me/cats") == out / MODEL


def test_a_run_of_another_model_is_not_replaced(
    packaged: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = packaged
    monkeypatch.chdir(tmp_path)
    snapshot = fill_cache(out, tmp_path / "home", "me/cats")
    run = find_run(snapshot, print)
    assert run.path == Path("runs/cats")
    assert not run.model.is_symlink()
    assert find_run(snapshot / "onnx" / "step-fp32", print) == run, "made once"
    run.model.write_bytes(b"another")
    assert "give that folder another name" in fail(2, "tune-steps", snapshot, "--data", "synthetic")
    assert run.model.read_bytes() == b"another"
