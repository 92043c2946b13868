"""Parity as a gate: judge engines against float32 PyTorch and store the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, RUNS, locate
from lutdeploy.artefacts.shipped import is_shipped
from lutdeploy.artefacts.target import find_run, place_of_results
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import is_reference, keep_verdict, verdict_of
from lutdeploy.engines import (
    Engine,
    EngineRequest,
    choose_export,
    newest_built_export,
    open_engine,
    require_same_model,
    torch_precision,
)
from lutdeploy.engines.benchmark.contenders import list_contenders
from lutdeploy.engines.tensorrt.library import MODULES
from lutdeploy.errors import LutDeployError, UsageError
from lutdeploy.machine import this_machine
from lutdeploy.parity import Report, compare
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import ScheduleRequest


class Judge:
    """What engines are held against: a model and images 0 … count−1 of a seed.

    ``path`` is a run, an export or a model file. A model of the package stands for the run that
    its exports are in, a download from the Hub for its copy; ``note`` says which.
    """

    def __init__(
        self,
        path: Path,
        schedule: ScheduleRequest,
        count: int,
        seed: int,
        note: Callable[[str], None],
    ) -> None:
        if is_shipped(path) and (RUNS / path.stem).is_dir():
            path = find_run(path, note).path
        path = place_of_results(path, note)
        self.located = locate(path)
        self.run = self.located.run
        if self.located.model is None:
            raise UsageError(f"{path} has no {MODEL} beside it to compare with")
        self.path = self.located.export or (self.run.path if self.run else self.located.model)
        self.model = load_model(self.located.model)
        self.schedule, self.note = schedule, note
        self.noise = batch_noise(seed, range(count), self.model.config.image_shape)

    def judge(self, engine: Engine, precision: str) -> Report:
        """Compare an engine with PyTorch and store the verdict in the run, if there is one.

        The limits are those of ``precision``, see :func:`lutdeploy.parity.compare`.
        """
        schedule = resolve_schedule(self.schedule, self.path, engine)
        report = compare(self.model, engine, precision, schedule, self.noise)
        if self.run is not None:
            keep_verdict(self.run, verdict_of(report, engine.identity, "parity"), self.note)
        return report


def save_replay(judge: Judge, request: EngineRequest, folder: Path) -> list[str]:
    """Write what parity feeds an export, and what is right, for Polygraphy to replay elsewhere.

    Returns:
        A `polygraphy run` command for each of the export's graphs.
    """
    from lutdeploy.engines.polygraphy_files import save_cases

    manifest = read_manifest(request.path)
    return save_cases(judge.model, manifest, judge.noise, folder, request.backend)


def request_to_judge(judge: Judge, request: EngineRequest, fp16: bool) -> EngineRequest:
    """The request with its export found: the named one, the newest, or the newest of fp16."""
    located, export = judge.located, request.export
    if request.backend == "torch":
        if fp16 or export:
            raise UsageError("--fp16 and --export name an export; --backend torch runs the model")
        return request
    if request.backend in MODULES and export is None and not fp16 and judge.run:
        export = None if located.export else newest_built_export(judge.run, request.backend)
    if fp16 and export is None and located.export is None:
        exports = judge.run.exports() if judge.run else []
        halves = [e for e in exports if read_manifest(e).precision == "fp16"]
        if not halves:
            raise UsageError(
                f"{judge.path} has no fp16 export; run `lutdeploy export --fp16` first"
            )
        export = halves[0].name
    folder = choose_export(located, export)
    if folder is None:
        raise UsageError(f"{judge.path} has no export; run `lutdeploy export` first")
    if fp16 and read_manifest(folder).precision != "fp16":
        raise UsageError(f"{folder} is no fp16 export")
    return replace(request, path=folder, export=None)


def judged_precision(request: EngineRequest) -> str:
    """Whose limits count for the engine of a request that :func:`request_to_judge` made."""
    if request.backend == "torch":
        return torch_precision(request)
    held = read_manifest(request.path).precision
    if request.precision == "bf16":
        return "int8-bf16" if held == "int8" else "bf16"
    return held


@dataclass(frozen=True)
class Judged:
    """One of all engines; ``refused`` says why it could not be opened."""

    name: str
    report: Report | None
    refused: str = ""


def judge_everything(judge: Judge, threads: int | None) -> Iterator[Judged]:
    """Judge every engine that `lutdeploy bench` could measure here."""
    located, run = judge.located, judge.run
    assert located.model is not None
    everyone = list_contenders(located.model, located.exports(), run, bool(this_machine().gpus))
    to_judge = [c for c in everyone if c.kind == "engine" and not is_reference(c.backend, c.device)]
    if not to_judge:
        raise UsageError("there is no export to judge; run `lutdeploy export` first")
    for contender in to_judge:
        request = replace(contender.request(threads, batch=len(judge.noise)), unverified=True)
        try:
            if contender.export is not None:
                require_same_model(read_manifest(request.path), located.model)
            opened = open_engine(request)
        except LutDeployError as error:
            yield Judged(contender.name, None, str(error))
            continue
        with opened as engine:
            yield Judged(contender.name, judge.judge(engine, contender.precision))
