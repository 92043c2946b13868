"""`lutdeploy sample`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import click

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.sample_folder import Folder, open_place, require_shareable
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import answer, interrupted_code, note, stop_with
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import POSITIVE, SEED, Place, engine_request, schedule_request
from lutdeploy.engines import EngineRequest
from lutdeploy.engines.sampler import Sampler, open_sampler
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
        sampler = stack.enter_context(open_sampler(engine, schedule, address, actors, note))
        stepping = sampler.stepping() if gif or trajectory else None
        if not engine.unverified:
            require_passed(engine.path, sampler.identity, note)
        settings = sample_folder.settings(sampler.identity, sampler.schedule, seed, file_format)
        folder = stack.enter_context(open_place(out, settings, overwrite, images))
        fill(folder, sampler, count, engine.batch or 64, first or 0, out)
        if grid and images is None:
            sample_folder.write_grid(folder, count)
        if stepping is not None:
            sample_folder.write_trajectory(
                folder, stepping, sampler.schedule, count, trajectory, gif
            )
    answer(out)


def fill(folder: Folder, sampler: Sampler, n: int, batch: int, first: int, out: Path | str) -> None:
    """Make what is missing of images first … first+n−1 in ``out``, and show how far that is.

    Where it ends early, the last words say what is there.
    """
    missing = folder.lacking(n, first)
    if missing < n:
        note(f"{n - missing} of {n} images are there already")
    filling = sampler.fill(folder, n, batch, first)
    try:
        with progress_bar("rate") as bar, contextlib.closing(filling):
            task = bar.add_task("sample", total=n, completed=n - missing, rate="")
            done, start = 0, time.perf_counter()
            for made in filling:
                done += made
                speed = done / (time.perf_counter() - start)
                bar.update(task, advance=made, rate=f"{speed:.1f} images/s")
    except KeyboardInterrupt as stop:
        stop_with(f"interrupted: {folder.progress(n, first)}", interrupted_code(stop))
    except OSError as error:  # a full disk, say
        raise LutDeployError(
            f"{error.filename or out}: {error.strerror or error}; {folder.progress(n, first)}"
        ) from error
