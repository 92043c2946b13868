"""What a model.safetensors says of itself, read without PyTorch and without the weights."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lutdeploy.artefacts import files, foreign
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, UsageError

METADATA_KEY = "lutdeploy"


def read_metadata(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the ``about`` values of a model.safetensors; its weights are not read."""
    if not path.is_file():
        raise UsageError(f"{path}: no such model file")
    metadata = told_metadata(path)
    if metadata is None:
        raise ArtefactError(
            f"{path} holds no {METADATA_KEY} metadata, which a model of lutdeploy has: it comes "
            "from elsewhere, or was saved again without; `lutdeploy import` reads its weights"
        )
    return metadata


def told_metadata(path: Path) -> tuple[ModelConfig, dict[str, Any]] | None:
    """What a safetensors file says of a model in our metadata; None where it has none."""
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        if zipfile.is_zipfile(path):
            raise ArtefactError(f"{path} is no safetensors file; try `lutdeploy import`") from error
        raise foreign.unreadable(path, error) from error
    if text is None:
        return None
    try:
        metadata = json.loads(text)
        return ModelConfig.from_dict(metadata["config"]), dict(metadata.get("about", {}))
    except (*files.BAD_JSON, KeyError, TypeError, ConfigError) as error:
        raise ArtefactError(f"{path}: unreadable {METADATA_KEY} metadata: {error}") from error
