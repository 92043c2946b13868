"""Model weights on disk: our safetensors files, and the author's state dicts.

The specification describes the author's layout under "The author's checkpoints".
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutdeploy.artefacts import files
from lutdeploy.artefacts.metadata import METADATA_KEY, read_metadata
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, UsageError, first_line
from lutdeploy.model import LutTransformer


def save_model(
    model: LutTransformer,
    path: Path,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and config as one safetensors file, atomically.

    Args:
        model: the model; its parameters are stored as ``dtype``.
        path: the file to write or replace.
        dtype: float32, or float16 for half the size.
        about: further plain JSON values for the metadata (origin, steps, …).
    """
    tensors = {
        name: value.detach().to(dtype).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"config": model.config.to_dict(), "about": dict(about or {})}
    files.write_atomic(path, save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def load_model(path: Path) -> LutTransformer:
    """Read a model.safetensors into a float32 model in eval mode, on the CPU."""
    config, _ = read_metadata(path)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    model = LutTransformer(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_shapes(state, expected, f"{path}: the weights do not fit the config")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _check_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise an ArtefactError that names the first missing, misshapen or unknown key."""
    for key, shape in expected.items():
        if key not in state:
            raise ArtefactError(f"{what}: key {key} is missing")
        if tuple(state[key].shape) != shape:
            raise ArtefactError(
                f"{what}: key {key} has shape {list(state[key].shape)}, expected {list(shape)}"
            )
    for key in state:
        if key not in expected:
            raise ArtefactError(f"{what}: key {key} is unknown")


def _block_keys(index: int) -> dict[str, tuple[str, ...]]:
    """The author's layers for each of our layers of a block, in the order of their stacking."""
    at = f"backbone.{index}"
    return {
        "norm1": (f"{at}.norm1",),
        "qkv": (f"{at}.attn.q.0", f"{at}.attn.k.0", f"{at}.attn.v.0"),
        "out": (f"{at}.attn.fc.0",),
        "norm2": (f"{at}.norm2",),
        "gated": (f"{at}.ffw.0.ffw_0", f"{at}.ffw.0.ffw_1"),
    }


def _first_block(config: ModelConfig) -> int:
    return 6 if config.lut == "static" else 7


def _layer_keys(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The author's names for each of our layers that has a weight and a bias."""
    layers: dict[str, tuple[str, ...]] = {
        "stem.time": ("time_mlp.0",),
        "stem.expand": ("expand",),
        "stem.patch": ("backbone.1",),
    }
    for block in range(config.depth):
        for name, theirs in _block_keys(_first_block(config) + block).items():
            layers[f"blocks.{block}.{name}"] = theirs
    layers["head"] = ("projection",)
    if config.lut == "dynamic":
        layers["lut.factors"] = ("lut_projection",)
    return layers


# The author's 1×1 convolutions [out, in, 1, 1], which are linear layers [out, in] here.
_POINTWISE = re.compile(r"(\.attn\.\w+\.0|\.ffw_\d|^projection)\.weight$")


def to_author_state(model: LutTransformer) -> dict[str, Tensor]:
    """The model as a state dict in the author's layout, bit for bit."""
    config, state = model.config, model.state_dict()
    author: dict[str, Tensor] = {}
    if config.lut == "static":
        author["lut"] = state["lut.entries"].clone()
    else:  # [K, D] to [1, D, 1, K]
        author["backbone.6.tokens"] = state["lut.tokens"].T[None, :, None].contiguous()
    for ours, theirs in _layer_keys(config).items():
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.{kind}"].chunk(len(theirs))
            for their, part in zip(theirs, parts, strict=True):
                key = f"{their}.{kind}"
                part = part[..., None, None] if _POINTWISE.search(key) else part
                author[key] = part.clone()
    return author


def from_author_state(author: Mapping[str, Tensor], config: ModelConfig) -> LutTransformer:
    """The inverse of :func:`to_author_state`, as a float32 model."""
    model = LutTransformer(config)
    expected = {key: tuple(value.shape) for key, value in to_author_state(model).items()}
    _check_shapes(author, expected, "not a state dict of this model")
    state: dict[str, Tensor] = {}
    if config.lut == "static":
        state["lut.entries"] = author["lut"]
    else:
        state["lut.tokens"] = author["backbone.6.tokens"][0, :, 0].T  # [1, D, 1, K] to [K, D]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for ours, theirs in _layer_keys(config).items():
        for kind in ("weight", "bias"):
            parts = torch.cat([author[f"{their}.{kind}"] for their in theirs])
            state[f"{ours}.{kind}"] = parts.reshape(shapes[f"{ours}.{kind}"])
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.eval().requires_grad_(False)


def infer_author_config(
    author: Mapping[str, Tensor], heads: int = 8, weights: str | None = None
) -> ModelConfig:
    """The config that fits a state dict in the author's layout.

    The shapes tell the kind of LUT, the widths, the depth and K, but not the heads and the
    activation.

    Args:
        author: the state dict.
        heads: attention heads; 8 in the post.
        weights: "tanh" or "softmax"; by default what the preset of this K uses.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in author:
            raise ArtefactError(f"not a state dict of a LUT model: key {key} is missing")
        found = tuple(author[key].shape)
        if len(found) != dims or 0 in found:
            raise ArtefactError(
                f"not a state dict of a LUT model: key {key} has shape {list(found)}"
            )
        return found

    width, stem, patch, _ = shape("backbone.1.weight", 4)
    channels = shape("expand.weight", 4)[1]
    entries = shape("projection.weight", 4)[0]
    dynamic = "backbone.6.tokens" in author
    if not dynamic:
        shape("lut", 4)
    first = 7 if dynamic else 6
    found = {int(m[1]) for key in author if (m := re.match(r"backbone\.(\d+)\.attn\.", key))}
    blocks = found or {first}
    return ModelConfig(
        patch_size=patch,
        channels=channels,
        width=width,
        depth=len(blocks),  # a gap in the numbers shows up as a missing key
        heads=heads,
        lut="dynamic" if dynamic else "static",
        entries=entries,
        weights=weights or ("softmax" if entries == 512 and not dynamic else "tanh"),
        stem_channels=stem,
        time_frequencies=max(2, shape("time_mlp.0.weight", 2)[1] // 2),
    )


def read_author_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict saved with torch.save without executing code that it may contain."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(Unsupported|Trying to load|GLOBAL).*?(?= Please|\n|$)", str(error))
        reason = found[0] if found else str(error)  # drops PyTorch's advice to trust the file
        raise ArtefactError(
            f"{path} refused: its pickle holds more than tensors, or is damaged, and is not "
            f"executed ({' '.join(reason.split())[:160]})"
        ) from error
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ArtefactError(
            f"{path} is damaged or no torch.save file: {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or not state:
        raise ArtefactError(f"{path} holds a {type(state).__name__}, not a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ArtefactError(f"{path}: entry {key!r} is no tensor: not a plain state dict")
    return state


def import_author_file(
    path: Path, heads: int = 8, weights: str | None = None, image_size: int = 64
) -> LutTransformer:
    """Read one of the author's checkpoints into a float32 model."""
    author = read_author_file(path)
    try:
        config = replace(infer_author_config(author, heads, weights), image_size=image_size)
        return from_author_state(author, config)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; see --heads and --image-size") from error


def save_author_file(model: LutTransformer, path: Path) -> None:
    """Write the model as the author's state dict with torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(to_author_state(model), buffer)
    files.write_atomic(path, buffer.getvalue())
