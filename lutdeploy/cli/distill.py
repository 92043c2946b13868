"""`lutdeploy distill`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import MODEL, RUNS, Run, locate
from lutdeploy.artefacts.target import find, find_model, find_run
from lutdeploy.artefacts.tuned_steps import KnownDenoiser, distilled_schedule
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import PATH, POSITIVE, SEED, engine_request
from lutdeploy.cli.train import follow
from lutdeploy.cli.tune_steps import float32_engine
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import UsageError

if TYPE_CHECKING:
    from lutdeploy.training.evaluation.data import Trained
    from lutdeploy.training.few_steps.distill import Paths
    from lutdeploy.training.recipes import Guidance, TrainSettings


@click.command("distill", context_settings={"show_default": True})
@engine_request(leave_out=("device", "provider", "batch"), look=False)
@click.option(
    "--steps", type=click.IntRange(1, 16), default=4, help="Network evaluations of the new model."
)
@click.option("--out", type=PATH, help="Default: runs/NAME-distilled-STEPS.")
@click.option("--resume", is_flag=True, help="Continue the run in --out as it was started.")
@click.option(
    "--paths",
    type=POSITIVE,
    default=32_000,
    help="Of the teacher, to learn from; a path of 64×64 pixels takes 25 kB of disk for each of "
    "the --steps.",
)
@click.option(
    "--guide",
    metavar="RUN",
    help="A weaker model, say an earlier one, that the teacher is guided away from.",
)
@click.option(
    "--guidance",
    type=click.FloatRange(min=1, min_open=True),
    default=2.0,
    help="Weight of --guide; 1 would be none.",
)
@click.option(
    "--guidance-interval",
    metavar="FROM TO",
    type=click.FloatRange(0, 1),
    nargs=2,
    default=(0.1, 0.9),
    help="Times t between which --guide counts.",
)
@click.option("--train-steps", type=POSITIVE, default=4000, help="Steps of the optimiser.")
@click.option("--batch", type=POSITIVE, default=64, help="Images of a step.")
@SEED
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Default: 3e-4.")
@click.option(
    "--optimizer",
    type=click.Choice(("adamw", "muon")),
    default="adamw",
    help="See docs/training.md; the two have not been compared here.",
)
@click.option(
    "--train-precision",
    type=click.Choice(("fp32", "bf16")),
    default="fp32",
    help="Arithmetic of the training.",
)
@click.option(
    "--compile",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    help="torch.compile; auto: from 1000 steps, where there is a C++ compiler.",
)
@click.option(
    "--device",
    default="auto",
    help="Of the training: auto, cpu, cuda or cuda:N; on a GPU also of the teacher.",
)
@click.option("--checkpoint-every", type=POSITIVE, default=250)
@click.pass_context
def command(
    context: click.Context,
    /,
    engine: EngineRequest,
    out: Path | None,
    resume: bool,
    device: str,
    checkpoint_every: int,
    **options: Any,
) -> None:
    """Train a model that gives in 4 steps what RUN, its teacher, gives in 16.

    Fits a schedule of segments to the teacher, draws its paths by the engine that `sample` would
    take, and trains a copy of it on them. The result is a run like any other, but follows its own
    steps alone: `sample` takes them by itself. Ctrl-C and --resume work from the first path on.

    With --guide the teacher is better than RUN: every prediction goes on in the direction from that
    of a weaker model to its own (autoguidance). The new model needs no guide.

    With the defaults it costs two million evaluations of the network, as 10,000 steps of `train`
    do (four hours for a `small` model on one CPU core without bfloat16), and 3.2 GB of disk for
    paths.f16, which can be removed at the end.
    """
    from lutdeploy.training import session
    from lutdeploy.training.evaluation.data import Trained
    from lutdeploy.training.few_steps.distill import Distilling, Paths, require_same_engine
    from lutdeploy.training.loop import Cadence, learn
    from lutdeploy.training.processes import Processes, launch

    if launch().count > 1:
        raise UsageError("distill runs in one process; start it without torchrun")
    if options["batch"] < options["steps"]:
        raise UsageError(f"--batch {options['batch']} holds no image for some of the --steps")
    device = session.choose_device(device)
    path = None if engine.path == Path() else engine.path
    command_line = click.core.ParameterSource.COMMANDLINE
    named = {n for n in context.params if context.get_parameter_source(n) is command_line}
    if resume:
        if out is None:
            raise UsageError("--resume needs --out, the run to continue")
    else:
        named_path = find(path, note)
        path = _teacher(named_path)
        name = path.stem if path.is_file() else path.name
        out = out or RUNS / f"{name}-distilled-{options['steps']}"
    run, processes, drew = Run(out), Processes(device), None
    with session.hold_folder(run, resume, "distill"):
        if resume:
            settings = _resumed(run, path, {name: options[name] for name in named & {*options}})
            path = _place(Path(str(settings.init)))
            assert settings.distilled is not None
            guidance = settings.distilled.guidance
            if not named & {"backend", "export", "precision"}:
                drew = settings.distilled.engine
        else:
            guidance = _guidance(options)
        assert path is not None
        if device.startswith("cuda") and engine.backend != "openvino" and engine.device is None:
            engine = replace(engine, device=device)
        with _opened_teacher(replace(engine, path=path), guidance, drew) as teacher:
            if not resume:
                images = Trained.of_model(named_path)
                settings = _started(run, path, engine, teacher, guidance, images, device, options)
            require_same_engine(run, settings, teacher.identity)
            paths = Paths(run, settings)
            if settings.compile:
                session.quiet_compiler()
            with session.stoppable(run, processes) as requests:
                reached = 0
                if _draw(paths, teacher, requests):
                    steps = learn(
                        settings,
                        Distilling(settings, paths, teacher, processes.device),
                        run,
                        processes=processes,
                        resume=resume,
                        cadence=Cadence(checkpoint_every, checkpoint_every, checkpoint_every),
                        should_stop=lambda: bool(requests),
                    )
                    reached = follow(steps, settings.steps)
    if reached < settings.steps:
        note(f"stopped and saved; `lutdeploy distill --resume --out {run.path}` continues")
        sys.exit(128 + requests[0])
    answer(run.model)


def same_engine(request: EngineRequest, identity: dict[str, Any]) -> EngineRequest:
    """A request for the engine that drew the first paths of a run, from what it said of itself.

    ``identity``: of :class:`lutdeploy.engines.Engine`. Its device ends with the arithmetic, where
    --precision decides that: "CPU bf16", "CPU int8-bf16", "cuda:0 fp16".
    """
    told = str(identity["device"])
    precision = next((name for name in ("fp32", "fp16", "bf16") if told.endswith(name)), None)
    on_cpu = told in ("cpu", "CPUExecutionProvider")
    return replace(
        request,
        backend=identity["backend"],
        export=identity["export"],
        precision=precision,
        device="cpu" if on_cpu else None,
    )


def _teacher(path: Path) -> Path:
    """The run or model file to learn from; a model of the package may have a run here."""
    if shipped.is_shipped(path) and (RUNS / path.stem).is_dir():
        path = find_run(path, note).path
    model = locate(path).model
    if model is None:
        raise UsageError(
            f"{path} has no {MODEL} beside it, whose weights the new model begins with"
        )
    if distilled_schedule(model) is not None:
        raise UsageError(f"{path} is distilled itself; distill the model that it was made from")
    return _place(model)


def _guidance(options: dict[str, Any]) -> Guidance | None:
    """What guides the teacher of a new run."""
    from lutdeploy.training.recipes import Guidance

    low, high = options["guidance_interval"]
    if low >= high:
        raise UsageError(f"--guidance-interval {low} {high}: nothing lies between")
    if options["guide"] is None:
        return None
    return Guidance(
        guide=_guide(options["guide"]), weight=options["guidance"], interval=(low, high)
    )


def _guide(name: str) -> str:
    """The run or model file that --guide names."""
    return str(_place(find_model(name)).absolute())


@contextlib.contextmanager
def _opened_teacher(
    engine: EngineRequest, guidance: Guidance | None, drew: dict[str, Any] | None = None
) -> Iterator[KnownDenoiser]:
    """The engine of the teacher; with its guide, in the same backend, if it has one.

    ``drew``: the identity of what drew the first paths, in whose place other engines come if None.
    """
    from lutdeploy.training.few_steps.guidance import GuidedDenoiser

    requests, were = [engine], [drew]
    if guidance:
        requests.append(replace(engine, path=Path(guidance.guide), export=None))
        were.append(drew and drew["guide"])
    with contextlib.ExitStack() as stack:
        opened = []
        for request, was in zip(requests, were, strict=True):
            asked = same_engine(request, was) if was else request
            found = stack.enter_context(open_engine(asked, note))
            if not asked.unverified:
                require_passed(asked.path, found.identity, note)
            opened.append(found)
        yield GuidedDenoiser(opened[0], opened[1], guidance) if guidance else opened[0]


def _place(model: Path) -> Path:
    """The run of a model file, or the file itself."""
    return model.parent if model.name == MODEL else model


def _started(
    run: Run,
    path: Path,
    engine: EngineRequest,
    teacher: KnownDenoiser,
    guidance: Guidance | None,
    images: Trained | None,
    device: str,
    options: dict[str, Any],
) -> TrainSettings:
    """The settings of a new run, stored in it; the teacher's schedule is fitted here."""
    from lutdeploy.training import session
    from lutdeploy.training.few_steps.distill import student_settings, teacher_rows
    from lutdeploy.training.few_steps.fit import require_steps

    require_steps(teacher)
    located = locate(path)
    assert located.model is not None
    note("the teacher's schedule is fitted first, in float32:")
    precise = replace(engine, path=path, device=None, precision=None, export=None)
    with _opened_teacher(float32_engine(precise, located.run), guidance) as fitted_to:
        with progress_bar() as bar:
            task = bar.add_task("fit", total=1.0)
            rows = teacher_rows(
                fitted_to, options["steps"], lambda share: bar.update(task, completed=share)
            )
            bar.update(task, completed=1.0)
    long = options["train_steps"] >= session.COMPILES_FROM
    settings = student_settings(
        located.model,
        teacher.identity,
        rows,
        options["steps"],
        options["paths"],
        images,
        guidance,
        steps=options["train_steps"],
        batch=options["batch"],
        seed=options["seed"],
        lr=options["lr"],
        optimizer=options["optimizer"],
        precision=options["train_precision"],
        compile=session.compiles(options["compile"], long, device, note),
    )
    if located.run is not None and located.run.images.is_file():
        files.write_atomic(run.images, located.run.images.read_bytes())
    files.write_json(run.settings, settings)
    return settings


def _resumed(run: Run, path: Path | None, named: dict[str, Any]) -> TrainSettings:
    """A run's own settings, if what is asked for agrees; only --train-steps may differ."""
    from lutdeploy.training import session
    from lutdeploy.training.recipes import read_settings
    from lutdeploy.training.state import read_position

    settings = read_settings(run)
    of = settings.distilled
    if of is None:
        raise UsageError(f"{run.path} was not distilled; `lutdeploy train --resume` continues it")
    steps = named.pop("train_steps", settings.steps)
    held = {
        "steps": of.schedule.steps,
        "paths": of.paths,
        "batch": settings.batch,
        "seed": settings.seed,
        "lr": settings.lr,
        "optimizer": settings.optimizer,
        "train_precision": settings.precision,
        "compile": "on" if settings.compile else "off",
        "guide": of.guidance and of.guidance.guide,
        "guidance": of.guidance and of.guidance.weight,
        "guidance_interval": of.guidance and of.guidance.interval,
    }
    if "guide" in named:
        named["guide"] = _guide(named["guide"])
    if named.get("compile") == "auto":
        del named["compile"]
    for name, value in named.items():
        if value != held[name]:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {value}: {run.path} was started with {held[name]}")
    if path is not None and files.sha256(find_model(str(path))) != settings.init_sha256:
        raise UsageError(f"{path} is not the teacher of {run.path}, which is {settings.init}")
    reached = read_position(run).step if run.training_state.is_file() else 0
    return session.extended(settings, steps, reached, False, note)


def _draw(paths: Paths, teacher: KnownDenoiser, requests: Sequence[int]) -> bool:
    """Draw the paths that are missing; whether all are there."""
    with progress_bar() as bar:
        task = bar.add_task("paths", total=paths.total)
        for done in paths.draw(teacher):
            bar.update(task, completed=done)
            if requests:  # signals to stop
                break
    return done == paths.total
