"""ci/gpu.sh on a machine without a GPU: stand-ins note what they are asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "ci" / "gpu.sh"
ENVIRONMENTS = ("runtimes", "tensorrt-10", "tensorrt-11", "tensorrt-rtx")
# Stands for every Python: notes its arguments, makes "environments", and fails where $FAILS is in
# what it is called as or with.
PYTHON = r"""#!/usr/bin/env bash
call="${0#"$PWD"/} $*"
echo "$call" >>"$CALLS"
if [ -n "$FAILS" ] && [[ "$call" == *$FAILS* ]]; then exit 1; fi
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(
    folder: Path, fails: str, *names: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script on a copy of nothing but itself, and the calls of Python."""
    (folder / "ci").mkdir()
    shutil.copy(SCRIPT, folder / "ci")
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", "#!/usr/bin/env bash\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls = folder / "calls"
    environment = {
        **{**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        **{"CALLS": str(calls), "FAILS": fails, "PYTHON": str(tools / "python3")},
    }
    done = subprocess.run(
        ["bash", str(folder / "ci" / "gpu.sh"), "report", *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_every_tensorrt_has_an_environment_with_pinned_versions(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "")
    assert done.returncode == 0, done.stderr
    installs = [call for call in calls if " -m pip install " in call and "--editable" in call]
    assert [call.split("/")[1] for call in installs] == list(ENVIRONMENTS)
    packages = (
        ".[dev]",
        ".[dev,tensorrt] tensorrt==10.",
        ".[dev,tensorrt] tensorrt==11.",
        ".[dev,tensorrt-rtx] tensorrt-rtx==1.",
    )
    for call, package in zip(installs, packages, strict=True):
        assert f"--constraint constraints.txt --editable {package}" in call
    measured = [call.partition(" -m benchmarks.gpu ")[2] for call in calls if "benchmarks" in call]
    assert measured == [
        "--backend torch --backend onnxruntime --out report/runtimes",
        "--backend tensorrt --out report/tensorrt-10",
        "--backend tensorrt --out report/tensorrt-11",
        "--backend tensorrt-rtx --out report/tensorrt-rtx",
    ]
    assert sum("-m pytest -m gpu" in call for call in calls) == 4
    swapped = [call for call in calls if "onnxruntime" in call and "pip" in call]
    assert [call.split(" -m pip ")[1].split()[0] for call in swapped] == ["uninstall", "install"]
    assert all(call.startswith(".venv-gpu/runtimes/") for call in swapped)
    assert done.stdout.endswith("passed: runtimes tensorrt-10 tensorrt-11 tensorrt-rtx\n")


@pytest.mark.parametrize(
    ("fails", "failed", "left_out"),
    [
        ("tensorrt==10.", "tensorrt-10: installation failed", 3),
        ("tensorrt-11/bin/python -m benchmarks", "tensorrt-11: benchmarks.gpu (see report/", 0),
        ("tensorrt-rtx/bin/python -m pytest", "tensorrt-rtx: pytest -m gpu failed", 0),
        ("runtimes/bin/python -c", "runtimes: torch, which sees no CUDA device", 3),
    ],
)
def test_what_fails_is_reported_and_the_rest_goes_on(
    fails: str, failed: str, left_out: int, tmp_path: Path
) -> None:
    done, calls = run(tmp_path, fails)
    assert done.returncode == 1
    (line,) = (tmp_path / "report" / "failed.txt").read_text().splitlines()
    assert line.startswith(failed)
    assert done.stderr.endswith(f"failed:\n{line}\n")
    after = [
        call
        for call in calls
        if any(f" -m {n} " in call for n in ("pytest", "benchmarks.gpu", "lutdeploy.cli"))
    ]
    assert len(after) == 12 - left_out


def test_one_environment_can_be_named(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "", "tensorrt-rtx")
    assert done.returncode == 0 and len([call for call in calls if " -m venv " in call]) == 1


def test_an_unknown_environment_is_an_error(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "", "runtimes", "tensorrt-9")
    assert (done.returncode, calls) == (2, [])
    assert "no environment tensorrt-9" in done.stderr
