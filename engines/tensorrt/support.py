"""What TensorRT's ONNX parser and its attention fusion ask of a graph, checked without it.

The operator list is data with its source: ``operators.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError

TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.UINT8: "UINT8",
}
PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")
CONTROL_FLOW = ("If", "Loop", "Scan")
BODY = ("stem", "blocks.")  # scopes whose products are the model's half-precision work


@cache
def operators() -> dict[str, Any]:
    """The parser's operators: opset range, and by name types and restrictions."""
    text = (files("lutdeploy.engines.tensorrt") / "operators.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


@dataclass(frozen=True)
class GraphReport:
    """What a graph holds, and what TensorRT would not take or not do fast."""

    problems: tuple[str, ...]  # the build would fail, or the islands are not what they should be
    warnings: tuple[str, ...]  # it builds, more slowly than it could
    float16_products: tuple[str, ...]  # node names
    float32_products: tuple[str, ...]
    attention: tuple[tuple[str, str], ...]  # node names of the MatMuls around each Softmax


def check_graph(path: Path, precision: str, config: ModelConfig) -> GraphReport:
    """Hold a graph file against the parser's list, the fusion's pattern and the islands.

    The weights file beside the graph is not read. ``precision`` is "fp32" or "fp16".
    """
    try:
        model = onnx.load(path, load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except Exception as error:  # protobuf and onnx raise several kinds
        first = (str(error).splitlines() or ["?"])[0]
        raise ArtefactError(f"{path} is no readable ONNX graph: {first}") from error
    problems = [*_opset_problems(model), *_axis_problems(graph)]
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    products: dict[str, list[str]] = {"FP16": [], "FP32": []}
    for node in graph.node:
        problems += _node_problems(node, types)
        if node.op_type in PRODUCTS:
            products.setdefault(_type(types, node.output[0]), []).append(node.name)
    if precision == "fp16":
        problems += _island_problems(graph, types)
    attention = _attention(graph, types, precision)
    warnings = _attention_warnings(graph, len(attention), precision, config)
    return GraphReport(
        tuple(problems),
        tuple(warnings),
        tuple(products["FP16"]),
        tuple(products["FP32"]),
        tuple(attention),
    )


def _type(types: dict[str, int], name: str) -> str:
    return TYPES.get(types.get(name, 0), f"type {types.get(name, 0)}")


def _opset_problems(model: onnx.ModelProto) -> list[str]:
    lowest, highest = operators()["opset"]
    problems = []
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            problems.append(f"operators of domain {opset.domain!r}")
        elif not lowest <= opset.version <= highest:
            problems.append(f"opset {opset.version}: the parser takes {lowest} to {highest}")
    return problems


def _axis_problems(graph: onnx.GraphProto) -> list[str]:
    problems = []
    for value in (*graph.input, *graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and axis > 0:
                problems.append(f"{value.name}: axis {axis} is dynamic, only the batch may be")
    return problems


def _node_problems(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    known = operators()["supported"].get(node.op_type)
    if node.op_type in CONTROL_FLOW:
        return [f"{node.name}: {node.op_type}, control flow, which keeps layers from fusing"]
    if known is None:
        return [f"{node.name}: the parser has no {node.op_type}"]
    problems = []
    kind = _type(types, node.output[0])
    if kind not in known["types"]:
        problems.append(f"{node.name}: {node.op_type} in {kind}, the parser takes {known['types']}")
    if node.op_type == "LayerNormalization" and sum(map(bool, node.output)) > 1:
        problems.append(f"{node.name}: more outputs than Y")
    return problems


def _island_problems(graph: onnx.GraphProto, types: dict[str, int]) -> list[str]:
    """Where an fp16 graph is not float32 although it must be, or float32 although it must not."""
    problems = []
    for value in (*graph.input, *graph.output):
        if _type(types, value.name) != "FP32":
            problems.append(
                f"{value.name}: {_type(types, value.name)}, inputs and outputs are FP32"
            )
    for node in graph.node:
        scope = node.name.rsplit("/", 1)[0].split("/")[-1]
        kind = _type(types, node.output[0])
        if node.op_type in PRODUCTS and scope.startswith(BODY) and kind != "FP16":
            problems.append(f"{node.name}: {node.op_type} in {kind}, the body is FP16")
        elif node.op_type in ("LayerNormalization", "Sin", "Cos", "Tanh") and kind != "FP32":
            problems.append(f"{node.name}: {node.op_type} in {kind}, an island is FP32")
        elif "lut" in node.input and kind != "FP32":
            problems.append(f"{node.name}: the LUT product in {kind}, an island is FP32")
    return problems


def _attention(
    graph: onnx.GraphProto, types: dict[str, int], precision: str
) -> list[tuple[str, str]]:
    """The MatMuls around each Softmax of the body, where nothing stands between the three."""
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    chains = []
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        before, after = makers.get(node.input[0]), users.get(node.output[0], [])
        if before is None or before.op_type != "MatMul":
            continue
        kind = "FP16" if precision == "fp16" else "FP32"
        if [user.op_type for user in after] == ["MatMul"] and _type(types, node.output[0]) == kind:
            chains.append((before.name, after[0].name))
    return chains


def _attention_warnings(
    graph: onnx.GraphProto, chains: int, precision: str, config: ModelConfig
) -> list[str]:
    """What keeps TensorRT from fusing attention: facts from its "Fused Attention" page."""
    passes = {node.name.split("/")[0] for node in graph.node if node.name.startswith("step_")}
    expected = config.depth * max(1, len(passes))
    warnings = []
    if chains != expected:
        warnings.append(f"{chains} attention chains of {expected} have the pattern that fuses")
    head = config.width // config.heads
    if not (16 <= head <= 256 and head % 8 == 0):
        warnings.append(f"heads of {head} channels do not fuse: wanted 16 to 256, divisible by 8")
    if precision == "fp32":
        warnings.append("float32 attention does not fuse; export with --fp16")
    return warnings
