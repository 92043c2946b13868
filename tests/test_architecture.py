"""What importing lutdeploy costs, and that it works beside a user's own modules of its names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import lutdeploy", ("torch", "numpy", "onnx", "onnxruntime", "tensorrt", "openvino")),
        ("import lutdeploy.cli", ("torch", "numpy", "onnx", "onnxruntime", "rich")),
        ("import lutdeploy.cli.sample", ("torch", "onnxruntime", "ray", "fsspec", "s3fs", "rich")),
        ("import lutdeploy.machine", ("torch", "numpy", "psutil")),
        (
            "import lutdeploy.engines, lutdeploy.sampling",
            ("torch", "onnxruntime", "tensorrt", "openvino"),
        ),
    ],
)
def test_imports_stay_light(code: str, heavy: tuple[str, ...]) -> None:
    probe = f"{code}; import sys; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []


def test_sampling_the_default_model_loads_what_it_needs(tmp_path: Path) -> None:
    """Into a log: neither rich, nor PyTorch, nor what reads pictures of any kind."""
    heavy = ("rich", "torch", "psutil", "PIL.JpegImagePlugin", "lutdeploy.decoding")
    code = (
        "import atexit, sys\n"
        "from lutdeploy.cli import cli\n"
        f"atexit.register(lambda: print(*[m for m in {heavy!r} if m in sys.modules]))\n"
        "cli(['sample', '-n', '1', '--steps', '1', '--out', 'out'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["out"]
    assert (tmp_path / "out" / "grid.png").is_file()


def test_load_beside_a_users_own_engines_and_training(tmp_path: Path) -> None:
    (tmp_path / "engines.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    code = (
        "import lutdeploy; from lutdeploy.artefacts import shipped;"
        "print(lutdeploy.load(shipped.model_path()).config.preset())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip() == "static-tanh-64", done.stderr
