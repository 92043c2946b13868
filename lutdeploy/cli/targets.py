"""What a command works on: the run that was given or found, opened by a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import MODEL, RUNS, Run, locate, newest_run, tuned_steps_file
from lutdeploy.cli.console import note
from lutdeploy.errors import UsageError

if TYPE_CHECKING:
    from lutdeploy.engines import Engine
    from lutdeploy.schedule import Schedule


def find(run: Path | None) -> Path:
    """The given run, else the newest, else the default model; says which when it chose."""
    if run is not None:
        return run
    newest = newest_run()
    if newest is not None:
        note(f"run: {newest.path} (the newest)")
        return newest.path
    note(f"model: {shipped.DEFAULT} (of the package; there is no run under runs/)")
    return shipped.model_path()


def find_run(path: Path | None) -> Run:
    """A run to write into; a model of the package gets a run of its own.

    Raises:
        UsageError: no run there, or one that was trained where the package's model would go.
    """
    chosen = find(path)
    if shipped.is_shipped(chosen):
        run = Run(RUNS / chosen.stem)
        if run.settings.is_file():
            raise UsageError(
                f"{run.path} was trained here, and the model of the package would replace its "
                "model; give that folder another name"
            )
        weights, tuned = chosen.read_bytes(), tuned_steps_file(chosen)
        known = run.tuned_steps.is_file() and run.model.is_file()
        if tuned.is_file() and not (known and run.model.read_bytes() == weights):
            files.write_atomic(run.tuned_steps, tuned.read_bytes())  # grids are of these weights
        files.write_atomic(run.model, weights)
        note(f"run: {run.path} (made for the model of the package)")
        return run
    if chosen.name == MODEL and chosen.is_file():
        return Run(chosen.parent)
    located = locate(chosen)
    if located.run is None:
        raise UsageError(f"{chosen} belongs to no run folder, where results could be written")
    return located.run


def open_reported(
    path: Path,
    backend: str,
    device: str | None,
    export: str | None,
    threads: int | None,
    **special: Any,
) -> Engine:
    """Open an engine and say what it is; ``special``: what one backend alone asks for."""
    from lutdeploy.engines import open_engine

    engine = open_engine(path, backend, device, export, threads, say=note, **special)
    made = engine.identity
    name = f", export {made['export']}" if made["export"] else ""
    note(f"backend: {made['backend']} on {made['device']}{name}")
    return engine


def schedule_for(
    engine: Engine,
    path: Path,
    solver: str | None,
    steps: int | None,
    shift: float | None,
    time_grid: str | None = None,
) -> Schedule:
    """The steps that the options mean, which the engine can follow.

    Args:
        engine: opened from ``path``.
        path: whose tuned grids count.
        solver, steps, shift, time_grid: of the command line; None where nothing was said.

    Raises:
        UsageError: the engine holds other steps, or there is no such tuned grid.
    """
    from lutdeploy.artefacts.tuned_steps import tuned_schedules
    from lutdeploy.sampling import check_schedule, choose_schedule

    model = engine.identity["model_sha256"]
    schedule = choose_schedule(
        engine.schedule, solver, steps, shift, time_grid, lambda: tuned_schedules(path, model)
    )
    check_schedule(engine, schedule)
    return schedule


def place(backend: str, device: str | None, provider: str | None) -> tuple[str, str | None]:
    """The backend and the device that --device and --provider mean together."""
    if provider is None:
        return backend, device
    if device is not None:
        raise UsageError("--provider says where ONNX Runtime computes; leave out --device")
    if backend not in ("auto", "onnxruntime"):
        raise UsageError(f"--provider belongs to --backend onnxruntime, not {backend}")
    return "onnxruntime", provider
