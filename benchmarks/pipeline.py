"""Start-up, training, export and sampling, as a user runs them: every command a new process.

    python -m benchmarks.pipeline --data FOLDER

Unlike in `lutdeploy bench` nothing is compared here, so the figures belong to the
machine and the moment; the report says which machine and what else was running.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import Run
from lutdeploy.machine import this_machine

LUTDEPLOY = (sys.executable, "-m", "lutdeploy.cli")
HELP_RUNS = 9
WARM = 60  # training steps that are not counted


@dataclass(frozen=True)
class Usage:
    """Of one process: wall-clock seconds and the most memory it held."""

    seconds: float
    peak_bytes: int


def run(*command: object) -> Usage:
    """Run a command to its end.

    Raises:
        click.ClickException: it failed; with what it said.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            raise click.ClickException(f"{' '.join(map(str, command))}: {text[-500:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return Usage(seconds, usage.ru_maxrss * unit)


def measure_help() -> dict[str, Any]:
    """`lutdeploy --help`, several times."""
    times = [run(*LUTDEPLOY, "--help").seconds for _ in range(HELP_RUNS)]
    return {"seconds": median(times), "seconds_min": min(times), "seconds_max": max(times)}


def measure_training(data: str, steps: int, precision: str, out: Path) -> dict[str, Any]:
    """Steps per second of `lutdeploy train`, small, batch 64, compiled, once it is warm."""
    small = ("--preset", "static-tanh-64", "--size", "small", "--batch", 64, "--steps", steps)
    fast = ("--precision", precision, "--compile", "on", "--device", "cpu")
    whole = run(*LUTDEPLOY, "train", "--data", data, *small, *fast, "--out", out)
    lines = [json.loads(line) for line in Run(out).log.read_text().splitlines()]
    rates = [line["images_per_second"] / 64 for line in lines if line["step"] > WARM]
    if not rates:
        raise click.ClickException(f"--train-steps {steps} leaves nothing behind {WARM} of warm-up")
    return {
        "steps": steps,
        "precision": precision,
        "steps_per_second": median(rates),
        "steps_per_second_min": min(rates),
        "steps_per_second_max": max(rates),
        "whole_command_seconds": whole.seconds,
        "peak_bytes": whole.peak_bytes,
    }


def measure_export(size: str, folder: Path) -> dict[str, Any]:
    """`lutdeploy export` of random weights, each kind of graph that is asked for daily."""
    import torch

    from lutdeploy.artefacts.checkpoint import save_model
    from lutdeploy.config import model_config
    from lutdeploy.model import LutTransformer

    torch.manual_seed(0)
    save_model(LutTransformer(model_config("static-tanh-64", size)), Run(folder).model)
    found = {}
    for options in (
        (),
        ("--fp16",),
        ("--fp16", "--graph", "per-step"),
        ("--fp16", "--graph", "loop"),
    ):
        usage = run(*LUTDEPLOY, "export", folder, *options)
        name = " ".join(("export", *options))
        found[name] = {"seconds": usage.seconds, "peak_bytes": usage.peak_bytes}
    return found


def measure_sampling(model: Path, count: int, folder: Path) -> dict[str, Any]:
    """The engine's share of the wall time of `lutdeploy sample`, per backend."""
    target = Run(folder / "run")
    files.write_atomic(target.model, model.read_bytes())
    run(*LUTDEPLOY, "export", target.path)
    found = {}
    for backend in ("torch", "onnxruntime"):
        report = folder / f"{backend}.json"
        options = ("-n", count, "--backend", backend, "--out", folder / backend)
        command = (sys.executable, "-m", "benchmarks.engine_clock", report, "sample", target.path)
        usage = run(*command, *options)
        inside = json.loads(report.read_text())["engine_seconds"]
        found[f"sample --backend {backend}"] = {
            "images": count,
            "seconds": usage.seconds,
            "engine_seconds": inside,
            "engine_share": inside / usage.seconds,
            "peak_bytes": usage.peak_bytes,
        }
    return found


def describe(result: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    about = result["machine"]
    yield about.describe()
    yield about.describe_versions()
    yield ""
    yield "| command | figure |"
    yield "|---|---|"
    shown = result["help"]
    yield (
        f"| `lutdeploy --help` | {shown['seconds']:.2f} s, median of {HELP_RUNS} "
        f"({shown['seconds_min']:.2f} … {shown['seconds_max']:.2f}) |"
    )
    trained = result["train"]
    yield (
        f"| `train`, static-tanh-64 small, batch 64, {trained['precision']}, compiled | "
        f"{trained['steps_per_second']:.2f} steps/s once warm, median "
        f"({trained['steps_per_second_min']:.2f} … {trained['steps_per_second_max']:.2f}); "
        f"{trained['steps']} steps with start and compilation "
        f"{trained['whole_command_seconds']:.0f} s |"
    )
    for name, row in result["export"].items():
        yield (
            f"| `{name}`, static-tanh-64 seed | {row['seconds']:.1f} s, at most "
            f"{row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    for name, row in result["sample"].items():
        yield (
            f"| `{name} -n {row['images']}`, static-tanh-64 small, 64 steps | "
            f"{row['seconds']:.1f} s, of which {row['engine_seconds']:.1f} s in the engine: "
            f"{row['engine_share']:.1%}; at most {row['peak_bytes'] / 2**30:.2f} GiB |"
        )


@click.command()
@click.option("--data", default="synthetic", show_default=True, help="Training images.")
@click.option("--train-steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--precision", type=click.Choice(("fp32", "bf16")), default="fp32", show_default=True)
@click.option("-n", "count", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--export-size", default="seed", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    data: str,
    train_steps: int,
    precision: str,
    count: int,
    export_size: str,
    json_file: Path | None,
) -> None:
    """Time the commands. Linux and macOS."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = {
            "machine": this_machine(),
            "help": measure_help(),
            "train": measure_training(data, train_steps, precision, folder / "trained"),
            "export": measure_export(export_size, folder / "exported"),
            "sample": measure_sampling(shipped.model_path(), count, folder / "sampled"),
        }
    for line in describe(result):
        click.echo(line)
    if json_file is not None:
        files.write_json(json_file, result)


if __name__ == "__main__":
    main()
