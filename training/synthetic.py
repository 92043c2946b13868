"""Simple cat faces, drawn: training data for when there is none."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OVERSAMPLING = 4
FURS = ((214, 137, 66), (96, 96, 104), (40, 38, 42), (232, 224, 210), (150, 112, 80))
EYES = ((120, 180, 60), (230, 180, 40), (80, 150, 200), (170, 110, 40))

CIRCLE = np.array([(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, False)])

Axis = TypeVar("Axis", float, NDArray[np.float64])
Colour = tuple[int, int, int]


def _vary(colour: Colour, generator: np.random.Generator, spread: float = 25) -> Colour:
    r, g, b = (int(v) for v in np.clip(np.array(colour) + generator.normal(0, spread, 3), 0, 255))
    return (r, g, b)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (int(one * (1 - share) + two * share) for one, two in zip(colour, other, strict=True))
    return (r, g, b)


def draw_cat(generator: np.random.Generator, size: int) -> Image.Image:
    """One RGB picture of ``size`` pixels a side; all it varies comes from ``generator``.

    Varied: fur and eye colour, markings, background gradient, place, scale and tilt.
    """
    side = size * OVERSAMPLING
    unit = side / 2
    top, bottom = (generator.uniform(20, 235, 3) for _ in range(2))
    ramp = np.linspace(0, 1, side)[:, None, None]
    rows = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (side, side, 3))
    image = Image.fromarray(np.ascontiguousarray(rows.astype(np.uint8)))
    draw = ImageDraw.Draw(image)

    fur = _vary(FURS[generator.integers(len(FURS))], generator)
    dark, light = _mix(fur, (0, 0, 0), 0.45), _mix(fur, (255, 255, 255), 0.55)
    iris = _vary(EYES[generator.integers(len(EYES))], generator, 15)
    tilt = generator.normal(0, 0.14)
    scale = generator.uniform(0.62, 0.85) * unit
    centre = unit + generator.normal(0, 0.07 * unit, 2)
    turn = generator.normal(0, 0.06)  # the face's features shift sideways
    cos, sin = math.cos(tilt), math.sin(tilt)

    def at(x: Axis, y: Axis) -> tuple[Axis, Axis]:
        """Face coordinates, about [−1, 1], to pixels; of one point or of many."""
        return (centre[0] + scale * (cos * x - sin * y), centre[1] + scale * (sin * x + cos * y))

    def ellipse(x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        across, down = x + rx * CIRCLE[:, 0], y + ry * CIRCLE[:, 1]
        points = np.stack(at(across, down), axis=-1)  # [48, 2]
        draw.polygon(points.ravel().tolist(), fill)

    for sign in (-1, 1):
        ear = generator.uniform(0.95, 1.15)
        draw.polygon([at(sign * 0.85, -0.2), at(sign * 0.72, -ear), at(sign * 0.18, -0.6)], fur)
        draw.polygon(
            [at(sign * 0.74, -0.4), at(sign * 0.68, -ear + 0.2), at(sign * 0.36, -0.6)],
            _mix(fur, (235, 150, 150), 0.6),
        )
    ellipse(0, 0.05, 0.92, 0.8, fur)
    if generator.random() < 0.5:  # tabby stripes on the brow
        for x in (-0.22, 0.0, 0.22):
            draw.polygon([at(x - 0.05, -0.72), at(x + 0.05, -0.72), at(x * 0.7, -0.3)], dark)
    if generator.random() < 0.4:  # a blaze
        draw.polygon([at(-0.06, -0.5), at(0.06, -0.5), at(0.2, 0.5), at(-0.2, 0.5)], light)
    ellipse(turn, 0.45, 0.42, 0.3, light)
    open_, gap = generator.uniform(0.11, 0.2), generator.uniform(0.34, 0.44)
    pupil = generator.uniform(0.04, 0.12)
    for sign in (-1, 1):
        ellipse(sign * gap + turn, -0.05, 0.2, open_ + 0.03, dark)
        ellipse(sign * gap + turn, -0.05, 0.18, open_, iris)
        ellipse(sign * gap + turn, -0.05, pupil, open_ * 0.92, (12, 12, 14))
        ellipse(sign * gap + turn + 0.05, -0.05 - open_ * 0.4, 0.035, 0.035, (250, 250, 250))
    nose = _mix((220, 130, 130), dark, generator.uniform(0, 0.7))
    draw.polygon([at(turn - 0.11, 0.28), at(turn + 0.11, 0.28), at(turn, 0.4)], nose)
    width = max(1, int(0.03 * scale))
    draw.line([at(turn, 0.4), at(turn, 0.52)], dark, width)
    for sign in (-1, 1):
        draw.line([at(turn, 0.52), at(turn + sign * 0.16, 0.58)], dark, width)
        for lift in (-0.08, 0.02, 0.12):
            draw.line(
                [at(turn + sign * 0.28, 0.44 + lift / 2), at(turn + sign * 0.95, 0.4 + lift * 2)],
                _mix(light, (255, 255, 255), 0.5),
                max(1, width // 2),
            )
    return image.resize((size, size), Image.Resampling.BOX)
