"""An evaluation for people: rows of a table, and a self-contained HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lutdeploy import images
from lutdeploy.errors import BackendError
from lutdeploy.training.evaluation.distances import Pixels
from lutdeploy.training.evaluation.evaluate import ErrorCurve, Evaluation, Memorisation
from lutdeploy.training.evaluation.features import Extractor

TEMPLATE = Path(__file__).parent / "report.html.j2"
MEMORISATION_HEADS = (
    "space",
    "images",
    "median d1",
    "smallest d1",
    "median d1/d2",
    "d1/d2 < 1/3",
)
GRID_IMAGES = 64
WIDTH, HEIGHT = 560, 300  # of a chart
LEFT, BOTTOM, TOP, RIGHT = 56, 40, 16, 16  # its margins


def metric_table(evaluation: Evaluation, extractor: Extractor) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a column for each set, a line for each metric, best first."""
    rows = evaluation.rows
    lines = [
        [extractor.frechet_name, *(f"{row.metrics.frechet_distance:.2f}" for row in rows)],
        [
            f"{extractor.kernel_name} × 1000",
            *(
                f"{1000 * row.metrics.kernel_distance:.2f} "
                f"± {1000 * row.metrics.kernel_distance_std:.2f}"
                for row in rows
            ),
        ],
    ]
    for name in ("precision", "recall", "density", "coverage"):
        lines.append([name, *(f"{getattr(row.metrics, name):.3f}" for row in rows)])
    for side in rows[0].metrics.sliced_wasserstein:
        distances = (row.metrics.sliced_wasserstein[side] for row in rows)
        lines.append(
            [f"sliced Wasserstein × 1000, {side}×{side}", *(f"{d:.1f}" for d in distances)]
        )
    heads = [f"{row.metrics.images:,} {row.what} against {row.against}" for row in rows]
    return ["", *heads], lines


def memorisation_rows(found: Sequence[Memorisation]) -> list[list[str]]:
    """Lines under :data:`MEMORISATION_HEADS`."""
    lines = []
    for space in found:
        for what, values in (("samples", space.samples), ("held-out", space.held_out)):
            if values is not None:
                lines.append(
                    [
                        space.space,
                        f"{values['images']:,} {what}",
                        f"{values['median_nearest']:.3g}",
                        f"{values['smallest_nearest']:.3g}",
                        f"{values['median_ratio']:.3f}",
                        f"{values['share_copies']:.2%}",
                    ]
                )
    return lines


def sentences(evaluation: Evaluation) -> list[str]:
    """What the tables do not hold: error gap, likeness of pairs, alarms, notes."""
    said = []
    if (curve := evaluation.errors) is not None:
        said.append(
            f"x0 error: held-out minus training {curve.gap:.2g} ± {curve.gap_error:.2g} "
            f"(mean over t, {curve.images} images of each kind)"
        )
    if (like := evaluation.likeness) is not None:
        said.append(
            f"MS-SSIM of {like.pairs} pairs ({like.scales} scales): samples {like.samples:.3f} ± "
            f"{like.samples_error:.3f}, real {like.real:.3f} ± {like.real_error:.3f}"
        )
    said += [f"ALARM: {alarm}" for alarm in evaluation.alarms]
    return said + [f"note: {text}" for text in evaluation.notes]


def _data_uri(pixels: images.Pixels) -> str:
    encoded = base64.b64encode(images.encode_png(pixels)).decode()
    return f"data:image/png;base64,{encoded}"


def _last(pixels: Pixels) -> images.Pixels:
    """[n, C, S, S] to [n, S, S, C]."""
    return np.ascontiguousarray(np.moveaxis(pixels, 1, -1))


def _grid(pixels: Pixels) -> str:
    return _data_uri(images.grid(_last(pixels[:GRID_IMAGES]), columns=8))


def _pairs(found: Memorisation, samples: Pixels, training: Pixels) -> list[dict[str, str]]:
    """Each sample beside its nearest training image, flipped where that is nearer."""
    pairs = []
    for pair in found.closest:
        image = training[pair.training]
        both = np.stack([samples[pair.sample], image[..., ::-1] if pair.mirrored else image])
        caption = f"d {pair.distance:.3g}, d1/d2 {pair.ratio:.2f}"
        pairs.append({"image": _data_uri(images.grid(_last(both), columns=2)), "text": caption})
    return pairs


def chart(curve: ErrorCurve) -> dict[str, Any]:
    """Lines, ticks and labels of the error curves: error (logarithmic) over t, in pixels."""
    low = math.floor(math.log10(max(min(*curve.held_out, *curve.training), 1e-12)))
    high = max(math.ceil(math.log10(max(*curve.held_out, *curve.training, 1e-12))), low + 1)

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
    facts: dict[str, str],
) -> str:
    """The HTML page: everything is inside it, nothing is loaded.

    Args:
        evaluation: what was found.
        extractor: whose features were used.
        samples, training: uint8 [n, C, S, S], that the evaluation's indices point into.
        title: of the page.
        facts: settings and hashes, name to value.

    Raises:
        BackendError: Jinja2 is not installed.
    """
    template = require_jinja2().Template(
        TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    spread = np.linspace(0, len(training) - 1, min(len(training), GRID_IMAGES)).round().astype(int)
    heads, lines = metric_table(evaluation, extractor)
    return template.render(
        title=title,
        evaluation=evaluation,
        heads=heads,
        lines=lines,
        memorisation_heads=MEMORISATION_HEADS,
        memorisation=memorisation_rows(evaluation.memorisation),
        extractor=extractor,
        sample_grid=_grid(samples),
        real_grid=_grid(training[spread]),
        grid_images=min(len(samples), GRID_IMAGES),
        closest=[
            (found.space, _pairs(found, samples, training)) for found in evaluation.memorisation
        ],
        chart=chart(evaluation.errors) if evaluation.errors else None,
        facts=facts,
    )


def require_jinja2() -> Any:
    """Jinja2.

    Raises:
        BackendError: not installed; says how to get it.
    """
    try:
        import jinja2
    except ImportError as error:
        raise BackendError(
            f"Jinja2 is not installed here ({error}); pip install 'lutdeploy[evaluate]'"
        ) from error
    return jinja2
