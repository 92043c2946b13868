"""Model weights on disk: our safetensors files, and the author's state dicts.

The specification describes the author's layout under "The author's checkpoints".
"""

from __future__ import annotations

import io
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutdeploy.artefacts import files, foreign
from lutdeploy.artefacts.metadata import METADATA_KEY, read_metadata, told_metadata
from lutdeploy.artefacts.state_dicts import StateDict, is_safetensors, read_state_dict
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, UsageError
from lutdeploy.model import LutTransformer

UNTOLD = ("heads", "weights", "image_size")  # by the shapes of a state dict


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
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise foreign.unreadable(path, error) from error
    try:
        return from_state(state, config)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error


def from_state(state: Mapping[str, Tensor], config: ModelConfig) -> LutTransformer:
    """A float32 model in eval mode from weights by our names."""
    if config.depth > len(state):
        raise ArtefactError(f"{len(state)} keys are too few for depth {config.depth}")
    with torch.device("meta"):
        expected = LutTransformer(config).state_dict()
    checked = _checked(state, expected)
    model = LutTransformer(config)
    model.load_state_dict(checked)
    return model.eval().requires_grad_(False)


def _checked(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as float32, if they are a model's.

    Raises:
        ArtefactError: names the first key that is missing, unknown or misshapen, or whose values
            are no finite floating-point numbers.
    """
    checked = {}
    for key, model in expected.items():
        if key not in state:
            raise ArtefactError(f"key {key} is missing")
        value = state[key]
        if value.shape != model.shape:
            raise ArtefactError(
                f"key {key} has shape {list(value.shape)}, expected {list(model.shape)}"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ArtefactError(f"key {key} is no plain tensor that holds its numbers")
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ArtefactError(f"key {key} holds {kind}, no floating-point weights")
        checked[key] = value.float()
        bad = value.numel() - int(checked[key].isfinite().sum())
        if bad:
            raise ArtefactError(
                f"key {key} holds NaN or Inf ({bad} of {value.numel()} numbers): a training that "
                "diverged, or a damaged file; take an earlier checkpoint"
            )
    for key in state:
        if key not in expected:
            raise ArtefactError(f"key {key} is unknown")
    return checked


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
    """The inverse of :func:`to_author_state`, as a float32 model in eval mode."""
    with torch.device("meta"):
        model = LutTransformer(config)
    checked = _checked(author, to_author_state(model))
    state: dict[str, Tensor] = {}
    if config.lut == "static":
        state["lut.entries"] = checked["lut"]
    else:
        state["lut.tokens"] = checked["backbone.6.tokens"][0, :, 0].T  # [1, D, 1, K] to [K, D]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for ours, theirs in _layer_keys(config).items():
        for kind in ("weight", "bias"):
            parts = torch.cat([checked[f"{their}.{kind}"] for their in theirs])
            state[f"{ours}.{kind}"] = parts.reshape(shapes[f"{ours}.{kind}"])
    return from_state(state, config)


@dataclass(frozen=True)
class _Layout:
    """Where a layout keeps what tells the config."""

    patch: str
    expand: str
    head: str
    time: str
    static: str
    dynamic: str
    block: str  # matches a key of each block, with its number as group 1


AUTHOR = _Layout(
    patch="backbone.1.weight",
    expand="expand.weight",
    head="projection.weight",
    time="time_mlp.0.weight",
    static="lut",
    dynamic="backbone.6.tokens",
    block=r"backbone\.(\d+)\.attn\.",
)
OURS = _Layout(
    patch="stem.patch.weight",
    expand="stem.expand.weight",
    head="head.weight",
    time="stem.time.weight",
    static="lut.entries",
    dynamic="lut.tokens",
    block=r"blocks\.(\d+)\.",
)


def infer_config(state: Mapping[str, Tensor], layout: _Layout = AUTHOR, **told: Any) -> ModelConfig:
    """The config that fits a state dict.

    The shapes tell the kind of LUT, the widths, the depth and K.

    Args:
        state: the state dict.
        layout: whose names it has.
        told: fields that the shapes do not tell. By default 8 heads and 64 pixels, as in the
            post, and the activation of the preset with this K.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in state:
            raise ArtefactError(f"not a state dict of a LUT model: key {key} is missing")
        found = tuple(state[key].shape)
        if len(found) != dims or 0 in found:
            raise ArtefactError(
                f"not a state dict of a LUT model: key {key} has shape {list(found)}"
            )
        return found

    width, stem, patch, _ = shape(layout.patch, 4)
    channels = shape(layout.expand, 4)[1]
    entries = shape(layout.head, 4 if layout is AUTHOR else 2)[0]
    dynamic = layout.dynamic in state
    if not dynamic:
        shape(layout.static, 4)
    blocks = {m[1] for key in state if (m := re.match(layout.block, key))}
    return ModelConfig(
        patch_size=patch,
        channels=channels,
        width=width,
        depth=len(blocks) or 1,  # a gap in the numbers shows up as a missing key
        lut="dynamic" if dynamic else "static",
        entries=entries,
        stem_channels=stem,
        time_frequencies=max(2, shape(layout.time, 2)[1] // 2),
        **{"weights": "softmax" if entries == 512 and not dynamic else "tanh", **told},
    )


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, in float32, and what a person should know of it."""

    model: LutTransformer
    state: StateDict
    assumed: tuple[str, ...]  # fields of the config that neither the file nor the caller gave


def import_file(
    path: Path,
    key: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    image_size: int | None = None,
) -> Imported:
    """Read a checkpoint of a training script, of the author or of ours.

    Args:
        path: a file of torch.save or a safetensors file, in the author's layout or in ours.
        key: the state dict to take, where the file holds several.
        heads, weights, image_size: what no state dict holds. Files of ours say it beside.
    """
    state = read_state_dict(path, key)
    layout = OURS if OURS.patch in state.tensors or OURS.time in state.tensors else AUTHOR
    given = {"heads": heads, "weights": weights, "image_size": image_size}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        assumed: tuple[str, ...] = ()
        config = _told_config(path, state)
        if config is None:
            assumed = tuple(name for name in UNTOLD if name not in given)
            config = infer_config(state.tensors, layout, **given)
        else:
            for name, value in given.items():
                if value != getattr(config, name):
                    raise UsageError(
                        f"{path} is of a model with {name} {getattr(config, name)}, which it says "
                        f"itself; leave out --{name.replace('_', '-')} {value}"
                    )
        make = from_state if layout is OURS else from_author_state
        return Imported(make(state.tensors, config), state, assumed)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; see --heads and --image-size") from error


def _told_config(path: Path, state: StateDict) -> ModelConfig | None:
    """The config that a file of ours has beside its weights; None where there is none."""
    if is_safetensors(path):
        metadata = told_metadata(path)
        return None if metadata is None else metadata[0]
    return None if state.config is None else ModelConfig.from_dict(state.config)


def save_author_file(model: LutTransformer, path: Path) -> None:
    """Write the model as the author's state dict with torch.save, atomically.

    The config is in the state dict's ``_metadata``, where PyTorch keeps what is no weight: it
    goes wherever the file goes, and ``load_state_dict`` finds the author's keys and no other.
    """
    state = OrderedDict(to_author_state(model))
    state._metadata = {"": {METADATA_KEY: model.config.to_dict()}}  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_atomic(path, buffer.getvalue())
