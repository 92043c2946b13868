"""The trained models that come with the package: weights, facts, fitted schedules, an export.

A folder NAME has NAME.safetensors (float16), NAME.json (how it was trained and what `lutdeploy
evaluate` measured), and NAME.steps.json where fits were better than formulas. That of the default
model is an export as well, with its manifest and its verdict: a graph that reads its matrices from
NAME.safetensors. Cards and pictures are in docs/models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files

FOLDER = Path(__file__).parents[1] / "models"
DEFAULT = "static-tanh-64-small"  # the one of the best metrics
LICENSE = "mit"  # of them all, as the Hub writes it


def names() -> tuple[str, ...]:
    """Of all models, the default first."""
    found = {path.stem for path in FOLDER.glob("*/*.safetensors")}
    return tuple(sorted(found, key=lambda name: (name != DEFAULT, name)))


def model_path(name: str = DEFAULT) -> Path:
    """The weights of a model of :func:`names`."""
    return FOLDER / name / f"{name}.safetensors"


def is_shipped(path: Path) -> bool:
    """Whether a file is the weights of a model of the package."""
    return path.parent.parent == FOLDER and path.stem in names()


def named(model_sha256: str) -> str | None:
    """The model of the package whose weights have this hash."""
    found = (name for name in names() if files.sha256(model_path(name)) == model_sha256)
    return next(found, None)


def facts(name: str) -> dict[str, Any]:
    """What NAME.json says: ``training``, ``sampling``, ``metrics`` and ``floor``."""
    values: dict[str, Any] = json.loads(model_path(name).with_suffix(".json").read_text("utf-8"))
    return values
