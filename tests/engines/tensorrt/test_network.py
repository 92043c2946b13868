"""What NVIDIA's own parser makes of our graphs, without a GPU: TensorRT for RTX is the real one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.config import PRESETS
from lutdeploy.engines.tensorrt.builder import BuildTarget, GraphBuild, export_types
from lutdeploy.engines.tensorrt.engine import this_machine
from lutdeploy.engines.tensorrt.library import RTX
from lutdeploy.engines.tensorrt.network import network_types, parse, polygraphy, read_graph
from lutdeploy.engines.tensorrt.plan import BatchProfile, BuildOptions
from lutdeploy.errors import ArtefactError, BackendError, ParityError
from lutdeploy.signature import step_signature

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

OPTIONS = BuildOptions(profiles=(BatchProfile(1, 2, 4),))
Exported = Callable[..., Path]


@pytest.fixture
def target() -> BuildTarget:
    return BuildTarget(this_machine(RTX), ("8.9",))


@pytest.fixture
def changed(exported: Exported, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the fp16 step graph after a change of its nodes."""

    def make(change: Callable[[onnx.GraphProto], None]) -> Path:
        folder = shutil.copytree(exported(precision="fp16"), tmp_path / "export")
        model = onnx.load(folder / "step.onnx", load_external_data=False)
        change(model.graph)
        onnx.save(model, folder / "step.onnx")
        return folder / "step.onnx"

    return make


def types_of(path: Path, target: BuildTarget, precision: str = "fp16") -> tuple[str, ...]:
    said = GraphBuild(path, OPTIONS, target, print, print).types(precision)
    return said.problems


@pytest.mark.parametrize(
    ("preset", "graph", "precision"),
    [
        *((preset, graph, "fp16") for preset in PRESETS for graph in ("step", "per-step", "loop")),
        ("static-tanh-64", "step", "fp32"),
        ("static-softmax-512", "per-step", "fp32"),
        ("dynamic-64", "loop", "fp32"),
    ],
)
def test_the_types_of_every_graph_are_those_of_its_export(
    exported: Exported, target: BuildTarget, preset: str, graph: str, precision: str
) -> None:
    manifest = read_manifest(exported(preset, graph, precision))
    passes = 5 if graph == "loop" else 1
    config = manifest.config
    # q-k-v, scores, weighted values, output, gate in a block; weights, LUT; a dynamic LUT's factors
    matmuls = passes * (5 * config.depth + 2 + (config.lut == "dynamic"))
    softmax_head = config.weights == "softmax"
    for _, types in export_types(manifest, OPTIONS, target):
        assert types.problems == ()
        counts = types.counts()
        if precision == "fp32":
            assert all(name.endswith("float32") for name in counts)
            timed = passes if graph == "step" else 0
            assert counts["MATRIX_MULTIPLY float32"] == matmuls + timed
            continue
        assert counts["MATRIX_MULTIPLY float16"] == matmuls
        assert "MATRIX_MULTIPLY float32" not in counts, "Turing compiles no such product"
        assert counts["CONVOLUTION float16"] == passes
        assert counts["NORMALIZATION float32"] == 2 * config.depth * passes
        assert counts["SOFTMAX float16"] == config.depth * passes
        head = "SOFTMAX" if softmax_head else "ACTIVATION"
        assert counts[f"{head} float32"] == passes
        assert counts.get("UNARY float32", 0) == (2 if graph == "step" else 0)


def test_a_float32_graph_is_no_fp16_export(exported: Exported, target: BuildTarget) -> None:
    problems = types_of(exported() / "step.onnx", target)
    assert any("MATRIX_MULTIPLY) computes in float32, not float16" in text for text in problems)
    problems = types_of(exported(precision="fp16") / "step.onnx", target, "fp32")
    assert any("computes in float16, not float32" in text for text in problems)


def test_a_graph_of_other_types_than_its_export_is_not_built(
    exported: Exported, target: BuildTarget
) -> None:
    path = exported() / "step.onnx"
    signature = step_signature(read_manifest(exported()).config)
    with pytest.raises(ParityError) as error:
        GraphBuild(path, OPTIONS, target, print, print).build("fp16", signature, None)
    assert str(error.value).startswith(f"{path} is not what its export says, fp16: ")
    assert str(error.value).endswith(" more")


def test_an_island_in_half_precision_is_named(
    changed: Callable[..., Path], target: BuildTarget
) -> None:
    def narrow(graph: onnx.GraphProto) -> None:
        (tanh,) = (node for node in graph.node if node.op_type == "Tanh")
        half = onnx.TensorProto.FLOAT16
        before = onnx.helper.make_node("Cast", [tanh.input[0]], ["narrow"], "head/Cast_a", to=half)
        after = onnx.helper.make_node(
            "Cast", ["narrow_tanh"], [tanh.output[0]], "head/Cast_b", to=onnx.TensorProto.FLOAT
        )
        place = list(graph.node).index(tanh)
        tanh.input[0], tanh.output[0] = "narrow", "narrow_tanh"
        graph.node.insert(place + 1, after)
        graph.node.insert(place, before)

    assert types_of(changed(narrow), target) == (
        "head/Tanh_1 (ACTIVATION) computes in float16, not float32",
    )


def test_a_product_without_a_layer_of_its_name_is_unknown(exported: Exported) -> None:
    """What has no layer has no type that could be read: that is no pass."""
    path = exported(precision="fp16") / "step.onnx"
    with polygraphy(RTX) as (loaders, messages):
        model = read_graph(path)
        _builder, network, _parser = parse(loaders, messages, model, str(path))
        for node in model.graph.node:
            if node.name == "head/MatMul_1":
                node.name = "head/hidden"
        types = network_types(network, model, "fp16")
    assert types.problems == (
        "head/hidden (MatMul) is no layer of its kind in the network: its type is unknown",
    )


def test_an_unsupported_operator_is_named_with_its_node(
    changed: Callable[..., Path], target: BuildTarget
) -> None:
    def unsupported(graph: onnx.GraphProto) -> None:
        (tanh,) = (node for node in graph.node if node.op_type == "Tanh")
        tanh.op_type = "Det"

    path = changed(unsupported)
    with pytest.raises(BackendError) as error:
        types_of(path, target)
    assert str(error.value).startswith(f"TensorRT cannot parse {path}: ")
    assert "head/Tanh_1" in str(error.value)
    assert "Det" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path, target: BuildTarget) -> None:
    path = tmp_path / "step.onnx"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ArtefactError, match="is no readable ONNX graph"):
        types_of(path, target)
