"""The export that a model of the package brings: of its very weights, and right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lutdeploy
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run, tuned_steps_file
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import fitted_schedules, read_tuned_steps
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.config import ModelConfig
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.export.shipped import export_shipped
from lutdeploy.errors import ArtefactError, ParityError, UsageError
from lutdeploy.parity import compare
from tests.command import fail, succeed
from tests.conftest import golden_model


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a golden model, whose norms are not the identity, exported once."""

    @cache
    def make(preset: str) -> Path:
        model = golden_model(preset)
        for name, weights in model.state_dict().items():
            if ".norm" in name and name.endswith("weight"):
                weights.copy_(torch.linspace(0.5, 2, len(weights)))
        path = tmp_path_factory.mktemp("ready") / preset / f"{preset}.safetensors"
        path.parent.mkdir()
        save_model(model, path, torch.float16)
        return export_shipped(path, ())

    return make


@pytest.fixture
def model(
    ready: Callable[[str], Path], preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The weights of a model with an export, in a package of the test's own."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "models")
    path = shipped.model_path(preset)
    shutil.copytree(ready(preset), path.parent)
    return path


def test_the_shipped_export_is_of_the_shipped_weights_and_right() -> None:
    path = shipped.model_path()
    manifest = read_manifest(path.parent)
    manifest.verify()
    assert manifest.source_sha256 == files.sha256(path) == manifest.files[path.name].sha256
    assert manifest.tuned == tuple(read_tuned_steps(tuned_steps_file(path)).schedules)
    (verdict,) = read_verdicts(Run(path.parent))
    assert verdict.passed
    with open_engine(EngineRequest(path)) as engine:
        assert engine.identity["backend"] == "onnxruntime"
        assert verdict.judged(engine.identity)
        report = compare(load_model(path), engine, manifest.precision, manifest.tuned[0])
    assert report.passed, report.failures()


def test_it_reads_its_matrices_from_the_model(model: Path) -> None:
    """Of every preset: nothing of their size is in the graph, and the pictures are PyTorch's."""
    folder = model.parent
    graph = onnx.load(str(folder / "step.onnx"), load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    assert {
        entry.value for t in outside for entry in t.external_data if entry.key == "location"
    } == {model.name}
    depth = read_manifest(folder).config.depth
    assert len(outside) == 3 * depth + 1
    for backend in ("onnxruntime", "openvino"):
        if backend == "openvino":
            pytest.importorskip("openvino")
        with lutdeploy.load(model, backend) as engine:
            found = lutdeploy.sample(engine, 2, steps=4)
        with lutdeploy.load(model, "torch") as reference:
            assert np.abs(found - lutdeploy.sample(reference, 2, steps=4)).max() < 1e-4


@pytest.mark.parametrize("preset", ["static-tanh-64"], indirect=True)
class TestOneModel:
    def test_its_graph_says_what_it_is(self, model: Path) -> None:
        """As those of `lutdeploy export` do; the weights are the model's own file."""
        manifest = read_manifest(model.parent)
        manifest.verify()  # the graph was hashed with its metadata
        graph = onnx.load(model.parent / "step.onnx", load_external_data=False)
        told = {entry.key: entry.value for entry in graph.metadata_props}
        sha256 = files.sha256(model)
        assert ModelConfig.from_dict(json.loads(told.pop("lutdeploy.config"))) == manifest.config
        assert json.loads(told.pop("lutdeploy.weights_sha256")) == {model.name: sha256}
        assert told == {
            "lutdeploy.graph": "step",
            "lutdeploy.precision": "fp32",
            "lutdeploy.model_sha256": sha256,
            "model_license": shipped.LICENSE,
        }

    def test_what_differs_is_not_kept(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = torch.ones(3 * 64, dtype=torch.float64)  # q and k not scaled
        monkeypatch.setattr("lutdeploy.engines.export.shipped.attention_scale", lambda c: wrong)
        before = {path.name: path.stat().st_mtime_ns for path in model.parent.iterdir()}
        with pytest.raises(ParityError, match="its export differs"):
            export_shipped(model, ())
        after = {path.name: path.stat().st_mtime_ns for path in model.parent.iterdir()}
        assert after == before

    def test_other_weights_are_refused(self, model: Path) -> None:
        changed = load_model(model)
        changed.state_dict()["head.bias"].add_(1)
        save_model(changed, model, torch.float16)
        with pytest.raises(ArtefactError, match=r"has hash mismatch: .*; export again"):
            lutdeploy.load(model, "auto")

    def test_it_goes_into_the_run_that_is_made_for_the_model(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = find_run(model, print)
        (folder,) = run.exports()
        assert folder.name == "step-fp32"
        (verdict,) = read_verdicts(run)
        assert (verdict.export, verdict.check) == ("step-fp32", "parity")
        said = succeed("sample", run.path, "-n", 1, "--steps", 1, "--out", "samples").stderr
        assert "has not judged" not in said
        before = (folder / MANIFEST).stat().st_mtime_ns
        assert find_run(model, print).exports() == [folder]
        assert (folder / MANIFEST).stat().st_mtime_ns == before, "it is not made again"
        files.write_json(
            folder / MANIFEST, {**files.read_json(folder / MANIFEST), "source_sha256": ""}
        )
        find_run(model, print)
        assert read_manifest(folder).source_sha256 == files.sha256(model), "a stale one is replaced"

    def test_a_failed_verdict_beside_an_export_is_heeded(self, model: Path, tmp_path: Path) -> None:
        """Also where the folder was copied to a server, away from any run."""
        folder = shutil.copytree(model.parent, tmp_path / "server")
        (stored,) = (folder / "verdicts").iterdir()
        files.write_json(stored, {**files.read_json(stored), "passed": False})
        line = fail(1, "sample", folder, "-n", 1, "--out", tmp_path / "out")
        assert "failed parity" in line

    def test_its_name_is_the_only_one(self, model: Path) -> None:
        with pytest.raises(UsageError, match="has no export 'step-fp16'; it has static-tanh-64"):
            open_engine(EngineRequest(model, export="step-fp16"))
        assert fitted_schedules(model, files.sha256(model)) == []
