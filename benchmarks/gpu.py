"""What a GPU box shows: engines built, parity held, 1,024 pictures, images a second.

    python -m benchmarks.gpu --out report/

Runs the daily commands for each preset, then times whole trajectories of every backend that is
here, and writes report.json and report.md. A backend that is not here is named with its reason;
a command that fails makes the exit code 1, and the report is written all the same.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.config import PRESETS, SIZES, ModelConfig, model_config
from lutdeploy.errors import LutDeployError
from lutdeploy.machine import versions

LUTDEPLOY = (sys.executable, "-m", "lutdeploy.cli")
STEPS = 64
MATRIX = 8192  # side of the product that measures the peak


def run_command(arguments: tuple[object, ...]) -> dict[str, Any]:
    """One `lutdeploy` command: exit code, seconds, the last line that it said."""
    start = time.perf_counter()
    done = subprocess.run(
        [*LUTDEPLOY, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    said = (done.stderr + done.stdout).strip().splitlines()
    return {
        "command": " ".join(("lutdeploy", *map(str, arguments))),
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 3),
        "said": said[-1] if said else "",
    }


def make_run(folder: Path, config: ModelConfig) -> Run:
    """A run with random weights: speed and parity do not ask for trained ones."""
    import torch

    from lutdeploy.artefacts.checkpoint import save_model
    from lutdeploy.model import LutTransformer

    torch.manual_seed(0)
    run = Run(folder)
    save_model(LutTransformer(config), run.model)
    return run


def daily_commands(run: Run, batches: tuple[int, ...], images: int) -> list[dict[str, Any]]:
    """Export, build for each batch size, parity, sample; stops at the first that fails."""
    sizes = [word for batch in batches for word in ("--batch", batch)]
    done = []
    for arguments in (
        ("export", run.path, "--fp16"),
        ("build", run.path, *sizes),
        ("parity", run.path, "--backend", "tensorrt"),
        (
            *("sample", run.path, "-n", images, "--batch", min(images, max(batches))),
            *("--backend", "tensorrt", "--out", run.path / "pictures"),
        ),
    ):
        done.append(run_command(arguments))
        if done[-1]["exit_code"]:
            break
    return done


def contenders(run: Run, batch: int) -> dict[str, Callable[[], Any]]:
    """What can be timed: names, and what opens each."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines import EngineRequest, open_engine
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser

    def torch_step(compile: bool, graph: bool) -> Callable[[], Any]:
        return lambda: TorchDeviceDenoiser(
            load_model(run.model), CudaDevice(), "fp16", compile=compile, graph=graph
        )

    return {
        "PyTorch fp16, eager": torch_step(False, False),
        "PyTorch fp16, eager, CUDA graph": torch_step(False, True),
        "PyTorch fp16, compiled, CUDA graph": torch_step(True, True),
        "ONNX Runtime fp16, CUDA": lambda: open_engine(
            EngineRequest(run.path, "onnxruntime", "cuda")
        ),
        "TensorRT fp16, CUDA graph": lambda: open_engine(
            EngineRequest(run.path, "tensorrt", batch=batch)
        ),
    }


def time_trajectories(engine: Any, batch: int, seconds: float) -> list[float]:
    """Seconds of single batches through all steps, noise from the host to pixels on the host."""
    from lutdeploy.sampling import batch_noise, finished_batches
    from lutdeploy.schedule import solver_schedule

    schedule = solver_schedule("euler", STEPS)
    noise = batch_noise(0, range(batch), engine.config.image_shape)

    def once() -> float:
        start = time.perf_counter()
        list(finished_batches(engine, [(range(batch), noise)], schedule, pixels=True))
        return time.perf_counter() - start

    once(), once()  # builds, captures, warms up
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(once())
    return times


def peak_flops(size: int = MATRIX) -> float:
    """The best float16 matrix product of this GPU, in FLOP/s."""
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return float(2 * size**3 / best)


def speed_rows(
    run: Run, config: ModelConfig, batches: tuple[int, ...], seconds: float, peak: float
) -> Iterator[dict[str, Any]]:
    """A row for each contender and batch size; one that cannot run says why."""
    for batch in batches:
        for name, open_contender in contenders(run, batch).items():
            row: dict[str, Any] = {"contender": name, "batch": batch}
            try:
                with open_contender() as engine:
                    times = time_trajectories(engine, batch, seconds)
            except LutDeployError as error:
                yield {**row, "missing": str(error)}
                continue
            middle = median(times)
            flops = 2 * config.multiply_adds() * STEPS * batch / middle
            yield {
                **row,
                "seconds": middle,
                "seconds_min": min(times),
                "seconds_max": max(times),
                "images_per_second": batch / middle,
                "share_of_peak": flops / peak,
            }


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"# {about['gpu']}"
    yield ""
    yield f"{about['system']}, compute capability {about['compute_capability']}, CUDA "
    yield f"{about['cuda']}; {versions}."
    yield f"Size {report['size']}, random weights, {STEPS} Euler steps."
    yield f"Best float16 matrix product: {report['peak_flops'] / 1e12:.0f} TFLOP/s."
    for preset, found in report["presets"].items():
        yield f"\n## {preset}\n"
        yield "| command | exit code | seconds | last line |"
        yield "|---|---|---|---|"
        for done in found["commands"]:
            said = done["said"].replace("|", "/")[:120]
            yield f"| `{done['command']}` | {done['exit_code']} | {done['seconds']:.1f} | {said} |"
        yield ""
        yield "| contender | batch | seconds, median (min … max) | images/s | share of peak |"
        yield "|---|---|---|---|---|"
        for row in found["speed"]:
            if "missing" in row:
                reason = f"not here: {row['missing'][:120]}"
                yield f"| {row['contender']} | {row['batch']} | {reason} | | |"
                continue
            yield (
                f"| {row['contender']} | {row['batch']} | {row['seconds']:.4f} "
                f"({row['seconds_min']:.4f} … {row['seconds_max']:.4f}) | "
                f"{row['images_per_second']:.0f} | {row['share_of_peak']:.0%} |"
            )


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="gpu-report", show_default=True)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="seed", show_default=True)
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 16, 256, 1024)
)
@click.option("-n", "images", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each timing.")
def main(out: Path, size: str, batches: tuple[int, ...], images: int, seconds: float) -> None:
    """Build, judge, sample and time on this machine's GPU."""
    from lutdeploy.engines.cuda.device import CudaDevice

    try:
        device = CudaDevice()
    except LutDeployError as error:
        raise click.ClickException(str(error)) from error
    report: dict[str, Any] = {
        "machine": {
            "gpu": device.gpu,
            "compute_capability": device.compute_capability,
            "cuda": device.cuda_version,
            "system": f"{platform.system()} {platform.machine()}",
            "versions": versions(),
        },
        "size": size,
        "peak_flops": peak_flops(),
        "presets": {},
    }
    failed = []
    for preset in PRESETS:
        config = model_config(preset, size)
        run = make_run(out / preset, config)
        commands = daily_commands(run, batches, images)
        failed += [done["command"] for done in commands if done["exit_code"]]
        speed = list(speed_rows(run, config, batches, seconds, report["peak_flops"]))
        report["presets"][preset] = {"commands": commands, "speed": speed}
        files.write_json(out / "report.json", report)
        text = "\n".join(describe(report)) + "\n"
        files.write_atomic(out / "report.md", text.encode())
    click.echo(out / "report.md")
    if failed:
        raise click.ClickException(f"failed: {json.dumps(failed)}")


if __name__ == "__main__":
    main()
