"""JavaScript and browsers for tests: Node, Chromium, onnxruntime-web, where they can be had."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lutdeploy.engines.packaging.web import PAGE, RUNTIME, RUNTIME_VERSION

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def node() -> str:
    """Node, of the system or the one that comes with Playwright."""
    found = shutil.which("node")
    spec = importlib.util.find_spec("playwright")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(Path(spec.origin).parent / "driver" / "node")
    if found is None:
        pytest.skip("needs Node: there is no node on the PATH and no Playwright")
    return found


def run_module(code: str, value: Any) -> Any:
    """Run an ES module that imports from PAGE, and has ``value`` as ``input``; what it prints."""
    preamble = (
        "import { readFileSync } from 'node:fs';"
        "const input = JSON.parse(readFileSync(0, 'utf-8'));"
        "const print = (value) => console.log(JSON.stringify(value));\n"
    )
    program = code.replace("PAGE", PAGE.resolve().as_uri())
    command = [node(), "--input-type=module", "--no-warnings", "-e", preamble + program]
    told = json.dumps(value)
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def chromium() -> str:
    """A Chromium of the system."""
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(CHROMIUMS)} is on the PATH")
    return found


def onnxruntime_web(folder: Path) -> None:
    """Put the runtime's files, from the npm package, into ``folder/package``."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs onnxruntime-web: there is no npm on the PATH to get it")
    package = f"onnxruntime-web@{RUNTIME_VERSION}"
    done = subprocess.run(
        [npm, "pack", "--silent", "--pack-destination", str(folder), package],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm cannot get {package}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for name in RUNTIME:
            archive.extract(f"package/dist/{name}", folder, filter="data")
