"""What a command works on: the run, export or model that was named, or found, or downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from lutdeploy.artefacts import files, hub, shipped
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import MODEL, RUNS, Run, locate, newest_run, tuned_steps_file
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.errors import UsageError


def find(path: Path | None, note: Callable[[str], None]) -> Path:
    """The given path, else the newest run, else the default model; notes which it chose."""
    if path is not None:
        return path
    newest = newest_run()
    if newest is not None:
        note(f"run: {newest.path} (the newest)")
        return newest.path
    note(f"model: {shipped.DEFAULT} (of the package; there is no run under runs/)")
    return shipped.model_path()


def resolve(path: Path, note: Callable[[str], None] = lambda text: None) -> Path:
    """What an address on the Hub stands for, in the cache of downloads; any other path as it is.

    Raises:
        LutDeployError: as :func:`lutdeploy.artefacts.hub.download`.
    """
    return hub.download(path, note) if hub.is_address(path) else path


def find_model(name: str) -> Path:
    """The model.safetensors of a run folder, a model file, or a model of the package by name."""
    if name in shipped.names():
        return shipped.model_path(name)
    located = locate(resolve(Path(name)))
    if located.model is None:
        raise UsageError(f"{name} has no {MODEL}")
    return located.model


def find_run(path: Path, note: Callable[[str], None]) -> Run:
    """A run to write into; a model of the package, or of the Hub, gets a run of its own."""
    if shipped.is_shipped(path):
        return _run_of_shipped(path, note)
    run = Run(path.parent) if path.name == MODEL and path.is_file() else locate(path).run
    if run is None:
        raise UsageError(f"{path} belongs to no run folder, where results could be written")
    name = hub.snapshot_name(run.path)
    return run if name is None else _run_of_download(run, name, note)


def place_of_results(path: Path, note: Callable[[str], None]) -> Path:
    """A path as it is; of a download from the Hub, the run that is made for it."""
    run = locate(path).run
    return find_run(path, note).path if run and hub.snapshot_name(run.path) else path


def _run_of_download(source: Run, name: str, note: Callable[[str], None]) -> Run:
    """A copy of a download: the Hub's cache is for reading, and replaced as it likes."""
    run, lock = Run(RUNS / name), f".{name}-lock"
    with files.lock(RUNS, "command", on_wait=lambda text: None, name=lock):
        try:
            if not run.path.exists():
                with files.staged(run.path) as stage:
                    copied = (source.model, source.tuned_steps, source.verdicts)
                    for path in (*copied, source.exports_folder):
                        if path.is_dir():
                            shutil.copytree(path, stage / path.name)
                        elif path.is_file():
                            shutil.copyfile(path, stage / path.name)
            elif not run.model.is_file() or files.sha256(run.model) != files.sha256(source.model):
                raise UsageError(
                    f"{run.path} holds something else than the model from the Hub, which would "
                    "get a copy there; give that folder another name"
                )
        finally:
            (RUNS / lock).unlink(missing_ok=True)
    note(f"run: {run.path} (made for the model from the Hub)")
    return run


def _run_of_shipped(path: Path, note: Callable[[str], None]) -> Run:
    run = Run(RUNS / path.stem)
    if run.settings.is_file():
        raise UsageError(
            f"{run.path} was trained here, and the model of the package would replace its "
            "model; give that folder another name"
        )
    weights, tuned = path.read_bytes(), tuned_steps_file(path)
    same = run.model.is_file() and run.model.read_bytes() == weights
    if tuned.is_file() and not (same and run.tuned_steps.is_file()):
        files.write_atomic(run.tuned_steps, tuned.read_bytes())  # fitted to these weights
    files.write_atomic(run.model, weights)
    for export in locate(path).exports():
        _copy_export(export, run)
    note(f"run: {run.path} (made for the model of the package)")
    return run


def _copy_export(source: Path, run: Run) -> None:
    """Bring the export of a model of the package, and its verdict, into the run made for it."""
    manifest = read_manifest(source)
    folder = run.export_folder(f"{manifest.graph}-{manifest.precision}")
    with files.lock(run.exports_folder, "command", on_wait=lambda text: None):
        if (folder / MANIFEST).is_file():
            if read_manifest(folder).source_sha256 == manifest.source_sha256:
                return
        with files.staged(folder) as stage:
            for name in (*manifest.files, MANIFEST):
                shutil.copyfile(source / name, stage / name)
    for verdict in read_verdicts(Run(source)):
        store_verdict(run, msgspec.structs.replace(verdict, export=folder.name))
