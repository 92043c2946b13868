"""`lutdeploy parity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lutdeploy import __version__, bundle
from lutdeploy.commands.console import show_report
from lutdeploy.commands.options import (
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
)
from lutdeploy.commands.targets import find, open_reported, place
from lutdeploy.errors import ParityError, UsageError


@click.command()
@RUN
@click.option(
    "--backend",
    type=click.Choice(("onnxruntime", "torch", "openvino", "tensorrt")),
    default="onnxruntime",
    show_default=True,
)
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
def parity(
    run: Path | None,
    backend: str,
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
) -> None:
    """Compare a backend with PyTorch float32: step, trajectory, pictures.

    Exit code 1 when a limit is passed. The verdict goes to parity.json in the run.
    """
    from engines import choose_export, newest_built_export
    from lutdeploy.checkpoint import load_model
    from lutdeploy.machine import this_machine
    from lutdeploy.parity import compare
    from lutdeploy.sampling import batch_noise, check_table, choose_table

    backend, device = place(backend, device, provider)
    if backend == "torch" and (fp16 or export):
        raise UsageError("--fp16 and --export name an export; --backend torch runs the model")
    path = find(run)
    located = bundle.locate(path)
    if located.model is None:
        raise UsageError(f"{path} has no {bundle.MODEL} beside it to compare with")
    folder = None
    if backend != "torch":
        if backend == "tensorrt" and export is None and not fp16 and located.run:
            export = None if located.export else newest_built_export(located.run)
        if fp16 and export is None and located.export is None:
            halves = [
                e
                for e in (located.run.exports() if located.run else [])
                if bundle.read_manifest(e).precision == "fp16"
            ]
            if not halves:
                raise UsageError(f"{path} has no fp16 export; run `lutdeploy export --fp16` first")
            export = halves[0].name
        folder = choose_export(located, export)
        if folder is None:
            raise UsageError(f"{path} has no export; run `lutdeploy export` first")
        if fp16 and bundle.read_manifest(folder).precision != "fp16":
            raise UsageError(f"{folder} is no fp16 export")
    held = bundle.read_manifest(folder).precision if folder else "fp32"
    model = load_model(located.model)
    opened = open_reported(
        *(folder or path, backend, device, None, threads),
        batch=count,
        unverified=True,
        precision=precision,
    )
    with opened as engine:
        table = choose_table(engine.table, solver, steps, shift)
        check_table(engine, table)
        noise = batch_noise(seed, range(count), model.config.image_shape)
        judged_as = "bf16" if precision == "bf16" else held
        report = compare(model, engine, judged_as, table, noise)
        made = engine.identity
    if located.run is not None:
        about = {"lutdeploy": __version__, "machine": this_machine().fingerprint()}
        record = {**made, **about, **report.to_dict()}
        known = located.run.verdicts()
        known[parity_key(made)] = record
        bundle.write_json(located.run.parity, known)
    show_report(report)
    if not report.passed:
        raise ParityError(f"parity failed: {'; '.join(report.failures()[:2])}")
    click.echo("parity: passed")


def parity_key(identity: dict[str, Any]) -> str:
    return f"{identity['export'] or 'model'} {identity['backend']} {identity['device']}"
