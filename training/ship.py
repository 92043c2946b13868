"""Make a run's model one of the package.

    python -m lutdeploy.training.ship runs/cats --name static-tanh-64-small
    python -m lutdeploy.training.ship --name static-tanh-64-small --data faces/   # measure it anew

Run it in the root of the checkout. Weights and facts go to lutdeploy/models, which the wheel
holds; the card and the pictures go to docs/models, which it does not. The weights are stored as
float16 and measured as `lutdeploy evaluate` does, with the reference schedule and with the best
of the model's fitted schedules. The default model gets its export too, as
:mod:`lutdeploy.engines.export.shipped` makes it. Run it again after `lutdeploy tune-steps --model
NAME` has found those for the new weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import jinja2
import msgspec
import numpy as np
import torch

from lutdeploy import images
from lutdeploy.artefacts import checkpoint, files, shipped
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import Run, tuned_steps_file
from lutdeploy.artefacts.tuned_steps import (
    distilled_schedule,
    fitted_schedules,
    stored_tuned_steps,
)
from lutdeploy.config import ModelConfig
from lutdeploy.engines.export.shipped import export_shipped
from lutdeploy.errors import ArtefactError, LutDeployError, UsageError
from lutdeploy.reference import TorchDenoiser
from lutdeploy.schedule import DISTILLED, Schedule, solver_schedule
from lutdeploy.training import pictures
from lutdeploy.training.evaluation.data import RealImages, Trained, draw_samples, load_real
from lutdeploy.training.evaluation.evaluate import Evaluation, Metrics, evaluate
from lutdeploy.training.evaluation.features import Extractor, open_extractor
from lutdeploy.training.recipes import TrainSettings, read_settings

TEMPLATE = Path(__file__).parent / "card.md.j2"
REFERENCE = solver_schedule("euler", 64)
SHOWN = 64  # unselected samples in the picture


def seen_before(settings: TrainSettings) -> int:
    """Images that the weights in the place of a start had seen, as far as the package knows them.

    It knows them before the run's model takes their place, and by its metadata afterwards.
    """
    if settings.init_sha256 is None or settings.distilled is not None:
        return 0
    for name in shipped.names():
        path = shipped.model_path(name)
        _, about = read_metadata(path)
        if files.sha256(path) == settings.init_sha256:
            return int(about["images_seen"])
        if about.get("init_sha256") == settings.init_sha256:
            return int(about["init_images_seen"])
    return 0


def write_weights(run: Run, name: str) -> Path:
    """The run's model as float16, under its name in the package."""
    _, about = read_metadata(run.model)
    settings = read_settings(run)
    before = seen_before(settings)
    seen = {"images_seen": before + about["step"] * settings.batch, "recipe": settings.recipe}
    if before:
        seen |= {"init_sha256": str(settings.init_sha256), "init_images_seen": before}
    path = shipped.model_path(name)
    model = checkpoint.load_model(run.model)
    about = {key: value for key, value in about.items() if key != "data"}  # a path of this machine
    checkpoint.save_model(model, path, torch.float16, about={**about, **seen, "name": name})
    return path


def schedules(path: Path) -> tuple[Schedule, Schedule]:
    """What the weights are sampled with: their best schedule, and the reference.

    A distilled model's only schedule is both.
    """
    own = distilled_schedule(path)
    if own is not None:
        return own, own
    try:
        known = stored_tuned_steps(path, files.sha256(path))
    except ArtefactError as error:
        click.echo(f"{error}; removed", err=True)
        tuned_steps_file(path).unlink()
        known = None
    return (known.best if known else None) or REFERENCE, REFERENCE


def training_facts(settings: TrainSettings, about: dict[str, Any], real: RealImages) -> Any:
    """What NAME.json holds of the training."""
    training = msgspec.to_builtins(settings)
    del training["data"], training["init"]  # paths of this machine
    if settings.distilled is not None and settings.distilled.images is not None:
        del training["distilled"]["images"]["data"]
    if settings.distilled is not None and settings.distilled.guidance is not None:
        del training["distilled"]["guidance"]["guide"]
    training |= {name: about[name] for name in ("step", "images_seen", "ema")}
    training["init_images_seen"] = about.get("init_images_seen", 0)
    training |= {"training_images": len(real.training), "held_out_images": len(real.held_out)}
    return training


def measured(
    sampled: dict[str, Evaluation], best: str, reference: str, extractor: Extractor
) -> dict[str, Any]:
    """What NAME.json holds of an evaluation for each schedule."""
    first, other = (msgspec.to_builtins(sampled[name]) for name in (best, reference))
    return {
        "sampling": {"steps": best, "seed": 0},
        "features": {"name": extractor.name, "sha256": extractor.sha256},
        "metrics": first["rows"][0]["metrics"],
        "floor": first["rows"][1]["metrics"],
        "reference": reference,
        "reference_metrics": other["rows"][0]["metrics"],
        "x0_errors": first["errors"],
        "memorisation": first["memorisation"],
        "likeness": first["likeness"],
        "alarms": list(first["alarms"]),
    }


def card(name: str, values: dict[str, Any]) -> str:
    """NAME.md, for people."""
    rows: list[tuple[str, Metrics]] = [
        (values["sampling"]["steps"], Metrics(**values["metrics"])),
        (values["reference"], Metrics(**values["reference_metrics"])),
        ("real faces (floor)", Metrics(**values["floor"])),
    ]
    if values["sampling"]["steps"] == values["reference"]:
        del rows[1]
    preset = ModelConfig.from_dict(values["training"]["model"]).preset()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    training = values["training"]
    split = (training["distilled"] or {}).get("images") or training
    return template.render(name=name, rows=rows, preset=preset, split=split, **values)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--name", required=True, help="Such as static-tanh-64-small.")
@click.option("--data", help="Folder of real images. Default: what the run was trained on.")
@click.option("-n", "count", type=click.IntRange(min=16), default=1024, show_default=True)
@click.option("--remark", help="A paragraph for the card: where it falls short.")
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="docs/models",
    show_default=True,
    help="Folder for the card and the pictures.",
)
def main(
    run: Path | None, name: str, data: str | None, count: int, remark: str | None, docs: Path
) -> None:
    """Write weights and facts into lutdeploy/models, the card and pictures into --docs.

    Without RUN, the weights that are there already are measured again.
    """
    try:
        _ship(Run(run) if run else None, name, data, count, remark, docs)
    except LutDeployError as error:
        raise click.ClickException(str(error)) from error


def _ship(
    run: Run | None, name: str, data: str | None, count: int, remark: str | None, docs: Path
) -> None:
    settings = read_settings(run) if run else None
    known = {} if run else shipped.facts(name)
    path = write_weights(run, name) if run else shipped.model_path(name)
    folder = data or (settings.data if settings else None)
    if folder is None:
        raise UsageError("without a RUN, --data is needed")
    model = checkpoint.load_model(path)
    _, about = read_metadata(path)
    size, channels = model.config.image_size, model.config.channels
    trained = Trained.of_run(run) if run else Trained.of_model(path)
    real = load_real(folder, None, size, channels, trained)
    extractor = open_extractor()
    denoiser = TorchDenoiser(model, "cpu")
    best, reference = schedules(path)
    sampled = {}
    for schedule in dict.fromkeys((reference, best)):
        click.echo(f"{count} samples with {schedule.describe()}", err=True)
        samples = draw_samples(denoiser, count, schedule)
        # x0 errors need no schedule; a distilled model has none of use
        judged = denoiser if schedule == best and best.solver != DISTILLED else None
        sampled[schedule.describe()] = evaluate(samples, real, extractor, judged)
    values = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": training_facts(settings, about, real) if settings else known["training"],
        **measured(sampled, best.describe(), reference.describe(), extractor),
        "remark": known.get("remark", "") if remark is None else remark,
    }
    files.write_json(path.with_suffix(".json"), values)
    files.write_atomic(docs / f"{name}.md", card(name, values).encode())
    grid = images.grid(np.moveaxis(samples[:SHOWN], 1, -1))
    for kind, picture in {"samples": grid, **pictures.of_model(model, reference)}.items():
        files.write_atomic(docs / f"{name}.{kind}.png", images.encode_png(picture))
    if name == shipped.DEFAULT:
        tell = partial(click.echo, err=True)
        export_shipped(path, fitted_schedules(path, files.sha256(path)), tell)
    click.echo(path)


if __name__ == "__main__":
    main()
