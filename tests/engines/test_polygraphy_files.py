"""Polygraphy as a second opinion: it runs our exports on our cases and comes to our verdict."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.engines.polygraphy_files import save_cases
from lutdeploy.sampling import batch_noise
from tests.command import invoke, succeed
from tests.conftest import golden_model

Exported = Callable[..., Path]


def opinion(graph: Path, command: str) -> bool:
    """Polygraphy's verdict on a graph in ONNX Runtime, with the files and limits of a command."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    words = shlex.split(command)
    assert words[2] == str(graph)
    feeds = load_json(words[words.index("--load-inputs") + 1])
    tolerances = words[words.index("--atol") + 1 : words.index("--rtol")]
    limits = {name: float(text) for name, text in (word.split(":") for word in tolerances)}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        runner = OnnxrtRunner(SessionFromOnnx(str(graph), providers=["CPUExecutionProvider"]))
        results = Comparator.run([runner], data_loader=feeds)
        for name, outputs in RunResults.load(words[words.index("--load-outputs") + 1]).items():
            results[name] = outputs
        compare = SimpleCompareFunc(atol=limits, rtol=0.0)
        return bool(Comparator.compare_accuracy(results, compare_func=compare))


@pytest.mark.parametrize(
    ("preset", "graph", "precision"),
    [
        ("static-tanh-64", "step", "fp32"),
        ("static-tanh-64", "step", "fp16"),
        ("static-tanh-64", "per-step", "fp16"),
        ("static-tanh-64", "loop", "fp32"),
        ("static-softmax-512", "step", "fp16"),
        ("dynamic-64", "step", "fp16"),
    ],
)
def test_polygraphy_agrees_with_parity(
    exported: Exported, tmp_path: Path, preset: str, graph: str, precision: str
) -> None:
    manifest, noise = (
        read_manifest(exported(preset, graph, precision)),
        batch_noise(0, range(2), (3, 64, 64)),
    )
    commands = save_cases(golden_model(preset), manifest, noise, tmp_path, "onnxruntime")
    assert len(commands) == len(manifest.graphs)
    assert opinion(manifest.folder / manifest.graphs[-1], commands[-1])


def test_polygraphy_sees_another_model(exported: Exported, tmp_path: Path) -> None:
    model = golden_model("static-tanh-64")
    model.head.bias.data += 0.01
    manifest = read_manifest(exported())
    noise = batch_noise(0, range(2), (3, 64, 64))
    (command,) = save_cases(model, manifest, noise, tmp_path, "onnxruntime")
    assert not opinion(manifest.folder / manifest.graphs[0], command)


def test_the_printed_command_replays_as_it_is(exported: Exported, tmp_path: Path) -> None:
    source = exported(precision="fp16")
    run = Run(tmp_path / "run")
    shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    replay = tmp_path / "replay"
    line = succeed("parity", run.path, "--save-polygraphy", replay, "-n", "2").stdout.strip()
    words = shlex.split(line)
    assert words[0] == "polygraphy"
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
    told = succeed("parity", run.path, "--save-polygraphy", replay, "--backend", "tensorrt-rtx")
    assert re.match(
        r"POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run \S+ --trt --strongly-typed ", told.stdout
    )
    assert not list(run.verdicts.glob("*")), "nothing was judged"


def test_what_cannot_be_replayed_is_one_line(exported: Exported, tmp_path: Path) -> None:
    folder = exported()
    for wrong in (("--all",), ("--backend", "torch")):
        result = invoke("parity", folder.parent.parent, "--save-polygraphy", tmp_path, *wrong)
        assert result.exit_code == 2
        assert "--save-polygraphy is for" in result.stderr.splitlines()[-1]
