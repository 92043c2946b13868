"""`lutdeploy parity`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy import __version__
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, RUNS, Located, Run, locate
from lutdeploy.cli.console import show_report
from lutdeploy.cli.options import (
    DEVICE,
    EXPORT,
    POSITIVE,
    PRECISION,
    PROVIDER,
    RUN,
    SEED,
    SHIFT,
    SOLVER,
    STEPS,
    THREADS,
    TIME_GRID,
)
from lutdeploy.cli.targets import find, find_run, open_reported, place, schedule_for
from lutdeploy.errors import LutDeployError, ParityError, UsageError

if TYPE_CHECKING:
    from lutdeploy.engines import Engine
    from lutdeploy.parity import Report


@click.command("parity")
@RUN
@click.option(
    "--backend",
    type=click.Choice(("onnxruntime", "torch", "openvino", "tensorrt")),
    help="Default: onnxruntime.",
)
@click.option("--all", "everything", is_flag=True, help="Every engine that can run here.")
@click.option("--fp16", is_flag=True, help="The newest fp16 export.")
@EXPORT
@DEVICE
@PROVIDER
@PRECISION
@THREADS
@click.option("-n", "count", type=POSITIVE, default=4, show_default=True, help="Images.")
@SEED
@SOLVER
@STEPS
@SHIFT
@TIME_GRID
def command(
    run: Path | None,
    backend: str | None,
    everything: bool,
    fp16: bool,
    export: str | None,
    device: str | None,
    provider: str | None,
    precision: str | None,
    threads: int | None,
    count: int,
    seed: int,
    solver: str | None,
    steps: int | None,
    shift: float | None,
    time_grid: str | None,
) -> None:
    """Compare a backend with PyTorch float32: step, trajectory, pictures.

    Exit code 1 when a limit is passed. The verdict goes to parity.json in the run, where
    `sample` looks for failures and `--backend auto` for what it may take.
    """
    from lutdeploy.artefacts.checkpoint import load_model

    path = find(run)
    if shipped.is_shipped(path) and (RUNS / path.stem).is_dir():
        path = find_run(path).path  # where `export --model` put its exports
    located = locate(path)
    if located.model is None:
        raise UsageError(f"{path} has no {MODEL} beside it to compare with")

    def judge(engine: Engine, judged_as: str) -> Report:
        from lutdeploy.parity import compare
        from lutdeploy.sampling import batch_noise

        schedule = schedule_for(engine, path, solver, steps, shift, time_grid)
        noise = batch_noise(seed, range(count), model.config.image_shape)
        report = compare(model, engine, judged_as, schedule, noise)
        if located.run is not None:
            _record(located.run, engine.identity, report)
        return report

    if everything:
        if (backend, fp16, export, device, provider, precision) != (None, False, *(None,) * 4):
            raise UsageError("--all judges every engine that can run here; leave out which")
        model = load_model(located.model)
        _judge_everything(located, judge, count, threads)
        return
    backend, device = place(backend or "onnxruntime", device, provider)
    if backend == "torch" and (fp16 or export):
        raise UsageError("--fp16 and --export name an export; --backend torch runs the model")
    folder = None if backend == "torch" else _export_to_judge(located, path, backend, fp16, export)
    held = read_manifest(folder).precision if folder else "fp32"
    model = load_model(located.model)
    opened = open_reported(
        *(folder or path, backend, device, None, threads),
        batch=count,
        unverified=True,
        precision=precision,
    )
    with opened as engine:
        if precision == "bf16":
            held = "int8-bf16" if held == "int8" else "bf16"
        report = judge(engine, held)
    show_report(report)
    if not report.passed:
        raise ParityError(f"parity failed: {'; '.join(report.failures()[:2])}")
    click.echo("parity: passed")


def _export_to_judge(
    located: Located, path: Path, backend: str, fp16: bool, export: str | None
) -> Path:
    """The export that the options mean.

    Raises:
        UsageError: there is none.
    """
    from lutdeploy.engines import choose_export, newest_built_export

    if backend == "tensorrt" and export is None and not fp16 and located.run:
        export = None if located.export else newest_built_export(located.run)
    if fp16 and export is None and located.export is None:
        exports = located.run.exports() if located.run else []
        halves = [e for e in exports if read_manifest(e).precision == "fp16"]
        if not halves:
            raise UsageError(f"{path} has no fp16 export; run `lutdeploy export --fp16` first")
        export = halves[0].name
    folder = choose_export(located, export)
    if folder is None:
        raise UsageError(f"{path} has no export; run `lutdeploy export` first")
    if fp16 and read_manifest(folder).precision != "fp16":
        raise UsageError(f"{folder} is no fp16 export")
    return folder


def _judge_everything(
    located: Located,
    judge: Callable[[Engine, str], Report],
    count: int,
    threads: int | None,
) -> None:
    """Judge every engine that `lutdeploy bench` could measure here; a line for each.

    Raises:
        UsageError: nothing to judge.
        ParityError: some failed; the others are judged all the same.
    """
    from lutdeploy.engines import open_engine, require_same_model
    from lutdeploy.engines.benchmark.contenders import list_contenders
    from lutdeploy.machine import this_machine

    assert located.model is not None
    run = located.run
    exports = [located.export] if located.export else run.exports() if run else []
    if not exports:
        raise UsageError("there is no export to judge; run `lutdeploy export` first")
    failed = []
    for contender in list_contenders(located.model, exports, run, bool(this_machine().gpus)):
        if contender.kind != "engine" or contender.export is None:
            continue
        try:
            require_same_model(read_manifest(contender.path), located.model)
            opened = open_engine(
                *(contender.path, contender.backend, contender.device, None, threads),
                batch=count,
                unverified=True,
                precision=contender.arithmetic,
            )
        except LutDeployError as error:
            click.echo(f"{contender.name}: not judged: {error}")
            continue
        with opened as engine:
            report = judge(engine, contender.precision)
        verdict = f"PSNR {report.final.psnr:.1f} dB, {report.schedule.describe()}"
        if report.passed:
            click.echo(f"{contender.name}: passed, {verdict}")
        else:
            failed.append(contender.name)
            click.echo(f"{contender.name}: FAILED, {verdict}; {report.failures()[0]}")
    if failed:
        raise ParityError(f"parity failed: {', '.join(failed)}")


def _record(run: Run, identity: dict[str, Any], report: Report) -> None:
    """Add a verdict to the run's, in the place of an older one on the same engine."""
    from lutdeploy.machine import this_machine

    about = {"lutdeploy": __version__, "machine": this_machine().fingerprint()}
    known = run.verdicts()
    known[parity_key(identity)] = {**identity, **about, **report.to_dict()}
    files.write_json(run.parity, known)


def parity_key(identity: dict[str, Any]) -> str:
    return f"{identity['export'] or 'model'} {identity['backend']} {identity['device']}"
