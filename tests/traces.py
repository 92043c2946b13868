"""torch.onnx.export, asked once in a test session for each kind of network."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lutdeploy.artefacts import files
from lutdeploy.config import ModelConfig

trace: Callable[..., Any] = torch.onnx.export  # the exporter itself

# What decides on a module's graph, beside its class and the names and types of its tensors.
_SETTINGS = (bool, int, float, str, torch.dtype, ModelConfig)


def remembering(folder: Path) -> Callable[..., Any]:
    """``trace`` for modules that differ in their weights alone from one that was traced before.

    A trace takes seconds, and the suite wants many of the same few networks. The graph of each is
    kept in ``folder`` without its weights, and gets those of every later one. Where a weight is
    not among the initializers by its own name, the exporter has made something else of it; then
    nothing is kept.
    """

    def export(module: nn.Module, args: tuple[()], kwargs: dict[str, Tensor], **more: Any) -> Any:
        state = module.state_dict()
        kept = folder / f"trace-{_kind(module, kwargs, more)}.onnx"
        with filelock.FileLock(kept.with_suffix(".lock")):
            if kept.is_file():
                return types.SimpleNamespace(model=_with_weights(kept, state))
            program = trace(module, args, kwargs=kwargs, **more)
            if program is not None and state.keys() <= program.model.graph.initializers.keys():
                files.write_atomic(kept, _without_weights(program.model, state))
        return program

    return export


def _kind(module: nn.Module, kwargs: dict[str, Tensor], more: dict[str, Any]) -> str:
    """A digest of all that a graph depends on but the values of the tensors."""
    tensors = {**module.state_dict(), **kwargs}
    parts = [
        (name, type(part).__qualname__, _settings(part)) for name, part in module.named_modules()
    ]
    shapes = [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    return hashlib.sha256(repr((parts, shapes, sorted(more.items()))).encode()).hexdigest()[:16]


def _settings(part: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(part).items() if isinstance(value, _SETTINGS)]


def _without_weights(model: ir.Model, state: dict[str, Tensor]) -> bytes:
    """The file of a graph in which the weights are places in a file that is not there."""
    weights = {name: model.graph.initializers[name] for name in state}
    values = {name: weight.const_value for name, weight in weights.items()}
    for name, weight in weights.items():
        shape, dtype = ir.Shape(state[name].shape), weight.dtype
        assert dtype is not None
        weight.const_value = ir.ExternalTensor("none", 0, 0, dtype, shape=shape, name=name)
    try:
        return ir.to_proto(model).SerializeToString()
    finally:
        for name, weight in weights.items():
            weight.const_value = values[name]


def _with_weights(kept: Path, state: dict[str, Tensor]) -> ir.Model:
    model = ir.from_proto(onnx.load(kept, load_external_data=False))
    for name, value in state.items():
        model.graph.initializers[name].const_value = ir.tensor(value.numpy(), name=name)
    return model
