"""The wheel beside what sampling needs, and no PyTorch: made as the Dockerfile says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import shipped
from lutdeploy.artefacts.run import tuned_steps_file
from lutdeploy.artefacts.tuned_steps import read_tuned_steps
from lutdeploy.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
ABSENT = ("torch", "onnx", "onnx_ir", "onnxscript")
# Runs several command lines in one process: [[exit code, stdout, stderr], …] as JSON.
RUNNER = """
import json, sys
from click.testing import CliRunner
from lutdeploy.cli import cli
done = [CliRunner().invoke(cli, line) for line in json.load(sys.stdin)]
json.dump([[r.exit_code, r.stdout, r.stderr] for r in done], sys.stdout)
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the Dockerfile's commands are POSIX")


def stage_lines() -> list[tuple[str, str]]:
    """Instructions and their arguments of the Dockerfile's first stage, after its FROM."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]
    first, second = (k for k, (word, _) in enumerate(pairs) if word == "FROM")
    return pairs[first + 1 : second]


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def needed(requirements: list[str]) -> set[str]:
    """The distributions that some requirements mean here, and all that those need."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "onnxruntime" and not is_installed(name):
            name = canonicalize_name("onnxruntime-gpu")  # the same modules, and CUDA beside them
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in found:
            found.add(name)
            waiting += importlib.metadata.requires(name) or []
    return found


def link(distribution: str, site: Path) -> None:
    """Show a distribution that is installed here in another site-packages."""
    metadata = importlib.metadata.distribution(distribution)
    for name in {file.parts[0] for file in metadata.files or ()} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(str(metadata.locate_file(name)))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment that the Dockerfile's first stage makes below another root.

    Nothing is fetched: the packages that it would download are links to those installed here.
    """
    root = tmp_path_factory.mktemp("image")
    environment = root / "opt" / "lutdeploy"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    site.mkdir(parents=True)
    for name in needed(DEPENDENCIES):
        link(name, site)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"},  # 0: isolation is off
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if not is_installed("onnxruntime"):  # its stand-in satisfies no requirement of its name
        variables["PIP_NO_DEPS"] = "1"

    def inside(text: str) -> str:
        return re.sub(r"(?<![\w.])/(?=(opt|src|dist)\b)", f"{root}/", text)

    place = root
    for word, rest in stage_lines():
        if word == "ENV":
            for name, _, value in (pair.partition("=") for pair in shlex.split(inside(rest))):
                variables[name] = value
        elif word == "WORKDIR":
            place = Path(inside(rest))
            place.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in (ROOT / name for name in sources):
                if source.is_dir():
                    skip = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(source, place / target, symlinks=True, ignore=skip)
                else:
                    shutil.copy(source, place / target)
        else:
            assert word == "RUN", word
            done = subprocess.run(
                ["sh", "-c", inside(rest)], cwd=place, env=variables, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return environment


def run(fresh: Path, place: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A program of the environment, which sees nothing of the checkout."""
    program, *arguments = map(str, command)
    variables = {
        name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ
    }
    return subprocess.run(
        [str(fresh / "bin" / program), *arguments],
        cwd=place,
        env={**variables, "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_else_is_there(fresh: Path, tmp_path: Path) -> None:
    code = "import importlib.util, lutdeploy; print(lutdeploy.__file__, *("
    code += f"name for name in {ABSENT!r} if importlib.util.find_spec(name)))"
    done = run(fresh, tmp_path, "python", "-c", code)
    assert Path(done.stdout.strip()).is_relative_to(fresh), "and the rest of the line is empty"


def test_the_default_model_paints_what_pytorch_paints(fresh: Path, tmp_path: Path) -> None:
    done = run(fresh, tmp_path, "lutdeploy", "sample", "-n", 2, "--out", "samples")
    assert done.returncode == 0, done.stderr
    path = shipped.model_path()
    assert f"backend: onnxruntime on CPUExecutionProvider, export {path.stem}" in done.stderr
    assert "has not judged" not in done.stderr, "its verdict came with it"
    best = read_tuned_steps(tuned_steps_file(path)).best
    assert best is not None
    expected = lutdeploy.sample(lutdeploy.load(path, "torch"), 2, schedule=best)
    for index, picture in enumerate(images.to_uint8(expected)):
        found = images.decode_png((tmp_path / "samples" / f"{index:06d}.png").read_bytes())
        assert np.abs(found.astype(int) - picture).max() <= 1
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_inspect_and_doctor_say_what_is_missing(fresh: Path, tmp_path: Path) -> None:
    code = "from lutdeploy.artefacts import shipped; print(shipped.model_path())"
    model = Path(run(fresh, tmp_path, "python", "-c", code).stdout.strip())
    found = json.loads(run(fresh, tmp_path, "lutdeploy", "inspect", "--json", model).stdout)
    assert found["dtypes"] == ["F16"]
    assert found["unverified"].startswith("the check of the weights needs PyTorch, which is not")
    shown = run(fresh, tmp_path, "lutdeploy", "inspect", model.parent)
    assert "files verified by sha256" in shown.stdout, shown.stderr
    doctor = run(fresh, tmp_path, "lutdeploy", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    words = {line[8:47].strip(): line for line in doctor.stdout.splitlines()}
    assert words["onnxruntime CPUExecutionProvider"].startswith("ok ")
    for name in ("torch", "onnx", "onnx-ir", "onnxscript"):
        assert words[name].startswith("- ")
        assert "pip install 'lutdeploy[train]'" in words[name]


def test_an_export_is_packaged(fresh: Path, tmp_path: Path) -> None:
    done = run(fresh, tmp_path, "lutdeploy", "package", "web", "--out", "page")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "page" / "page.json").read_text())
    assert "step-fp32/step.onnx" in facts["contents"]
    assert "warning: a float16 export, which is not there yet, needs PyTorch" in done.stderr
    done = run(fresh, tmp_path, "lutdeploy", "package", "triton", "--out", "models")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "models").rglob("step.onnx"))


def test_commands_that_need_more_say_so_in_one_line(fresh: Path, tmp_path: Path) -> None:
    without = ("--model", next(name for name in shipped.names() if name != shipped.DEFAULT))
    default = ("--model", shipped.DEFAULT)
    (tmp_path / "model.pth").write_bytes(b"")
    lines: list[tuple[str, ...]] = [
        ("train", "--data", "synthetic", "--out", "runs/new"),
        ("import", "model.pth", "--out", "runs/new"),
        ("export", *without),
        ("parity", *default),
        ("tune-steps", *default),
        ("evaluate", *default, "--data", "synthetic"),
        ("bench", *default, "--quick"),
        ("distill", *default, "--out", "runs/new", "--steps", "2"),
        ("sample", *default, "--backend", "torch"),
        ("sample", *without),
        *((command, "--help") for command in COMMANDS),
    ]
    done = subprocess.run(
        [str(fresh / "bin" / "python"), "-c", RUNNER],
        input=json.dumps(lines),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for line, (code, stdout, stderr) in zip(lines, json.loads(done.stdout), strict=True):
        if "--help" in line:
            assert (code, stderr) == (0, ""), line
            continue
        assert (code, stdout) == (1, ""), (line, stderr)
        last = stderr.splitlines()[-1]
        subject = "backend torch" if line[0] == "sample" else f"lutdeploy {line[0]}"
        assert last.startswith(f"error: {subject}"), last
        assert last.endswith(
            "needs PyTorch, which is not installed: pip install 'lutdeploy[train]'"
        )
