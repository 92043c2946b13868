"""`lutdeploy bench`: contenders in place of processes, then the real ones."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import MANIFEST
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.engines.benchmark import (
    process as bench_process,
)
from lutdeploy.engines.benchmark import (
    report as bench_report,
)
from lutdeploy.engines.benchmark import (
    subject as bench_subject,
)
from lutdeploy.engines.benchmark import (
    worker as bench_worker,
)
from lutdeploy.engines.benchmark.benchmark import Benchmark, processor_seconds, sample_command
from lutdeploy.engines.benchmark.contenders import ORIGINAL, Contender, choose, list_contenders
from lutdeploy.engines.benchmark.findings import Settings
from lutdeploy.engines.benchmark.limits import MEMORY
from lutdeploy.engines.benchmark.original import OriginalDenoiser
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.machine import Machine
from lutdeploy.sampling import Images
from lutdeploy.schedule import Schedule, Step, solver_schedule
from tests.command import fail, invoke, succeed

MACHINE = Machine("a processor", 2, 2**30, "Linux", (), {"python": "3.12.0", "torch": "2.13.0"})
SETTINGS = Settings(solver_schedule("euler", 4), batches=(1,), end_to_end=0, matrix=64, pause=0.0)


class Double:
    """A contender in this process: the original's numbers, times as they are told.

    Args:
        seconds: of a step, by batch size and round.
        error: added to what it computes.
        dies: the batch size at which its process is gone.
    """

    schedule: Schedule | None = None
    whole_trajectory = False
    engine_sha256 = "0" * 64
    computes_on = "cpu"
    startup = {"seconds": 1.0}  # noqa: RUF012

    def __init__(
        self,
        denoiser: OriginalDenoiser,
        seconds: Callable[[int, int], float],
        error: float = 0.0,
        dies: int | None = None,
    ) -> None:
        self.denoiser, self.config = denoiser, denoiser.config
        self.seconds, self.error, self.dies = seconds, error, dies
        self.rounds: dict[int, int] = {}
        self.closed = False

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        x_next, x0 = self.denoiser.step(x, row, x0_prev)
        return x_next, x0 + np.float32(self.error)

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        return self.denoiser.predict_x0(x, t)

    def run(self, noise: Images) -> Images:
        raise NotImplementedError

    def window(
        self, batch: int, schedule: Schedule, pause: float, seconds: float, least: int
    ) -> tuple[list[float], int]:
        if batch == self.dies:
            raise BackendError("its process was ended by SIGKILL")
        self.rounds[batch] = self.rounds.get(batch, -1) + 1
        return [self.seconds(batch, self.rounds[batch])] * least, 1000 * batch

    def trajectory(self, batch: int, schedule: Schedule) -> float:
        return 2.0

    def close(self) -> None:
        self.closed = True


class DoubleLimits:
    """Limits of 64×64 products: 1, 2, … GFLOP/s."""

    def __init__(self, *arguments: Any) -> None:
        flop = 2 * 64**3
        self.tries = [
            {"fp32": flop / 0.5e9, MEMORY: 1.0},
            {"fp32": flop / 1e9, "bf16": flop / 2e9, MEMORY: 0.5},
        ]
        self.closed = False

    def measure(self) -> dict[str, float]:
        return self.tries[0] if len(self.tries) == 1 else self.tries.pop(0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def subject(golden_runs: Callable[[str], Run], tmp_path: Path) -> Iterator[bench_subject.Subject]:
    run = golden_runs("static-tanh-64")
    config = load_model(run.model).config
    yield bench_subject.Subject("golden", run.model, config, (), None, tmp_path)


def measure(
    subject: bench_subject.Subject,
    settings: Settings = SETTINGS,
    original: Any = None,
    **doubles: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a benchmark with these contenders and what became of their doubles.

    A double is given as a dictionary of its arguments, or as the error it ends with at once.
    """
    denoiser = OriginalDenoiser(load_model(subject.model))
    asked = {ORIGINAL: original or {"seconds": lambda batch, number: 1.0}, **doubles}
    contenders = [
        Contender(name, "torch", "bf16" if "bf16" in name else "fp32", subject.model)
        for name in asked
    ]
    made: dict[str, Double] = {}

    def start(contender: Contender, threads: int | None, log: Path) -> Double:
        told = asked[contender.name]
        if isinstance(told, str):
            raise BackendError(told)
        made[contender.name] = Double(denoiser, **told)
        return made[contender.name]

    benchmark = Benchmark(subject, contenders, settings, start, DoubleLimits)
    for progress in benchmark.run():
        assert progress.text and 0 <= progress.done <= progress.total
    assert all(double.closed for double in made.values())
    result = benchmark.findings.result(MACHINE)
    assert json.loads(json.dumps(result)) == result
    return result, made


def rows(result: dict[str, Any], path: str) -> list[dict[str, Any]]:
    return bench_report.rows_of(result, path)


def contender(result: dict[str, Any], path: str) -> dict[str, Any]:
    (found,) = [entry for entry in result["contenders"] if entry["path"] == path]
    return found


def test_ratio_images_a_second_and_share_of_the_limit(subject: bench_subject.Subject) -> None:
    result, _ = measure(subject, fast={"seconds": lambda batch, number: 0.25})
    flop = 2 * subject.config.multiply_adds()
    assert result["peaks"]["cpu"]["flops_per_second"] == pytest.approx({"fp32": 1e9, "bf16": 2e9})
    (row,) = rows(result, "fast")
    assert row["ratio_to_original"] == 4.0
    assert row["images_per_second"] == 1 / (4 * 0.25)
    assert row["share_of_peak"] == pytest.approx(flop / 0.25 / 1e9)
    assert row["stable"] and row["windows"] == 3
    assert row["peak_bytes"] == 1000
    assert row["computes_on"] == "cpu"
    assert row["sample_options"] == ["--backend", "torch", "--device", "cpu"]
    assert rows(result, ORIGINAL)[0]["ratio_to_original"] == 1.0
    loop = contender(result, "fast")["loop"]
    assert (loop["seconds"], loop["images_per_second"], loop["batch"]) == (2.0, 0.5, 1)
    assert 0 <= result["used_by_others"]


def test_each_contender_sweeps_until_larger_batches_gain_nothing(
    subject: bench_subject.Subject,
) -> None:
    def early(batch: int, number: int) -> float:  # no gain from 2 on
        return 0.2 * batch

    def late(batch: int, number: int) -> float:  # no gain from 8 on
        return 0.2 if batch <= 4 else 0.05 * batch

    settings = replace(SETTINGS, batches=(), max_batch=64)
    flat: dict[str, Any] = {"seconds": lambda batch, number: float(batch)}
    result, _ = measure(
        *(subject, settings, flat), early={"seconds": early}, late={"seconds": late}
    )
    assert [row["batch"] for row in rows(result, "early")] == [1, 2]
    assert [row["batch"] for row in rows(result, "late")] == [1, 2, 4, 8]
    # The original's own sweep ends at 2; it is there wherever a ratio needs it.
    assert [row["batch"] for row in rows(result, ORIGINAL)] == [1, 2, 4, 8]
    assert contender(result, "late")["best_batch"] == 4
    assert [row["batch"] for row in measure(subject, settings, flat)[0]["rows"]] == [1, 2]


def test_max_batch_ends_the_sweep(subject: bench_subject.Subject) -> None:
    settings = replace(SETTINGS, batches=(), max_batch=2)
    result, _ = measure(subject, settings, flat={"seconds": lambda batch, number: 1.0})
    assert [row["batch"] for row in rows(result, "flat")] == [1, 2]


def test_who_never_settles_is_unstable(subject: bench_subject.Subject) -> None:
    result, made = measure(
        subject,
        noisy={"seconds": lambda batch, number: 1.0 + number % 2},
        calm={"seconds": lambda batch, number: 1.0},
    )
    (noisy,), (calm,) = rows(result, "noisy"), rows(result, "calm")
    assert not noisy["stable"] and noisy["windows"] == SETTINGS.max_rounds
    assert calm["stable"] and calm["windows"] == 3  # it need not wait for the other
    assert made[ORIGINAL].rounds[1] == SETTINGS.max_rounds - 1
    assert "~" in bench_report.tables(result)[0].rows[1][2]
    assert any("unstable" in remark for remark in bench_report.remarks(result))


def test_who_computes_something_else_is_refused_and_not_timed(
    subject: bench_subject.Subject,
) -> None:
    result, made = measure(
        subject,
        wrong={"seconds": lambda batch, number: 0.1, "error": 0.01},
        rounded_bf16={"seconds": lambda batch, number: 0.1, "error": 1e-3},
    )
    assert rows(result, "wrong") == [] and made["wrong"].rounds == {}
    refused = contender(result, "wrong")
    assert refused["status"] == "refused" and refused["best_batch"] is None
    assert "differs from the original: step, x0 at t" in refused["reason"]
    assert rows(result, "rounded_bf16")  # within its precision's limit
    assert any(line.startswith("wrong: refused: ") for line in bench_report.remarks(result))


def test_what_cannot_start_is_named_and_the_others_go_on(subject: bench_subject.Subject) -> None:
    result, _ = measure(subject, missing="it is not installed here")
    assert contender(result, "missing")["status"] == "absent"
    assert rows(result, ORIGINAL)
    assert "missing: absent: it is not installed here" in list(bench_report.remarks(result))


def test_a_process_that_dies_keeps_what_it_has_shown(subject: bench_subject.Subject) -> None:
    def flat(batch: int, number: int) -> float:
        return 1.0

    result, _ = measure(
        subject,
        replace(SETTINGS, batches=(1, 2, 4)),
        later={"seconds": flat, "dies": 2},
        at_once={"seconds": flat, "dies": 1},
    )
    assert [row["batch"] for row in rows(result, "later")] == [1]
    assert contender(result, "later")["reason"] == "batch 2: its process was ended by SIGKILL"
    assert contender(result, "at_once")["status"] == "failed"
    assert [row["batch"] for row in rows(result, ORIGINAL)] == [1, 2, 4]


def test_without_the_original_there_are_no_ratios(subject: bench_subject.Subject) -> None:
    with pytest.raises(BackendError, match="no torch"):
        measure(subject, original="no torch")
    steady: dict[str, Any] = {"seconds": lambda batch, number: 1.0}
    result, _ = measure(subject, original={**steady, "dies": 1}, fast=steady)
    (row,) = rows(result, "fast")
    assert row["ratio_to_original"] is None
    assert bench_report.tables(result)[0].rows[0][5] == "–"


def test_no_batch_size_is_begun_that_the_time_does_not_allow(
    subject: bench_subject.Subject,
) -> None:
    settings = replace(SETTINGS, batches=(1, 2), seconds=5.0)
    result, _ = measure(subject, settings)
    assert [row["batch"] for row in result["rows"]] == [1]
    assert result["notes"] == ["batch 2 and above: not measured, --seconds 5 are used up"]


def test_a_trajectory_that_takes_too_long_is_left_out(subject: bench_subject.Subject) -> None:
    result, _ = measure(subject, replace(SETTINGS, trajectory_seconds=3.0))
    assert contender(result, ORIGINAL)["loop"] is None
    assert result["notes"] == ["original: a whole trajectory would take 4 s, left out"]


# The lists.


def test_contenders_come_from_the_exports(exported: Callable[..., Path]) -> None:
    half, single, steps = (
        exported("static-tanh-64", graph, precision)
        for graph, precision in (("step", "fp16"), ("step", "fp32"), ("per-step", "fp32"))
    )
    model = single.parent.parent / MODEL
    names = [c.name for c in list_contenders(model, (steps, half, single), None, gpu=False)]
    assert names == [
        *("original", "torch-eager", "torch-compiled", "onnxruntime-fp16"),
        *("onnxruntime-fp32", "openvino-fp32", "openvino-bf16"),
    ]
    alone = list_contenders(model, (steps,), None, gpu=False)
    assert {c.export for c in alone if c.backend == "openvino"} == {steps.name}
    on_gpu = list_contenders(model, (half,), None, gpu=True)
    assert {c.name for c in on_gpu if c.place == "cuda"} == {
        *("torch-cuda-fp16", "torch-cuda-compiled-fp16"),
        *("onnxruntime-cuda-fp16", "onnxruntime-tensorrt-fp16"),
    }
    chosen = choose(on_gpu, ["onnxruntime-fp16"])
    assert [c.name for c in chosen] == ["original", "onnxruntime-fp16"]
    with pytest.raises(UsageError, match="no contender 'x' here; there are original, torch-eager"):
        choose(on_gpu, ["x"])


def test_sample_is_asked_for_the_same(tmp_path: Path) -> None:
    contender = Contender("openvino-bf16", "openvino", "bf16", tmp_path, export="step-fp32")
    command = sample_command(contender, replace(SETTINGS, threads=2), 8, 4, tmp_path / "out")
    text = " ".join(command)
    assert "--backend openvino --device cpu --precision bf16" in text
    assert "-n 8 --batch 4" in text and "--steps 4" in text and "--threads 2" in text
    assert Contender("torch-compiled", "torch", "fp32", tmp_path, "compiled").sample_options is None


# Real processes.


@pytest.fixture
def worker(
    exported: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., bench_process.Worker]]:
    started = []

    def start(backend: str = "onnxruntime", **options: Any) -> bench_process.Worker:
        chosen = Contender(backend, backend, "fp32", **{"path": exported(), **options})
        found = bench_process.start(chosen, 1, tmp_path / "log")
        started.append(found)
        return found

    yield start
    for process in started:
        process.close()


def test_a_process_computes_and_measures(worker: Callable[..., bench_process.Worker]) -> None:
    process = worker()
    schedule = solver_schedule("euler", 4)
    noise = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    model = load_model(process.contender.path.parent.parent / MODEL)
    expected = OriginalDenoiser(model).step(noise, schedule.rows[1], None)
    np.testing.assert_allclose(
        process.step(noise, schedule.rows[1], None)[1], expected[1], atol=1e-4
    )
    assert process.predict_x0(noise, np.zeros(2, np.float32)).shape == noise.shape
    times, peak_bytes = process.window(2, schedule, 0.0, 0.0, 3)
    assert len(times) == 3 and min(times) > 0
    assert 2**24 < peak_bytes < 2**33
    assert process.trajectory(2, schedule) > 0
    parts = ("python_seconds", "open_seconds", "first_step_seconds")
    assert 0 < sum(process.startup[part] for part in parts) <= process.startup["seconds"] + 1e-6
    assert len(process.engine_sha256) == 64
    assert processor_seconds()[1] > 0


def test_a_wrong_request_is_an_answer_and_no_end(
    worker: Callable[..., bench_process.Worker],
) -> None:
    process = worker()
    with pytest.raises(BackendError, match="float32"):
        process.step(np.zeros((2, 3, 8, 8), np.float64), Step(0.5, 0.5, 0.5, 0.0), None)
    with pytest.raises(BackendError, match="holds steps, no whole trajectory"):
        process.run(np.zeros((1, 3, 64, 64), np.float32))
    assert process.trajectory(1, solver_schedule("euler", 2)) > 0


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_killed_process_says_what_ended_it(worker: Callable[..., bench_process.Worker]) -> None:
    process = worker()
    os.kill(process.process.pid, signal.SIGINT)  # Ctrl-C goes to everyone: it does not listen
    assert process.trajectory(1, solver_schedule("euler", 2)) > 0
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="ended by SIGKILL: out of memory"):
        for _ in range(2):  # the first request may still find the pipe open
            process.trajectory(1, solver_schedule("euler", 2))


def test_what_cannot_open_says_why(
    worker: Callable[..., bench_process.Worker], exported: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "step-fp32"
    shutil.copytree(exported(), broken)
    (weights,) = broken.glob("*.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BackendError, match="truncated or replaced; export again"):
        worker(path=broken)
    with pytest.raises(BackendError, match=r"no CUDA|CUDAExecutionProvider"):
        worker(device="cuda")


def test_an_exit_without_a_word_is_told_by_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ended with exit code 7. last words"):
        bench_process.Process(_leave, (), tmp_path / "log")


def _leave(link: Any) -> None:
    print("last words", flush=True)
    sys.stdout.flush()
    os._exit(7)


def test_reasons_are_one_line() -> None:
    assert bench_worker.reason(ValueError("\n  first \nsecond")) == "first"
    assert bench_worker.reason(ValueError()) == "ValueError"
    assert bench_worker.reason(MemoryError("x")) == "out of memory"


def test_limits_are_measured_in_their_process(tmp_path: Path) -> None:
    limits = bench_process.Limits("cpu", 64, 1, tmp_path / "log")
    try:
        found = limits.measure()
    finally:
        limits.close()
    assert {"fp32", "int8", MEMORY} <= set(found) <= {"fp32", "bf16", "int8", MEMORY}
    assert all(0 < seconds < math.inf for seconds in found.values())


# The command.


@pytest.mark.slow
def test_quick_measures_random_weights_from_start_to_end(tmp_path: Path) -> None:
    file, text = tmp_path / "bench.json", tmp_path / "bench.md"
    said = succeed(
        *("bench", "--preset", "static-tanh-64", "--size", "tiny", "--quick", "--threads", 1),
        *("--seconds", 1, "--steps", 2, "--max-batch", 2),
        *("--json", file, "--markdown", text),
    )
    result = json.loads(file.read_text())
    by_the_cpu = ("openvino-bf16", "openvino-int8", "openvino-int8-bf16")
    assert {row["path"] for row in result["rows"]} == {
        *("original", "torch-eager", "onnxruntime-fp32", "openvino-fp32", "onnxruntime-int8"),
        *(name for name in by_the_cpu if contender(result, name)["reason"] is None),
    }
    for row in result["rows"]:
        assert {"path", "backend", "precision", "batch", "stable"} <= set(row)
        assert row["images_per_second"] == row["batch"] / (row["step_seconds"] * 2)
        assert row["ratio_to_original"] > 0
        peak = result["peaks"]["cpu"]["flops_per_second"][row["precision"].partition("-")[0]]
        flop = result["model"]["flop_per_image_and_step"] * row["batch"]
        assert row["share_of_peak"] == pytest.approx(flop / row["step_seconds"] / peak)
    assert not result["interrupted"] and result["settings"]["threads"] == 1
    assert result["machine"]["versions"]["torch"]
    assert any(entry["end_to_end"] for entry in result["contenders"]), result["notes"]
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.format == "PNG"
    for written in ("bench.json", "bench.png", "bench.md"):
        assert str(tmp_path / written) in said.stdout
    assert "| onnxruntime-fp32 |" in text.read_text()
    assert "onnxruntime-fp32" in said.stdout and "GFLOP/s" in said.stdout


def test_a_run_keeps_its_result_and_an_export_of_other_weights_is_refused(
    exported_run: Callable[..., Run],
) -> None:
    run = exported_run("step", preset="static-softmax-512", precision="fp32")
    model = load_model(run.model)
    model.head.weight.data *= 1.01
    from lutdeploy.artefacts.checkpoint import save_model

    save_model(model, run.model)
    assert "exported from another" in fail(1, "bench", run.path)
    manifest = run.export_folder("step-fp32") / MANIFEST
    told = {**files.read_json(manifest), "source_sha256": files.sha256(run.model)}
    files.write_json(manifest, told)
    options = ("--only", "onnxruntime-fp32", "--quick", "--threads", 1, "--batch", 1)
    succeed("bench", run.path, *options, "--end-to-end", 0, "--steps", 1)
    result = json.loads(run.bench.read_text())
    assert [row["path"] for row in result["rows"]] == ["original"]
    assert contender(result, "onnxruntime-fp32")["status"] == "refused"
    assert run.bench.with_suffix(".png").is_file()


def test_wrong_options_are_one_line(tmp_path: Path, golden_runs: Callable[..., Any]) -> None:
    run = golden_runs("static-tanh-64").path
    assert "leave out RUN" in fail(2, "bench", run, "--preset", "dynamic-64")
    assert "leave one out" in fail(2, "bench", run, "--batch", 2, "--max-batch", 4)
    assert "is a folder; --json" in fail(2, "bench", run, "--json", tmp_path)
    assert "no folder; --markdown" in fail(2, "bench", run, "--markdown", tmp_path / "a" / "b")
    assert "does not end in .png" in fail(2, "bench", run, "--plot", tmp_path / "a.jpg")
    assert "no such run" in fail(2, "bench", tmp_path / "nothing")
    for option, value in (("--seconds", 0), ("--batch", 0), ("--size", "huge"), ("--steps", -1)):
        assert option in fail(2, "bench", option, value)


def test_an_export_without_its_model_has_nothing_to_be_compared_with(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(exported(), tmp_path / "alone")
    assert "has no model.safetensors beside it" in fail(2, "bench", tmp_path / "alone")


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("lutdeploy.cli.bench._has_matplotlib", lambda: False)
    message = fail(2, "bench", "--plot", tmp_path / "a.png")
    assert message == "error: --plot needs matplotlib: pip install 'lutdeploy[bench]'"
    from lutdeploy.cli.bench import _write

    written = _write(_result(), tmp_path / "bench.json", None, None)
    assert written == [tmp_path / "bench.json"]


def test_two_at_once_are_refused(exported_run: Callable[..., Run]) -> None:
    run = exported_run(precision="fp32")
    with files.lock(run.path, "`lutdeploy bench`", name=".bench.lock"):
        assert "in use by another `lutdeploy bench`" in fail(2, "bench", run.path)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_writes_what_was_measured(exported_run: Callable[..., Run]) -> None:
    run = exported_run(precision="fp32")
    # Ctrl-C when the first window of the second batch size is about to begin.
    program = (
        "import signal, os; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lutdeploy.engines.benchmark.benchmark import Benchmark\n"
        "window = Benchmark._window\n"
        "def interrupted(self, name, batch, number):\n"
        "    os.kill(os.getpid(), signal.SIGINT) if batch == 2 else None\n"
        "    window(self, name, batch, number)\n"
        "Benchmark._window = interrupted\n"
        "from lutdeploy.cli import cli\n"
        "if __name__ == '__main__': cli()\n"
    )
    options = ("--only", "onnxruntime-fp32", "--quick", "--batch", "1", "--batch", "2")
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", str(run.path), *options, "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: interrupted; what was measured is in {run.bench}"
    assert "Traceback" not in done.stderr
    result = json.loads(run.bench.read_text())
    assert result["interrupted"]
    assert {row["batch"] for row in result["rows"]} == {1}


def test_markdown_on_stdout_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, exported_run: Callable[..., Run]
) -> None:
    run = exported_run(precision="fp32")
    monkeypatch.setattr(
        "lutdeploy.engines.benchmark.benchmark.Benchmark.run", lambda self: iter(())
    )
    monkeypatch.setattr(
        "lutdeploy.engines.benchmark.findings.Findings.result", lambda *_: _result()
    )
    shown = succeed("bench", run.path, "--markdown", "-")
    assert shown.stdout == bench_report.markdown(_result())
    assert invoke("bench", run.path, "--markdown", "-").stdout.startswith("**Best batch size")


def _result() -> dict[str, Any]:
    """What two contenders at four batch sizes would give."""

    def row(path: str, precision: str, batch: int, rate: float) -> dict[str, Any]:
        seconds = batch / rate / 64
        return {
            "path": path,
            "precision": precision,
            "device": "cpu",
            "batch": batch,
            "step_seconds": seconds,
            "step_seconds_min": 0.9 * seconds,
            "step_seconds_max": 1.2 * seconds,
            "images_per_second": rate,
            "ratio_to_original": rate / (3 + math.log2(batch)),
            "share_of_peak": rate / 40,
            "ratio_stable": batch != 4,
            "stable": batch != 4,
            "peak_bytes": 2**28,
        }

    paths = {"original": "fp32", "openvino-bf16": "bf16", "onnxruntime-fp16": "fp16"}
    return {
        "interrupted": False,
        "model": {
            "name": "a | model",
            "preset": "static-tanh-64",
            "config": {"width": 256, "depth": 8},
            "flop_per_image_and_step": 446_000_000,
        },
        "machine": MACHINE.to_dict(),
        "peaks": {
            "cpu": {
                "flops_per_second": {"fp32": 2e11, "bf16": 4e11},
                "bytes_per_second": 1e10,
                "matrix": 2048,
            }
        },
        "settings": {"steps": 64, "table": "euler-64", "threads": None},
        "used_by_others": 0.01,
        "contenders": [
            {
                "path": path,
                "precision": precision,
                "device": "cpu",
                "status": "measured",
                "reason": None,
                "startup": {"seconds": 2.5},
                "best_batch": 8,
                "loop": {"images_per_second": 5.0},
                "end_to_end": None,
            }
            for path, precision in paths.items()
        ],
        "rows": [
            row(path, precision, batch, (3.0 + k) * (1 + math.log2(batch) / 4))
            for k, (path, precision) in enumerate(paths.items())
            for batch in (1, 2, 4, 8)
        ],
        "notes": [],
    }


def test_tables_and_markdown_read_the_json() -> None:
    result = _result()
    best, around, by_batch, ratios = bench_report.tables(result)
    assert best.rows[1][:2] == ("openvino-bf16", "8") and best.rows[1][4] == "7"
    assert around.rows[0] == ("original", "5", "–", "2.5", "256")
    assert by_batch.header == ("", "1", "2", "4", "8")
    assert by_batch.rows[0][3] == "~4.5"
    assert ratios.rows[0][1] == "1.00×"
    text = bench_report.markdown(result)
    assert "Model a / model" in text  # a bar would end the cell
    assert "No limit in fp16" in text
    assert "used meanwhile: 1.0%" in text and "say little" not in text
    disturbed = {**result, "used_by_others": 0.3}
    assert "Others used more than 10% of the processors" in bench_report.markdown(disturbed)


def test_the_plot_has_a_line_for_each_contender_and_limit() -> None:
    data = bench_report.plot(_result())
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (1200, 720)
    without = {**_result(), "peaks": {}}
    assert bench_report.plot(without) != data
