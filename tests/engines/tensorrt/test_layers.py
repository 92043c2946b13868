"""What the engine inspector says, in the spellings of its versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lutdeploy.engines.tensorrt.layers import LayerReport, merge_reports, read_layers


def layer(kind: str, name: str = "", **types: str) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": [types] if types else []}


@pytest.mark.parametrize(
    ("half", "single"),
    [
        ({"Format/Datatype": "Half"}, {"Format/Datatype": "Float"}),
        (
            {"Format/Datatype": "Row major linear FP16 format"},
            {"Format/Datatype": "Row major linear FP32"},
        ),
        (
            {"Format": "Row major linear", "Datatype": "Half"},
            {"Format": "Row major linear", "Datatype": "Float"},
        ),
    ],
)
def test_types_are_read_in_every_spelling(half: dict[str, str], single: dict[str, str]) -> None:
    layers = [
        layer("kgen", "kgen_mha_myl0_3", **half),
        layer("fusion", "__myl_Fc_myl0_4", **half),
        layer("gemm", "_gemm_mha_v2_myl0_5", **half),
        layer("CaskConvolution", "stem", **single),
        layer("signal"),
    ]
    text = json.dumps({"Layers": layers, "I/O Tensors": []}) + "\n"
    found = read_layers(text.replace("stem", "st\x1eem"))  # it writes control characters as such
    assert found == LayerReport(5, 2, 3, 1, 1, ())


def test_what_is_not_known_is_counted_as_unknown() -> None:
    new = layer("quantum", "a", Datatype="Half")
    found = read_layers(json.dumps({"Layers": [new, "a name alone", {}]}))
    assert (found.float16, found.unknown) == (0, 3)
    assert found.unknown_kinds == ("quantum", "no type") and "quantum" in found.describe()
    for text in ("", "[]", "{}", '{"Layers": 3}'):
        assert read_layers(text).unknown_kinds == ("no JSON of layers",)


def test_reports_of_several_engines_add_up() -> None:
    one = read_layers(json.dumps({"Layers": [layer("kgen", "mha", Datatype="Half")] * 2}))
    other = read_layers(json.dumps({"Layers": [layer("new", Datatype="Float")]}))
    assert merge_reports([one, other, one]) == LayerReport(5, 4, 4, 0, 1, ("new",))
