"""`--backend auto`: the fastest that passed here, and the reason."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

import lutdeploy
from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts, store_verdict
from lutdeploy.engines import EngineRequest
from lutdeploy.engines.auto import Choice, has_passed, measured_choices, nearest
from lutdeploy.engines.auto import rank as rank_all
from lutdeploy.engines.benchmark.contenders import Contender
from lutdeploy.engines.benchmark.process import Host
from lutdeploy.engines.benchmark.result import REMEDY, Result, Row
from lutdeploy.machine import this_machine
from lutdeploy.schedule import solver_schedule
from tests.command import fail, succeed
from tests.doubles import install
from tests.doubles.tensorrt_double import VERSIONS, Controls
from tests.engines.benchmark.bench_records import make_result, row

Exported = Callable[..., Path]
SAMPLE = ("-n", 1, "--steps", 2, "--no-grid")


def verdict(of: Row, passed: bool = True, **changes: Any) -> Verdict:
    """What `lutdeploy parity` would have found of a measured engine on this machine."""
    values = {
        **{key: getattr(of, key) for key in ("backend", "export", "engine_sha256")},
        "device": of.computes_on,
        "model_sha256": "m",
        "lutdeploy": lutdeploy.__version__,
        "machine": this_machine().fingerprint(),
        "passed": passed,
        "precision": of.precision,
        "solver": "euler-64",
        "images": 4,
        "final": {},
        "drift_rms": (),
        "checks": (),
    }
    return Verdict(**{**values, **changes})


def rank(rows: list[Row], verdicts: list[Verdict], batch: int) -> list[Choice]:
    request = EngineRequest(Path("run"), batch=batch)
    return rank_all(Run(Path("run")), rows, verdicts, request)


def test_the_fastest_that_passed_is_first() -> None:
    rows = [row("torch-eager", seconds=4), row("onnxruntime-fp32", seconds=3)]
    rows += [row("openvino-fp32", seconds=2), row("openvino-bf16", seconds=1)]
    verdicts = [verdict(rows[1]), verdict(rows[2]), verdict(rows[3], passed=False)]
    first, *others = rank(rows, verdicts, 16)
    assert first.name == "openvino-fp32"
    assert first.why == (
        "openvino-fp32, the fastest of 3 that passed parity here: 125 ms an image and step at "
        "batch 16; faster, but not passed: openvino-bf16 (`lutdeploy parity --all` judges)"
    )
    assert [choice.name for choice in others] == ["onnxruntime-fp32", "torch-eager"]
    (shaky,) = rank([row("torch-eager", stable=False)], [], 16)
    assert shaky.why.endswith("at batch 16 in an unstable measurement")
    (*_, narrow) = rank(rows, [verdict(rows[3])], 16)[:1]
    assert (narrow.name, narrow.request.precision) == ("openvino-bf16", "bf16")


def test_pytorch_on_a_gpu_is_judged_by_precision() -> None:
    """A verdict on float32 lets nobody take float16; the CPU's float32 needs none."""
    half, single = (
        row(
            f"torch-cuda-{precision}",
            seconds=seconds,
            precision=precision,
            device="cuda",
            computes_on=f"cuda:0 {precision}",
            export=None,
            sample_options=["--backend", "torch", "--device", "cuda", "--precision", precision],
        )
        for precision, seconds in (("fp16", 1.0), ("fp32", 2.0))
    )
    rows = [half, single, row("torch-eager", seconds=9)]
    assert [choice.name for choice in rank(rows, [], 16)] == ["torch-eager"]
    first, *_ = rank(rows, [verdict(single)], 16)
    assert (first.name, first.request.precision) == ("torch-cuda-fp32", "fp32")
    first, *_ = rank(rows, [verdict(single), verdict(half)], 16)
    assert (first.name, first.request.precision) == ("torch-cuda-fp16", "fp16")
    assert (first.request.backend, first.request.device) == ("torch", "cuda")


def test_the_batch_size_decides() -> None:
    small = [row("torch-eager", 1, 1.0), row("torch-eager", 64, 60.0)]
    large = [row("onnxruntime-fp32", 1, 2.0), row("onnxruntime-fp32", 64, 20.0)]
    verdicts = [verdict(large[0])]
    assert rank([*small, *large], verdicts, 1)[0].name == "torch-eager"
    assert rank([*small, *large], verdicts, 100)[0].name == "onnxruntime-fp32"
    (choice, *_) = rank([*small, *large], verdicts, 100)
    assert choice.request.batch == 64, "asks for what was measured"
    assert nearest(small, 63).batch == 1
    assert nearest([row("torch-eager", 8)], 2).batch == 8


@pytest.mark.parametrize("key", ["backend", "export", "device", "engine_sha256"])
def test_a_verdict_counts_for_what_it_judged_alone(key: str) -> None:
    measured = row("onnxruntime-fp32")
    assert has_passed(measured, [verdict(measured)])
    assert not has_passed(
        measured, [msgspec.structs.replace(verdict(measured), **{key: "another"})]
    )
    assert not has_passed(measured, [verdict(measured, check="export")])
    assert not has_passed(measured, [])


@pytest.fixture
def run(exported: Exported, tmp_path: Path) -> Run:
    """A run with a float32 export that has passed in both runtimes, and their speeds."""
    source = exported()
    run = Run(tmp_path / "run")
    shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    rows = [row("openvino-fp32", seconds=1), row("onnxruntime-fp32", seconds=2)]
    write_bench(run, *rows)
    for measured in files.read_record(run.bench, Result, REMEDY).rows:
        store_verdict(run, verdict(measured))
    return run


def write_bench(run: Run, *rows: Row, **changes: Any) -> None:
    model = files.sha256(run.model)
    of = {None: model, "step-fp32": read_manifest(run.export_folder("step-fp32")).weights_sha256}
    measured = [replace(row, engine_sha256=of[row.export]) for row in rows]
    here = {"sha256": model, "fingerprint": this_machine().fingerprint()}
    files.write_json(run.bench, make_result(measured, **{**here, **changes}))


def sampled_by(run: Run, out: Path, *options: object) -> tuple[str, str]:
    """The backend that `lutdeploy sample` took, and what it said about it."""
    result = succeed("sample", run.path, *SAMPLE, "--out", out, *options)
    line = json.loads((out / "manifest.jsonl").read_text())
    said = [text for text in result.stderr.splitlines() if text.startswith("auto: ")]
    return line["backend"], "\n".join(said)


def test_sample_takes_it_and_says_why(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.verdicts)
    succeed("parity", run.path, "--backend", "openvino", "-n", 1, "--steps", 2)
    succeed("parity", run.path, "--backend", "onnxruntime", "-n", 1, "--steps", 2)
    backend, said = sampled_by(run, tmp_path / "out")
    assert backend == "openvino"
    assert said.startswith("auto: openvino-fp32, the fastest of 2 that passed parity here")
    with lutdeploy.load(run.path, "auto") as engine:
        assert engine.identity["backend"] == "openvino"
    assert measured_choices(run, EngineRequest(run.path, device="cuda")) == []
    assert len(measured_choices(run, EngineRequest(run.path, device="cpu"))) == 2
    assert measured_choices(run, EngineRequest(run.path, export="step-fp16")) == []


def test_what_was_measured_elsewhere_does_not_count(run: Run, tmp_path: Path) -> None:
    fast = row("openvino-fp32")
    elsewhere: list[dict[str, Any]] = [{"fingerprint": {"cpu": "another"}}, {"sha256": "another"}]
    for number, changes in enumerate(elsewhere):
        write_bench(run, fast, **changes)
        backend, said = sampled_by(run, tmp_path / str(number))
        assert backend == "onnxruntime"
        assert "has measured nothing else here" in said
    for judged in read_verdicts(run):
        store_verdict(run, msgspec.structs.replace(judged, machine={"cpu": "another"}))
    write_bench(run, fast)
    assert sampled_by(run, tmp_path / "verdicts")[0] == "onnxruntime"


def test_what_changed_or_does_not_open_is_passed_over(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bench(run, row("openvino-fp32", seconds=1), row("torch-eager", seconds=2))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        patch.delitem(sys.modules, "lutdeploy.engines.openvino", raising=False)
        backend, said = sampled_by(run, tmp_path / "absent")
    assert backend == "torch"
    assert "auto: not openvino-fp32: backend openvino needs OpenVINO, which is not" in said
    result = files.read_json(run.bench)
    for measured in result["rows"]:
        if measured["backend"] == "openvino":
            measured["engine_sha256"] = "of another export"
            store_verdict(run, verdict(msgspec.convert(measured, Row)))
    files.write_json(run.bench, result)
    backend, said = sampled_by(run, tmp_path / "changed")
    assert backend == "torch"
    assert "auto: not openvino-fp32, which has changed" in said


def test_what_bench_measured_of_tensorrt_is_found(
    exported_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine for each of two batch sizes: bench, auto and sample open the same one."""
    install(monkeypatch, VERSIONS[1], Controls())
    run = exported_run("step", precision="fp32")
    succeed("build", run.path, "--batch", 1, "--batch", 4)
    export = run.export_folder("step-fp32")
    contender = Contender(
        "tensorrt-fp32", "tensorrt", "fp32", export, device="cuda", export="step-fp32"
    )
    host, schedule = Host(contender, None, time.time()), solver_schedule("euler", 2)
    rows = []
    for batch in (1, 2, 4):
        window = host.window(batch, schedule, 0.0, 0.0, 1)
        about = {"computes_on": host.about.computes_on, "engine_sha256": window.engine_sha256}
        rows.append(row("tensorrt-fp32", batch, 0.1 * batch, device="cuda", **about))
    host.denoiser.close()
    assert rows[0].engine_sha256 != rows[2].engine_sha256
    here = this_machine().fingerprint()
    files.write_json(run.bench, make_result(rows, files.sha256(run.model), fingerprint=here))
    for batch, expected in ((1, rows[0]), (2, rows[1]), (4, rows[2]), (64, rows[2])):
        out = tmp_path / str(batch)
        backend, said = sampled_by(run, out, "--batch", batch)
        assert backend == "tensorrt", said
        line = json.loads((out / "manifest.jsonl").read_text())
        assert line["engine_sha256"] == expected.engine_sha256


def test_a_damaged_measurement_is_one_line(run: Run, tmp_path: Path) -> None:
    for text in ('{"model"', "[]", '{"model": {}}', '{"model": 3}'):
        run.bench.write_text(text)
        said = fail(1, "sample", run.path, *SAMPLE, "--out", tmp_path / "out")
        assert "bench.json is" in said
