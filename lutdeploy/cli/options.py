"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lutdeploy.artefacts import shipped
from lutdeploy.schedule import GRIDS, SOLVERS

F = TypeVar("F", bound=Callable[..., Any])

POSITIVE = click.IntRange(min=1)


def _chosen_model(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """Keep --model, which is read first, for the RUN that it stands for."""
    context.meta["lutdeploy.model"] = name


def _run_or_model(
    context: click.Context, parameter: click.Parameter, run: Path | None
) -> Path | None:
    name = context.meta["lutdeploy.model"]
    if name is None:
        return run
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
            callback=_chosen_model,
            help="A model of the package in place of a RUN; see `lutdeploy models`.",
        )
        run = click.argument(
            "run",
            metavar=metavar,
            required=False,
            type=click.Path(path_type=Path),
            callback=_run_or_model,
        )
        return run(model(function))

    return decorate


RUN = run_or_model()
SEED = click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
BACKEND = click.option(
    "--backend",
    type=click.Choice(("auto", "torch", "onnxruntime", "openvino", "tensorrt")),
    default="auto",
    show_default=True,
    help="auto: the fastest that `bench` measured and `parity` passed on this machine; where there "
    "is none, onnxruntime when the run has an export, else torch.",
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
    help="Arithmetic of --backend openvino, of an int8 export that of all but its int8 products. "
    "Default: fp32. Elsewhere it is the export's.",
)
EXPORT = click.option("--export", help="Name of an export of the run; the newest by default.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 1024),  # many more, and starting them takes the process down
    help="CPU threads; the backend's own choice by default.",
)
SOLVER = click.option(
    "--solver",
    type=click.Choice(tuple(SOLVERS)),
    help="Default: euler; of a tuned grid the best there is.",
)
STEPS = click.option("--steps", type=POSITIVE, help="Network evaluations. Default: 64.")
SHIFT = click.option(
    "--shift",
    type=click.FloatRange(min=0, min_open=True),
    help="Warp of the time grid. Default: 1.",
)
TIME_GRID = click.option(
    "--time-grid",
    type=click.Choice(GRIDS),
    help="Times of the steps; tuned: what `lutdeploy tune-steps` found. Default: uniform.",
)
