"""OpenVINO: what the conformance test does not ask."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest

import lutdeploy
import lutdeploy.engines.openvino
from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import hash_files, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.openvino import OpenVinoDenoiser
from lutdeploy.errors import ArtefactError, BackendError, UsageError
from tests.command import fail, invoke, succeed

Exported = Callable[..., Path]
Runs = Callable[..., Run]
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU does not compute in bfloat16")


@pytest.mark.parametrize(
    ("graph", "precision"), [("step", "fp16"), ("per-step", "fp32"), ("loop", "fp16")]
)
def test_every_kind_of_export_gives_the_pictures_of_onnxruntime(
    exported: Exported, graph: str, precision: str
) -> None:
    folder = exported("dynamic-64", graph, precision)
    images = [
        lutdeploy.sample(lutdeploy.load(folder, backend), 3, steps=5, solver="dpmpp-3m", batch=2)
        for backend in ("openvino", "onnxruntime")
    ]
    limit = 1e-4 if precision == "fp32" else 1e-2
    assert np.abs(images[0] - images[1]).max() < limit


@pytest.mark.parametrize(
    ("held", "precision"), [("fp16", "fp32"), pytest.param("fp32", "bf16", marks=needs_bf16)]
)
def test_a_verdict_names_the_arithmetic(
    exported_run: Runs, tmp_path: Path, held: str, precision: str
) -> None:
    """An export is judged by its own precision, or by bfloat16's limits where it runs in that."""
    run = exported_run(precision=held)
    options = ("--backend", "openvino", "--precision", precision)
    assert succeed("parity", run.path, *options, "-n", 2).stdout == "parity: passed\n"
    (verdict,) = [verdict for verdict in read_verdicts(run) if verdict.check == "parity"]
    assert (verdict.backend, verdict.device) == ("openvino", f"CPU {precision}")
    assert verdict.precision == ("bf16" if precision == "bf16" else held)
    assert float(verdict.final["max_abs"]) > 1e-4, "so it was not float32 that ran"
    succeed("sample", run.path, *options, "-n", 1, "--steps", 2, "--out", tmp_path / "out")
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line["device"] == f"CPU {precision}"


@needs_bf16
def test_bf16_called_fp32_is_refused(exported_run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lutdeploy.engines.openvino.HINTS, "fp32", ov.Type.bf16)
    run = exported_run(precision="fp32")
    result = invoke("parity", run.path, "--backend", "openvino", "-n", 1)
    assert result.exit_code == 1
    assert "runs 0 of the 10 fp32 matmuls" in result.stderr.splitlines()[-1]


def test_a_precision_that_the_cpu_lacks_is_an_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(exported())
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    with monkeypatch.context() as patch:
        patch.setattr(ov, "Core", lambda: core)
        with pytest.raises(BackendError, match="does not compute in bf16: OpenVINO offers FP32"):
            OpenVinoDenoiser(manifest, precision="bf16")
    with pytest.raises(UsageError, match="int4: backend openvino computes in fp32 or bf16"):
        OpenVinoDenoiser(manifest, precision="int4")
    with pytest.raises(BackendError, match="cpu alone"):
        open_engine(EngineRequest(exported(), "openvino", "cuda"))
    with pytest.raises(UsageError, match="for backends torch and openvino"):
        open_engine(EngineRequest(exported(), "onnxruntime", precision="bf16"))


def test_another_precision_than_asked_for_is_an_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(OpenVinoDenoiser):
        """Asks OpenVINO for float32 whatever it was told."""

        def _compile(self, path: Path) -> object:
            self._settings["INFERENCE_PRECISION_HINT"] = ov.Type.f32
            return super()._compile(path)

    monkeypatch.setitem(lutdeploy.engines.openvino.CAPABILITIES, "bf16", "FP32")
    with pytest.raises(BackendError, match="OpenVINO would compute in"):
        Silent(read_manifest(exported()), precision="bf16")


def test_a_graph_of_other_inputs_is_refused(exported: Exported, tmp_path: Path) -> None:
    mixed = shutil.copytree(exported(), tmp_path / "step-fp32")
    loop = (exported(graph="loop") / "loop.onnx").read_bytes()
    for graph, message in ((loop, r"got inputs \['noise'\]"), (b"no graph", "cannot compile")):
        (mixed / "step.onnx").write_bytes(graph)
        values = files.read_json(mixed / "manifest.json")
        files.write_json(mixed / "manifest.json", {**values, "files": hash_files(mixed)})
        with pytest.raises(ArtefactError, match=message):
            open_engine(EngineRequest(mixed, "openvino"))


def test_without_openvino_there_is_one_line(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "lutdeploy.engines.openvino")
    out = tmp_path / "out"
    said = fail(1, "sample", exported(), "--backend", "openvino", "--out", out)
    assert "pip install 'lutdeploy[openvino]'" in said
