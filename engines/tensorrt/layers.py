"""What an engine really runs, read from the JSON of TensorRT's engine inspector.

An engine is float16 because its matrix products are, not because of its name. The JSON has
two spellings of a data type ("Half" in fused layers, "Row major linear FP16 format"
elsewhere), and ``Metadata`` names the ONNX nodes that a layer came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lutdeploy.engines.tensorrt.support import GraphReport
from lutdeploy.errors import ArtefactError

PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|conv|mha|attention", re.IGNORECASE)
NOT_PRODUCT = re.compile(r"reformat|constant|shuffle|cast", re.IGNORECASE)
FUSED_ATTENTION = re.compile(r"mha|fused_?attention", re.IGNORECASE)
SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
NAMED = 5  # layers that a message lists


@dataclass(frozen=True)
class LayerReport:
    """The precision of an engine's matrix products, and its attention."""

    layers: int
    float16_products: int
    float32_products: int
    other_products: int
    fused_attention: int
    failures: tuple[str, ...]  # the engine is not what its export says
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        return {**values, "failures": list(self.failures), "warnings": list(self.warnings)}


def _precision(layer: dict[str, Any]) -> str:
    """fp16, fp32 or the data type's own name: that of the first input, the activations."""
    inputs = layer.get("Inputs") or [{}]
    text = str(inputs[0].get("Format/Datatype", "unknown"))
    if re.search(r"\b(half|fp16)\b", text, re.IGNORECASE):
        return "fp16"
    if re.search(r"\b(float|fp32|float32)\b", text, re.IGNORECASE):
        return "fp32"
    return text


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def read_layers(text: str, graph: GraphReport, precision: str) -> LayerReport:
    """Hold an engine's layers against the graph that it was built from.

    Args:
        text: ``EngineInspector.get_engine_information`` in JSON, of an engine built with
            detailed profiling verbosity.
        precision: "fp16" or "fp32", of the export.
    """
    try:
        layers = json.loads(text)["Layers"]
        detailed = [layer for layer in layers if isinstance(layer, dict)]
        names = [
            (str(layer.get("Name", "")), str(layer.get("LayerType", ""))) for layer in detailed
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"the engine inspector's JSON is not understood: {error!r}") from error
    failures: list[str] = []
    warnings: list[str] = []
    if len(detailed) < len(layers):
        failures.append("the inspector shows names only: the engine was built without details")
    found: dict[str, list[str]] = {"fp16": [], "fp32": []}
    halves, singles = set(graph.float16_products), set(graph.float32_products)
    wrong: list[str] = []
    claimed: set[str] = set()  # float32 products of the graph that a layer names
    nameless: list[str] = []  # layers in float32 that name no product of the graph
    attention = {name for pair in graph.attention for name in pair}
    unfused: list[str] = []
    mha = 0
    for layer, (name, kind) in zip(detailed, names, strict=True):
        product = PRODUCT.search(kind) or FUSED_ATTENTION.search(name)
        if not product or NOT_PRODUCT.search(kind):
            continue
        runs = _precision(layer)
        sources = set(SOURCE.findall(str(layer.get("Metadata", ""))))
        found.setdefault(runs, []).append(name)
        if (runs == "fp32" and sources & halves) or (runs == "fp16" and sources & singles - halves):
            wrong.append(f"{name} ({runs})")
        elif runs == "fp32" and sources & singles:
            claimed |= sources & singles
        elif runs == "fp32":
            nameless.append(name)
        if FUSED_ATTENTION.search(f"{kind} {name}"):
            mha += 1
        elif sources & attention:
            unfused.append(name)
    others = sum(len(v) for k, v in found.items() if k not in ("fp16", "fp32"))
    if detailed and not any(found.values()):
        kinds = sorted({kind for _, kind in names})
        warnings.append(
            f"the inspector shows no matrix product (layer types {_list(kinds)}): the precision "
            "is not verified, parity alone speaks for this engine"
        )
    elif wrong:
        failures.append(f"an {precision} export, but in another precision run {_list(wrong)}")
    elif precision == "fp16" and len(nameless) > len(singles - claimed):
        failures.append(
            f"{len(found['fp32'])} matrix products run in float32, the export has {len(singles)}: "
            f"{_list(nameless)} say not what they are"
        )
    elif precision == "fp32" and found["fp16"]:
        failures.append(f"a float32 export, but in float16 run {_list(found['fp16'])}")
    if precision == "fp16" and any(found.values()) and mha < len(graph.attention):
        warnings.append(
            f"attention is fused in {mha} of {len(graph.attention)} places"
            + (f"; apart run {_list(unfused)}" if unfused else "")
        )
    return LayerReport(
        layers=len(layers),
        float16_products=len(found["fp16"]),
        float32_products=len(found["fp32"]),
        other_products=others,
        fused_attention=mha,
        failures=tuple(failures),
        warnings=tuple(warnings),
    )


def merge_reports(reports: Sequence[LayerReport]) -> LayerReport:
    """The layers of several engines as if they were one; each message once."""
    return LayerReport(
        layers=sum(report.layers for report in reports),
        float16_products=sum(report.float16_products for report in reports),
        float32_products=sum(report.float32_products for report in reports),
        other_products=sum(report.other_products for report in reports),
        fused_attention=sum(report.fused_attention for report in reports),
        failures=tuple(dict.fromkeys(m for report in reports for m in report.failures)),
        warnings=tuple(dict.fromkeys(m for report in reports for m in report.warnings)),
    )
