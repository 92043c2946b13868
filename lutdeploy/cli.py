"""The command line. Options are typed and checked here; each command is one call.

Heavy modules are imported inside the commands, so that --help is immediate.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy import __version__, bundle
from lutdeploy.config import PRESETS, SIZES
from lutdeploy.errors import LutDeployError, ParityError, UsageError
from lutdeploy.signature import GRAPHS
from lutdeploy.solvers import SOLVERS

if TYPE_CHECKING:
    from rich.progress import Progress

    from engines import Engine
    from engines.cuda_device import CudaDevice
    from engines.tensorrt_support import GraphReport
    from lutdeploy import plan
    from lutdeploy.model import LutTransformer
    from training.recipes import TrainSettings

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
OUT_OF_MEMORY = "out of memory; try a smaller --batch"


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """What libraries make of a Ctrl-C, an import error say, is a KeyboardInterrupt again."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell's background job is told to ignore it
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class OneLineErrors(click.Group):
    """Errors as one line on stderr: exit code 2 for usage, 1 for failure, 130 for Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            with _interrupts():
                code = super().main(*args, **kwargs)
        except click.ClickException as error:
            _stop(error.format_message(), error.exit_code)
        except LutDeployError as error:
            _stop(str(error), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _stop("interrupted", INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # nobody reads; the interpreter would complain at exit
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _stop(f"{where}{error.strerror or error}", 1)
        except MemoryError:
            _stop(OUT_OF_MEMORY, 1)
        except RuntimeError as error:  # PyTorch's allocators raise nothing more telling
            if not ("memory" in str(error) and "allocate" in str(error)):
                raise
            _stop(OUT_OF_MEMORY, 1)
        sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="lutdeploy")
@click.pass_context
def cli(context: click.Context, /) -> None:
    """Train, export, verify and sample LUT denoisers.

    Commands that take a RUN use the newest run under runs/ when none is given, and the
    model that comes with the package when there is none.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _note(text: str) -> None:
    """What a person wants to know and a pipe does not."""
    click.echo(text, err=True)


def _find(run: Path | None) -> Path:
    """The given run, else the newest, else the embedded model; says which when it chose."""
    if run is not None:
        return run
    newest = bundle.newest_run()
    if newest is not None:
        _note(f"run: {newest.path} (the newest)")
        return newest.path
    _note(f"model: {bundle.embedded_model().stem} (embedded; there is no run under runs/)")
    return bundle.embedded_model()


def _find_run(path: Path | None) -> bundle.Run:
    """A run to write into; the embedded model gets a run of its own."""
    chosen = _find(path)
    if chosen == bundle.embedded_model():
        run = bundle.Run(bundle.RUNS / chosen.stem)
        bundle.write_atomic(run.model, chosen.read_bytes())
        _note(f"run: {run.path} (made for the embedded model)")
        return run
    if chosen.name == bundle.MODEL and chosen.is_file():
        return bundle.Run(chosen.parent)
    located = bundle.locate(chosen)
    if located.run is None:
        raise UsageError(f"{chosen} belongs to no run folder, where results could be written")
    return located.run


@contextlib.contextmanager
def _progress(*fields: str) -> Iterator[Progress]:
    """A progress bar on stderr with the named fields and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.fields[" + name + "]}") for name in fields]
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        yield bar


def _open(
    path: Path,
    backend: str,
    device: str | None,
    export: str | None,
    threads: int | None,
    **special: Any,
) -> Engine:
    """Open an engine and say what it is; ``special``: what one backend alone asks for."""
    from engines import open_engine

    engine = open_engine(path, backend, device, export, threads, **special)
    made = engine.identity
    name = f", export {made['export']}" if made["export"] else ""
    _note(f"backend: {made['backend']} on {made['device']}{name}")
    return engine


# Options that several commands share.

POSITIVE = click.IntRange(min=1)
RUN = click.argument("run", required=False, type=click.Path(path_type=Path))
SEED = click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
BACKEND = click.option(
    "--backend",
    type=click.Choice(("auto", "torch", "onnxruntime", "openvino", "tensorrt")),
    default="auto",
    show_default=True,
    help="auto: onnxruntime when the run has an export, else torch.",
)
DEVICE = click.option(
    "--device",
    help="cpu, cuda or cuda:N. Default: cuda for tensorrt, else cpu. No fallback.",
)
PROVIDER = click.option(
    "--provider",
    help="cpu, cuda, tensorrt, or the name of an execution provider, for --backend onnxruntime. "
    "No fallback.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(("fp32", "bf16")),
    help="Arithmetic of --backend openvino. Default: fp32. Elsewhere it is the export's.",
)
EXPORT = click.option("--export", help="Name of an export of the run; the newest by default.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 1024),  # many more, and starting them takes the process down
    help="CPU threads; the backend's own choice by default.",
)
SOLVER = click.option("--solver", type=click.Choice(tuple(SOLVERS)), help="Default: euler.")
STEPS = click.option("--steps", type=POSITIVE, help="Network evaluations. Default: 64.")
SHIFT = click.option(
    "--shift",
    type=click.FloatRange(min=0, min_open=True),
    help="Warp of the time grid. Default: 1.",
)


def _place(backend: str, device: str | None, provider: str | None) -> tuple[str, str | None]:
    """The backend and the device that --device and --provider mean together."""
    if provider is None:
        return backend, device
    if device is not None:
        raise UsageError("--provider says where ONNX Runtime computes; leave out --device")
    if backend not in ("auto", "onnxruntime"):
        raise UsageError(f"--provider belongs to --backend onnxruntime, not {backend}")
    return "onnxruntime", provider


# train


def _model_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: write FIELD=VALUE, such as --set width=96")
        try:
            overrides[name] = json.loads(text)
        except ValueError:
            overrides[name] = text
    return overrides


def _resumed(run: bundle.Run, given: dict[str, Any]) -> TrainSettings:
    """The run's own settings, when what was given on the command line agrees with them."""
    import dataclasses

    from training.loop import resumable_settings

    stored = resumable_settings(run)
    values = stored.to_dict()
    model = {
        **PRESETS.get(given.get("preset", ""), {}),
        **SIZES.get(given.get("size", ""), {}),
        **_model_overrides(given.get("overrides", ())),
    }
    for name, value in model.items():
        if values["model"].get(name) != value:
            raise UsageError(
                f"{name} {value}: {run.path} was started with {values['model'].get(name)}"
            )
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


@cli.command()
@click.option("--data", help="Folder of images (nested PNG, JPEG, WebP), or 'synthetic'.")
@click.option(
    "--preset", type=click.Choice(tuple(PRESETS)), default="static-tanh-64", show_default=True
)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="small", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Any model field.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Such as runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings.")
@click.option(
    "--recipe", type=click.Choice(("modern", "post")), default="modern", show_default=True
)
@click.option("--steps", type=POSITIVE, default=5000, show_default=True)
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
@SEED
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Default: the recipe's.")
@click.option("--t-mean", type=float, help="μ of logit t; recipe modern: -0.8.")
@click.option("--gram-weight", type=click.FloatRange(min=0), help="Default: the recipe's.")
@click.option("--ema", type=click.FloatRange(0, 1, max_open=True), help="Default: the recipe's.")
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
def train(context: click.Context, /, out: Path, resume: bool, **options: Any) -> None:
    """Train a model on a folder of images, or on drawn ones.

    Writes model.safetensors (the EMA), train.jsonl, pictures and all that --resume needs.
    """
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    run = bundle.Run(out)
    if not resume and (run.settings.exists() or run.model.exists()):
        raise UsageError(
            f"{out} already holds a run: --resume continues it, or choose another --out"
        )
    if resume and not run.settings.exists():
        raise UsageError(f"{out} holds no training run to resume")
    bundle.output_folder(out)
    with bundle.lock(out, "`lutdeploy train`"):
        _train(run, resume, given, options)


def _train(run: bundle.Run, resume: bool, given: dict[str, Any], options: dict[str, Any]) -> None:
    import torch

    from lutdeploy.config import model_config
    from training.data import draw_set, load_folder
    from training.loop import Schedule
    from training.loop import train as train_loop
    from training.recipes import train_settings

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
        overrides = _model_overrides(options["overrides"])
        settings = train_settings(
            model_config(options["preset"], options["size"], **overrides),
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
    model = settings.model
    if settings.data == "synthetic":
        data = draw_set(model.image_size, model.channels)
    else:
        data = load_folder(Path(settings.data), model.image_size, model.channels, scratch=run.path)
    _note(
        f"data: {len(data.images)} images, {len(data.skipped)} unreadable; "
        f"model: {model.preset()}, width {model.width}, depth {model.depth}; device: {device}"
        + ("; compiling, which takes a minute" if settings.compile else "")
    )
    for line in data.skipped[:20]:
        _note(f"  skipped {line}")
    if len(data.skipped) > 20:
        _note(f"  … and {len(data.skipped) - 20} more")

    if settings.precision == "bf16" and device == "cpu":
        from engines.doctor import bf16_speedup

        speedup = bf16_speedup()
        if speedup < 1:
            _note(
                f"warning: this CPU multiplies bfloat16 at {speedup:.2g} × the speed of float32; "
                "--precision fp32 trains faster here"
            )
    if settings.compile:  # deprecations inside the compiler, which are not the user's to mend
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    stopping: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if stopping:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        stopping.append(number)

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _progress("loss", "held_out", "rate") as bar:
            task = bar.add_task("train", total=settings.steps, loss="", held_out="", rate="")
            for progress in train_loop(
                settings,
                data,
                run,
                device=device,
                resume=resume,
                schedule=Schedule(options["checkpoint_every"], options["sample_every"]),
                should_stop=lambda: bool(stopping),
            ):
                held = "" if progress.held_out is None else f"held out {progress.held_out:.4f}"
                bar.update(
                    task,
                    completed=progress.step,
                    loss=f"loss {progress.loss:.4f}",
                    held_out=held,
                    rate=f"{progress.images_per_second:.0f} images/s",
                )
    except OSError as error:  # a full disk, say
        raise LutDeployError(
            f"{error.filename or run.path}: {error.strerror or error}; what was saved before is "
            f"kept, and --resume --out {run.path} continues from it"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopping:
        _note(f"stopped at a step's end and saved; --resume --out {run.path} continues")
        sys.exit(INTERRUPTED)
    click.echo(run.model)


def _compiles(choice: str, steps: int) -> bool:
    """Whether to use torch.compile. Says so where "auto" has to do without."""
    import shutil

    if choice != "auto":
        return choice == "on"
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if steps >= 1000 and compiler is None:
        _note("no C++ compiler here: training without torch.compile, which is slower")
    return steps >= 1000 and compiler is not None


# import


@cli.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Such as runs/NAME.")
@click.option("--heads", type=POSITIVE, default=8, show_default=True, help="Not in the file.")
@click.option("--weights", type=click.Choice(("tanh", "softmax")), help="Not in the file.")
@click.option("--image-size", type=POSITIVE, default=64, show_default=True, help="Not in the file.")
@click.option("--overwrite", is_flag=True, help="Replace the model of an existing run.")
def import_(
    file: Path, out: Path, heads: int, weights: str | None, image_size: int, overwrite: bool
) -> None:
    """Read one of the original author's checkpoints (.pth) into a run.

    Nothing in the file is executed. Preset, width, depth and K come from the shapes.
    """
    from lutdeploy.checkpoint import import_author_file, save_model

    run = bundle.Run(out)
    if run.model.exists() and not overwrite:
        raise UsageError(f"{run.model} exists; choose another --out, or --overwrite")
    model = import_author_file(file, heads, weights, image_size)
    config = model.config
    assumed = "as told" if weights else "assumed; --weights tells otherwise"
    _note(
        f"inferred: preset {config.preset()}, width {config.width}, depth {config.depth}, "
        f"K {config.entries}, {config.heads} heads (--heads), {config.weights} weights ({assumed})"
    )
    bundle.output_folder(out)
    save_model(model, run.model, about={"origin": "import", "file": file.name})
    click.echo(run.model)


# export


@cli.command()
@RUN
@click.option("--fp16", is_flag=True, help="float16 body with float32 islands.")
@click.option("--graph", type=click.Choice(GRAPHS), default="step", show_default=True)
@SOLVER
@STEPS
@SHIFT
@click.option(
    "--author-format",
    type=click.Path(path_type=Path),
    metavar="FILE.pth",
    help="Write the author's state dict instead of ONNX.",
)
def export(
    run: Path | None,
    fp16: bool,
    graph: str,
    solver: str | None,
    steps: int | None,
    shift: float | None,
    author_format: Path | None,
) -> None:
    """Export a run to ONNX and check it against PyTorch before it takes its place.

    step: one step of any solver. per-step: a graph for each step, constants inside.
    loop: the whole trajectory in one graph.
    """
    if graph == "step" and (solver, steps, shift) != (None, None, None):
        raise UsageError(
            "--solver, --steps and --shift belong to --graph per-step and loop; "
            "a step graph follows any"
        )
    from lutdeploy.checkpoint import load_model, save_author_file
    from lutdeploy.export import ExportPlan, export_model
    from lutdeploy.sampling import choose_table

    target = _find_run(run)
    model = load_model(target.model)
    if author_format is not None:
        save_author_file(model, author_format)
        click.echo(author_format)
        return
    table = None if graph == "step" else choose_table(None, solver, steps, shift)
    plan = ExportPlan(graph, "fp16" if fp16 else "fp32", table)

    def verify(folder: Path) -> None:
        from engines import open_engine
        from lutdeploy.parity import compare
        from lutdeploy.sampling import batch_noise

        levels = ("trajectory", "picture") if graph == "loop" else ("step",)
        noise = batch_noise(0, range(1 if graph == "loop" else 2), model.config.image_shape)
        with open_engine(folder, "onnxruntime") as engine:
            report = compare(model, engine, plan.precision, noise=noise, levels=levels)
        if not report.passed:
            raise ParityError(
                f"{plan.name} differs from PyTorch and was not kept: {report.failures()[0]}"
            )

    with bundle.lock(target.path / "onnx", "`lutdeploy export`"):
        folder = export_model(model, plan, target, bundle.sha256(target.model), verify)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    _note(f"exported and checked against PyTorch, {size:.1f} MB")
    click.echo(folder)


# build


@cli.command()
@RUN
@EXPORT
@click.option("--graph", type=click.Choice(GRAPHS), help="The newest export of this kind.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=("1:64:256",),
    show_default=True,
    metavar="N|MIN:OPT:MAX",
    help="A static batch, or a range tuned for OPT; again for an engine each.",
)
@click.option("--workspace", type=POSITIVE, metavar="MIB", help="Default: what TensorRT takes.")
@click.option(
    "--opt-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How hard TensorRT searches.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Default: engines/timing.cache in the run.",
)
@click.option("--hardware-compatible", is_flag=True, help="For every GPU from Ampere on; slower.")
@click.option("--version-compatible", is_flag=True, help="For later TensorRT versions; slower.")
@click.option("--refittable", is_flag=True, help="Weights can be changed afterwards; slower.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--dry-run", is_flag=True, help="Check the graphs, say what would be built.")
@click.option("--force", is_flag=True, help="Build even what is there and fits.")
def build(
    run: Path | None,
    export: str | None,
    graph: str | None,
    batches: tuple[str, ...],
    workspace: int | None,
    opt_level: int,
    timing_cache: Path | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refittable: bool,
    device: str,
    dry_run: bool,
    force: bool,
) -> None:
    """Build TensorRT engines from an export, and check them before they may be used.

    Precision is the export's: `lutdeploy export --fp16` makes a float16 engine. An engine that
    is there and fits exactly is used again. Exit code 1 when an engine fails its checks.
    """
    from lutdeploy import plan

    options = [
        plan.BuildOptions(
            batch=plan.BatchProfile.parse(text),
            workspace_mib=workspace,
            optimization_level=opt_level,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            refittable=refittable,
        )
        for text in batches
    ]
    target = _find_run(run)
    manifest = _export_to_build(target, run, export, graph)
    if manifest.precision == "fp32":
        _note("this export is float32, and so will be the engine; --fp16 belongs to `export`")
    graphs = _check_graphs(manifest)
    if dry_run:
        for option in options:
            _say_what_would_be_built(target, manifest, option, device, force)
        return
    from engines import require_tensorrt

    require_tensorrt()
    from engines.cuda_device import CudaDevice

    gpu = CudaDevice(device)
    if timing_cache is not None and opt_level == 0:
        _note("TensorRT ignores the timing cache at --opt-level 0")
    with bundle.lock(target.engines, "`lutdeploy build`", on_wait=_note):
        for option in options:
            _build(target, manifest, graphs, option, gpu, timing_cache, force)


def _export_to_build(
    target: bundle.Run, given: Path | None, export: str | None, graph: str | None
) -> bundle.Manifest:
    """The manifest of the export that was asked for, by path, name or kind; else the newest."""
    from engines import choose_export, require_same_model

    located = bundle.locate(given if given is not None and given.is_dir() else target.path)
    if graph is not None and export is None and located.export is None:
        kinds = [e for e in target.exports() if bundle.read_manifest(e).graph == graph]
        if not kinds:
            raise UsageError(
                f"{target.path} has no {graph} export; run `lutdeploy export --graph {graph}` first"
            )
        export = kinds[0].name
    folder = choose_export(located, export)
    if folder is None:
        raise UsageError(f"{target.path} has no export; run `lutdeploy export --fp16` first")
    manifest = bundle.read_manifest(folder)
    if graph is not None and manifest.graph != graph:
        raise UsageError(f"{folder} is a {manifest.graph} export, not {graph}")
    require_same_model(manifest, target.model)
    _note(f"export: {manifest.name}")
    return manifest


def _check_graphs(manifest: bundle.Manifest) -> list[GraphReport]:
    """Hold the graphs against what TensorRT takes; a problem ends here, a warning is said."""
    from engines.tensorrt_support import check_graph

    manifest.verify()
    warnings: dict[str, None] = {}
    reports = []
    for name in manifest.graphs:
        report = check_graph(manifest.folder / name, manifest.precision, manifest.config)
        if report.problems:
            raise LutDeployError(
                f"{manifest.folder / name} does not suit TensorRT: {'; '.join(report.problems[:3])}"
            )
        warnings |= dict.fromkeys(report.warnings)
        reports.append(report)
    for warning in warnings:
        _note(f"warning: {warning}")
    _note(f"{len(manifest.graphs)} graph(s): operators, types, axes and islands suit TensorRT")
    return reports


def _say_what_would_be_built(
    target: bundle.Run,
    manifest: bundle.Manifest,
    option: plan.BuildOptions,
    device: str,
    force: bool,
) -> None:
    from engines import tensorrt_machine
    from lutdeploy import plan

    machine = tensorrt_machine(device)
    if machine is None:
        size = f"{len(manifest.graphs)} engine(s), batch {option.batch}"
        click.echo(f"would build {size}; TensorRT or the GPU is missing here, so no key is known")
        return
    for name in manifest.graphs:
        fields = plan.key_fields(manifest, name, option, machine)
        there = not force and plan.find_plan(target, fields) is not None
        click.echo(
            f"{'would reuse' if there else 'would build'} {target.plan(plan.key_of(fields))}"
        )


def _build(
    target: bundle.Run,
    manifest: bundle.Manifest,
    graphs: list[GraphReport],
    option: plan.BuildOptions,
    gpu: CudaDevice,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Build one set of engines, judge those that are new or were never judged, show it."""
    from engines.tensorrt_builder import build_export, judge
    from lutdeploy.checkpoint import load_model

    with _build_progress(len(manifest.graphs)) as on_phase:
        built = build_export(
            target, manifest, option, gpu, timing_cache, force, on_phase, note=_note
        )
    records = [record for record, _ in built]
    reused = sum(again for _, again in built)
    if reused:
        _note(f"{reused} engine(s) were there already and fit: reused")
    if reused == len(built) and all(record.verdict == "passed" for record in records):
        _note("their checks passed when they were built")
    else:
        _note("checking layers and parity")
        model = load_model(target.model)
        with _float32_reference(target, manifest, model) as reference:
            records, layers, report = judge(records, graphs, manifest, gpu, model, reference)
        for warning in layers.warnings:
            _note(f"warning: {warning}")
        _note(
            f"layers: {layers.float16_products} matrix products in float16, "
            f"{layers.float32_products} in float32, {layers.fused_attention} fused attentions"
        )
        if report is not None:
            _show_report(report)
        if layers.failures or report is None:
            raise ParityError(f"the engine is not what its export says: {layers.failures[0]}")
        if not report.passed:
            raise ParityError(f"the engine failed parity: {'; '.join(report.failures()[:2])}")
    for record in records:
        click.echo(record.plan)


@contextlib.contextmanager
def _build_progress(graphs: int) -> Iterator[Callable[[int, str], None]]:
    """The builder's phase and the time it has taken; gives what is to be told each phase."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("build")

        def on_phase(k: int, phase: str) -> None:
            number = f" {k + 1} of {graphs}" if graphs > 1 else ""
            bar.update(task, description=f"build{number}: {phase[:60]}")

        yield on_phase


@contextlib.contextmanager
def _float32_reference(
    target: bundle.Run, manifest: bundle.Manifest, model: LutTransformer
) -> Iterator[Engine]:
    """ONNX Runtime on the CPU in float32: the run's step export, or one made for this."""
    import tempfile

    from engines import open_engine
    from lutdeploy.export import ExportPlan, export_model

    step = ExportPlan()
    folder = target.export_folder(step.name)
    fresh = (folder / bundle.MANIFEST).is_file() and bundle.read_manifest(
        folder
    ).source_sha256 == manifest.source_sha256
    with tempfile.TemporaryDirectory() as scratch:
        if not fresh:
            own = bundle.Run(Path(scratch))
            folder = export_model(model, step, own, manifest.source_sha256)
        with open_engine(folder, "onnxruntime", "cpu") as reference:
            yield reference


# parity


@cli.command()
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
    from lutdeploy.parity import compare
    from lutdeploy.sampling import batch_noise, check_table, choose_table

    backend, device = _place(backend, device, provider)
    if backend == "torch" and (fp16 or export):
        raise UsageError("--fp16 and --export name an export; --backend torch runs the model")
    path = _find(run)
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
    opened = _open(
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
        record = {**made, "lutdeploy": __version__, **report.to_dict()}
        known = located.run.verdicts()
        known[_parity_key(made)] = record
        bundle.write_json(located.run.parity, known)
    _show_report(report)
    if not report.passed:
        raise ParityError(f"parity failed: {'; '.join(report.failures()[:2])}")
    click.echo("parity: passed")


def _parity_key(identity: dict[str, Any]) -> str:
    return f"{identity['export'] or 'model'} {identity['backend']} {identity['device']}"


def _show_report(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report.precision}, {report.table.describe()}, {report.images} images"
    table = Table("level", "what", "measure", "value", "limit", "", title=title)
    for check in report.checks:
        verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(
            check.level,
            check.what,
            check.measure,
            f"{check.value:.3g}",
            f"{check.limit:.3g}",
            verdict,
        )
    console = Console(stderr=True)
    console.print(table)
    final = report.final
    drift = [report.drift[k] for k in sorted({0, len(report.drift) // 2, len(report.drift) - 1})]
    console.print(
        f"final pictures: max abs {final.max_abs:.3g}, PSNR {final.psnr:.1f} dB, cosine "
        f"{final.cosine:.8f}; rms drift, first to last step: {', '.join(f'{d:.2g}' for d in drift)}"
    )


# sample


@cli.command()
@RUN
@click.option("-n", "count", type=POSITIVE, default=64, show_default=True, help="Images.")
@click.option("--out", type=click.Path(path_type=Path), default="samples", show_default=True)
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
@STEPS
@SOLVER
@SHIFT
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
def sample(
    run: Path | None,
    count: int,
    out: Path,
    batch: int,
    steps: int | None,
    solver: str | None,
    shift: float | None,
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
    from lutdeploy import sample_folder
    from lutdeploy.sampling import check_table, choose_table

    backend, device = _place(backend, device, provider)
    path = _find(run)
    opened = _open(
        *(path, backend, device, export, threads),
        batch=batch,
        unverified=unverified,
        precision=precision,
    )
    with opened as engine:
        table = choose_table(engine.table, solver, steps, shift)
        check_table(engine, table)
        if engine.whole_trajectory and (gif or trajectory):
            raise UsageError("a loop export shows no steps; --gif and --trajectory need another")
        if not unverified:
            _require_verdict(path, engine.identity)
        settings = sample_folder.settings(engine.identity, table, seed, file_format)
        with sample_folder.open_folder(out, settings, overwrite) as folder:
            missing = len(folder.missing(count))
            if missing < count:
                _note(f"{count - missing} of {count} images are there already")
            try:
                with _progress("rate") as bar:
                    task = bar.add_task("sample", total=count, completed=count - missing, rate="")
                    done, start = 0, time.perf_counter()
                    for made in sample_folder.fill(folder, engine, table, count, batch):
                        done += made
                        speed = done / (time.perf_counter() - start)
                        bar.update(task, advance=made, rate=f"{speed:.1f} images/s")
            except KeyboardInterrupt:
                _stop(f"interrupted: {folder.progress(count)}", INTERRUPTED)
            except OSError as error:  # a full disk, say
                raise LutDeployError(
                    f"{error.filename or out}: {error.strerror or error}; {folder.progress(count)}"
                ) from error
            if grid:
                sample_folder.write_grid(folder, count)
            if gif or trajectory:
                sample_folder.write_trajectory(folder, engine, table, count, trajectory, gif)
    click.echo(out)


def _require_verdict(path: Path, identity: dict[str, Any]) -> None:
    """Refuse an export whose last parity run failed; say so where there was none."""
    if identity["export"] is None:
        return
    run = bundle.locate(path).run
    verdicts = run.verdicts() if run else {}
    verdict = verdicts.get(_parity_key(identity), {})
    if verdict.get("engine_sha256") != identity["engine_sha256"]:
        if identity["backend"] != "tensorrt":  # an engine has the verdict of its build
            _note(
                "this export has passed the check at export; `lutdeploy parity` has not judged "
                "it yet"
            )
    elif not verdict.get("passed"):
        raise ParityError(
            f"export {identity['export']} failed parity; `lutdeploy parity` shows where, "
            "--unverified samples all the same"
        )


# inspect, doctor


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what a run, an export or a model file is, and verify its files."""
    from lutdeploy.inspection import inspect_path

    machine = None
    if path.is_dir() and bundle.Run(path).plan_records():
        from engines import tensorrt_machine

        machine = tensorrt_machine()
    found = inspect_path(path, machine)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for line in _describe(found):
        click.echo(line)


def _describe(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    if found["kind"] == "run":
        yield f"{indent}run {found['path']}"
        yield from _describe(found["model"], indent + "  ")
        for part in found["exports"]:
            yield from _describe(part, indent + "  ")
        for engine in found["engines"]:
            yield from _describe_engine(engine, indent + "  ")
        for name, verdict in found["parity"].items():
            word = "passed" if verdict.get("passed") else "FAILED"
            yield f"{indent}  parity {name}: {word} ({verdict.get('solver')})"
        return
    config = found["config"]
    if found["kind"] == "model":
        yield f"{indent}model {found['path']}"
        yield (
            f"{indent}  {found['preset']}, {found['parameters'] / 1e6:.3f} M parameters, "
            f"{'/'.join(found['dtypes'])}, {found['bytes'] / 1e6:.1f} MB"
        )
    else:
        solver = f", {found['solver']}" if found["solver"] else ""
        stale = "; STALE: the model has changed since" if found.get("stale") else ""
        yield f"{indent}export {found['path']}"
        yield (
            f"{indent}  {found['preset']}, {found['graph']}, {found['precision']}{solver}, "
            f"{found['graphs']} graph(s), opset {found['opset']}, {found['bytes'] / 1e6:.1f} MB"
        )
        yield f"{indent}  files verified by sha256; exported {found['created']}{stale}"
        if found["islands"]:
            yield f"{indent}  float32 islands: {'; '.join(found['islands'])}"
    yield (
        f"{indent}  {config['image_size']}×{config['image_size']}×{config['channels']}, width "
        f"{config['width']}, depth {config['depth']}, {config['heads']} heads, K "
        f"{config['entries']}; {found['gflop_per_image_and_step']} GFLOP per image and step"
    )


def _describe_engine(found: dict[str, Any], indent: str) -> Iterator[str]:
    yield f"{indent}engine {found['path']}"
    if "fields" in found:
        fields = found["fields"]
        yield (
            f"{indent}  of {found['export']}/{found['graph_file']}, batch {fields['batch']}, "
            f"{fields['precision']}, {found['bytes'] / 1e6:.1f} MB, checks: {found['verdict']}"
        )
        yield (
            f"{indent}  TensorRT {fields['tensorrt']}, CUDA {fields['cuda']}, {fields['gpu']}, "
            f"compute capability {fields['compute_capability']}"
        )
    if not found["machine_compared"]:
        yield f"{indent}  not compared with this machine: TensorRT or the GPU is missing here"
    for reason in found["stale"]:
        yield f"{indent}  STALE: {reason}"


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """Say what is installed, which backends and providers compute here, what is missing.

    Exit code 1 when something that every installation needs is missing.
    """
    import dataclasses

    from engines.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = "ok" if finding.works else ("MISSING" if finding.required else "-")
            click.echo(f"{mark:8}{finding.subject:39} {finding.detail}")
    broken = [finding.subject for finding in findings if finding.required and not finding.works]
    if broken:
        raise LutDeployError(f"missing or broken: {', '.join(broken)}")


if __name__ == "__main__":
    cli()
