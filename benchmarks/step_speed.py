"""Time of one sampling step: the original in eager PyTorch, ours, ONNX Runtime, OpenVINO.

    python -m benchmarks.step_speed

Times of one run can be compared, times of different runs cannot: a shared machine's clock
drifts. So the contenders take turns (A B C A B C …), and a ratio is the median of the ratios
within the rounds. Every contender has a process of its own, because a thread pool that has
nothing to do may spin and slow down whoever comes next. A turn begins with a pause, in which
such threads fall asleep, and with an untimed step.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import psutil

from lutdeploy import bundle
from lutdeploy.config import PRESETS, SIZES, ModelConfig, model_config
from lutdeploy.sampling import Images, batch_noise
from lutdeploy.solvers import step_table

ORIGINAL, OURS, ONNX_RUNTIME = "original, eager", "lutdeploy, eager", "ONNX Runtime, step export"
OPENVINO, OPENVINO_BF16 = "OpenVINO, step export", "OpenVINO in bfloat16, step export"
CONTENDERS = (ORIGINAL, OURS, ONNX_RUNTIME, OPENVINO)
# The machine's peaks, taken in the same rounds, and who is measured by the narrower one.
PRODUCT, PRODUCT_BF16 = "float32 matrix product", "bfloat16 matrix product"
NARROW = {OPENVINO_BF16: PRODUCT_BF16}
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "numpy")
ROW = step_table("euler", 64).rows[32]
AGREEMENT = 1e-4  # max abs between any contender and the original, on x' and x0
AGREEMENT_BF16 = 0.1  # outputs reach 5, where bfloat16's steps are 0.03
PAUSE = 0.1  # seconds; idle threads spin for some milliseconds

Outputs = tuple[Images, Images]  # x' and x0


@dataclass(frozen=True)
class Settings:
    """What every process needs to know."""

    run: Path
    batch: int
    threads: int | None
    steps: int  # timed in a turn
    matrix: int


def prepare(run: bundle.Run, config: ModelConfig) -> None:
    """A run folder with random weights and their ``step`` export."""
    import torch

    from lutdeploy.checkpoint import load_model, save_model
    from lutdeploy.export import ExportPlan, export_model
    from lutdeploy.model import LutTransformer

    torch.manual_seed(0)
    save_model(LutTransformer(config), run.model)
    export_model(load_model(run.model), ExportPlan(), run, bundle.sha256(run.model))


def open_torch(settings: Settings, original: bool) -> Callable[[Images], Outputs]:
    """A PyTorch contender's step; only the network differs between the two."""
    import torch

    from benchmarks.original import OriginalModel
    from lutdeploy.checkpoint import load_model, to_author_state

    ours = load_model(bundle.Run(settings.run).model)
    model: torch.nn.Module = ours
    if original:
        model = OriginalModel(ours.config).eval()
        model.load_state_dict(to_author_state(ours), strict=True)

    @torch.inference_mode()
    def step(noise: Images) -> Outputs:
        x = torch.from_numpy(noise)
        x0 = model(x, torch.full((len(x),), ROW.t))
        return (ROW.a * x + ROW.b * x0).numpy(), x0.numpy()

    return step


def open_onnx_runtime(settings: Settings) -> Callable[[Images], Outputs]:
    """The step of the export, through the engine that `lutdeploy sample` uses."""
    from engines import open_engine

    engine = open_engine(settings.run, "onnxruntime", threads=settings.threads)
    return lambda noise: engine.step(noise, ROW, None)


def open_openvino(settings: Settings, precision: str) -> Callable[[Images], Outputs]:
    """The same step export in OpenVINO."""
    from engines import open_engine

    engine = open_engine(settings.run, "openvino", threads=settings.threads, precision=precision)
    return lambda noise: engine.step(noise, ROW, None)


def narrow_contenders() -> tuple[str, ...]:
    """Those in bfloat16, where this CPU computes in it."""
    import openvino

    offered = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(NARROW) if "BF16" in offered else ()


def open_product(size: int, narrow: bool) -> Callable[[Images], Outputs]:
    """A matrix product [size, size]; the images pass through untouched."""
    import torch

    dtype = torch.bfloat16 if narrow else torch.float32
    left, right, out = (torch.randn(size, size).to(dtype) for _ in range(3))

    def product(noise: Images) -> Outputs:
        torch.mm(left, right, out=out)
        return noise, noise

    return product


def serve(name: str, settings: Settings, config: ModelConfig, connection: Connection) -> None:
    """A contender's process: sends its outputs once, then the times of a turn when asked."""
    import torch

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if name in (PRODUCT, PRODUCT_BF16):
        step = open_product(settings.matrix, narrow=name == PRODUCT_BF16)
    elif name == ONNX_RUNTIME:
        step = open_onnx_runtime(settings)
    elif name in (OPENVINO, OPENVINO_BF16):
        step = open_openvino(settings, "bf16" if name == OPENVINO_BF16 else "fp32")
    else:
        step = open_torch(settings, original=name == ORIGINAL)
    noise = batch_noise(0, range(settings.batch), config.image_shape)
    connection.send(step(noise))
    while connection.recv():
        time.sleep(PAUSE)
        step(noise)
        times = []
        for _ in range(settings.steps):
            start = time.perf_counter()
            step(noise)
            times.append(time.perf_counter() - start)
        connection.send(times)


@contextlib.contextmanager
def processes(settings: Settings, config: ModelConfig) -> Iterator[dict[str, Connection]]:
    """A process for each contender, by name; its outputs are the first thing to receive."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    narrow = narrow_contenders()
    with contextlib.ExitStack() as stack:
        for name in (*CONTENDERS, *narrow, PRODUCT, *(NARROW[name] for name in narrow)):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(name, settings, config, there))
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            there.close()  # a process that dies is then an EOFError on this side
            connections[name] = here
        yield connections


def require_agreement(outputs: dict[str, Outputs]) -> dict[str, float]:
    """Max abs difference of each contender from the original, over x' and x0.

    Raises:
        click.ClickException: one is further off than rounding; its time would mean nothing.
    """
    expected = outputs[ORIGINAL]
    differences = {
        name: max(
            float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, expected, strict=True)
        )
        for name, found in outputs.items()
    }
    for name, value in differences.items():
        if not value < (AGREEMENT_BF16 if name in NARROW else AGREEMENT):
            raise click.ClickException(f"{name} differs from the original by {value:.3g}")
    return differences


def take_turns(
    connections: dict[str, Connection], rounds: int
) -> Iterator[tuple[str, list[float]]]:
    """Every contender's name and times, a turn each, ``rounds`` times over."""
    for _ in range(rounds):
        for name, connection in connections.items():
            connection.send(True)
            yield name, connection.recv()


def processor_seconds() -> tuple[float, float]:
    """Processor time since boot: what all processes used, and what this one's children did."""
    whole = psutil.cpu_times()
    stolen = getattr(whole, "steal", 0.0)  # by other guests of the same host, on Linux
    ours = [child.cpu_times() for child in psutil.Process().children()]
    return (
        whole.user + whole.system + getattr(whole, "nice", 0.0) + stolen,
        sum(times.user + times.system for times in ours),
    )


def machine() -> dict[str, Any]:
    """CPU, logical processors, operating system, versions."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu,
        "logical_processors": os.cpu_count(),
        "system": platform.system(),
        "versions": versions,
    }


def summarise(
    config: ModelConfig, settings: Settings, turns: dict[str, list[list[float]]]
) -> dict[str, Any]:
    """Seconds, ratios and rates from all times; a turn counts with its median step."""
    peaks = {
        name: 2 * settings.matrix**3 / min(min(times) for times in turns[name])
        for name in (PRODUCT, PRODUCT_BF16)
        if name in turns
    }
    flop = 2 * config.multiply_adds() * settings.batch
    rounds = {name: [median(times) for times in turns[name]] for name in turns if name not in peaks}
    found: dict[str, Any] = {
        "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
        "gflop_per_step": flop / 1e9,
        "contenders": list(rounds),
    }
    for name, seconds in rounds.items():
        paired = [original / ours for original, ours in zip(rounds[ORIGINAL], seconds, strict=True)]
        rate = flop / median(seconds)
        found[name] = {
            "seconds": median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "times_as_fast": median(paired),
            "times_as_fast_min": min(paired),
            "times_as_fast_max": max(paired),
            "gflops": rate / 1e9,
            "share_of_peak": rate / peaks[NARROW.get(name, PRODUCT)],
        }
    return found


def describe(result: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    about, summary, differences = result["machine"], result["summary"], result["max_abs"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = result["threads"] or "default"
    yield f"{about['cpu']}, {about['logical_processors']} logical processors, {about['system']}"
    yield f"threads: {threads}; {versions}"
    yield (
        f"{result['preset']}, size {result['size']}, batch {result['batch']}: "
        f"{summary['gflop_per_step']:.1f} GFLOP per step; {result['rounds']} rounds of "
        f"{result['steps']} steps each"
    )
    yield f"processor time that others used meanwhile: {result['used_by_others']:.1%}"
    for name, peak in summary["peak_gflops"].items():
        yield f"{name} {result['matrix']}×{result['matrix']}, best: {peak:.0f} GFLOP/s"
    yield ""
    yield (
        "| | seconds per step, median (min … max) | times as fast as the original, median "
        "(min … max) | GFLOP/s | share of peak | max abs difference |"
    )
    yield "|---|---|---|---|---|---|"
    for name in summary["contenders"]:
        row = summary[name]
        seconds = f"{row['seconds']:.4f} ({row['seconds_min']:.4f} … {row['seconds_max']:.4f})"
        ratio = (
            f"{row['times_as_fast']:.3f} "
            f"({row['times_as_fast_min']:.3f} … {row['times_as_fast_max']:.3f})"
        )
        yield (
            f"| {name} | {seconds} | {ratio} | {row['gflops']:.0f} | {row['share_of_peak']:.0%} "
            f"| {differences[name]:.1e} |"
        )


@click.command()
@click.option(
    "--preset", type=click.Choice(tuple(PRESETS)), default="static-tanh-64", show_default=True
)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="seed", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="A turn.")
@click.option("--matrix", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: each library's own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="All times, too.")
def main(
    preset: str,
    size: str,
    batch: int,
    rounds: int,
    steps: int,
    matrix: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare the time of one step on the CPU, in float32 and where it can in bfloat16."""
    config = model_config(preset, size)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder) / "run", batch, threads, steps, matrix)
        prepare(bundle.Run(settings.run), config)
        with processes(settings, config) as connections:
            outputs = {name: connection.recv() for name, connection in connections.items()}
            for name in (PRODUCT, PRODUCT_BF16):
                outputs.pop(name, None)
            differences = require_agreement(outputs)
            turns: dict[str, list[list[float]]] = {name: [] for name in connections}
            start, before = time.perf_counter(), processor_seconds()
            for name, times in take_turns(connections, rounds):
                turns[name].append(times)
            used, own = (now - then for now, then in zip(processor_seconds(), before, strict=True))
            available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    result = {
        "machine": machine(),
        "preset": preset,
        "size": size,
        "batch": batch,
        "rounds": rounds,
        "steps": steps,
        "matrix": matrix,
        "threads": threads,
        "used_by_others": max(0.0, used - own) / available,
        "max_abs": differences,
        "summary": summarise(config, settings, turns),
        "seconds": turns,
    }
    for line in describe(result):
        click.echo(line)
    if json_file is not None:
        bundle.write_json(json_file, result)


if __name__ == "__main__":
    main()
