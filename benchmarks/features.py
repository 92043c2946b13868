"""Do the distances of `lutdeploy evaluate` grow with what is worse? A table in Markdown.

    python -m benchmarks.features --data faces/ [-n 1024] [SAMPLES ...]

Real images are measured against as many others: as they are, blurred, noisy, with modes
missing; then folders of samples, in the order given.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageFilter

from lutdeploy.training.data import load_folder
from lutdeploy.training.evaluation.data import read_samples
from lutdeploy.training.evaluation.distances import Features, Pixels
from lutdeploy.training.evaluation.evaluate import Metrics, compare_sets
from lutdeploy.training.evaluation.features import open_extractor


def worn(pixels: Pixels, kind: str, strength: float) -> Pixels:
    """uint8 [n, 3, S, S] blurred by sigma pixels, or with noise of so many of 255 levels."""
    if kind == "noise":
        noise = np.random.default_rng(0).standard_normal(pixels.shape)
        return (pixels + strength * noise).round().clip(0, 255).astype(np.uint8)
    kernel = ImageFilter.GaussianBlur(strength)
    pictures = [Image.fromarray(p).filter(kernel) for p in np.moveaxis(pixels, 1, -1)]
    return np.moveaxis(np.stack([np.asarray(p) for p in pictures]), -1, 1)


def missing_modes(pixels: Pixels, features: Features, share: float) -> Pixels:
    """The set without the ``share`` farthest to one side of its main axis, the rest repeated."""
    centred = features - features.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    kept = np.argsort(centred @ axis)[: round(len(pixels) * (1 - share))]
    return pixels[kept[np.arange(len(pixels)) % len(kept)]]


def line(what: str, found: Metrics) -> str:
    cells = [
        what,
        f"{found.frechet_distance:.1f}",
        f"{1000 * found.kernel_distance:.1f} ± {1000 * found.kernel_distance_std:.1f}",
        *(f"{v:.2f}" for v in (found.precision, found.recall, found.density, found.coverage)),
        *(f"{v:.1f}" for v in found.sliced_wasserstein.values()),
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("samples", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("-n", "count", type=click.IntRange(min=16), default=1024)
def main(samples: tuple[Path, ...], data: Path, count: int) -> None:
    """Print the table."""
    extractor = open_extractor()
    images = load_folder(data, 64).images
    order = np.random.default_rng(0).permutation(len(images))
    count = min(count, len(images) // 2)
    real, reference = images[order[:count]], images[order[count : 2 * count]]
    cases = [("real", real)]
    cases += [(f"blur, σ {s} pixels", worn(real, "blur", s)) for s in (0.5, 0.75, 1.0, 1.5, 2.0)]
    cases += [(f"noise, {s} of 255", worn(real, "noise", s)) for s in (4, 8, 16, 32, 64)]
    features = extractor(real)
    cases += [
        (f"{share:.0%} of the modes missing", missing_modes(real, features, share))
        for share in (0.1, 0.25, 0.5, 0.75)
    ]
    cases += [(str(folder), read_samples(folder, count).pixels) for folder in samples]
    for what, pixels in cases:
        against = reference[: len(pixels)]
        click.echo(line(what, compare_sets(pixels, against, extractor)))


if __name__ == "__main__":
    main()
