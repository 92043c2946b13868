"""What the exported graphs are made of."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts, store_verdict
from lutdeploy.config import PRESETS, model_config
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.export.check import export_checked
from lutdeploy.engines.export.graphs import (
    ISLANDS,
    OPSET,
    ExportPlan,
    export_model,
    write_graphs,
)
from lutdeploy.errors import ConfigError
from lutdeploy.fused import FusedNetwork, TimeBias
from lutdeploy.model import LutTransformer
from lutdeploy.schedule import solver_schedule
from tests import traces
from tests.conftest import golden_model

Exported = Callable[..., Path]
DEPTH = 2  # of the tiny models
# Nodes of a static fp32 step graph; per block what BLOCK says.
CENSUS = {
    "time": {"Unsqueeze": 1, "Mul": 1, "Sin": 1, "Cos": 1, "Concat": 1, "Gemm": 1},
    "stem": {
        "Conv": 1,
        "Reshape": 1,
        "Transpose": 1,
        "Unsqueeze": 1,
        "Add": 2,
        "Split": 1,
        "Concat": 1,
        "Mul": 2,
    },
    "head": {"MatMul": 2, "Add": 1, "Tanh": 1, "Reshape": 2, "Transpose": 1},
    "sampler": {"Reshape": 3, "Mul": 3, "Add": 2},
}
TIME_WITHOUT_MATMUL = {"Gemm": -1, "Unsqueeze": 1, "Mul": 1, "ReduceSum": 1, "Add": 1}
BLOCK = {
    "LayerNormalization": 2,
    "MatMul": 5,
    "Add": 5,
    "Split": 2,
    "Reshape": 4,
    "Transpose": 4,
    "Softmax": 1,
    "Sigmoid": 1,
    "Mul": 2,
}
FORBIDDEN = {
    *("If", "Scan", "Loop", "Shape", "Slice", "Gather", "Expand", "ConstantOfShape", "Range"),
    *("Where", "Einsum", "Attention"),
}


def read(folder: Path, k: int = 0) -> onnx.ModelProto:
    name = read_manifest(folder).graphs[k]
    return onnx.load(folder / name, load_external_data=False)


def census(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, {}),
        (
            {"preset": "dynamic-64"},
            {"Pad": 1, "Add": 2, "Split": 2, "MatMul": 1, "Reshape": 2, "Transpose": 1, "Mul": 1},
        ),
        # Casts: x, the time bias, both sides of each LayerNormalization, the logits, both sides
        # of the LUT product. The timestep's product is a multiplication and a sum.
        (
            {"precision": "fp16"},
            {"Cast": 1 + 1 + 2 * 2 * DEPTH + 1 + 2, **TIME_WITHOUT_MATMUL},
        ),
    ],
)
def test_op_census_of_the_step_graph(
    exported: Exported, options: dict[str, str], extra: dict[str, int]
) -> None:
    expected = Counter(extra)
    for part in (*CENSUS.values(), *DEPTH * [BLOCK]):
        expected.update(part)
    assert census(read(exported(**options))) == expected


def test_a_loop_is_its_steps_and_nothing_else(exported: Exported) -> None:
    """But for x0_prev + d/c·x0_prev2 of the one step that needs two x0 from the past."""
    loop = census(read(exported(graph="loop")))
    steps: Counter[str] = Counter()
    for k in range(5):
        steps += census(read(exported(graph="per-step"), k))
    assert loop == steps + Counter({"Mul": 1, "Add": 1})


@pytest.mark.parametrize(
    ("preset", "graph"),
    [*itertools.product(PRESETS, ("step", "loop")), ("static-tanh-64", "per-step")],
)
def test_no_forbidden_operator_and_one_dynamic_axis(
    exported: Exported, preset: str, graph: str
) -> None:
    model = read(exported(preset, graph))
    assert not FORBIDDEN & set(census(model))
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [OPSET]
    for value in (*model.graph.input, *model.graph.output):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dim.dim_value > 0 for dim in others)
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_graph_inputs_and_outputs_are_named_by_the_signature(exported: Exported) -> None:
    def names(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
        return [v.name for v in model.graph.input], [v.name for v in model.graph.output]

    step = (["x", "t", "a", "b", "c", "x0_prev"], ["x_next", "x0"])
    assert names(read(exported())) == step
    per_step = exported(graph="per-step")
    schedule = read_manifest(per_step).schedule
    assert schedule is not None
    for k, row in enumerate(schedule.rows):
        inputs = ["x", "x0_prev"] if row.c else ["x"]
        assert names(read(per_step, k)) == (inputs, ["x_next", "x0"])
    assert names(read(exported(graph="loop"))) == (["noise"], ["image"])


def test_static_lut_is_an_initializer_named_lut(exported: Exported) -> None:
    for precision, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        folder = exported(precision=precision)
        model = onnx.load(folder / "step.onnx")
        lut = next(i for i in model.graph.initializer if i.name == "lut")
        entries = golden_model("static-tanh-64").lut.entries.flatten(1).numpy()  # type: ignore
        assert np.array_equal(numpy_helper.to_array(lut), entries.astype(dtype))


def test_dynamic_lut_is_a_subgraph_found_by_name(exported: Exported) -> None:
    model = read(exported("dynamic-64"))
    scoped = [node for node in model.graph.node if node.name.startswith("lut")]
    assert {"MatMul", "Mul"} <= {node.op_type for node in scoped}
    assert scoped[-1].output[0] == "lut"
    readers = [node.name for node in model.graph.node if "lut" in node.input]
    assert len(readers) == 1
    assert readers[0].startswith("head/MatMul")


def test_nodes_are_named_after_their_modules(exported: Exported) -> None:
    names = [node.name for node in read(exported()).graph.node]
    assert len(set(names)) == len(names)
    parts = {name.split("/")[0].split(".")[0] for name in names}
    assert parts == {"time", "stem", "blocks", "head", "sampler"}
    by_part = Counter(name.split("/")[0].split(".")[0] for name in names)
    for part, ops in CENSUS.items():
        assert by_part[part] == sum(ops.values()), part


def test_fp16_islands_are_float32_in_the_graph(exported: Exported, preset: str) -> None:
    folder = exported(preset, precision="fp16")
    assert read_manifest(folder).islands == ISLANDS
    assert read_manifest(exported(preset)).islands == ()
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "step.onnx"), strict_mode=True)
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    dtypes = {v.name: v.type.tensor_type.elem_type for v in values}
    dtypes |= {i.name: i.data_type for i in graph.initializer}
    for node in graph.node:
        inputs = {dtypes[name] for name in node.input if dtypes[name] != TensorProto.INT64}
        island = (
            node.op_type in ("LayerNormalization", "Tanh", "Sin", "Cos")
            or node.name.startswith(("sampler/", "time/"))
            or (node.op_type == "Softmax" and node.name.startswith("head"))
            or (node.op_type == "Mul" and node.name.startswith("lut/"))
        )
        if island and node.op_type != "Cast":
            assert inputs == {TensorProto.FLOAT}, node.name
        elif node.op_type in ("MatMul", "Conv", "Gemm"):
            assert inputs == {TensorProto.FLOAT16}, node.name


def test_per_step_graphs_share_one_weights_file(exported: Exported) -> None:
    many, one = exported(graph="per-step"), exported()
    files = read_manifest(many).files
    assert sorted(files) == [*(f"step-{k:03d}.onnx" for k in range(5)), "weights.bin"]
    weights = read_manifest(one).files["weights.bin"].bytes
    assert files["weights.bin"].bytes <= weights
    assert max(files[name].bytes for name in files if name.endswith(".onnx")) < weights / 5


def test_per_step_graphs_differ_by_their_coefficients_alone(exported: Exported) -> None:
    manifest = read_manifest(exported(graph="per-step"))
    assert manifest.schedule is not None
    time = TimeBias(golden_model("static-tanh-64").stem)
    shared: dict[str, bytes] = {}
    for name, row in zip(manifest.graphs, manifest.schedule.rows, strict=True):
        tensors = onnx.load(manifest.folder / name).graph.initializer
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        assert np.array_equal(held.pop("time_bias"), time(torch.tensor([row.t])).detach().numpy())
        for coefficient in ("a", "b", "c"):
            assert held.pop(coefficient, 0) == np.float32(getattr(row, coefficient))
        for weight, values in held.items():  # one name is one value in every graph
            assert shared.setdefault(weight, values.tobytes()) == values.tobytes(), weight


def test_exports_hold_no_path_of_this_machine(exported: Exported) -> None:
    for graph in ("step", "per-step", "loop"):
        for path in exported(graph=graph).glob("*.onnx"):
            data = path.read_bytes()
            assert str(Path.cwd()).encode() not in data
            assert b"site-packages" not in data
            assert b".py" not in data


def test_fused_network_equals_the_model(preset: str) -> None:
    """The rewrites are algebra: against the model in float64 only rounding is left."""
    torch.manual_seed(0)
    model = LutTransformer(model_config(preset, "tiny")).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".norm" in name:  # an affine that does something
            parameter.add_(torch.randn_like(parameter) * 0.3)
    network, time = FusedNetwork(model, "fp32"), TimeBias(model.stem)
    x, t = torch.randn(2, 3, 64, 64), torch.tensor([0.1, 0.8])
    found = network(x, time(t))
    expected = model.double()(x.double(), t.double())
    assert (found - expected).abs().max() < 2e-5 * expected.std()


@pytest.mark.parametrize(
    ("preset", "plan"),
    [
        ("dynamic-64", ExportPlan("step", "fp32")),
        ("static-softmax-512", ExportPlan("loop", "fp16", solver_schedule("dpmpp-3m", 5))),
    ],
    ids=["step", "loop"],
)
def test_a_graph_depends_on_its_weights_by_their_bytes_alone(
    preset: str, plan: ExportPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the suite traces a network once: another model's trace makes the same files."""

    def contents(name: str, model: LutTransformer) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        write_graphs(model, plan, folder, lambda phase: None)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    model = golden_model(preset)
    contents("other", LutTransformer(model.config).eval().requires_grad_(False))
    with monkeypatch.context() as patched:
        patched.setattr(traces, "trace", None)  # the other's graph serves
        remembered = contents("remembered", model)
    monkeypatch.setattr(torch.onnx, "export", traces.trace)
    assert contents("traced", model) == remembered


def test_an_export_again_is_the_newest_and_the_same_bytes(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", traces.trace)
    run, model = Run(tmp_path), golden_model("static-tanh-64")
    for source in (exported(), exported(precision="fp16")):
        shutil.copytree(source, run.export_folder(source.name))
    sha256 = read_manifest(exported()).source_sha256
    folder = export_model(model, ExportPlan(), run, sha256)
    assert [export.name for export in run.exports()] == ["step-fp32", "step-fp16"]
    assert read_manifest(folder).files == read_manifest(exported()).files

    def refuse(stage: Path) -> None:
        raise ConfigError("no")

    before = read_manifest(folder)
    with pytest.raises(ConfigError):
        export_model(model, ExportPlan(), run, sha256, refuse)
    assert read_manifest(folder) == before, "a refused export leaves the old one"
    assert sorted(p.name for p in run.exports_folder.iterdir()) == ["step-fp16", "step-fp32"]


def test_the_check_after_an_export_leaves_a_verdict(tmp_path: Path) -> None:
    run, model = Run(tmp_path), golden_model("static-tanh-64")

    def export() -> Verdict:
        export_checked(model, ExportPlan(), run, "0" * 64, (), print)
        (verdict,) = read_verdicts(run)
        return verdict

    found = export()
    assert (found.check, found.export, found.passed) == ("export", "step-fp32", True)
    with open_engine(EngineRequest(run.export_folder("step-fp32"), "onnxruntime")) as engine:
        assert found.judged(engine.identity)
    parity = msgspec.structs.replace(found, check="parity", passed=False)
    store_verdict(run, parity)
    assert export() == parity, "parity has asked more of the same bytes"


def test_plan_names_and_impossible_plans() -> None:
    schedule = solver_schedule("euler", 64)
    assert ExportPlan("step", "fp16").name == "step-fp16"
    assert ExportPlan("per-step", "fp16", schedule).name == "per-step-fp16-euler-64"
    for graph, precision, steps in (
        ("step", "fp16", schedule),
        ("loop", "fp16", None),
        ("steps", "fp16", None),
        ("step", "int4", None),
    ):
        with pytest.raises(ConfigError):
            ExportPlan(graph, precision, steps)
