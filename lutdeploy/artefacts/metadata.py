"""What a model.safetensors says of itself, read without PyTorch and without the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, UsageError

METADATA_KEY = "lutdeploy"


def read_metadata(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the ``about`` values of a model.safetensors; its weights are not read."""
    if not path.is_file():
        raise UsageError(f"{path}: no such model file")
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged or no safetensors file: {error}") from error
    if text is None:
        raise ArtefactError(f"{path} holds no {METADATA_KEY} metadata: not a lutdeploy model")
    try:
        metadata = json.loads(text)
        return ModelConfig.from_dict(metadata["config"]), dict(metadata.get("about", {}))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ArtefactError(f"{path}: unreadable {METADATA_KEY} metadata: {error}") from error
