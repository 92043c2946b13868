"""The state dicts in a file of torch.save or safetensors, as training scripts leave them there.

A script may save its model wrapped (DataParallel, torch.compile), several models side by side,
averages among them, and its progress beside them. Nothing in a file is executed.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lutdeploy.artefacts import foreign
from lutdeploy.artefacts.metadata import METADATA_KEY
from lutdeploy.errors import ArtefactError, UsageError, ran_out_of_memory

WRAPPERS = ("module", "_orig_mod")  # DataParallel, FSDP and AveragedModel; torch.compile
AVERAGE_COUNT = "n_averaged"  # that torch.optim.swa_utils.AveragedModel keeps beside its module
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow)([._]|$)", re.IGNORECASE)
# A layer that every LUT model has, in the author's layout or in ours, after any prefix.
LAYER = re.compile(r"(.*\.)?(?:backbone\.1|time_mlp\.0|stem\.patch|stem\.time)\.weight")
DEPTH = 8  # of dicts in dicts


class _Ignored:
    """Stands for what a script saved beside its weights; it keeps nothing and runs nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Of what scripts save beside weights; every name stands for _Ignored while a file is read.
HARMLESS = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)


@dataclass(frozen=True)
class StateDict:
    """The weights of one model in a file."""

    name: str  # where it is in the file, such as "ema"; "" at the top
    tensors: Mapping[str, Tensor]  # by the model's own names
    average: bool  # of the weights, over training
    config: object  # what a file of ours says of it, unchecked; None where it says nothing
    notes: tuple[str, ...]  # what was taken off, left out and preferred


def read_state_dict(path: Path, key: str | None = None) -> StateDict:
    """The state dict of a LUT model in a file; where there are several, the average.

    Args:
        path: a file of torch.save or a safetensors file.
        key: the name of the state dict to take.

    Raises:
        UsageError: no such file or key, or nothing tells which state dict is meant.
        ArtefactError: no checkpoint, a damaged one, or one without a LUT model.
    """
    value = read_mapping(path)
    return _choose(list(_find(value)), key, value, path)


def read_mapping(path: Path) -> Mapping[Any, Any]:
    """What a file of weights holds: tensors, and of a file of torch.save anything else too.

    Raises:
        UsageError: no such file.
        ArtefactError: says what the file is instead.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does: eight bytes, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{"


def _read_safetensors(path: Path) -> Mapping[Any, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise foreign.unreadable(path, error) from error


def _read_torch(path: Path) -> Mapping[Any, Any]:
    """What torch.save wrote, tensors on the CPU, without executing code that it may contain."""
    if foreign.is_compressed_zip(path):  # a few bytes could unpack to fill the memory
        what = "is a compressed zip file, which torch.save never writes; save the weights again"
        raise ArtefactError(f"{path} {foreign.describe(path) or what}")
    ignored: list[Any] = [(_Ignored, name) for name in HARMLESS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ignored):
            warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        if ran_out_of_memory(error):
            raise
        held = re.search(r"GLOBAL (\S+)", str(error))
        if held is None or not isinstance(error, pickle.UnpicklingError):
            raise foreign.unreadable(path, error) from error
        raise ArtefactError(
            f"{path} holds more than tensors ({held[1][:80]}), which only the code of its script "
            "could read; save the weights alone there: torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(value, Mapping):
        raise ArtefactError(f"{path} holds a {type(value).__name__}, not a state dict")
    return value


def _find(value: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[StateDict]:
    """The state dicts of LUT models in a mapping and in the mappings that it holds."""
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    layers = filter(None, map(LAYER.fullmatch, tensors))
    inner_first = sorted({match[1] or "" for match in layers}, key=len, reverse=True)
    rest = dict(tensors)
    for prefix in inner_first:
        inside = {key: rest.pop(key) for key in tuple(rest) if key.startswith(prefix)}
        outside = [key for key in tensors if key not in inside]
        yield _state_dict(inside, outside, prefix, name, getattr(value, "_metadata", None))
    for key, inner in value.items():
        if isinstance(inner, Mapping) and depth < DEPTH:
            yield from _find(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _state_dict(
    inside: Mapping[str, Tensor], outside: list[str], prefix: str, name: str, metadata: object
) -> StateDict:
    """The tensors of a mapping that begin with a prefix; ``outside`` are the others' names."""
    state: dict[str, Tensor] = {}
    counts = [key for key in (*inside, *outside) if _unwrapped(key) == AVERAGE_COUNT]
    for key in inside:
        own = _unwrapped(key.removeprefix(prefix))
        if own in state:
            raise ArtefactError(f"the state dict {name!r} holds {own} with and without a wrapper")
        if key not in counts:
            state[own] = inside[key]
    notes = []
    if prefix or list(state) != [key for key in inside if key not in counts]:
        notes.append(f"prefix taken off: {prefix or '_orig_mod.'}")
    left = outside + [key for key in counts if key in inside]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out: {', '.join(left[:3])}{more}")
    full = ".".join(filter(None, (name, _unwrapped(prefix.removesuffix(".")))))
    average = bool(counts) or AVERAGE.search(full) is not None
    root = metadata.get("") if isinstance(metadata, Mapping) else None
    config = root.get(METADATA_KEY) if isinstance(root, Mapping) else None
    return StateDict(full, state, average, config, tuple(notes))


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _choose(
    found: list[StateDict], key: str | None, value: Mapping[Any, Any], path: Path
) -> StateDict:
    """The state dict of this name, else the only one, else the only average."""
    if not found:
        held = ", ".join(map(str, list(value)[:4])) or "nothing"
        raise ArtefactError(
            f"{path} holds no state dict of a LUT model, whose keys are backbone.1.weight and so "
            f"on; it holds {held}{', …' if len(value) > 4 else ''}"
        )
    names = ", ".join(repr(state.name) for state in found)
    if key is not None:
        fitting = [state for state in found if state.name == key]
    else:
        fitting = [s for s in found if s.average] if len(found) > 1 else found
    if len(fitting) != 1:
        asked = "several state dicts" if key is None else f"no state dict {key!r}"
        raise UsageError(f"{path} holds {asked}; --key takes one of {names}")
    chosen = fitting[0]
    if len(found) == 1:
        return chosen
    why = "the average; --key takes another" if key is None else "--key"
    note = f"state dicts: {names}; taken: {chosen.name!r} ({why})"
    return replace(chosen, notes=(note, *chosen.notes))
