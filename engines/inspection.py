"""What a file or folder is, for people and for programs: `lutdeploy inspect`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.picture_text import read_picture_text
from lutdeploy.artefacts.run import MODEL, RUNS, Run, locate
from lutdeploy.artefacts.tuned_steps import distilled_from, fitted_schedules
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.config import ModelConfig
from lutdeploy.engines.tensorrt import plan
from lutdeploy.errors import ArtefactError, BackendError, needing
from lutdeploy.schedule import DISTILLED, FITTED, Schedule


def _about_model(config: ModelConfig) -> dict[str, Any]:
    return {
        "preset": config.preset(),
        "gflop_per_image_and_step": round(2 * config.multiply_adds() / 1e9, 3),
        "config": config.to_dict(),
    }


def inspect_export(folder: Path) -> dict[str, Any]:
    """An export folder, its files verified by size and hash."""
    manifest = read_manifest(folder)
    manifest.verify()
    schedule = manifest.schedule
    return {
        "kind": "export",
        "path": str(folder),
        "graph": manifest.graph,
        "precision": manifest.precision,
        "solver": schedule.describe() if schedule else None,
        "opset": manifest.opset,
        "islands": list(manifest.islands),
        "quantization": msgspec.to_builtins(manifest.quantization),
        "created": manifest.created,
        "versions": manifest.versions,
        "graphs": len(manifest.graphs),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "engine_sha256": manifest.weights_sha256,
        "model_sha256": manifest.source_sha256,
        "files": msgspec.to_builtins(manifest.files),
        **_about_model(manifest.config),
    }


def inspect_model(path: Path) -> dict[str, Any]:
    """A model.safetensors, its weights verified; without PyTorch, ``unverified`` says why not."""
    from safetensors import safe_open

    config, about = read_metadata(path)
    unverified = None
    try:
        with needing("the check of the weights"):
            from lutdeploy.artefacts.checkpoint import load_model

            load_model(path)  # which refuses what is no model's
    except BackendError as error:
        unverified = str(error)
    with safe_open(path, "np") as file:
        slices = [file.get_slice(name) for name in file.keys()]
        dtypes = sorted({part.get_dtype() for part in slices})
        parameters = sum(prod(part.get_shape()) for part in slices)
    return {
        "kind": "model",
        "path": str(path),
        "parameters": parameters,
        "dtypes": dtypes,
        "bytes": path.stat().st_size,
        "unverified": unverified,
        "model_sha256": files.sha256(path),
        "about": about,
        "distilled": msgspec.to_builtins(distilled_from(about, path)),
        **_about_model(config),
    }


def inspect_engines(run: Run, machines: Mapping[str, plan.Machine]) -> list[dict[str, Any]]:
    """The TensorRT engines of a run: what each was built for, its verdict, why it is stale.

    Plans are held against their recorded hash, and not deserialised. ``machines`` are the
    TensorRTs that are here, by backend; others' engines are compared with the exports alone.
    """
    found = []
    for state in plan.survey(run, machines):
        about: dict[str, Any] = {"kind": "engine", "path": str(state.path.with_suffix(".plan"))}
        if state.record is not None:
            about |= {
                "export": state.record.export,
                "graph_file": state.record.graph_file,
                "verdict": state.outcome,
                "bytes": state.record.plan_bytes,
                "created": state.record.created,
                "build_seconds": state.record.build_seconds,
                "fields": state.record.fields,
                "types": state.record.types,
                "layers": state.verdict.layers if state.verdict else None,
            }
        reasons = list(state.reasons)
        if state.record is not None and not reasons:
            try:
                state.record.read_plan()
            except ArtefactError as error:
                reasons.append(str(error))
        machine = machines.get(state.record.backend) if state.record else None
        compared = machine is not None and machine.gpu is not None
        found.append({**about, "stale": reasons, "machine_compared": compared})
    return found


def _inspect_tuned_steps(run: Run, model_sha256: str) -> dict[str, Any] | None:
    """The fitted schedules of a run, the best first, or why they are of no use."""
    schedules: Sequence[Schedule] = ()
    problem = None
    if not run.tuned_steps.is_file():
        return None
    try:
        schedules = fitted_schedules(run.path, model_sha256)
    except ArtefactError as error:
        problem = str(error)
    names = [schedule.describe() for schedule in schedules]
    return {"path": str(run.tuned_steps), "schedules": names, "problem": problem}


def inspect_picture(path: Path) -> dict[str, Any]:
    """A PNG of `lutdeploy sample`: what it says of its making, and the command that repeats it."""
    made, software = read_picture_text(path)
    source = _source(made.model_sha256)
    words = ["lutdeploy sample", source or "RUN", f"--seed {made.seed}"]
    if made.solver != DISTILLED:
        words.append(f"--solver {made.solver} --steps {made.steps}")
    if made.shift != 1:
        words.append(f"--shift {made.shift!r}")
    if made.images is not None:
        words += [f"-n {made.images[1] + 1}", *["--trajectory"] * made.trajectory]
    else:
        words.append(f"--first {made.index} -n 1")
    # Exports of earlier versions follow times that no option names.
    nameless = made.grid != "uniform" and made.solver not in (FITTED, DISTILLED)
    return {
        "kind": "picture",
        "path": str(path),
        "software": software,
        **msgspec.to_builtins(made),
        "model": source,
        "command": None if nameless else " ".join(words),
    }


def _source(model_sha256: str) -> str | None:
    """How a command line names the model of a hash: of the package, or of a run under runs/."""
    name = shipped.named(model_sha256)
    if name is not None:
        return f"--model {name}"
    models = sorted(RUNS.glob(f"*/{MODEL}"))
    found = (path.parent for path in models if files.sha256(path) == model_sha256)
    return next(map(shlex.quote, map(str, found)), None)


def inspect_path(
    path: Path, machines: Mapping[str, plan.Machine] = MappingProxyType({})
) -> dict[str, Any]:
    """A run folder with all that is in it, an export, a model, or a sampled picture."""
    if path.suffix == ".png" and path.is_file():
        return inspect_picture(path)
    located = locate(path)
    if located.export is not None:
        return inspect_export(located.export)
    if located.run is None or located.model is None:
        return inspect_model(path)
    run, model = located.run, inspect_model(located.model)
    exports = []
    for folder in run.exports():
        export = inspect_export(folder)
        export["stale"] = export["model_sha256"] != model["model_sha256"]
        exports.append(export)
    return {
        "kind": "run",
        "path": str(path),
        "model": model,
        "exports": exports,
        "engines": inspect_engines(run, machines),
        "verdicts": [msgspec.to_builtins(verdict) for verdict in read_verdicts(run)],
        "tuned_steps": _inspect_tuned_steps(run, model["model_sha256"]),
    }
