"""What graphs say of themselves, and that it costs nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.config import ModelConfig
from lutdeploy.engines.export.metadata import describe_graphs
from tests.command import succeed

Exported = Callable[..., Path]


def told(path: Path) -> dict[str, str]:
    """The metadata, and that there is no other: nodes, values and graph have none."""
    model = onnx.load(path, load_external_data=False)
    parts = (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info)
    assert not any(part.metadata_props for part in parts)
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_graphs_name_their_model_and_schedule(exported: Exported, graph: str) -> None:
    manifest = read_manifest(exported(graph=graph))
    manifest.verify()
    for step, name in enumerate(manifest.graphs):
        found = told(manifest.folder / name)
        assert ModelConfig.from_dict(json.loads(found.pop("lutdeploy.config"))) == manifest.config
        weights = json.loads(found.pop("lutdeploy.weights_sha256"))
        assert weights == {"weights.bin": manifest.files["weights.bin"].sha256}
        if manifest.schedule is not None:
            schedule = json.loads(found.pop("lutdeploy.schedule"))
            assert schedule["solver"] == manifest.schedule.solver
            assert len(schedule["rows"]) == manifest.schedule.steps
        if graph == "per-step":
            assert found.pop("lutdeploy.step") == str(step)
        assert found == {
            "lutdeploy.graph": graph,
            "lutdeploy.precision": "fp32",
            "lutdeploy.model_sha256": manifest.source_sha256,
        }


def test_int8_graphs_say_so_too(exported: Exported) -> None:
    manifest = read_manifest(exported(precision="int8"))
    found = told(manifest.folder / "step.onnx")
    assert found["lutdeploy.precision"] == "int8"
    assert found["lutdeploy.model_sha256"] == manifest.source_sha256


def test_the_licence_is_what_was_said_or_the_package_s(
    golden_runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "cats")
    files.write_atomic(run.model, golden_runs("static-tanh-64").model.read_bytes())
    succeed("export", run.path, "--license", "cc-by-4.0")
    path = run.export_folder("step-fp32") / "step.onnx"
    assert told(path)["model_license"] == "cc-by-4.0"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == told(path), "ONNX Runtime shows it"
    manifest, source = read_manifest(path.parent), files.sha256(shipped.model_path())
    describe_graphs(path.parent, [path.name], "step", "fp32", manifest.config, None, source)
    assert told(path)["model_license"] == shipped.LICENSE
