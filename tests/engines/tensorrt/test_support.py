"""Graphs against TensorRT's parser, and engines' layers against their graphs."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from lutdeploy import engines
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.engines.tensorrt.layers import merge_reports, read_layers
from lutdeploy.engines.tensorrt.support import GraphReport, check_graph
from lutdeploy.errors import ArtefactError
from tests.doubles.tensorrt_double import VERSIONS, make_tensorrt

Exported = Callable[..., Path]
Change = Callable[[onnx.ModelProto], None]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_every_export_suits_tensorrt(
    exported: Exported, preset: str, graph: str, precision: str
) -> None:
    manifest = read_manifest(exported(preset, graph, precision))
    config = manifest.config
    passes = manifest.schedule.steps if graph == "loop" and manifest.schedule else 1
    for name in manifest.graphs:
        report = check_graph(manifest.folder / name, precision, config)
        assert report.problems == ()
        assert len(report.attention) == config.depth * passes
        dynamic, timed = config.lut == "dynamic", graph == "step"
        body, islands = 2 + 5 * config.depth + dynamic, 1 + timed
        if precision == "fp16":
            assert report.warnings == ()
            assert len(report.float16_products) == body * passes
            assert len(report.float32_products) == islands * passes
        else:
            assert report.warnings == ("float32 attention does not fuse; export with --fp16",)
            assert len(report.float32_products) == (body + islands) * passes


def changed(folder: Path, scratch: Path, change: Change) -> GraphReport:
    """The report on an fp16 step export after a change."""
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    change(model)
    onnx.save(model, scratch / "step.onnx")
    return check_graph(scratch / "step.onnx", "fp16", read_manifest(folder).config)


def _rename_softmax(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"


def _unknown_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "HardSwish"


def _split_attention(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    at = next(k for k, node in enumerate(nodes) if node.op_type == "Softmax")
    nodes[at].input[0], old = "between", nodes[at].input[0]
    nodes.insert(at, helper.make_node("Neg", [old], ["between"], name="blocks.0/Neg_1"))


def _dynamic_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def _new_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 26


def _narrow_island(model: onnx.ModelProto) -> None:
    """The first LayerNormalization in float16: its casts point at float16 and nothing else."""
    nodes = list(model.graph.node)
    node = next(node for node in nodes if node.op_type == "LayerNormalization")
    before = next(other for other in nodes if node.input[0] in other.output)
    before.attribute[0].i = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.name in node.input[1:]:
            tensor.data_type = TensorProto.FLOAT16
    del model.graph.value_info[:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_unknown_operator, "no HardSwish"),
        (_dynamic_axis, "axis 2 is dynamic"),
        (_new_opset, "opset 26: the parser takes 9 to 24"),
        (_narrow_island, "LayerNormalization in FP16"),
    ],
)
def test_what_tensorrt_would_not_take_is_named(
    exported: Exported, tmp_path: Path, change: Change, told: str
) -> None:
    report = changed(exported("static-tanh-64", "step", "fp16"), tmp_path, change)
    assert any(told in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("change", [_split_attention, _rename_softmax])
def test_attention_that_would_not_fuse_is_a_warning(
    exported: Exported, tmp_path: Path, change: Change
) -> None:
    report = changed(exported("static-tanh-64", "step", "fp16"), tmp_path, change)
    assert any("1 attention chains of 2" in warning for warning in report.warnings)


def test_a_float32_graph_is_no_fp16_export(exported: Exported) -> None:
    folder = exported("static-tanh-64", "step", "fp32")
    report = check_graph(folder / "step.onnx", "fp16", read_manifest(folder).config)
    assert any("the body is FP16" in problem for problem in report.problems)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path, exported: Exported) -> None:
    path = tmp_path / "step.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ArtefactError, match=r"step\.onnx is no readable ONNX graph"):
        check_graph(path, "fp16", read_manifest(exported()).config)


# Layers.

GRAPH = GraphReport(
    problems=(),
    warnings=(),
    float16_products=("stem/Conv_1", "blocks.0/MatMul_1", "blocks.0/MatMul_2"),
    float32_products=("head/MatMul_1",),
    attention=(("blocks.0/MatMul_1", "blocks.0/MatMul_2"),),
)


def layer(name: str, kind: str, dtype: str, *sources: str) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "in", "Dimensions": [1, 64, 64], "Format/Datatype": dtype}],
        "Outputs": [{"Name": "out", "Dimensions": [1, 64, 64], "Format/Datatype": dtype}],
        "TacticName": "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n",
        "StreamId": 0,
        "Metadata": "\u001e".join(f"[ONNX Layer: {source}]" for source in sources),
    }


CONV = layer("c", "CaskConvolution", "Row major linear FP16 format", "stem/Conv_1")
MHA = layer("_gemm_mha_v2_myl0_1", "gemm", "Half", "blocks.0/MatMul_1", "blocks.0/MatMul_2")
LUT = layer("l", "gemm", "Float", "head/MatMul_1", "head/Tanh_1")
POINTWISE = layer("__myl_AddCast_myl0_2", "kgen", "Float", "blocks.0/Add_1")


def report_of(*layers: Any, precision: str = "fp16", graph: GraphReport = GRAPH) -> Any:
    return read_layers(json.dumps({"Layers": layers}), graph, precision)


def test_a_half_precision_engine_is_recognised() -> None:
    report = report_of(CONV, MHA, LUT, POINTWISE)
    assert (report.failures, report.warnings) == ((), ())
    assert (report.float16_products, report.float32_products) == (2, 1)
    assert (report.fused_attention, report.layers) == (1, 4)


def test_a_half_precision_engine_that_computes_in_float32_fails() -> None:
    wide = layer("wide", "CaskConvolution", "Row major linear FP32", "stem/Conv_1")
    assert report_of(wide, MHA, LUT).failures == (
        "an fp16 export, but in another precision run wide (fp32)",
    )
    nameless = layer("nameless", "gemm", "Float")
    (failure,) = report_of(CONV, MHA, LUT, nameless).failures
    assert failure.startswith("2 matrix products run in float32, the export has 1")


def test_an_island_that_computes_in_half_precision_fails() -> None:
    assert report_of(CONV, MHA, layer("l", "gemm", "Half", "head/MatMul_1")).failures


def test_a_float32_engine_that_computes_in_half_precision_fails() -> None:
    graph = GraphReport((), (), (), (*GRAPH.float16_products, "head/MatMul_1"), ())
    assert report_of(LUT, precision="fp32", graph=graph).failures == ()
    assert report_of(LUT, CONV, precision="fp32", graph=graph).failures
    assert report_of(layer("n", "gemm", "Half"), precision="fp32", graph=graph).failures


def test_attention_that_is_not_fused_is_a_warning_with_the_layers() -> None:
    apart = [layer(f"scores{k}", "gemm", "Half", name) for k, name in enumerate(GRAPH.attention[0])]
    report = report_of(CONV, LUT, *apart)
    assert report.failures == ()
    assert report.warnings == ("attention is fused in 0 of 1 places; apart run scores0, scores1",)


def test_an_engine_that_hides_its_products_is_not_called_verified() -> None:
    opaque = layer("{ForeignNode[stem/Conv_1...head/MatMul_1]}", "Myelin", "Float")
    (warning,) = report_of(opaque).warnings
    assert "the precision is not verified" in warning
    assert report_of("stem/Conv_1", "head/MatMul_1").failures


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Layers": 3}', '{"layers": []}'])
def test_other_json_is_not_understood(text: str) -> None:
    with pytest.raises(ArtefactError, match="not understood"):
        read_layers(text, GRAPH, "fp16")


def test_reports_of_several_engines_add_up() -> None:
    merged = merge_reports([report_of(CONV, MHA, LUT), report_of(CONV, LUT), report_of(LUT, CONV)])
    assert (merged.layers, merged.fused_attention) == (7, 1)
    assert merged.warnings == ("attention is fused in 0 of 1 places",)


# Names.


def _used_names() -> dict[str, list[str]]:
    """Every dotted name that starts with ``trt.`` in our code, and the files that use it."""
    used: dict[str, list[str]] = {}
    for path in Path(engines.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if parts and isinstance(node, ast.Name) and node.id == "trt":
                used.setdefault(".".join(reversed(parts)), []).append(path.name)
    return used


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_used_of_tensorrt_exists(version: str) -> None:
    trt, used = make_tensorrt(version), _used_names()
    assert {"Builder", "Runtime", "OnnxParser", "BuilderFlag.TF32"} <= set(used)
    for name, where in used.items():
        found: Any = trt
        for part in name.split("."):
            assert hasattr(found, part), f"tensorrt {version} has no {name}, used in {where}"
            found = getattr(found, part)
