"""`lutdeploy sample`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from lutdeploy.artefacts.run import locate
from lutdeploy.cli.console import INTERRUPTED, note, progress_bar, stop_with
from lutdeploy.cli.options import (
    BACKEND,
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
from lutdeploy.cli.parity import parity_key
from lutdeploy.cli.targets import find, open_reported, place, schedule_for
from lutdeploy.errors import LutDeployError, ParityError, UsageError


@click.command("sample")
@RUN
@click.option("-n", "count", type=POSITIVE, default=64, show_default=True, help="Images.")
@click.option("--out", type=click.Path(path_type=Path), default="samples", show_default=True)
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
@STEPS
@SOLVER
@SHIFT
@TIME_GRID
@SEED
@BACKEND
@DEVICE
@PROVIDER
@PRECISION
@EXPORT
@THREADS
@click.option(
    "--format", "file_format", type=click.Choice(("png", "npz")), default="png", show_default=True
)
@click.option("--grid/--no-grid", default=True, show_default=True, help="grid.png of the pictures.")
@click.option("--gif", is_flag=True, help="trajectory.gif of 8 images.")
@click.option("--trajectory", is_flag=True, help="trajectory.png: noise on top, every 4th step.")
@click.option("--overwrite", is_flag=True, help="Replace what another command line made there.")
@click.option("--unverified", is_flag=True, help="Use what failed or never had its checks.")
def command(
    run: Path | None,
    count: int,
    out: Path,
    batch: int,
    steps: int | None,
    solver: str | None,
    shift: float | None,
    time_grid: str | None,
    seed: int,
    backend: str,
    device: str | None,
    provider: str | None,
    precision: str | None,
    export: str | None,
    threads: int | None,
    file_format: str,
    grid: bool,
    gif: bool,
    trajectory: bool,
    overwrite: bool,
    unverified: bool,
) -> None:
    """Sample images into a folder; the same command completes what is missing.

    Image i depends on the seed and i alone, whatever the batch, backend or count.
    """
    from lutdeploy.artefacts import sample_folder

    backend, device = place(backend, device, provider)
    path = find(run)
    opened = open_reported(
        *(path, backend, device, export, threads),
        batch=batch,
        unverified=unverified,
        precision=precision,
    )
    with opened as engine:
        schedule = schedule_for(engine, path, solver, steps, shift, time_grid)
        if engine.whole_trajectory and (gif or trajectory):
            raise UsageError("a loop export shows no steps; --gif and --trajectory need another")
        if not unverified:
            require_verdict(path, engine.identity)
        settings = sample_folder.settings(engine.identity, schedule, seed, file_format)
        with sample_folder.open_folder(out, settings, overwrite) as folder:
            missing = len(folder.missing(count))
            if missing < count:
                note(f"{count - missing} of {count} images are there already")
            try:
                with progress_bar("rate") as bar:
                    task = bar.add_task("sample", total=count, completed=count - missing, rate="")
                    done, start = 0, time.perf_counter()
                    for made in sample_folder.fill(folder, engine, schedule, count, batch):
                        done += made
                        speed = done / (time.perf_counter() - start)
                        bar.update(task, advance=made, rate=f"{speed:.1f} images/s")
            except KeyboardInterrupt:
                stop_with(f"interrupted: {folder.progress(count)}", INTERRUPTED)
            except OSError as error:  # a full disk, say
                raise LutDeployError(
                    f"{error.filename or out}: {error.strerror or error}; {folder.progress(count)}"
                ) from error
            if grid:
                sample_folder.write_grid(folder, count)
            if gif or trajectory:
                sample_folder.write_trajectory(folder, engine, schedule, count, trajectory, gif)
    click.echo(out)


def require_verdict(path: Path, identity: dict[str, Any]) -> None:
    """Refuse an export whose last parity run failed; say so where there was none."""
    if identity["export"] is None:
        return
    run = locate(path).run
    verdicts = run.verdicts() if run else {}
    verdict = verdicts.get(parity_key(identity), {})
    if verdict.get("engine_sha256") != identity["engine_sha256"]:
        if identity["backend"] != "tensorrt":  # an engine has the verdict of its build
            note(
                "this export has passed the check at export; `lutdeploy parity` has not judged "
                "it yet"
            )
    elif not verdict.get("passed"):
        raise ParityError(
            f"export {identity['export']} failed parity; `lutdeploy parity` shows where, "
            "--unverified samples all the same"
        )
