"""Recipes side by side on the same images: the schedules of docs/training.md.

    python -m benchmarks.recipes --data faces/ --out runs/recipes [--only NAME ...]

Each variant is recipe `modern` of `static-tanh-64`, or what is named, with some numbers changed,
for as many images seen. A run that was stopped goes on, and one that is done is not trained again.
What is judged is the average of the lowest held-out loss; with --averages all that the run kept.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.run import Run
from lutdeploy.config import model_config
from lutdeploy.reference import TorchDenoiser
from lutdeploy.schedule import solver_schedule
from lutdeploy.training.data import ImageSet, load_folder
from lutdeploy.training.evaluation.data import draw_samples
from lutdeploy.training.evaluation.evaluate import Set, measure, with_features, x0_errors
from lutdeploy.training.evaluation.features import Extractor, open_extractor
from lutdeploy.training.loop import Cadence, train
from lutdeploy.training.recipes import TrainSettings, train_settings

AVERAGES = [0.9, 0.98, 0.995, 0.9995]
# What the first comparison started from: `modern` as it was before it took what won there.
FIRST: dict[str, Any] = {
    "optimizer": "adamw",
    "start": "noise",
    "t_mean": -0.8,
    "t_std": 0.8,
    "velocity_floor": 0.05,
    "lr": 1e-3,
    "ema": AVERAGES,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": {},
    "modern, seed 1": {"seed": 1},
    "x0 loss": {"velocity_floor": None},
    "μ −0.8, σ 0.8": {"t_mean": -0.8, "t_std": 0.8},
    "μ −0.4": {"t_mean": -0.4},
    "μ 0": {"t_mean": 0.0},
    "μ 0.6": {"t_mean": 0.6},
    "lr 1e-3": {"lr": 1e-3},
    "lr 4e-3": {"lr": 4e-3},
    "Gram weight 0": {"gram_weight": 0.0},
    "Gram weight 0.2": {"gram_weight": 0.2},
    "batch 256, lr 4e-3": {"batch": 256, "lr": 4e-3},
    "dropout 0.1": {"dropout": 0.1},
    "post, no LPIPS": {"recipe": "post"},
    "softmax": {"preset": "static-softmax-512"},
    "softmax, noise": {"preset": "static-softmax-512", "start": "noise"},
    "dynamic": {"preset": "dynamic-64"},
    "first": FIRST,
    "first, seed 1": {**FIRST, "seed": 1},
    "first, x0 loss": {**FIRST, "velocity_floor": None},
    "first, μ −0.4": {**FIRST, "t_mean": -0.4},
    "first, μ 0": {**FIRST, "t_mean": 0.0},
    "first, μ 0.6": {**FIRST, "t_mean": 0.6},
    "first, μ 0, σ 1.2": {**FIRST, "t_mean": 0.0, "t_std": 1.2},
    "first, Muon": {**FIRST, "optimizer": "muon"},
    "first, Muon, copy": {**FIRST, "optimizer": "muon", "start": "copy"},
    "first, Muon, copy, μ 0, σ 1": {
        **FIRST,
        "optimizer": "muon",
        "start": "copy",
        "t_mean": 0.0,
        "t_std": 1.0,
    },
}


def settings_of(name: str, data: str, size: str, images: int) -> TrainSettings:
    """The settings of a variant that sees so many images."""
    changes = {**VARIANTS[name]}
    batch, seed = changes.pop("batch", 64), changes.pop("seed", 0)
    recipe, steps = changes.pop("recipe", "modern"), images // batch
    if recipe == "modern":  # whose 200 steps are meant for thousands
        changes["warmup"] = steps // 4
    plain = train_settings(
        model_config(changes.pop("preset", "static-tanh-64"), size),
        recipe,
        data=data,
        steps=steps,
        batch=batch,
        seed=seed,
        precision="bf16",
        compile=True,
        perceptual="none",
    )
    return plain.changed(**changes)


def run_of(name: str, folder: Path) -> Run:
    """Where a variant's run is."""
    kept = "".join(c if c.isalnum() or c in ".-" else "-" for c in name.replace("−", "-"))
    return Run(folder / kept)


def judge(
    path: Path, data: ImageSet, real: Set, extractor: Extractor, count: int, steps: int
) -> dict[str, Any]:
    """x0 errors on the held-out images of seed 0, and distances of samples."""
    denoiser = TorchDenoiser(load_model(path), "cpu")
    chosen, held = data.split(0.05, 0)
    curve = x0_errors(denoiser, data.images[held], data.images[chosen])
    samples = draw_samples(denoiser, count, solver_schedule("dpmpp-2m", steps))
    found = measure(with_features(samples, extractor), real, 0)
    errors = dict(zip(curve.times, curve.held_out, strict=True))
    return {"errors": errors, "gap": curve.gap, **dataclasses.asdict(found)}


def line(name: str, found: dict[str, Any]) -> str:
    """A row: x0 errors × 1000, distances, and what the errors of training images are below."""
    errors = {float(t): value for t, value in found["errors"].items()}
    cells = [
        name,
        *(f"{1000 * errors[t]:.1f}" for t in (0.1, 0.3, 0.6, 0.9, 0.98)),
        f"{found['frechet_distance']:.0f}",
        f"{1000 * found['kernel_distance']:.0f}",
        *(f"{found[key]:.2f}" for key in ("precision", "recall")),
        *(f"{value:.0f}" for value in found["sliced_wasserstein"].values()),
        f"{found['gap'] * 1000:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.option("--data", required=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/recipes", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(tuple(VARIANTS)))
@click.option("--size", default="small", show_default=True)
@click.option("--images", type=click.IntRange(min=256), default=51200, show_default=True)
@click.option("-n", "count", type=click.IntRange(min=16), default=512, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--averages", is_flag=True, help="Judge every average.")
def main(
    data: str,
    out: Path,
    only: tuple[str, ...],
    size: str,
    images: int,
    count: int,
    steps: int,
    threads: int | None,
    averages: bool,
) -> None:
    """Train what is missing, judge what is not judged yet, print the schedule."""
    if threads is not None:
        torch.set_num_threads(threads)
    found = load_folder(Path(data), 64)
    order = np.random.default_rng(0).permutation(len(found.images))[:count]
    extractor = open_extractor()
    real = with_features(found.images[order], extractor)
    for name in only or VARIANTS:
        run = run_of(name, out)
        settings = settings_of(name, data, size, images)
        run.path.mkdir(parents=True, exist_ok=True)
        cadence = Cadence(checkpoint=500, picture=10**9)
        for progress in train(settings, found, run, cadence=cadence, resume=True):
            if progress.step % 100 == 0:
                click.echo(f"{name}: step {progress.step}, loss {progress.loss:.4f}", err=True)
        for path in sorted(run.averages.glob("*.safetensors")) if averages else [run.model]:
            judged = run.path / f"judged-{path.stem}-{count}-{steps}.json"
            if not judged.is_file():
                files.write_json(judged, judge(path, found, real, extractor, count, steps))
            row = json.loads(judged.read_text(encoding="utf-8"))
            click.echo(line(f"{name}, {path.stem}" if averages else name, row))


if __name__ == "__main__":
    main()
