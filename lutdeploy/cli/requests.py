"""Options that several commands share, and the two requests that they make.

``engine_request`` gives a command an :class:`lutdeploy.engines.EngineRequest` ("which engine"),
``schedule_request`` a :class:`lutdeploy.schedule.ScheduleRequest` ("which schedule").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lutdeploy.artefacts import shipped
from lutdeploy.artefacts.target import find, resolve
from lutdeploy.cli.console import note
from lutdeploy.errors import UsageError
from lutdeploy.schedule import FITTED, SOLVERS, ScheduleRequest

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


class Place(click.ParamType[Any]):
    """A folder, or the address of one in an object store, which stays as it is written."""

    name = "path or url"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Path | str:
        if isinstance(value, str) and "://" in value:
            return value
        found: Path = PATH.convert(value, parameter, context)
        return found


POSITIVE = click.IntRange(min=1)
ENGINE_BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")

SEED = click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
EXPORT = click.option("--export", help="Name of an export of the run; the newest by default.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 1024),  # many more, and starting them takes the process down
    help="CPU threads; the backend's own choice by default.",
)
LICENSE = click.option(
    "--license",
    metavar="ID",
    help="The model's licence for what is written, such as mit or cc-by-4.0. Default: that of a "
    "model of the package; none is stated for others.",
)


def _keep_model(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """Keep --model, which is read first, for the RUN that it stands for."""
    context.meta["lutdeploy.model"] = name


def _run_or_model(
    context: click.Context, parameter: click.Parameter, run: Path | None
) -> Path | None:
    name = context.meta["lutdeploy.model"]
    if name is None:
        return run and resolve(run, note)
    if run is not None:
        raise click.UsageError(f"--model {name} stands for a RUN; leave out {run}")
    return shipped.model_path(name)


def run_or_model(metavar: str = "[RUN]") -> Callable[[F], F]:
    """The argument RUN, and --model in its place; the function gets the one path as ``run``."""

    def decorate(function: F) -> F:
        model = click.option(
            "--model",
            type=click.Choice(shipped.names()),
            is_eager=True,
            expose_value=False,
            callback=_keep_model,
            help="A model of the package in place of a RUN; see `lutdeploy models`.",
        )
        run = click.argument(
            "run", metavar=metavar, required=False, type=PATH, callback=_run_or_model
        )
        return run(model(function))

    return decorate


RUN = run_or_model()

_ENGINE_OPTIONS = {
    "device": click.option(
        "--device",
        help="cpu, cuda or cuda:N; mps for torch. Default: cuda for the TensorRTs, else cpu. No "
        "fallback.",
    ),
    "provider": click.option(
        "--provider",
        help="cpu, cuda, cuda:N, or the name of an execution provider, for --backend onnxruntime. "
        "No fallback.",
    ),
    "precision": click.option(
        "--precision",
        type=click.Choice(("fp32", "fp16", "bf16")),
        help="Arithmetic of --backend torch on a GPU (default: fp16) and of --backend openvino "
        "(fp32, the default, or bf16; of an int8 export that of all but its int8 matrix products). "
        "Elsewhere it is the export's.",
    ),
    "export": EXPORT,
    "threads": THREADS,
    "batch": click.option("--batch", type=POSITIVE, default=64, show_default=True),
    "unverified": click.option(
        "--unverified", is_flag=True, help="Use what failed or never had its checks."
    ),
}
AUTO = (
    "auto: the fastest that `bench` measured and `parity` passed on this machine; where there is "
    "none, onnxruntime when the run has an export, else torch."
)


def engine_request(
    metavar: str = "[RUN]",
    backends: Sequence[str] = ("auto", *ENGINE_BACKENDS),
    default: str | None = "auto",
    backend_help: str = AUTO,
    leave_out: Sequence[str] = (),
    look: bool = True,
) -> Callable[[F], Callable[..., Any]]:
    """Options that say which engine; the function gets one request as ``engine``.

    Args:
        metavar: of the argument.
        backends, default, backend_help: of --backend. Where nothing is given and ``default``
            is None, the request is for onnxruntime.
        leave_out: options that the command does not have.
        look: whether the newest run is taken where no RUN is given; else the path is then ".".
    """
    names = [name for name in _ENGINE_OPTIONS if name not in leave_out]
    backend = click.option(
        "--backend",
        type=click.Choice(backends),
        default=default,
        show_default=default is not None,
        help=backend_help,
    )

    def decorate(function: F) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(run: Path | None, backend: str | None, **options: Any) -> Any:
            from lutdeploy.engines import EngineRequest

            given = {name: options.pop(name) for name in names}
            provider = given.pop("provider", None)
            if provider is not None:
                if given["device"] is not None:
                    raise UsageError(
                        "--provider says where ONNX Runtime computes; leave out --device"
                    )
                if backend not in ("auto", "onnxruntime", None):
                    raise UsageError(f"--provider belongs to --backend onnxruntime, not {backend}")
                given["device"], backend = provider, "onnxruntime"
            path = find(run, note) if look else run or Path()
            engine = EngineRequest(path, backend or "onnxruntime", **given)
            return function(engine=engine, **options)

        decorated: Any = command
        for option in (*reversed([_ENGINE_OPTIONS[name] for name in names]), backend):
            decorated = option(decorated)
        wrapped: Callable[..., Any] = run_or_model(metavar)(decorated)
        return wrapped

    return decorate


def schedule_request(function: F) -> Callable[..., Any]:
    """Options that say which schedule; the function gets one request as ``schedule``."""

    @functools.wraps(function)
    def command(
        *arguments: Any,
        solver: str | None,
        steps: int | None,
        shift: float | None,
        **options: Any,
    ) -> Any:
        request = ScheduleRequest(solver, steps, shift)
        return function(*arguments, schedule=request, **options)

    decorated: Any = command
    for option in (
        click.option(
            "--shift",
            type=click.FloatRange(min=0, min_open=True),
            help="Warp of the time grid. Default: 1.",
        ),
        click.option("--steps", type=POSITIVE, help="Network evaluations. Default: 64."),
        click.option(
            "--solver",
            type=click.Choice((*SOLVERS, FITTED)),
            help="fitted: a schedule of `lutdeploy tune-steps`. Default: euler.",
        ),
    ):
        decorated = option(decorated)
    wrapped: Callable[..., Any] = decorated
    return wrapped
