"""A model as a folder for the Hugging Face Hub: `lutdeploy package hub`.

It is a run folder with a model card: whatever takes a run takes it, and a download of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, hub, sample_folder, shipped
from lutdeploy.artefacts.manifest import MANIFEST, Manifest
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import EVALUATION, Run
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import (
    Entry,
    resolve_schedule,
    stored_tuned_steps,
    usable_schedules,
)
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts
from lutdeploy.config import ModelConfig
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.engines.packaging.exports import verified_step
from lutdeploy.engines.packaging.folder import require_ours, write_folder
from lutdeploy.errors import UsageError, needing
from lutdeploy.schedule import DISTILLED, SOLVERS, Schedule, ScheduleRequest, solver_schedule

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

RECORD = "lutdeploy.json"
CARD = "README.md"
SAMPLES = 16
REFERENCE = "euler-64"
TASK = "unconditional-image-generation"
TAGS = ("image-generation", "lookup-table", "onnx")
REPOSITORIES = r"[\w.-]+/[\w.-]+"
LICENSES = r"[a-z0-9.+-]+"
DISTANCES = {"frechet_distance": "Fréchet distance", "kernel_distance": "kernel distance"}
# Of the neighbourhoods of generated and real pictures; other things than a classifier's.
SHARES = ("precision", "recall", "density", "coverage")
TYPES = {"FID": "fid", "KID": "kid"}  # what has a name of its own on the Hub


@dataclass(frozen=True)
class Figures:
    """What `lutdeploy evaluate` measured of pictures, against as many real ones."""

    schedule: str | None  # None: real pictures against the others, the floor
    pictures: int
    values: dict[str, tuple[str, float]]  # by the metric's type; its name for people


@dataclass(frozen=True)
class Facts:
    """What a model card tells."""

    name: str
    repository: str | None
    license: str | None
    config: ModelConfig
    about: dict[str, Any]
    remark: str
    parameters: int
    dtypes: tuple[str, ...]
    model_sha256: str
    schedule: Schedule  # of the samples
    fitted: tuple[Entry, ...]
    fitted_on: int  # pictures that the errors of ``fitted`` were measured on; 0: RMS alone
    manifest: Manifest
    verdicts: tuple[Verdict, ...]
    figures: tuple[Figures, ...]


def package_hub(
    path: Path, out: Path, repository: str | None, license: str | None, note: Callable[[str], None]
) -> int:
    """Write the folder; an earlier one of this command is replaced as a whole.

    Args:
        path: a run, whose float32 ``step`` export is used, and made where there is none; or a
            model of the package, which gets a run of its own once nothing else stands in the way.
        out: the folder.
        repository: OWNER/NAME on the Hub, for the card.
        license: of the model, as the Hub writes it; that of a model of the package is known.
        note: told which export is used, and what a reader of the folder will learn or miss.

    Returns:
        The bytes of the folder.

    Raises:
        UsageError: ``out`` holds something else, or a bad name.
        BackendError: huggingface_hub is not installed.
        ParityError: the export is not what PyTorch computes.
    """
    if repository is not None and not re.fullmatch(REPOSITORIES, repository, re.ASCII):
        raise UsageError(f"--repo names OWNER/NAME, not {repository!r}")
    if license is not None and not re.fullmatch(LICENSES, license):
        raise UsageError(f"--license takes an identifier such as mit, not {license!r}")
    out = Path(os.path.abspath(out))
    require_ours(out, RECORD)
    with needing("the model card"):
        import huggingface_hub  # noqa: F401
    run = find_run(path, note)
    channels = read_metadata(run.model)[0].channels
    if channels not in images.PNG_COLOURS:
        raise UsageError(f"images of {channels} channels are no pictures to show")
    source = files.sha256(run.model)
    if license is None and shipped.named(source) is not None:
        license = shipped.LICENSE
    if license is None:
        note("warning: the card states no licence; --license ID does, such as cc-by-4.0")
    manifest = verified_step(run, "fp32", note, license)
    fitted = usable_schedules(run.path, source, note)
    contents, schedule = _samples(run, manifest, note)
    facts = _facts(run, manifest, schedule, bool(fitted), repository, license, source)
    if "data" in facts.about:
        note(f"warning: {run.model.name} says what it was trained on: {facts.about['data']}")
    contents[CARD] = card(facts).encode()
    contents[hub.CONFIG] = _json(
        {
            "library_name": hub.LIBRARY,
            "lutdeploy_version": lutdeploy.__version__,
            "preset": facts.config.preset(),
            **facts.config.to_dict(),
        }
    )
    contents[run.model.name] = run.model.read_bytes()
    if fitted and run.tuned_steps.is_file():
        contents[run.tuned_steps.name] = run.tuned_steps.read_bytes()
    for name in (*manifest.files, MANIFEST):
        path = manifest.folder / name
        contents[str(path.relative_to(run.path).as_posix())] = path.read_bytes()
    for verdict in facts.verdicts:
        path = run.verdicts / f"{verdict.key}.json"
        contents[f"{run.verdicts.name}/{path.name}"] = _json(verdict)
    record = {"lutdeploy": lutdeploy.__version__, "name": facts.name, "model_sha256": source}
    write_folder(out, RECORD, record, contents)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _samples(
    run: Run, manifest: Manifest, note: Callable[[str], None]
) -> tuple[dict[str, bytes], Schedule]:
    """The first pictures of seed 0, as `lutdeploy sample` writes them, and what they follow."""
    with (
        tempfile.TemporaryDirectory(prefix="lutdeploy-") as scratch,
        OnnxRuntimeDenoiser(manifest) as engine,
    ):
        schedule = resolve_schedule(ScheduleRequest(), run.path, engine, note)
        settings = sample_folder.settings(engine.identity, schedule, 0, "png")
        with sample_folder.open_folder(Path(scratch), settings) as folder:
            for _ in sample_folder.fill(folder, engine, schedule, SAMPLES, SAMPLES):
                pass
            sample_folder.write_grid(folder, SAMPLES)
        made = sorted(p for p in Path(scratch).iterdir() if not p.name.startswith("."))
        return {f"samples/{path.name}": path.read_bytes() for path in made}, schedule


def _facts(
    run: Run,
    manifest: Manifest,
    schedule: Schedule,
    fitted: bool,
    repository: str | None,
    license: str | None,
    source: str,
) -> Facts:
    from safetensors import safe_open

    config, about = read_metadata(run.model)
    with safe_open(run.model, "np") as file:
        slices = [file.get_slice(name) for name in file.keys()]
    tuned = stored_tuned_steps(run.path, source) if fitted else None
    name = shipped.named(source)
    verdicts = [v for v in read_verdicts(run) if v.engine_sha256 == manifest.weights_sha256]
    schedules = [schedule, *(entry.fitted.schedule for entry in (tuned.entries if tuned else ()))]
    return Facts(
        name=repository.partition("/")[2] if repository else run.path.resolve().name,
        repository=repository,
        license=license,
        config=config,
        about=about,
        remark=shipped.facts(name).get("remark", "") if name else "",
        parameters=sum(prod(part.get_shape()) for part in slices),
        dtypes=tuple(sorted({part.get_dtype() for part in slices})),
        model_sha256=source,
        schedule=schedule,
        fitted=tuned.entries if tuned else (),
        fitted_on=tuned.pictures if tuned else 0,
        manifest=manifest,
        verdicts=tuple(sorted(verdicts, key=lambda verdict: verdict.key)),
        figures=(
            tuple(_measured_here(run, source, schedules))
            or tuple(_measured_before(name, schedules))
        ),
    )


class _Metrics(msgspec.Struct):
    """What `lutdeploy evaluate` measures, as far as a card shows it."""

    images: int
    frechet_distance: float
    kernel_distance: float
    precision: float
    recall: float
    density: float
    coverage: float


class _Row(msgspec.Struct):
    metrics: _Metrics


class _Settings(msgspec.Struct):
    """Which model was measured, and its schedule as in a sample folder; folders have neither."""

    model_sha256: str | None = None
    solver: str = ""
    steps: int = 0
    shift: float = 1.0
    grid: str | None = None
    times_sha256: str | None = None


class _Evaluation(msgspec.Struct):
    """What a card takes from evaluation.json: samples against real images, then the floor."""

    settings: _Settings
    rows: tuple[_Row, ...]
    names: dict[str, str]  # of the distances

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise ValueError("fewer than two rows")


def _measured_here(run: Run, model_sha256: str, schedules: Sequence[Schedule]) -> Iterator[Figures]:
    """Those of the run's evaluation.json, if it is of this model and of steps that it follows.

    Neither the folder of the real images nor how they were split is told to the world.
    """
    path = run.path / EVALUATION
    if not path.is_file():
        return
    found = files.read_record(path, _Evaluation, "run `lutdeploy evaluate` again")
    said, followed = found.settings, [*schedules]
    if said.grid is None and said.solver in SOLVERS:  # over equal steps, as anybody can follow
        followed.append(solver_schedule(said.solver, said.steps, said.shift))
    for schedule in followed:
        settings = sample_folder.settings({"model_sha256": model_sha256}, schedule, 0, "png")
        if msgspec.convert(settings, _Settings) == said:
            yield _figures(schedule.describe(), found.rows[0].metrics, found.names)
            yield _figures(None, found.rows[1].metrics, found.names)
            return


def _measured_before(name: str | None, schedules: Sequence[Schedule]) -> Iterator[Figures]:
    """Those that come with a model of the package, of steps that can still be followed."""
    if name is None:
        return
    facts, known = shipped.facts(name), {schedule.describe() for schedule in schedules}
    names = {metric: f"{text} ({facts['features']['name']})" for metric, text in DISTANCES.items()}
    reference = facts.get("reference", REFERENCE)  # earlier ones do not name it
    measured = {
        reference: facts["reference_metrics"],
        facts["sampling"]["steps"]: facts["metrics"],
        None: facts["floor"],
    }
    for steps, metrics in measured.items():
        if steps in (None, *known) or _is_formula(steps):
            yield _figures(steps, msgspec.convert(metrics, _Metrics), names)


def _is_formula(described: str) -> bool:
    """Whether a schedule's name is that of a solver over equal steps."""
    solver, _, steps = described.rpartition("-")
    return solver in SOLVERS and steps.isdecimal()


def _figures(schedule: str | None, metrics: _Metrics, names: Mapping[str, str]) -> Figures:
    values = {}
    for metric, plain in DISTANCES.items():
        name = names.get(metric, plain)
        values[TYPES.get(name, metric)] = (name, getattr(metrics, metric))
    for share in SHARES:
        values[f"prdc_{share}"] = (share, getattr(metrics, share))
    return Figures(schedule, metrics.images, values)


def card(facts: Facts) -> str:
    """README.md: the metadata that the Hub reads, then what people read."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=facts.license,
        library_name=hub.LIBRARY,
        pipeline_tag=TASK,
        tags=[*TAGS, facts.config.preset()],
        model_name=facts.name if (results := _results(facts)) else None,
        eval_results=results or None,
    )
    parts = (_heading(facts), _use(facts), _folder(facts), _checks(facts), _quality(facts))
    text = "\n\n".join("\n".join(lines) for lines in parts if lines)
    # The Hub reads what is between two lines of dashes.
    return "\n".join(["---", data.to_yaml(line_break="\n").rstrip(), "---", "", text, ""])


def _results(facts: Facts) -> list[EvalResult]:
    """The figures of sampled pictures, as the model-index of a card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=TASK,
            dataset_type="imagefolder",  # as the Hub calls pictures in a folder
            dataset_name=f"{found.pictures:,} real images",
            metric_type=kind,
            metric_value=value,
            metric_name=f"{name}, {found.schedule}",
            metric_args={"pictures": found.pictures, "schedule": found.schedule},
        )
        for found in facts.figures
        if found.schedule is not None
        for kind, (name, value) in found.values.items()
    ]


def _heading(facts: Facts) -> Iterator[str]:
    config = facts.config
    side, patch = config.image_size, config.patch_size
    yield f"# {facts.name}"
    yield ""
    yield (
        f"Makes images of {side}×{side} pixels and {config.channels} channels from noise. A "
        f"transformer paints each patch of {patch}×{patch} pixels as a weighted sum of "
        f"{config.entries} learned patches, its lookup table."
    )
    yield ""
    yield "![samples](samples/grid.png)"
    yield ""
    yield (
        f"*Images 0 to {SAMPLES - 1} of seed 0, unselected, {facts.schedule.describe()}. "
        "Each PNG says in its text what made it.*"
    )
    yield ""
    parameters, dtypes = f"{facts.parameters / 1e6:.3f} M parameters", "/".join(facts.dtypes)
    yield f"- Architecture: `{config.preset()}`, width {config.width}, depth {config.depth}."
    yield f"- Weights: {parameters}, {dtypes}, sha256 `{facts.model_sha256}`."
    if trained := _trained(facts.about):
        yield f"- Training: {trained}."
    yield f"- Licence: {facts.license or 'none is stated'}."
    if facts.remark:
        yield ""
        yield facts.remark


def _trained(about: Mapping[str, Any]) -> str:
    """What the model's own metadata say of its training."""
    origin = about.get("origin")
    told = [f"`{origin}`"] if isinstance(origin, str) else []
    if isinstance(about.get("recipe"), str):
        told.append(f"recipe `{about['recipe']}`")
    for key, unit in (("step", "steps"), ("images_seen", "images seen")):
        if isinstance(about.get(key), int):
            told.append(f"{about[key]:,} {unit}")
    if isinstance(about.get("ema"), float):
        told.append(f"the average of EMA {about['ema']:g}")
    return ", ".join(told)


def _use(facts: Facts) -> Iterator[str]:
    address = f"hf://{facts.repository or 'OWNER/NAME'}"
    yield "## Use"
    yield ""
    if facts.repository is None:
        yield "OWNER/NAME is this repository; a downloaded folder takes the place of the address."
        yield ""
    yield "```sh"
    yield "pip install 'lutdeploy[hub]'"
    yield f"lutdeploy sample {address} -n 64 --out samples"
    yield "```"
    yield ""
    if facts.schedule.solver != DISTILLED:  # which Python has to be told of
        yield "```python"
        yield "import lutdeploy"
        yield ""
        yield f'denoiser = lutdeploy.load("{address}", backend="onnxruntime")'
        yield "images = lutdeploy.sample(denoiser, 16, seed=0, steps=64)  # float32, about [-1, 1]"
        yield "```"
        yield ""
    distilled = facts.schedule.solver == DISTILLED
    yield (
        "Image i depends on the seed and i alone, whatever the batch. `lutdeploy sample` follows "
        f"{facts.schedule.describe()}{', and no other' if distilled else ' unless told otherwise'}."
    )


def _folder(facts: Facts) -> Iterator[str]:
    manifest = facts.manifest
    yield "## Files"
    yield ""
    yield "| file | what it is |"
    yield "|---|---|"
    yield "| `model.safetensors` | the weights, with the config in their metadata |"
    yield "| `config.json` | the config, for people and for the Hub |"
    if facts.fitted:
        yield "| `steps.json` | schedules of few steps, fitted to these weights |"
    yield (
        f"| `onnx/{manifest.name}/` | an ONNX export in float32, one step of any schedule; "
        "`manifest.json` has the hash of every file |"
    )
    yield "| `verdicts/` | how the export compares with PyTorch |"
    yield "| `samples/` | the pictures above |"
    yield f"| `{RECORD}` | what this folder was packaged from, and its files |"


def _checks(facts: Facts) -> Iterator[str]:
    yield "## Checks"
    yield ""
    yield "Against the model in PyTorch, in float32, on the same noise:"
    yield ""
    for verdict in facts.verdicts:
        words = "passed" if verdict.passed else "FAILED"
        worst, psnr = float(verdict.final["max_abs"]), float(verdict.final["psnr"])
        yield (
            f"- `{verdict.export}` in {verdict.backend} on {verdict.device}: {words}; largest "
            f"difference {worst:.2g}, PSNR {psnr:.1f} dB ({verdict.images} images, "
            f"{verdict.solver})."
        )


def _quality(facts: Facts) -> Iterator[str]:
    if not facts.figures and not facts.fitted:
        return
    yield "## Figures"
    if facts.figures:
        names = [name for name, _ in facts.figures[0].values.values()]
        yield ""
        yield "Of `lutdeploy evaluate`, against as many real images; the last row is the floor:"
        yield ""
        yield f"| pictures | schedule | {' | '.join(names)} |"
        yield "|---" * (len(names) + 2) + "|"
        for found in facts.figures:
            values = " | ".join(f"{value:.4g}" for _, value in found.values.values())
            yield f"| {found.pictures:,} | {found.schedule or 'real images'} | {values} |"
    if facts.fitted:
        yield ""
        yield from _fitted(facts)


def _fitted(facts: Facts) -> Iterator[str]:
    measured = (
        f"Fréchet distance of {facts.fitted_on:,} pictures to real ones"
        if facts.fitted_on
        else "RMS to the ends of the reference's trajectories"
    )
    yield "Schedules of `lutdeploy tune-steps`, each beside the best formula of as many steps:"
    yield ""
    yield f"| schedule | {measured} | formula | the same |"
    yield "|---|---|---|---|"
    for entry in sorted(facts.fitted, key=lambda entry: entry.fitted.schedule.steps):
        cells = [
            f"{found.schedule.describe()} | {found.error:.4g}"
            for found in (entry.fitted, entry.formula)
        ]
        yield f"| {' | '.join(cells)} |"
