"""`lutdeploy sample`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import answer, interrupted_code, note, stop_with
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import PATH, POSITIVE, SEED, engine_request, schedule_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import LutDeployError, UsageError
from lutdeploy.schedule import ScheduleRequest


@click.command("sample")
@engine_request()
@click.option("-n", "count", type=POSITIVE, default=64, show_default=True, help="Images.")
@click.option("--out", type=PATH, default="samples", show_default=True)
@schedule_request
@SEED
@click.option(
    "--format",
    "file_format",
    type=click.Choice(sample_folder.FORMATS),
    default="png",
    show_default=True,
    help="A PNG a picture, pictures.npz (uint8), or tar shards of 10,000 PNGs.",
)
@click.option("--grid/--no-grid", default=True, show_default=True, help="grid.png of the pictures.")
@click.option("--gif", is_flag=True, help="trajectory.gif of 8 images.")
@click.option("--trajectory", is_flag=True, help="trajectory.png: noise on top, every 4th step.")
@click.option("--overwrite", is_flag=True, help="Replace what another command line made there.")
def command(
    engine: EngineRequest,
    schedule: ScheduleRequest,
    count: int,
    out: Path,
    seed: int,
    file_format: str,
    grid: bool,
    gif: bool,
    trajectory: bool,
    overwrite: bool,
) -> None:
    """Sample images into a folder; the same command completes what is missing.

    Image i depends on the seed and i alone, whatever the batch, backend or count. Without
    --solver, --steps and --shift it follows the model's best fitted schedule where there is one;
    --solver euler --steps 64 is the reference.
    """
    with open_engine(engine, note) as denoiser:
        followed = resolve_schedule(schedule, engine.path, denoiser, note)
        if denoiser.whole_trajectory and (gif or trajectory):
            raise UsageError("a loop export shows no steps; --gif and --trajectory need another")
        if not engine.unverified:
            require_passed(engine.path, denoiser.identity, note)
        settings = sample_folder.settings(denoiser.identity, followed, seed, file_format)
        with sample_folder.open_folder(out, settings, overwrite) as folder:
            missing = len(folder.writer.missing(count))
            if missing < count:
                note(f"{count - missing} of {count} images are there already")
            batch = engine.batch or 64
            try:
                with progress_bar("rate") as bar:
                    task = bar.add_task("sample", total=count, completed=count - missing, rate="")
                    done, start = 0, time.perf_counter()
                    for made in sample_folder.fill(folder, denoiser, followed, count, batch):
                        done += made
                        speed = done / (time.perf_counter() - start)
                        bar.update(task, advance=made, rate=f"{speed:.1f} images/s")
            except KeyboardInterrupt as stop:
                stop_with(f"interrupted: {folder.progress(count)}", interrupted_code(stop))
            except OSError as error:  # a full disk, say
                raise LutDeployError(
                    f"{error.filename or out}: {error.strerror or error}; {folder.progress(count)}"
                ) from error
            if grid:
                sample_folder.write_grid(folder, count)
            if gif or trajectory:
                sample_folder.write_trajectory(folder, denoiser, followed, count, trajectory, gif)
    answer(out)
