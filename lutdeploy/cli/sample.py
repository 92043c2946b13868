"""`lutdeploy sample`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import click

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.sample_folder import open_place, require_shareable
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import answer, interrupted_code, note, stop_with
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import POSITIVE, SEED, Place, engine_request, schedule_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import LutDeployError, UsageError
from lutdeploy.schedule import ScheduleRequest


@click.command("sample")
@engine_request()
@click.option("-n", "count", type=POSITIVE, default=64, show_default=True, help="Images.")
@click.option(
    "--first",
    type=click.IntRange(0, 2**63),
    help="Images FIRST to FIRST + n − 1, as one of several tasks that share --out; no grid.",
)
@click.option(
    "--out",
    type=Place(),
    default="samples",
    show_default=True,
    help="A folder, or s3://BUCKET/PREFIX and the like.",
)
@schedule_request
@SEED
@click.option(
    "--format",
    "file_format",
    type=click.Choice(sample_folder.FORMATS),
    default="png",
    show_default=True,
    help="A PNG a picture, pictures.npz (uint8), or tar shards of 10,000 PNGs with JSON.",
)
@click.option("--grid/--no-grid", default=True, show_default=True, help="grid.png of the pictures.")
@click.option("--gif", is_flag=True, help="trajectory.gif of 8 images.")
@click.option("--trajectory", is_flag=True, help="trajectory.png: noise on top, every 4th step.")
@click.option("--overwrite", is_flag=True, help="Replace what another command line made there.")
@click.option(
    "--ray",
    "address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    help="Share the work among actors of a Ray cluster: HOST:PORT, auto, or one on this machine.",
)
@click.option("--actors", type=POSITIVE, help="Of --ray; as many as the cluster has room for.")
def command(
    engine: EngineRequest,
    schedule: ScheduleRequest,
    count: int,
    first: int | None,
    out: Path | str,
    seed: int,
    file_format: str,
    grid: bool,
    gif: bool,
    trajectory: bool,
    overwrite: bool,
    address: str | None,
    actors: int | None,
) -> None:
    """Sample images into a folder; the same command completes what is missing.

    Image i depends on the seed and i alone, whatever the batch, backend or count. Without
    --solver, --steps and --shift it follows the model's best fitted schedule where there is one;
    --solver euler --steps 64 is the reference.

    --ray takes a thread for each actor, unless --threads says otherwise, and as many actors as
    there are processors, or GPUs.
    """
    images = None if first is None else range(first, first + count)
    if images is not None and (gif or trajectory or overwrite or address is not None):
        raise UsageError(
            "--first makes a share of a folder; leave out --gif, --trajectory, --overwrite and "
            "--ray"
        )
    if address is not None and (gif or trajectory):
        raise UsageError("--gif and --trajectory need the engine here; leave out --ray")
    if address is None and actors is not None:
        raise UsageError("--actors are those of --ray, which is not there")
    require_shareable(out, file_format, images, address is not None)
    with contextlib.ExitStack() as stack:
        denoiser = cluster = None
        if address is None:
            denoiser = stack.enter_context(open_engine(engine, note))
            identity = denoiser.identity
            followed = resolve_schedule(schedule, engine.path, denoiser, note)
            if denoiser.whole_trajectory and (gif or trajectory):
                raise UsageError(
                    "a loop export shows no steps; --gif and --trajectory need another"
                )
        else:
            from lutdeploy.engines.ray import connected

            cluster = stack.enter_context(connected(address, engine, schedule, actors, note))
            identity, followed = cluster.identity, cluster.schedule
        if not engine.unverified:
            require_passed(engine.path, identity, note)
        settings = sample_folder.settings(identity, followed, seed, file_format)
        folder = stack.enter_context(open_place(out, settings, overwrite, images))
        missing = folder.lacking(count, first or 0)
        if missing < count:
            note(f"{count - missing} of {count} images are there already")
        batch = engine.batch or 64
        try:
            if denoiser is not None:
                fill = folder.fill(denoiser, followed, count, batch, first or 0)
            else:
                assert cluster is not None
                fill = cluster.fill(folder, count, batch)
            with progress_bar("rate") as bar, contextlib.closing(fill):
                task = bar.add_task("sample", total=count, completed=count - missing, rate="")
                done, start = 0, time.perf_counter()
                for made in fill:
                    done += made
                    speed = done / (time.perf_counter() - start)
                    bar.update(task, advance=made, rate=f"{speed:.1f} images/s")
        except KeyboardInterrupt as stop:
            told = folder.progress(count, first or 0)
            stop_with(f"interrupted: {told}", interrupted_code(stop))
        except OSError as error:  # a full disk, say
            raise LutDeployError(
                f"{error.filename or out}: {error.strerror or error}; "
                f"{folder.progress(count, first or 0)}"
            ) from error
        if grid and images is None:
            sample_folder.write_grid(folder, count)
        if denoiser is not None and (gif or trajectory):
            sample_folder.write_trajectory(folder, denoiser, followed, count, trajectory, gif)
    answer(out)
