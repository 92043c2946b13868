"""INT8: what is quantised, what it costs, and when it is not offered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import openvino as ov
import pytest
import torch

import lutdeploy
import lutdeploy.engines.openvino
from lutdeploy import parity
from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import save_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.export.graphs import ExportPlan
from lutdeploy.engines.export.int8 import float_ladder, measure_sensitivity, most_sensitive_first
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.errors import BackendError, ConfigError
from lutdeploy.machine import int8_weight_bits
from lutdeploy.model import Block, LutTransformer
from lutdeploy.parity import difference
from lutdeploy.quantization import matmul_names, with_int8_matmuls
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import solver_schedule
from tests.command import fail, succeed
from tests.conftest import golden_model

Exported = Callable[..., Path]
INT8_MATMULS = tuple(f"blocks.{k}.{name}" for k in range(2) for name in ("qkv", "out", "gated"))
OFFERED = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
has_int8 = pytest.mark.skipif("INT8" not in OFFERED, reason="this CPU does not compute in int8")
has_bf16 = pytest.mark.skipif("BF16" not in OFFERED, reason="this CPU does not compute in bfloat16")


def spiked_model() -> LutTransformer:
    """The golden model with one channel of block 1's values scaled up, and down again after.

    In float nothing changes; int8 has one scale for all channels and loses the others.
    """
    model = golden_model("static-tanh-64")
    block = model.blocks[1]
    assert isinstance(block, Block)
    d = model.config.width
    with torch.no_grad():
        block.qkv.weight[2 * d] *= 1000
        block.qkv.bias[2 * d] *= 1000
        block.out.weight[:, 0] /= 1000
    return model


def test_the_graph_holds_int8_where_it_should_and_nowhere_else(
    exported: Exported, preset: str
) -> None:
    folder = exported(preset, precision="int8")
    manifest = read_manifest(folder)
    manifest.verify()
    graph = onnx.load(folder / "step.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    narrow = []
    for node in graph.node:
        if node.op_type == "MatMul":
            sources = [made.get(name) for name in node.input]
            if all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
                weight = sources[1]
                assert weight is not None
                assert types[weight.input[0]] == onnx.TensorProto.INT8
                narrow.append(node.name.partition("/")[0])
    assert tuple(narrow) == INT8_MATMULS
    assert manifest.quantization is not None
    assert manifest.quantization.int8 == INT8_MATMULS
    quantised = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert len(quantised) == len(INT8_MATMULS), "the matmuls' inputs, and no output"
    assert manifest.files["weights.bin"].bytes < (
        read_manifest(exported(preset)).files["weights.bin"].bytes
    )


@has_int8
@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", None), ("openvino", None), pytest.param("openvino", "bf16", marks=has_bf16)],
)
def test_pictures_are_those_of_float32_to_35_db(
    exported: Exported, preset: str, backend: str, precision: str | None
) -> None:
    folder, model = exported(preset, precision="int8"), golden_model(preset)
    noise = batch_noise(0, range(2), model.config.image_shape)
    judged_as = "int8-bf16" if precision else "int8"
    with open_engine(EngineRequest(folder, backend, precision=precision)) as engine:
        assert backend != "openvino" or engine.identity["device"] == f"CPU {judged_as}"
        report = parity.compare(model, engine, judged_as, solver_schedule("euler", 6), noise)
    assert report.passed, report.failures()
    assert report.final.max_abs > 1e-4, "so it was int8 that ran"


@has_int8
@has_bf16
def test_the_rest_of_int8_may_be_bf16(exported: Exported) -> None:
    folder = exported(precision="int8")
    x, t = batch_noise(0, range(2), (3, 64, 64)), np.full(2, 0.5, np.float32)
    found = []
    for precision in ("fp32", "bf16"):
        with open_engine(EngineRequest(folder, "openvino", precision=precision)) as engine:
            found.append(engine.predict_x0(x, t))
    assert difference(*found).max_abs > 1e-4


def test_a_simulated_matmul_is_that_of_the_graph(exported: Exported) -> None:
    """Both are as far from float32 in the same direction: the errors are correlated."""
    model = golden_model("static-tanh-64")
    noise = batch_noise(0, range(4), model.config.image_shape)
    t = np.full(4, 0.5, np.float32)
    exact = TorchDenoiser(model).predict_x0(noise, t)
    simulated = TorchDenoiser(with_int8_matmuls(model, matmul_names(model)))
    ours = simulated.predict_x0(noise, t) - exact
    with open_engine(EngineRequest(exported(precision="int8"), "onnxruntime")) as engine:
        theirs = engine.predict_x0(noise, t) - exact
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.3
    assert 0.4 < ours.std() / theirs.std() < 2.5


def test_sensitivity_finds_the_matmul_that_int8_spoils() -> None:
    model = spiked_model()
    sensitivity = measure_sensitivity(model, batch_noise(0, range(2), model.config.image_shape))
    assert set(sensitivity.rms) == set(matmul_names(model))
    assert most_sensitive_first(sensitivity)[0] == "blocks.1.out"
    assert all(len(errors) == len(sensitivity.timesteps) for errors in sensitivity.rms.values())


def test_the_ladder_keeps_ever_more_in_float() -> None:
    assert list(float_ladder("abcdefgh")) == [(), ("a",), ("a", "b"), tuple("abcd")]
    assert list(float_ladder("abcdef")) == [(), ("a",), ("a", "b")]


def test_export_keeps_what_int8_spoils_in_float32(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    save_model(spiked_model(), run.model)
    result = succeed("export", run.path, "--int8")
    assert "again with blocks.1.out in float32" in result.stderr
    folder = run.export_folder("step-int8")
    record = read_manifest(folder).quantization
    assert record is not None
    assert record.float32 == ("blocks.1.out",)
    assert record.sensitivity is not None
    assert "in float32: blocks.1.out" in succeed("inspect", folder).stdout
    assert succeed("parity", run.path, "--backend", "openvino").stdout == "parity: passed\n"
    judged = [(v.device, v.precision) for v in read_verdicts(run) if v.check == "parity"]
    assert judged == [("CPU int8", "int8")]


def test_a_model_that_does_not_bear_int8_gets_no_new_export(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = Run(tmp_path / "run"), exported(precision="int8")
    old = shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    monkeypatch.setitem(parity.MIN_PSNR, "int8", 1000.0)
    monkeypatch.setattr("lutdeploy.engines.export.int8.float_ladder", lambda ranked: [()])
    assert "does not bear int8" in fail(1, "export", run.path, "--int8")
    assert read_manifest(old).created == read_manifest(source).created, "the old one is kept"
    assert {entry.name for entry in run.exports_folder.iterdir()} <= {".lock", old.name}
    assert read_verdicts(run) == []


def test_int8_has_no_other_graph_precision_or_place(exported: Exported, tmp_path: Path) -> None:
    folder = exported(precision="int8")
    run = folder.parent.parent
    assert "not both" in fail(2, "export", run, "--fp16", "--int8")
    assert "int8 is for graph step" in fail(2, "export", run, "--int8", "--graph", "loop")
    with pytest.raises(ConfigError, match="int8 is for graph step"):
        ExportPlan("per-step", "int8", solver_schedule("euler", 2))
    assert "which is for CPUs" in fail(2, "build", run, "--export", "step-int8", "--dry-run")


def test_build_passes_over_a_newer_int8_export(exported: Exported, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for created, precision in enumerate(("fp16", "int8"), start=2001):
        source = exported(precision=precision)
        shutil.copytree(source, run.export_folder(source.name))
        shutil.copy(source.parent.parent / MODEL, run.model)
        manifest = run.export_folder(source.name) / MANIFEST
        files.write_json(manifest, {**files.read_json(manifest), "created": f"{created}-01-01"})
    assert "export: step-fp16" in succeed("build", run.path, "--dry-run").stderr


@has_int8
def test_int8_that_is_really_float32_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(precision="int8")
    monkeypatch.setitem(lutdeploy.engines.openvino.RUNTIME_TYPES, "int8", ("i4",))
    with pytest.raises(BackendError, match="runs 0 of the 6 int8 matmuls"):
        lutdeploy.load(folder, "openvino")


@pytest.mark.parametrize(("flags", "bits"), [("avx2 avx512_vnni", 8), ("avx2 fma", 7)])
def test_weights_have_the_bits_that_the_processor_bears(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flags: str, bits: int
) -> None:
    """Eight only where int8 dot products sum in 32 bits; an export with more is refused."""
    monkeypatch.setattr("lutdeploy.machine.instructions", lambda: tuple(flags.split()))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert int8_weight_bits() == bits
    manifest = read_manifest(exported(precision="int8"))
    assert manifest.quantization is not None
    record = msgspec.structs.replace(manifest.quantization, weight_bits=8)
    wide = msgspec.structs.replace(manifest, quantization=record)
    if bits == 8:
        OnnxRuntimeDenoiser(wide).close()
    else:
        with pytest.raises(BackendError, match="weights of 8 bits, whose products saturate"):
            OnnxRuntimeDenoiser(wide)
