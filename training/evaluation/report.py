"""An evaluation for people: tables and sentences, and the HTML page that holds them."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lutdeploy import images
from lutdeploy.errors import BackendError
from lutdeploy.machine import import_problem
from lutdeploy.training.evaluation.distances import Pixels
from lutdeploy.training.evaluation.evaluate import ErrorCurve, Evaluation, Likeness
from lutdeploy.training.evaluation.features import Extractor
from lutdeploy.training.evaluation.memorisation import Memorisation

TEMPLATE = Path(__file__).parent / "report.html.j2"
GRID_IMAGES = 64
WIDTH, HEIGHT = 560, 300  # of the chart
LEFT, BOTTOM, TOP, RIGHT = 56, 40, 16, 16  # its margins


@dataclass(frozen=True)
class Table:
    """What the screen and the page show alike."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    text_columns: int = 1  # on the left; the others hold figures


def metric_table(evaluation: Evaluation, extractor: Extractor) -> Table:
    """A column for each pair of sets, a row for each metric."""
    found = [row.metrics for row in evaluation.rows]
    kernel = [f"{1000 * m.kernel_distance:.2f} ± {1000 * m.kernel_distance_std:.2f}" for m in found]
    rows = [
        [extractor.frechet_name, *(f"{m.frechet_distance:.2f}" for m in found)],
        [f"{extractor.kernel_name} × 1000", *kernel],
    ]
    for name in ("precision", "recall", "density", "coverage"):
        rows.append([name, *(f"{getattr(m, name):.3f}" for m in found)])
    for side in found[0].sliced_wasserstein:
        distances = [f"{m.sliced_wasserstein[side]:.1f}" for m in found]
        rows.append([f"sliced Wasserstein × 1000, {side}×{side}", *distances])
    heads = [f"{row.metrics.images:,} {row.what} against {row.against}" for row in evaluation.rows]
    return Table("Pictures against real images, and real ones as the floor", ["", *heads], rows)


def memorisation_table(evaluation: Evaluation) -> Table:
    """The nearest training images of samples and of held-out images, in pixels and features."""
    rows = []
    for found in evaluation.memorisation:
        for what, nearest in (("samples", found.samples), ("held-out", found.held_out)):
            if nearest is not None:
                distances = f"{nearest.median_nearest:.3g}", f"{nearest.smallest_nearest:.3g}"
                ratios = f"{nearest.median_ratio:.3f}", f"{nearest.share_copies:.2%}"
                rows.append([found.space, f"{nearest.images:,} {what}", *distances, *ratios])
    heads = ["space", "images", "median d1", "smallest d1", "median d1/d2", "d1/d2 < 1/3"]
    return Table("Nearest training images, flips included", heads, rows, text_columns=2)


def error_table(curve: ErrorCurve) -> Table:
    """The x0 errors by noise level."""
    rows = [
        [name, *(f"{error:.4f}" for error in errors)]
        for name, errors in (("held-out", curve.held_out), ("training", curve.training))
    ]
    return Table("Error of x0 by noise level", ["t", *map(str, curve.times)], rows)


def error_sentence(curve: ErrorCurve) -> str:
    return (
        f"x0 error: held-out minus training {curve.gap:.2g} ± {curve.gap_error:.2g} "
        f"(mean over t, {curve.images} images of each kind)"
    )


def likeness_sentence(like: Likeness) -> str:
    return (
        f"MS-SSIM of {like.pairs} pairs ({like.scales} scales): samples {like.samples:.3f} ± "
        f"{like.samples_error:.3f}, real {like.real:.3f} ± {like.real_error:.3f}"
    )


def sentences(evaluation: Evaluation) -> list[str]:
    """What the screen shows below the tables: error gap, likeness of pairs, alarms, notes."""
    said = [error_sentence(evaluation.errors)] if evaluation.errors else []
    said += [likeness_sentence(evaluation.likeness)] if evaluation.likeness else []
    said += [f"ALARM: {alarm}" for alarm in evaluation.alarms]
    return said + [f"note: {text}" for text in evaluation.notes]


def _picture(pixels: Pixels, columns: int) -> str:
    """A grid of images [n, C, S, S] as a data URI."""
    last = np.ascontiguousarray(np.moveaxis(pixels, 1, -1))  # [n, S, S, C]
    encoded = base64.b64encode(images.encode_png(images.grid(last, columns=columns))).decode()
    return f"data:image/png;base64,{encoded}"


def _pairs(found: Memorisation, samples: Pixels, training: Pixels) -> list[dict[str, str]]:
    """Each sample beside its nearest training image, flipped where that is nearer."""
    pairs = []
    for pair in found.closest:
        image = training[pair.training]
        both = np.stack([samples[pair.sample], image[..., ::-1] if pair.mirrored else image])
        caption = f"d {pair.distance:.3g}, d1/d2 {pair.ratio:.2f}"
        pairs.append({"image": _picture(both, columns=2), "text": caption})
    return pairs


def chart(curve: ErrorCurve) -> dict[str, Any]:
    """Lines, ticks and labels of the error curves: error (logarithmic) over t, in pixels."""
    errors = [max(error, 1e-12) for error in (*curve.held_out, *curve.training)]
    low = math.floor(math.log10(min(errors)))
    high = max(math.ceil(math.log10(max(errors))), low + 1)

    def x(t: float) -> float:
        return LEFT + t * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (math.log10(max(value, 1e-12)) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def points(values: Sequence[float]) -> str:
        places = zip(curve.times, values, strict=True)
        return " ".join(f"{x(t):.1f},{y(value):.1f}" for t, value in places)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "held_out": points(curve.held_out),
        "training": points(curve.training),
        "bottom": HEIGHT - BOTTOM,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "x_ticks": [(f"{x(k / 5):.1f}", f"{k / 5:.1f}") for k in range(6)],
        "y_ticks": [(f"{y(10.0**k):.1f}", f"1e{k}") for k in range(low, high + 1)],
    }


def page(
    evaluation: Evaluation,
    extractor: Extractor,
    samples: Pixels,
    training: Pixels,
    title: str,
    facts: dict[str, Any],
) -> str:
    """The HTML page of ``facts`` and pictures, uint8 [n, C, S, S]; nothing is loaded from outside.

    Facts that are None are left out.
    """
    template = require_jinja2().Template(
        TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    spread = np.linspace(0, len(training) - 1, min(len(training), GRID_IMAGES)).round().astype(int)
    curve, like = evaluation.errors, evaluation.likeness
    return template.render(
        title=title,
        evaluation=evaluation,
        metrics=metric_table(evaluation, extractor),
        memorisation=memorisation_table(evaluation),
        features=extractor.name,
        sample_grid=_picture(samples[:GRID_IMAGES], columns=8),
        real_grid=_picture(training[spread], columns=8),
        grid_images=min(len(samples), GRID_IMAGES),
        closest=[(m.space, _pairs(m, samples, training)) for m in evaluation.memorisation],
        errors=error_table(curve) if curve else None,
        error_sentence=error_sentence(curve) if curve else "",
        chart=chart(curve) if curve else None,
        likeness_sentence=likeness_sentence(like) if like else "",
        facts={name: value for name, value in facts.items() if value is not None},
    )


def require_jinja2() -> Any:
    """Jinja2, or an error that says how to get it."""
    problem = import_problem("evaluate", "jinja2")
    if problem:
        raise BackendError(problem)
    import jinja2

    return jinja2
