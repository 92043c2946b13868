"""`lutdeploy bench`: doubles in place of processes, then real processes, then the command."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.manifest import MANIFEST, FileRecord, Manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.config import ModelConfig, model_config
from lutdeploy.engines.benchmark import contenders, limits, measure, process, report, result
from lutdeploy.engines.benchmark.contenders import ORIGINAL, Contender, Subject
from lutdeploy.engines.benchmark.measure import Benchmark, choose_settings, sample_command
from lutdeploy.engines.benchmark.original import OriginalDenoiser
from lutdeploy.engines.benchmark.process import About, Host, Isolated, Window
from lutdeploy.engines.benchmark.result import Participant, Result, Row
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.sampling import Images
from lutdeploy.schedule import Schedule, Step, solver_schedule
from tests.command import fail, invoke, succeed
from tests.engines.benchmark.bench_records import MACHINE, make_result, row

Bench = Callable[..., tuple[Result, dict[str, "Double"]]]
Seconds = Callable[[int, int], float]  # of a step, by batch size and round

SETTINGS = replace(
    choose_settings(solver_schedule("euler", 4), batches=[1], end_to_end=0), matrix=64, pause=0.0
)
SWEEP = replace(SETTINGS, batches=(), max_batch=64)
posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def by_round(*seconds: float) -> Seconds:
    """The given seconds in the first rounds, the last of them from then on."""
    return lambda batch, number: seconds[min(number, len(seconds) - 1)]


one_second = by_round(1.0)


@dataclass
class Double:
    """A contender without a process: halves its input, in the time that it is told."""

    config: ModelConfig
    seconds: Seconds = one_second
    error: float = 0.0  # added to what it computes
    ends: int = 0  # the batch size at which ``reason`` ends it
    reason: BaseException = field(default_factory=lambda: BackendError("ended by SIGKILL"))
    absent: str = ""  # why it does not open
    windows: dict[int, int] = field(default_factory=dict)  # how many, by batch size
    closed: bool = False
    schedule: Schedule | None = None
    whole_trajectory: bool = False
    run: Any = None

    def open(self) -> About:
        if self.absent:
            raise BackendError(self.absent)
        return About(self.config, None, False, "0" * 64, "cpu", {"seconds": 1.0})

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        return x, self.predict_x0(x) + np.float32(self.error)

    def predict_x0(self, x: Images, *t: Any) -> Images:
        return np.float32(0.5) * x

    def ask(self, method: Callable[..., Any], batch: int, *how: Any) -> Any:
        if method is Host.trajectory:
            return 2.0
        if batch == self.ends:
            raise self.reason
        number = self.windows.get(batch, 0)
        self.windows[batch] = number + 1
        return Window([self.seconds(batch, number)] * 3, 1000 * batch, f"engine of {batch}")

    def close(self) -> None:
        self.closed = True


class LimitsDouble:
    """Limits of 64×64 products: at best 1 GFLOP/s in float32 and 2 in bfloat16."""

    def __init__(self, *arguments: Any) -> None:
        self.times_slower = itertools.chain((4, 3, 1, 2), itertools.repeat(5))

    def ask(self, method: Callable[..., Any]) -> dict[str, float]:
        slower = next(self.times_slower)
        second = slower * 2 * 64**3 / 1e9
        return {"fp32": second, "bf16": second / 2, limits.MEMORY: float(slower)}

    def close(self) -> None:
        pass


@pytest.fixture
def bench(golden_runs: Callable[[str], Run], tmp_path: Path) -> Bench:
    """Measures doubles, each given as the arguments of one, beside the original."""
    model = golden_runs("static-tanh-64").model
    config = load_model(model).config
    subject = Subject("golden", model, config, (), None, tmp_path)

    def run(
        settings: result.Settings = SETTINGS, original: Any = None, **told: dict[str, Any]
    ) -> tuple[Result, dict[str, Double]]:
        everyone = {ORIGINAL: original or {}, **told}
        doubles: Any = {name: Double(config, **arguments) for name, arguments in everyone.items()}
        precisions = {name: "bf16" if "bf16" in name else "fp32" for name in everyone}
        named = [Contender(name, "torch", kind, model) for name, kind in precisions.items()]
        double: Any = LimitsDouble
        benchmark = Benchmark(
            *(subject, MACHINE, named, settings),
            start=lambda contender, threads, log: doubles[contender.name],
            isolate=double,
        )
        seen: list[tuple[int, int]] = []
        try:
            found = benchmark.measure(lambda text, done, total: seen.append((done, total)))
        finally:
            assert doubles[ORIGINAL].closed
        assert all(double.closed for double in doubles.values())
        assert all(done <= total for done, total in seen)
        return found, doubles

    return run


def rows(result: Result, path: str) -> list[Row]:
    return list(report.rows_of(result, path).values())


def participant(result: Result, path: str) -> Participant:
    (found,) = [contender for contender in result.contenders if contender.path == path]
    return found


def test_ratio_images_a_second_and_share_of_the_limit(bench: Bench) -> None:
    result, _ = bench(fast={"seconds": by_round(0.25)})
    assert result.peaks["cpu"].flops_per_second == pytest.approx({"fp32": 1e9, "bf16": 2e9})
    assert result.peaks["cpu"].bytes_per_second == 2 * limits.COPIED_BYTES
    (fast,) = rows(result, "fast")
    assert fast.ratio_to_original == 4.0
    assert fast.images_per_second == 1 / (4 * 0.25)
    assert fast.share_of_peak == pytest.approx(result.model.flop_per_image_and_step / 0.25 / 1e9)
    assert (fast.stable, fast.windows, fast.peak_bytes, fast.computes_on) == (True, 3, 1000, "cpu")
    assert fast.sample_options == ["--backend", "torch", "--device", "cpu"]
    assert rows(result, ORIGINAL)[0].ratio_to_original == 1.0
    loop = participant(result, "fast").loop
    assert loop and (loop.seconds, loop.images_per_second, loop.batch) == (2.0, 0.5, 1)


def test_figures_are_those_of_the_last_three_windows_that_agree(bench: Bench) -> None:
    """Within a tenth of the smallest; and who has settled need not wait for the others."""
    result, doubles = bench(
        calm={},
        late={"seconds": by_round(9.0, 1.0, 1.04, 1.1)},
        never={"seconds": by_round(1.0, 1.05, 1.11, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0)},
    )
    (late,), (never,) = rows(result, "late"), rows(result, "never")
    assert late.stable and late.windows == 4
    assert (late.step_seconds, late.step_seconds_min, late.step_seconds_max) == (1.04, 1.0, 1.1)
    assert not never.stable and never.windows == SETTINGS.max_rounds
    assert never.step_seconds == pytest.approx(1.08) and never.step_seconds_max == 2.0
    assert doubles["calm"].windows[1] == 3
    assert doubles[ORIGINAL].windows[1] == SETTINGS.max_rounds


def test_a_ratio_pairs_the_rounds(bench: Bench) -> None:
    """The machine's clock halves on the way: both are slow at once, the ratio stays 2."""
    clock = (1.0, 1.0, 1.2, 2.0, 2.1, 2.0)
    theirs, ours = by_round(*(2 * seconds for seconds in clock)), by_round(*clock)
    (paired,) = rows(bench(original={"seconds": theirs}, ours={"seconds": ours})[0], "ours")
    assert (paired.ratio_min, paired.ratio_to_original, paired.ratio_max) == (2, 2, 2)
    assert paired.ratio_stable and paired.windows == 6
    (beside,) = rows(bench(original={"seconds": by_round(2.0, 3.0, 2.0)}, ours={})[0], "ours")
    assert beside.stable and not beside.ratio_stable  # the original was not


def test_each_contender_sweeps_until_larger_batches_gain_nothing(bench: Bench) -> None:
    late = {"seconds": lambda batch, number: 0.2 if batch <= 4 else 0.05 * batch}
    early = {"seconds": lambda batch, number: float(batch)}
    result, _ = bench(SWEEP, original=early, early=early, late=late)
    assert [r.batch for r in rows(result, "early")] == [1, 2]
    assert [r.batch for r in rows(result, "late")] == [1, 2, 4, 8]
    assert participant(result, "late").best_batch == 4
    # The original's own sweep ends at 2; it is there wherever a ratio needs it.
    assert [r.batch for r in rows(result, ORIGINAL)] == [1, 2, 4, 8]
    result, _ = bench(replace(SWEEP, max_batch=3), late=late)
    assert [r.batch for r in rows(result, "late")] == [1, 2]


def test_the_best_batch_is_the_smallest_that_is_nearly_as_fast() -> None:
    rates = {1: 50.0, 2: 98.0, 4: 100.0, 8: 90.0}
    made = [row("torch-eager", batch, images_per_second=rate) for batch, rate in rates.items()]
    assert result.best_row(made) == made[1]


def test_who_computes_something_else_is_refused_and_not_timed(bench: Bench) -> None:
    result, doubles = bench(wrong={"error": 0.01}, rounded_bf16={"error": 1e-3})
    refused = participant(result, "wrong")
    assert rows(result, "wrong") == [] and doubles["wrong"].windows == {}
    assert refused.status == "refused" and refused.best_batch is None
    assert refused.reason and "differs from the original: step, x0 at t" in refused.reason
    assert rows(result, "rounded_bf16")  # within its precision's limit
    assert any(line.startswith("wrong: refused: ") for line in report.remarks(result))


def test_who_cannot_start_or_dies_is_named_and_the_others_go_on(bench: Bench) -> None:
    result, _ = bench(
        replace(SETTINGS, batches=(1, 2, 4)),
        missing={"absent": "it is not installed here"},
        later={"ends": 2},
        at_once={"ends": 1},
    )
    said = list(report.remarks(result))
    assert participant(result, "missing").status == "absent"
    assert "missing: absent: it is not installed here" in said
    assert [r.batch for r in rows(result, "later")] == [1]  # it keeps what it has shown
    assert "later: stopped: batch 2: ended by SIGKILL" in said
    assert participant(result, "at_once").status == "failed"
    assert [r.batch for r in rows(result, ORIGINAL)] == [1, 2, 4]


def test_without_the_original_there_are_no_ratios(bench: Bench) -> None:
    with pytest.raises(BackendError, match="no torch"):
        bench(original={"absent": "no torch"}, other={})
    result, _ = bench(original={"ends": 1}, other={})
    assert rows(result, "other")[0].ratio_to_original is None
    assert report.tables(result)[0].rows[0][5] == "–"


def test_ctrl_c_keeps_what_was_measured(bench: Bench) -> None:
    pressed = {"ends": 2, "reason": KeyboardInterrupt()}
    result, _ = bench(replace(SETTINGS, batches=(1, 2)), other=pressed)
    assert result.interrupted
    assert [r.batch for r in rows(result, "other")] == [1]
    assert list(report.remarks(result))[-1] == "Interrupted: not everything was measured."


def test_what_would_take_too_long_is_left_out(bench: Bench) -> None:
    result, _ = bench(replace(SETTINGS, batches=(1, 2), seconds=5.0, trajectory_seconds=3.0))
    assert [r.batch for r in result.rows] == [1]
    assert result.notes == [
        "batch 2 and above: not measured, --seconds 5 are used up",
        "original: a whole trajectory would take 4 s, left out",
    ]
    assert participant(result, ORIGINAL).loop is None


def test_processor_time_of_others_is_told_apart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, own = measure.processor_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    whole_after, own_after = measure.processor_seconds()
    assert own_after - own >= 0.25 and whole_after - whole >= 0.25
    for used_by_others in (0.0, 5.0):
        clocks = [(103.0 + used_by_others, 13.0), (100.0, 10.0)]
        monkeypatch.setattr(measure, "processor_seconds", clocks.pop)
        assert bool(bench()[0].used_by_others) == bool(used_by_others)


def test_settings_are_what_is_said_over_quick_ones() -> None:
    schedule = solver_schedule("dpmpp-2m", 8)
    settings = choose_settings(schedule, True, seconds=5.0, batches=(4, 1, 4), threads=None)
    assert (settings.seconds, settings.batches, settings.matrix) == (5.0, (1, 4), 1024)
    assert (settings.table, settings.steps) == ("dpmpp-2m-8", 8)


def exported_as(folder: Path, graph: str, precision: str) -> Path:
    """A folder that says it is such an export."""
    manifest = Manifest(
        folder=folder / f"{graph}-{precision}",
        config=model_config("static-tanh-64", "tiny"),
        graph=graph,
        precision=precision,
        schedule=None if graph == "step" else solver_schedule("euler", 1),
        islands=(),
        opset=20,
        created="",
        versions={},
        source_sha256="0" * 64,
        graphs=("a.onnx",),
        files={"a.onnx": FileRecord(0, "")},
    )
    manifest.write()
    return manifest.folder


def test_contenders_come_from_the_exports(tmp_path: Path) -> None:
    kinds = (("step", "fp16"), ("step", "fp32"), ("per-step", "fp32"))
    half, single, steps = (exported_as(tmp_path, *kind) for kind in kinds)
    model = tmp_path / MODEL
    here = contenders.list_contenders(model, (steps, half, single), None, gpu=False)
    assert [c.name for c in here] == [
        *("original", "torch-eager", "torch-compiled", "onnxruntime-fp16"),
        *("onnxruntime-fp32", "openvino-fp32", "openvino-bf16"),
    ]
    alone = contenders.list_contenders(model, (steps,), None, gpu=False)
    assert {c.export for c in alone if c.backend == "openvino"} == {steps.name}
    on_gpu = contenders.list_contenders(model, (half,), None, gpu=True)
    assert {c.name for c in on_gpu if c.device != "cpu"} == {
        *(f"torch-cuda-{name}" for name in ("fp16", "bf16", "fp32", "compiled-fp16")),
        "onnxruntime-cuda-fp16",
    }
    (narrow,) = [c for c in on_gpu if c.name == "torch-cuda-bf16"]
    options = ["--backend", "torch", "--device", "cuda", "--precision", "bf16"]
    assert narrow.sample_options == options
    assert narrow.request(None, 4).precision == "bf16"
    chosen = contenders.choose(on_gpu, ["onnxruntime-fp16"])
    assert [c.name for c in chosen] == ["original", "onnxruntime-fp16"]
    assert "torch-compiled" not in [c.name for c in contenders.choose(here, (), quick=True)]
    slow = contenders.choose(here, ["torch-compiled"], quick=True)
    assert [c.name for c in slow] == ["original", "torch-compiled"]
    with pytest.raises(UsageError, match="no contender 'x' here; there are original, torch-eager"):
        contenders.choose(on_gpu, ["x"])


def test_sample_is_asked_for_the_same(tmp_path: Path) -> None:
    contender = Contender("openvino-bf16", "openvino", "bf16", tmp_path, export="step-fp32")
    settings = replace(SETTINGS, threads=2)
    text = " ".join(sample_command(contender, settings, 8, 4, tmp_path / "out"))
    assert "--backend openvino --device cpu --precision bf16" in text
    assert "-n 8 --batch 4" in text and "--steps 4" in text and "--threads 2" in text
    assert Contender("torch-compiled", "torch", "fp32", tmp_path, "compiled").sample_options is None


# Real processes.


@posix
def test_a_process_answers_and_says_what_ended_it(tmp_path: Path) -> None:
    isolated = Isolated(tmp_path / "log", int, 2)
    assert isolated.process.pid is not None
    assert isolated.ask(int.bit_length) == 2
    with pytest.raises(BackendError, match=r"^negative shift count$"):
        isolated.ask(int.__lshift__, -1)  # an answer, and no end
    os.kill(isolated.process.pid, signal.SIGINT)  # Ctrl-C goes to everyone: it does not listen
    isolated.ask(os.write, b"\nlast words\n\n")
    with pytest.raises(BackendError, match=r"^its process ended with exit code 2\. last words$"):
        isolated.ask(os._exit)
    with pytest.raises(BackendError, match="exit code 2"):
        isolated.ask(int.bit_length)
    isolated.close()
    killed = Isolated(tmp_path / "log", int, int(signal.SIGKILL))
    with pytest.raises(BackendError, match="ended by SIGKILL: out of memory"):
        killed.ask(signal.raise_signal)
    killed.close()


def test_a_process_that_does_not_answer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = Isolated(tmp_path / "log", float, 600.0)
    monkeypatch.setattr(process, "PATIENCE", 0.1)
    monkeypatch.setattr(process, "FAREWELL", 0.1)
    with pytest.raises(BackendError, match="no answer within 0 seconds"):
        isolated.ask(time.sleep)
    isolated.close()
    assert not isolated.process.is_alive()


@posix
def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lutdeploy.engines.benchmark.process import Isolated\n"
        "if __name__ == '__main__':\n"
        "    isolated = Isolated(Path(sys.argv[1]), int, 1)\n"
        "    isolated.ask(int.bit_length)\n"
        "    print(isolated.process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    child, deadline = int(done.stdout), time.monotonic() + 10

    def lives() -> bool:  # as a zombie it has ended, whoever collects it
        try:
            return psutil.Process(child).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while lives() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives()


def test_a_contender_computes_and_measures_in_its_process(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    contender = Contender("onnxruntime-fp32", "onnxruntime", "fp32", exported())
    begun = time.time()
    worker = process.start(contender, 1, tmp_path / "log")
    try:
        about = worker.open()
        assert 0 < about.startup["seconds"] < time.time() - begun
        assert len(about.engine_sha256) == 64 and about.computes_on == "CPUExecutionProvider"
        schedule = solver_schedule("euler", 4)
        noise = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
        original = OriginalDenoiser(load_model(contender.path.parent.parent / MODEL))
        expected = original.step(noise, schedule.rows[1], None)
        found = worker.step(noise, schedule.rows[1], None)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
        times, peak_bytes, engine = worker.ask(Host.window, 2, schedule, 0.0, 0.0, 3)
        assert len(times) == 3 and min(times) > 0 and engine == about.engine_sha256
        assert 2**24 < peak_bytes < 2**33
        assert worker.ask(Host.trajectory, 2, schedule) > min(times)
        with pytest.raises(BackendError, match="holds steps, no whole trajectory"):
            worker.run(noise)
    finally:
        worker.close()


def test_what_cannot_open_says_why(exported: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "step-fp32"
    shutil.copytree(exported(), broken)
    (weights,) = broken.glob("*.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    contender = Contender("a", "onnxruntime", "fp32", broken)
    worker = process.start(contender, 1, tmp_path / "log")
    with pytest.raises(BackendError, match="truncated or replaced; export again"):
        worker.open()
    worker.close()


def test_limits_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**20)
    tries = limits.open_limits("cpu", 64, None)
    assert {"fp32", "int8", limits.MEMORY} <= set(tries) <= {"fp32", "bf16", "int8", limits.MEMORY}
    for name, seconds in limits.measure(tries).items():
        assert 1e6 < limits.rate(name, seconds, 64) < 1e15
    assert (limits.side("cpu", 64), limits.side("cuda:1", 64)) == (64, limits.GPU_SIDE)
    assert 1e6 < limits.product_peak("cpu", "fp32", 64) < 1e15


# The report.


def measured() -> Result:
    """Three contenders at four batch sizes, all of them unstable at 4."""
    found = []
    for k, path in enumerate(("original", "openvino-bf16", "onnxruntime-fp16")):
        for place, batch in enumerate((1, 2, 4, 8)):
            about: dict[str, Any] = {"stable": batch != 4, "ratio_stable": batch != 4}
            about["precision"] = path.partition("-")[2] or "fp32"
            rate = 3.5 + k + place
            found.append(row(path, batch, batch / rate / 64, images_per_second=rate, **about))
    return make_result(found)


def test_tables_and_markdown() -> None:
    result = measured()
    best, around, by_batch, ratios = report.tables(result)
    assert best.rows[1][:2] == ("openvino-bf16", "8") and best.rows[1][4] == "7.5"
    assert around.rows[0] == ("original", "5", "–", "2.5", "256")
    assert by_batch.header == ("", "1", "2", "4", "8")
    assert by_batch.rows[0] == ("original", "3.5", "4.5", "~5.5", "6.5")
    assert ratios.rows[0] == ("original", "2.00×", "2.00×", "~2.00×", "2.00×")
    text = report.markdown(result)
    assert "Model a / model" in text  # a bar would end the cell
    assert "No limit in fp16" in text and "~ unstable: " in text
    assert "used meanwhile: 1.0%" in text and "say little" not in text
    disturbed = report.markdown(replace(result, used_by_others=0.3))
    assert "Others used more than 10% of the processors" in disturbed


def test_the_plot_has_a_line_for_each_contender_and_limit() -> None:
    result = measured()
    (axes,) = report.draw(result).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["openvino-bf16"].get_xdata()) == [1, 2, 4, 8]
    assert list(lines["openvino-bf16"].get_ydata()) == [4.5, 5.5, 6.5, 7.5]
    assert [label for label in lines if label.startswith("limit of cpu, ")] == [
        f"limit of cpu, {name}: {rate / result.model.flop_per_image_and_step / 64:.0f}"
        for name, rate in result.peaks["cpu"].flops_per_second.items()
    ]
    circled = [list(line.get_xdata()) for line in axes.lines if line.get_markersize() == 13]
    assert circled == [[4], [4], [4], []] and "unstable" in lines


# The command.

QUICK = ("--quick", "--only", "onnxruntime-fp32", "--threads", 1, "--end-to-end", 0, "--steps", 1)


def read(file: Path) -> Result:
    return files.read_record(file, Result, result.REMEDY)


@pytest.mark.slow
def test_quick_measures_random_weights_from_start_to_end(tmp_path: Path) -> None:
    file, text = tmp_path / "bench.json", tmp_path / "bench.md"
    said = succeed(
        *("bench", "--preset", "static-tanh-64", "--size", "tiny", "--quick", "--threads", 1),
        *("--only", "onnxruntime-int8", "--batch", 2, "--steps", 2, "--seconds", 1),
        *("--json", file, "--markdown", text),
    )
    result = read(file)
    assert [found.path for found in result.rows] == [ORIGINAL, "onnxruntime-int8"]
    for found in result.rows:
        assert found.images_per_second == 2 / (found.step_seconds * 2)
        peak = result.peaks["cpu"].flops_per_second[found.precision]
        flop = result.model.flop_per_image_and_step * 2
        assert found.share_of_peak == pytest.approx(flop / found.step_seconds / peak)
    assert not result.interrupted and result.settings.threads == 1
    assert participant(result, "onnxruntime-int8").end_to_end, result.notes
    for name in ("bench.json", "bench.png", "bench.md"):
        assert str(tmp_path / name) in said.stdout and (tmp_path / name).stat().st_size
    assert "│ onnxruntime-int8" in said.stdout and "GFLOP/s" in said.stdout
    assert text.read_text() == report.markdown(result)


def test_a_run_keeps_its_result_and_an_export_of_other_weights_is_refused(
    exported_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported_run("step", precision="fp32")
    model = load_model(run.model)
    model.head.weight.data *= 1.01
    save_model(model, run.model)
    assert "exported from another" in fail(1, "bench", run.path)
    manifest = run.export_folder("step-fp32") / MANIFEST
    told = {**files.read_json(manifest), "source_sha256": files.sha256(run.model)}
    files.write_json(manifest, told)
    said = succeed("bench", run.path, *QUICK, "--batch", 1, "--markdown", "-")
    result = read(run.bench)
    assert [found.path for found in result.rows] == [ORIGINAL]
    assert participant(result, "onnxruntime-fp32").status == "refused"
    assert said.stdout == report.markdown(result)
    assert run.bench.with_suffix(".png").is_file()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Benchmark, "measure", lambda *told: result)
    monkeypatch.setattr(os, "fsync", full)
    stopped = invoke("bench", run.path, *QUICK, "--batch", 1)
    assert stopped.exit_code == 1 and "│ original" in stopped.stdout  # what was measured is shown
    assert stopped.stderr.endswith(f"error: {run.bench}: No space left on device\n")
    assert read(run.bench) == result


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
    alone = exported_as(tmp_path, "step", "fp32")
    assert "has no model.safetensors beside it" in fail(2, "bench", alone)


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fail(2, "bench", "--plot", tmp_path / "a.png")
    assert message == "error: --plot needs matplotlib: pip install 'lutdeploy[bench]'"
    notes: list[str] = []
    written = report.write(measured(), tmp_path / "bench.json", None, None, notes.append)
    assert written == [tmp_path / "bench.json"] and notes[0].startswith("no plot: ")


def test_two_at_once_are_refused(exported_run: Callable[..., Run]) -> None:
    run = exported_run(precision="fp32")
    with files.lock(run.path, "`lutdeploy bench`", name=".bench.lock"):
        assert "in use by another `lutdeploy bench`" in fail(2, "bench", run.path)


@posix
def test_ctrl_c_writes_what_was_measured(exported_run: Callable[..., Run]) -> None:
    run = exported_run(precision="fp32")
    # Ctrl-C goes to every process, here before the first window of the second batch size.
    program = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lutdeploy.engines.benchmark.measure import Benchmark\n"
        "rounds = Benchmark._rounds\n"
        "def interrupted(self, sweeping, batch, deadline):\n"
        "    os.killpg(0, signal.SIGINT) if batch == 2 else None\n"
        "    rounds(self, sweeping, batch, deadline)\n"
        "Benchmark._rounds = interrupted\n"
        "from lutdeploy.cli import cli\n"
        "if __name__ == '__main__': cli()\n"
    )
    options = [str(word) for word in (*QUICK, "--batch", 1, "--batch", 2)]
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", str(run.path), *options],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 130, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: interrupted; what was measured is in {run.bench}"
    assert "Traceback" not in done.stderr
    result = read(run.bench)
    assert result.interrupted and {found.batch for found in result.rows} == {1}


def test_a_plot_without_a_home(tmp_path: Path) -> None:
    """matplotlib says at length where it keeps its fonts instead; nobody asked."""
    code = (
        "from lutdeploy.engines.benchmark.report import draw\n"
        "from tests.engines.benchmark.bench_records import make_result, row\n"
        "draw(make_result([row('torch-eager')])).savefig('plot.png')\n"
    )
    (tmp_path / "file").touch()
    places = {"HOME": str(tmp_path / "file"), "PYTHONPATH": str(Path(__file__).parents[3])}
    hidden = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | places
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "plot.png").is_file()
