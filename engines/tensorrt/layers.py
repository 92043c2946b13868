"""What an engine was compiled to, read from the JSON of TensorRT's engine inspector.

This is information, not a gate: the types of the network are (``network.py``), and parity. The
JSON changes between versions: a data type stands in ``Format/Datatype`` before 11.0 and in
``Datatype`` since, as "Half" or as "Row major linear FP16 format". What is not known here is
counted as unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

KNOWN = re.compile(
    r"gemm|matmul|matrix_?multiply|conv|mha|attention|reformat|constant|shuffle|cast|softmax|norm"
    r"|pointwise|elementwise|reduce|slice|gather|shape|concat|noop|myelin|kgen|fusion|signal|wait",
    re.IGNORECASE,
)
FUSED_ATTENTION = re.compile(r"mha|fused_?attention", re.IGNORECASE)
DTYPES = {
    "float16": re.compile(r"\b(half|fp16|float16)\b", re.IGNORECASE),
    "float32": re.compile(r"\b(float|fp32|float32)\b", re.IGNORECASE),
}


@dataclass(frozen=True)
class LayerReport:
    """The layers of one engine or several."""

    layers: int
    fused_attention: int  # attention in one kernel
    float16: int  # layers whose first input is of this type
    float32: int
    unknown: int  # layers of another type, or of a kind that is not known here
    unknown_kinds: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "unknown_kinds": list(self.unknown_kinds)}

    def describe(self) -> str:
        """One line for people."""
        text = (
            f"{self.layers} layers, {self.fused_attention} fused attentions; inputs: "
            f"{self.float16} float16, {self.float32} float32, {self.unknown} unknown"
        )
        return text + (f" ({', '.join(self.unknown_kinds[:5])})" if self.unknown_kinds else "")


def _dtype(layer: dict[str, Any]) -> str:
    """The type of the first input: the activations."""
    first = next(iter(layer.get("Inputs") or [{}]))
    text = str(first.get("Datatype") or first.get("Format/Datatype") or "")
    return next((name for name, pattern in DTYPES.items() if pattern.search(text)), "unknown")


def read_layers(text: str) -> LayerReport:
    """Count the layers in ``EngineInspector.get_engine_information``, which is JSON.

    The text may hold control characters. Text that is no such JSON is one layer of unknown kind.
    """
    try:
        layers = list(json.loads(text, strict=False)["Layers"])
    except (ValueError, KeyError, TypeError):
        return LayerReport(1, 0, 0, 0, 1, ("no JSON of layers",))
    counts = {"float16": 0, "float32": 0, "unknown": 0}
    unknown: dict[str, None] = {}
    fused = 0
    for layer in layers:
        if not isinstance(layer, dict):  # a name alone: built without details
            layer = {"Name": str(layer)}
        kind, name = str(layer.get("LayerType", "no type")), str(layer.get("Name", ""))
        known = bool(KNOWN.search(kind))
        if not known:
            unknown[kind] = None
        counts[_dtype(layer) if known else "unknown"] += 1
        fused += bool(FUSED_ATTENTION.search(f"{kind} {name}"))
    return LayerReport(len(layers), fused, **counts, unknown_kinds=tuple(unknown))


def merge_reports(reports: Sequence[LayerReport]) -> LayerReport:
    """The layers of several engines as if they were one."""
    names = ("layers", "fused_attention", "float16", "float32", "unknown")
    sums = {name: sum(getattr(report, name) for report in reports) for name in names}
    kinds = dict.fromkeys(kind for report in reports for kind in report.unknown_kinds)
    return LayerReport(**sums, unknown_kinds=tuple(kinds))
