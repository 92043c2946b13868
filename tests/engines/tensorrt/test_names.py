"""Every name and argument of TensorRT that the code uses exists in each version that it is for.

The surfaces were read from NVIDIA's bindings (``tests/data/tensorrt``). What stands behind a
question for TensorRT for RTX is looked for there alone, and the other way round.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lutdeploy.engines import tensorrt
from lutdeploy.engines.tensorrt import engine, network
from tests.doubles.surface import Signatures, read_surface

VERSIONS = ("10.13", "10.16", "11.1", "11.4", "rtx-1.7")
MODULE = ("trt", "self.trt", "self._trt")
# What is of which class, by file, where no assignment in the same function says it.
OBJECTS = {
    "builder.py": dict.fromkeys(("config", "made", "kept[0]"), "IBuilderConfig"),
    "network.py": {"network": "INetworkDefinition"},
    "engine.py": {
        **{"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext"},
        **{"inspector": "EngineInspector", "config": "IRuntimeConfig"},
        **{"self._cache": "IRuntimeCache"},
    },
}
# What is called for TensorRT for RTX alone.
RTX_SCOPES = ("check_architectures", "RuntimeCache", "_configure")
RTX = re.compile(r"is_rtx\(|\.rtx\b|== RTX")
NOT_RTX = re.compile(r"not \w+\.rtx\b|!= RTX")


class Uses(ast.NodeVisitor):
    """Collects the uses in one file that a surface does not have."""

    def __init__(self, surface: dict[str, Any], objects: dict[str, str]) -> None:
        self.classes, self.enums = surface["classes"], surface["enums"]
        self.here = "rtx" if surface["module"] == "tensorrt_rtx" else "tensorrt"
        self.explicit, self.objects, self.side = objects, dict(objects), "both"
        self.checked = 0
        self.missing: list[str] = []

    # Which of the two a line is for.

    def _visit(self, nodes: list[Any], side: str) -> None:
        before, self.side = self.side, side
        for node in nodes:
            self.visit(node)
        self.side = before

    def _scope(self, node: Any) -> None:
        objects, before = dict(self.objects), self.side
        self.side = "rtx" if node.name in RTX_SCOPES else before
        self.generic_visit(node)
        self.objects, self.side = objects, before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in map(self._path, node.bases):
            for method in node.body if base else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    self._override(base, method)
        self._scope(node)

    def visit_If(self, node: Any) -> None:
        test = ast.unparse(node.test)
        sides = (self.side, self.side)
        if NOT_RTX.search(test):
            sides = ("tensorrt", "rtx")
        elif RTX.search(test):
            sides = ("rtx", "tensorrt")
        body, other = ((n if isinstance(n, list) else [n]) for n in (node.body, node.orelse))
        self.visit(node.test)
        self._visit(body, sides[0])
        self._visit(other, sides[1])
        if sides[0] != self.side and isinstance(body[-1], ast.Return):
            self.side = sides[1]  # what follows in this function

    visit_IfExp = visit_If  # noqa: N815

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        gate = isinstance(node.op, ast.Or) and NOT_RTX.search(ast.unparse(node.values[0]))
        self._visit(node.values, "rtx" if gate else self.side)

    # What a name stands for.

    def _path(self, node: ast.expr) -> str:
        """X.Y of trt.X.Y; empty for other expressions."""
        text = ast.unparse(node)
        for name in MODULE:
            if text.startswith(f"{name}."):
                return text.removeprefix(f"{name}.")
        head, _, rest = text.partition(".")
        known = self.objects.get(head, "")
        return f"{known.removeprefix('enum ')}.{rest}" if known.startswith("enum ") else ""

    def _class(self, node: ast.expr) -> str | None:
        """The class of an object of TensorRT, by the explicit map or by what made it."""
        if found := self.objects.get(ast.unparse(node)):
            return None if found.startswith("enum ") else found
        if isinstance(node, ast.Call):
            path = self._path(node.func)
            if path in self.classes:
                return path
            if isinstance(node.func, ast.Attribute) and (owner := self._class(node.func.value)):
                lines = self.classes.get(owner, {}).get("methods", {}).get(node.func.attr, [""])
                returned = lines[0].rpartition("-> ")[2].rpartition("::")[2]
                return returned if returned in self.classes else None
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        (target,) = node.targets
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        for name, value in pairs:
            path = self._path(value) if isinstance(value, ast.Attribute) else ""
            if path in self.enums:
                self.objects[ast.unparse(name)] = f"enum {path}"
            elif found := self._class(value):
                self.objects[ast.unparse(name)] = found

    def _comprehension(self, node: Any) -> None:
        objects = self.objects
        targets = {ast.unparse(generator.target) for generator in node.generators}
        hidden = targets - set(self.explicit)
        self.objects = {name: what for name, what in objects.items() if name not in hidden}
        self.generic_visit(node)
        self.objects = objects

    visit_ListComp = visit_GeneratorExp = visit_DictComp = visit_SetComp = _comprehension  # noqa: N815

    # What is held against the surface.

    def _expect(self, there: bool, node: ast.AST, what: str) -> None:
        if self.side in ("both", self.here):
            self.checked += 1
            if not there:
                self.missing.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        path, owner = self._path(node), self._class(node.value)
        if "__" in path or node.attr.startswith("__"):
            return
        if path:
            self._expect(self._exists(path), node, f"trt.{path}")
        elif owner:
            api = self.classes.get(owner, {"methods": {}, "properties": {}})
            there = node.attr in api["methods"] or node.attr in api["properties"]
            self._expect(there, node, f"{owner}.{node.attr}")

    def _exists(self, path: str) -> bool:
        enum, _, member = path.rpartition(".")
        return path in self.classes or path in self.enums or member in self.enums.get(enum, {})

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        lines = self.classes.get(self._path(node.func), {}).get("constructors", ())
        if isinstance(node.func, ast.Attribute) and (owner := self._class(node.func.value)):
            lines = self.classes.get(owner, {}).get("methods", {}).get(node.func.attr, ())
        if not lines or any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        keywords = {str(keyword.arg): None for keyword in node.keywords}
        fits = False
        for overload in Signatures(ModuleType("none"), lines).overloads:
            try:
                overload.bind(*node.args, **keywords)
                fits = True
            except TypeError:
                continue
        self._expect(fits, node, f"{ast.unparse(node)} does not fit {lines}")

    def _override(self, base: str, method: ast.FunctionDef) -> None:
        lines = self.classes.get(base, {}).get("methods", {}).get(method.name, ())
        taken = [argument.arg for argument in method.args.args[1:]]
        given = [list(o.parameters) for o in Signatures(ModuleType("none"), lines).overloads]
        self._expect(taken in given, method, f"{base}.{method.name}({', '.join(taken)})")


def look(source: str, file: str, version: str) -> Uses:
    uses = Uses(read_surface(version), OBJECTS.get(file, {}))
    uses.visit(ast.parse(source))
    return uses


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_is_used_exists(version: str) -> None:
    checked = {}
    for path in Path(tensorrt.__file__).parent.glob("*.py"):
        uses = look(path.read_text(encoding="utf-8"), path.name, version)
        assert uses.missing == [], path.name
        checked[path.name] = uses.checked
    assert checked["engine.py"] > 40 and checked["builder.py"] > 15
    assert checked["network.py"] > 8 and checked["library.py"] > 3
    enums = read_surface(version)["enums"]
    assert set(network.CHECKED.values()) <= set(enums["LayerType"])
    assert {*network.TYPES, *engine.DTYPES} <= set(enums["DataType"])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trt.BuilderFlag.FP17", ["trt.BuilderFlag.FP17"]),
        ("flags = trt.BuilderFlag\nflags.FP17", ["trt.BuilderFlag.FP17"]),
        ("trt.Runtime()", ["trt.Runtime() does not fit"]),
        ("engine.get_binding_shape(0)", ["ICudaEngine.get_binding_shape"]),
        ("context.set_input_shape(name=1, dims=2)", ["dims=2) does not fit"]),
        ("a = engine.create_execution_context()\na.enqueue()", ["IExecutionContext.enqueue"]),
        ("engine.create_engine_inspector().layers", ["EngineInspector.layers"]),
        ("class A(trt.ILogger):\n def log(self, level, msg): ...", ["ILogger.log(level, msg)"]),
        ("context.is_stream_capturable(1)", ["IExecutionContext.is_stream_capturable"]),
        ("if is_rtx(trt):\n trt.EngineValidity.VALID\ntrt.EngineValidity.VALID", ["line 3"]),
        ("def f():\n if b != RTX:\n  return\n trt.EngineValidity\ntrt.EngineValidity", ["line 5"]),
        ("not a.rtx or context.is_stream_capturable(1)", []),
        ("context.execute_async_v3(stream_handle=1)\ntrt.DataType.HALF", []),
    ],
)
def test_a_name_that_does_not_exist_is_found(source: str, found: list[str]) -> None:
    missing = look(source, "engine.py", "11.4").missing
    assert len({line.partition(":")[0] for line in missing}) == len(found), missing
    assert all(any(text in line for line in missing) for text in found)
