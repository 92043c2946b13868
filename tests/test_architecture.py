"""Who may import whom, and what importing lutdeploy costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lutdeploy", "training", "engines")
# What each module of the core may import of the core, at any depth of its code.
CORE = {
    "errors": set(),
    "machine": set(),
    "config": {"errors"},
    "lut": {"config"},
    "solvers": {"errors"},
    "shipped": set(),
    "signature": {"config", "errors", "solvers"},
    "images": set(),
    "model": {"config", "lut"},
    "tuned_steps": {"bundle", "errors", "solvers"},
    "tuning": {"errors", "sampling", "solvers"},
    "step_comparison": {"errors", "parity", "sampling", "solvers", "tuning"},
    "sampling": {"config", "errors", "solvers"},
    "bundle": {"config", "errors", "signature", "solvers"},
    "checkpoint": {"bundle", "config", "errors", "model"},
    "reference": {"config", "errors", "model", "sampling", "solvers"},
    "plan": {"bundle", "errors"},
    "parity": {"errors", "images", "model", "quantization", "reference", "sampling", "solvers"},
    "fused": {"config", "lut", "model"},
    "quantization": {"fused", "model", "reference", "sampling", "solvers"},
    "export": {"bundle", "config", "errors", "fused", "model", "signature", "solvers"},
    "sample_folder": {"bundle", "errors", "images", "sampling", "solvers"},
    "inspection": {"bundle", "checkpoint", "config", "errors", "plan", "tuned_steps"},
}


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("package", "other"), [("training", "engines"), ("engines", "training")])
def test_training_and_engines_do_not_know_each_other(package: str, other: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        assert not [n for n in _imports(path) if n.split(".")[0] == other], path.name


def test_core_looks_upward_only_from_the_command_line() -> None:
    for path in (ROOT / "lutdeploy").glob("*.py"):
        upward = [n for n in _imports(path) if n.split(".")[0] in ("training", "engines")]
        assert path.stem == "__init__" or not upward, path.name


def test_core_modules_import_only_what_lies_below() -> None:
    modules = {path.stem for path in (ROOT / "lutdeploy").glob("*.py")}
    assert modules == {*CORE, "cli", "__init__"}
    for name, allowed in CORE.items():
        imported = _imports(ROOT / "lutdeploy" / f"{name}.py")
        used = {m for m in (*modules, "commands") if f"lutdeploy.{m}" in imported}
        assert used <= allowed, name


def test_every_file_name_is_known_to_the_bundle_alone() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            constants = [
                node.value
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            for name in ("model.safetensors", "manifest.json", "parity.json", "train.jsonl"):
                assert path.stem == "bundle" or name not in constants, (path.name, name)


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import lutdeploy", ("torch", "numpy", "onnx", "onnxruntime", "tensorrt", "openvino")),
        ("import lutdeploy.cli", ("torch", "numpy", "onnx", "onnxruntime", "rich")),
        ("import lutdeploy.machine", ("torch", "numpy", "psutil")),
        ("import engines.bench_process", ("torch", "onnx", "onnxruntime", "openvino")),
        ("import engines, lutdeploy.sampling", ("torch", "onnxruntime", "tensorrt", "openvino")),
    ],
)
def test_imports_stay_light(code: str, heavy: tuple[str, ...]) -> None:
    probe = f"{code}; import sys; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []
