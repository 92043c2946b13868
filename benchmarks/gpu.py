"""What a GPU box shows: engines built, parity held, 1,024 pictures, images a second.

    python -m benchmarks.gpu --backend torch --backend tensorrt --out report/

Runs the daily commands for each preset and backend, then times whole trajectories, and writes
report.json and report.md as it goes. What fails, be it for memory, a compiler or a missing
package, is named with its reason where its figures would stand; the rest goes on, and the exit
code is 1.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.config import PRESETS, SIZES, ModelConfig, model_config
from lutdeploy.errors import LutDeployError, first_line
from lutdeploy.machine import versions

LUTDEPLOY = (sys.executable, "-m", "lutdeploy.cli")
STEPS = 64
MATRIX = 8192  # side of the product that measures the peak
BACKENDS = {  # and the module that each needs
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}


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


def daily_commands(
    run: Run, backend: str, batches: Sequence[int], images: int
) -> Iterator[tuple[object, ...]]:
    """What one does with a backend: build where it needs that, parity, sample, bench."""
    place = ("--backend", backend, "--device", "cuda")
    if backend.startswith("tensorrt"):
        sizes = [word for batch in batches for word in ("--batch", batch)]
        yield ("build", run.path, "--backend", backend, *sizes)
    yield ("parity", run.path, *place)
    if backend == "torch":
        yield ("parity", run.path, *place, "--precision", "fp32")
        yield ("parity", run.path, *place, "--precision", "bf16")
    out = run.path / f"pictures-{backend}"
    batch = min(images, max(batches))
    yield ("sample", run.path, "-n", images, "--batch", batch, *place, "--out", out)
    yield ("bench", run.path, "--quick", "--batch", min(batches), "--end-to-end", 0)


def run_commands(run: Run, backend: str, commands: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """What came of them; stops at the first that fails, on which the others build."""
    for arguments in commands:
        done = run_command(arguments)
        if arguments[0] == "bench" and not done["exit_code"]:
            # `bench` itself goes on without a contender that fails.
            done["exit_code"], done["said"] = bench_outcome(run, backend)
        yield done
        if done["exit_code"]:
            return


def bench_outcome(run: Run, backend: str) -> tuple[int, str]:
    """Exit code and reasons: 0 where `bench` measured all that it knows of a backend on the GPU."""
    found = [
        contender
        for contender in files.read_json(run.bench)["contenders"]
        if contender["backend"] == backend and contender["device"] == "cuda"
    ]
    failed = [f"{c['path']}: {c['reason']}" for c in found if c["status"] != "measured"]
    names = ", ".join(contender["path"] for contender in found)
    return int(bool(failed) or not found), "; ".join(failed) or f"measured: {names or 'nothing'}"


def contenders(run: Run, backend: str, batch: int) -> dict[str, Callable[[], Any]]:
    """What can be timed of a backend: names, and what opens each."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines import EngineRequest, open_engine
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser

    def torch_step(precision: str, compile: bool, graph: bool) -> Callable[[], Any]:
        return lambda: TorchDeviceDenoiser(
            load_model(run.model), CudaDevice(), precision, compile=compile, graph=graph
        )

    if backend == "torch":
        return {
            "PyTorch fp16, eager": torch_step("fp16", False, False),
            "PyTorch fp16, CUDA graph": torch_step("fp16", False, True),
            "PyTorch fp16, compiled, CUDA graph": torch_step("fp16", True, True),
            "PyTorch bf16, CUDA graph": torch_step("bf16", False, True),
            "PyTorch fp32, CUDA graph": torch_step("fp32", False, True),
        }
    request = EngineRequest(run.path, backend, "cuda", batch=batch)
    return {f"{backend} fp16": lambda: open_engine(request)}


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


def said_by(error: Exception) -> str:
    """What an error says, with its type where it is not one of lutdeploy's own lines."""
    text = first_line(error)
    return text if isinstance(error, LutDeployError) else f"{type(error).__name__}: {text}"


def free_memory() -> None:
    """Give back what a contender that is gone, or has failed, held on the GPU."""
    import torch

    gc.collect()
    with contextlib.suppress(Exception):  # a device that has failed for good
        torch.cuda.empty_cache()


def speed_rows(
    run: Run,
    config: ModelConfig,
    backend: str,
    batches: Sequence[int],
    seconds: float,
    peak: float | None,
) -> Iterator[dict[str, Any]]:
    """A row for each contender and batch size; one that fails, however it does, says why."""
    for batch in batches:
        for name, open_contender in contenders(run, backend, batch).items():
            row: dict[str, Any] = {"contender": name, "batch": batch}
            try:
                with open_contender() as engine:
                    times = time_trajectories(engine, batch, seconds)
            except Exception as error:  # out of memory, a compiler's, a driver's
                yield {**row, "failed": said_by(error)}
            else:
                middle = median(times)
                flops = 2 * config.multiply_adds() * STEPS * batch / middle
                yield {
                    **row,
                    "seconds": middle,
                    "seconds_min": min(times),
                    "seconds_max": max(times),
                    "images_per_second": batch / middle,
                    "share_of_peak": flops / peak if peak else None,
                }
            free_memory()


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"# {about['gpu']}"
    yield ""
    yield f"{about['system']}, compute capability {about['compute_capability']}, CUDA "
    yield f"{about['cuda']}; {versions}."
    yield f"Size {report['size']}, random weights, {STEPS} Euler steps."
    peak = report["peak_flops"]
    product = f"{peak / 1e12:.0f} TFLOP/s" if peak else f"failed: {report['peak_failed']}"
    yield f"Best float16 matrix product: {product}."
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
            if "failed" in row:
                reason = row["failed"].replace("|", "/")[:200]
                yield f"| {row['contender']} | {row['batch']} | failed: {reason} | | |"
                continue
            share = row["share_of_peak"]
            yield (
                f"| {row['contender']} | {row['batch']} | {row['seconds']:.4f} "
                f"({row['seconds_min']:.4f} … {row['seconds_max']:.4f}) | "
                f"{row['images_per_second']:.0f} | {'–' if share is None else f'{share:.0%}'} |"
            )


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write what is known so far."""
    files.write_json(out / "report.json", report)
    files.write_atomic(out / "report.md", ("\n".join(describe(report)) + "\n").encode())


def installed() -> tuple[str, ...]:
    """The backends whose packages are there."""
    return tuple(name for name, module in BACKENDS.items() if importlib.util.find_spec(module))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="gpu-report", show_default=True)
@click.option(
    "--backend",
    "backends",
    type=click.Choice(tuple(BACKENDS)),
    multiple=True,
    default=installed,
    help="Must work here. Default: all that are installed.",
)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="seed", show_default=True)
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 16, 256, 1024)
)
@click.option("-n", "images", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each timing.")
def main(
    out: Path,
    backends: tuple[str, ...],
    size: str,
    batches: tuple[int, ...],
    images: int,
    seconds: float,
) -> None:
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
        "peak_flops": None,
        "presets": {},
    }
    failed: list[str] = []
    try:
        report["peak_flops"] = peak_flops()
    except Exception as error:  # as in speed_rows
        report["peak_failed"] = said_by(error)
        failed.append("the float16 matrix product")
    free_memory()
    for preset in PRESETS:
        config = model_config(preset, size)
        run = make_run(out / preset, config)
        found: dict[str, list[dict[str, Any]]] = {"commands": [], "speed": []}
        report["presets"][preset] = found
        commands = [
            run_commands(run, name, daily_commands(run, name, batches, images)) for name in backends
        ]
        exported = run_command(("export", run.path, "--fp16"))
        for done in itertools.chain([exported], *commands):
            found["commands"].append(done)
            failed += [done["command"]] if done["exit_code"] else []
            write_report(out, report)
        rows = (
            speed_rows(run, config, name, batches, seconds, report["peak_flops"])
            for name in backends
        )
        for row in itertools.chain.from_iterable(rows):
            found["speed"].append(row)
            if "failed" in row:
                failed.append(f"{preset}: {row['contender']}, batch {row['batch']}")
            write_report(out, report)
    click.echo(out / "report.md")
    if failed:
        raise click.ClickException(f"failed: {json.dumps(failed)}")


if __name__ == "__main__":
    main()
