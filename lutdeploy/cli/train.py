"""`lutdeploy train`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts.run import Run
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import POSITIVE, SEED
from lutdeploy.config import PRESETS, SIZES

if TYPE_CHECKING:
    from lutdeploy.cli.progress import Progress as Bar
    from lutdeploy.training.loop import Progress


@click.command("train", context_settings={"show_default": True})
@click.option("--data", help="Folder of images of any common kind, nested, or 'synthetic'.")
@click.option("--preset", type=click.Choice(tuple(PRESETS)), default="static-tanh-64")
@click.option("--size", type=click.Choice(tuple(SIZES)), default="small")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any other number of the model or the recipe; lists as [a,b].",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Such as runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings.")
@click.option(
    "--warm-restart",
    is_flag=True,
    help="With --resume and more --steps: warm up and decay the learning rate again, over the "
    "steps that are left. Default: the rate of a run of so many steps from the beginning.",
)
@click.option(
    "--init",
    metavar="RUN",
    help="Begin with the weights of this run, model file or model of the package.",
)
@click.option("--recipe", type=click.Choice(("modern", "post")), default="modern")
@click.option("--steps", type=POSITIVE, default=5000)
@click.option("--batch", type=POSITIVE, default=64)
@SEED
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Default: the recipe's.")
@click.option("--t-mean", type=float, help="μ of logit t. Default: the recipe's.")
@click.option("--gram-weight", type=click.FloatRange(min=0), help="Default: the recipe's.")
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, max_open=True),
    multiple=True,
    help="Decay of an average of the weights; may be repeated. Default: the recipe's.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    help="Fraction of the images that is never trained on.",
)
@click.option("--perceptual", type=click.Choice(("none", "lpips")), help="Default: the recipe's.")
@click.option("--precision", type=click.Choice(("fp32", "bf16")), default="fp32")
@click.option(
    "--compile",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    help="torch.compile; auto: from 1000 steps, where it works.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--checkpoint-every", type=POSITIVE, default=500)
@click.option("--sample-every", type=POSITIVE, default=500)
@click.pass_context
def command(
    context: click.Context,
    /,
    out: Path,
    resume: bool,
    device: str,
    checkpoint_every: int,
    sample_every: int,
    preset: str,
    size: str,
    overrides: tuple[str, ...],
    compile: str,
    warm_restart: bool,
    **fields: Any,
) -> None:
    """Train a model on a folder of images, or on drawn ones.

    Writes model.safetensors (the EMA), train.jsonl, pictures and all that --resume needs.
    `torchrun --no-python --nproc-per-node N lutdeploy train …` trains on N devices together.
    """
    from lutdeploy.engines.benchmark.limits import product_peak
    from lutdeploy.engines.doctor import bf16_speedup
    from lutdeploy.training import session
    from lutdeploy.training.data import load_once
    from lutdeploy.training.loop import Cadence, train
    from lutdeploy.training.processes import open_processes

    command_line = click.core.ParameterSource.COMMANDLINE
    given = (name for name in context.params if context.get_parameter_source(name) is command_line)
    request = session.Request(
        frozenset(given), preset, size, overrides, compile, warm_restart, fields
    )
    run = Run(out)
    with session.hold_folder(run, resume):
        processes = open_processes(session.choose_device(device))
        place = str(processes.device)
        say: Callable[[str], None] = note if processes.writes else lambda text: None
        if resume:
            settings = session.resumed_settings(run, request, say, place)
        else:
            settings = session.new_settings(request, say, place)
        model = settings.model
        shape = model.image_size, model.channels
        with progress_bar() if processes.writes else contextlib.nullcontext() as bar:
            data = load_once(processes, settings.data, *shape, out, _reading(bar))
        if resume:
            check = partial(session.require_same_images, run, data, settings.data, say)
            processes.by_first(check)  # which alone knows the files
        session.describe(settings, data, processes, bf16_speedup, say)
        if settings.compile:
            session.quiet_compiler()
        with session.stoppable(run, processes) as requests:
            steps = train(
                settings,
                data,
                run,
                processes=processes,
                resume=resume,
                cadence=Cadence(checkpoint_every, sample_every),
                should_stop=lambda: bool(requests),
                peak=session.peak_of(processes, settings.precision, product_peak),
            )
            if not processes.writes:
                for _ in steps:
                    pass
                return
            reached = follow(steps, settings.steps)
    if reached < settings.steps:
        note(f"stopped at a step's end and saved; --resume --out {run.path} continues")
        sys.exit(128 + (requests or [signal.SIGINT])[0])  # none: another process was asked
    answer(run.model)


def _reading(bar: Bar | None) -> Callable[[int, int], None]:
    """What shows in a progress bar how many images are read; nothing where there is no bar."""
    tasks: list[Any] = []

    def update(done: int, total: int) -> None:
        if bar is not None:
            if not tasks:
                tasks.append(bar.add_task("data", total=total))
            bar.update(tasks[0], completed=done)

    return update


def follow(steps: Iterable[Progress], total: int) -> int:
    """Show the steps in a progress bar; returns the last one."""
    reached = total  # where nothing is left to do
    with progress_bar("loss", "held_out", "rate") as bar:
        task = bar.add_task("train", total=total, loss="", held_out="", rate="")
        for progress in steps:
            reached = progress.step
            fields: dict[str, Any] = {"loss": f"loss {progress.loss:.4f}"}
            if progress.held_out_loss is not None:
                fields["held_out"] = f"held out {progress.held_out_loss:.4f}"
            fields["rate"] = f"{progress.images_per_second:.0f} images/s"
            if progress.of_peak is not None:
                fields["rate"] += f", {progress.of_peak:.0%} of peak"
            bar.update(task, completed=reached, **fields)
    return reached
