"""`lutdeploy train`."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.cli.console import INTERRUPTED, note, progress_bar
from lutdeploy.cli.requests import POSITIVE, SEED
from lutdeploy.config import PRESETS, SIZES
from lutdeploy.errors import LutDeployError, UsageError

if TYPE_CHECKING:
    from lutdeploy.training.data import ImageSet
    from lutdeploy.training.recipes import TrainSettings


def _overrides(pairs: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What --set gives to the model, and what to the recipe."""
    from lutdeploy.training.recipes import RECIPE_FIELDS

    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: write FIELD=VALUE, such as --set width=96")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        (recipe if name in RECIPE_FIELDS else model)[name] = value
    return model, recipe


def _resumed(run: Run, given: dict[str, Any]) -> TrainSettings:
    """The run's own settings, when what was given on the command line agrees with them."""
    import dataclasses

    from lutdeploy.training.loop import resumable_settings

    stored = resumable_settings(run)
    values = stored.to_dict()
    of_model, of_recipe = _overrides(given.get("overrides", ()))
    model = {
        **PRESETS.get(given.get("preset", ""), {}),
        **SIZES.get(given.get("size", ""), {}),
        **of_model,
    }
    for name, value in model.items():
        if values["model"].get(name) != value:
            raise UsageError(
                f"{name} {value}: {run.path} was started with {values['model'].get(name)}"
            )
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    for name, value in of_recipe.items():
        if plain[name] != value:
            raise UsageError(f"--set {name}: {run.path} was started with {plain[name]}")
    for name, value in given.items():
        if name in ("steps", "data", "preset", "size", "overrides"):
            continue
        held = values.get(name)
        if name == "compile":
            held, value = (
                "on" if held else "off",
                {"auto": "on" if held else "off"}.get(value, value),
            )
        if held != value:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: {run.path} was started with {held}"
            )
    changed = {name: given[name] for name in ("steps", "data") if name in given}
    return dataclasses.replace(stored, **changed)


@click.command("train")
@click.option("--data", help="Folder of images (nested PNG, JPEG, WebP), or 'synthetic'.")
@click.option(
    "--preset", type=click.Choice(tuple(PRESETS)), default="static-tanh-64", show_default=True
)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="small", show_default=True)
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
    "--recipe", type=click.Choice(("modern", "post")), default="modern", show_default=True
)
@click.option("--steps", type=POSITIVE, default=5000, show_default=True)
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
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
    show_default=True,
    help="Fraction of the images that is never trained on.",
)
@click.option("--perceptual", type=click.Choice(("none", "lpips")), help="Default: the recipe's.")
@click.option("--precision", type=click.Choice(("fp32", "bf16")), default="fp32", show_default=True)
@click.option(
    "--compile",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    show_default=True,
    help="torch.compile; auto: from 1000 steps, where there is a C++ compiler.",
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--checkpoint-every", type=POSITIVE, default=500, show_default=True)
@click.option("--sample-every", type=POSITIVE, default=500, show_default=True)
@click.pass_context
def command(context: click.Context, /, out: Path, resume: bool, **options: Any) -> None:
    """Train a model on a folder of images, or on drawn ones.

    Writes model.safetensors (the EMA), train.jsonl, pictures and all that --resume needs.
    `torchrun --no-python --nproc-per-node N lutdeploy train …` trains on N devices together.
    """
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    run = Run(out)
    if not _is_first():  # the first looks after the folder
        return _train(run, resume, given, options)
    if not resume and (run.settings.exists() or run.model.exists()):
        raise UsageError(
            f"{out} already holds a run: --resume continues it, or choose another --out"
        )
    if resume and not run.settings.exists():
        raise UsageError(f"{out} holds no training run to resume")
    new = not out.exists()
    files.output_folder(out)
    with files.lock(out, "`lutdeploy train`"):
        try:
            _train(run, resume, given, options)
        except BaseException:
            if new:  # a mistake found late leaves no empty run
                files.remove_if_empty(out)
            raise


def _is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def _train(run: Run, resume: bool, given: dict[str, Any], options: dict[str, Any]) -> None:
    import torch

    from lutdeploy.config import model_config
    from lutdeploy.training.data import draw_set, load_folder
    from lutdeploy.training.loop import Cadence
    from lutdeploy.training.loop import train as train_loop
    from lutdeploy.training.processes import open_processes
    from lutdeploy.training.recipes import TrainSettings, train_settings

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; see `lutdeploy doctor`")
    if resume:
        ignored = ("device", "checkpoint_every", "sample_every")
        settings = _resumed(run, {k: v for k, v in given.items() if k not in ignored})
    else:
        if not options["data"]:
            raise UsageError("--data is needed: a folder of images, or 'synthetic'")
        of_model, of_recipe = _overrides(options["overrides"])
        options["ema"] = options["ema"] or None
        settings = train_settings(
            model_config(options["preset"], options["size"], **of_model),
            options["recipe"],
            compile=_compiles(options["compile"], options["steps"]),
            **{
                name: options[name]
                for name in (
                    "data",
                    "steps",
                    "batch",
                    "seed",
                    "lr",
                    "t_mean",
                    "gram_weight",
                    "ema",
                    "held_out",
                    "perceptual",
                    "precision",
                )
            },
        )
        if of_recipe:
            settings = TrainSettings.from_dict({**settings.to_dict(), **of_recipe})
    processes = open_processes(device)
    model = settings.model
    if settings.data == "synthetic":
        data = draw_set(model.image_size, model.channels)
    else:
        data = load_folder(Path(settings.data), model.image_size, model.channels, scratch=run.path)
    if settings.compile:  # deprecations inside the compiler, which are not the user's to mend
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    if processes.writes:
        _say(settings, data, device, processes.count)
    stopping: list[int] = []
    reached = settings.steps  # where nothing is left to do

    def stop(number: int, frame: Any) -> None:
        # A second Ctrl-C does not wait for the step to end; torchrun passes one on twice.
        if stopping and processes.count == 1:
            raise KeyboardInterrupt
        stopping.append(number)

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        steps = train_loop(
            settings,
            data,
            run,
            processes=processes,
            resume=resume,
            cadence=Cadence(options["checkpoint_every"], options["sample_every"]),
            should_stop=lambda: bool(stopping),
            peak=_peak(device, settings.precision, processes.count),
        )
        if not processes.writes:
            for _ in steps:
                pass
            return
        with progress_bar("loss", "held_out", "rate") as bar:
            task = bar.add_task("train", total=settings.steps, loss="", held_out="", rate="")
            for progress in steps:
                reached = progress.step
                held = "" if progress.held_out is None else f"held out {progress.held_out:.4f}"
                peak = "" if progress.of_peak is None else f", {progress.of_peak:.0%} of peak"
                bar.update(
                    task,
                    completed=progress.step,
                    loss=f"loss {progress.loss:.4f}",
                    held_out=held,
                    rate=f"{progress.images_per_second:.0f} images/s{peak}",
                )
    except OSError as error:  # a full disk, say
        raise LutDeployError(
            f"{error.filename or run.path}: {error.strerror or error}; what was saved before is "
            f"kept, and --resume --out {run.path} continues from it"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if reached < settings.steps:  # this process was asked to stop, or one beside it
        note(f"stopped at a step's end and saved; --resume --out {run.path} continues")
        sys.exit(INTERRUPTED)
    click.echo(run.model)


def _say(settings: TrainSettings, data: ImageSet, device: str, processes: int) -> None:
    """What is trained on what, what was skipped, and whether bfloat16 pays."""
    model = settings.model
    note(
        f"data: {len(data.images)} images, {len(data.skipped)} unreadable; "
        f"model: {model.preset()}, width {model.width}, depth {model.depth}; device: {device}"
        + (f", {processes} processes" if processes > 1 else "")
        + ("; compiling, which takes a minute" if settings.compile else "")
    )
    for line in data.skipped[:20]:
        note(f"  skipped {line}")
    if len(data.skipped) > 20:
        note(f"  … and {len(data.skipped) - 20} more")
    if settings.precision == "bf16" and device == "cpu":
        from lutdeploy.engines.doctor import bf16_speedup

        speedup = bf16_speedup()
        if speedup < 1:
            note(
                f"warning: this CPU multiplies bfloat16 at {speedup:.2g} × the speed of float32; "
                "--precision fp32 trains faster here"
            )


def _peak(device: str, precision: str, processes: int) -> float | None:
    """FLOP/s of matrix products, all processes together; None where they share a CPU."""
    from lutdeploy.engines.benchmark.limits import product_peak

    if device == "cpu" and processes > 1:
        return None
    return processes * product_peak(device, precision)


def _compiles(choice: str, steps: int) -> bool:
    """Whether to use torch.compile. Says so where "auto" has to do without."""
    import shutil

    if choice != "auto":
        return choice == "on"
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if steps >= 1000 and compiler is None:
        note("no C++ compiler here: training without torch.compile, which is slower")
    return steps >= 1000 and compiler is not None
