"""Triton's ``config.pbtxt``: a ``ModelConfig`` of its model_config.proto in protobuf's text format.

The few fields that are needed are written here, in the order of their numbers, as protobuf prints
them: the Python package that has the message, tritonclient, does not install beside onnx.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Fields = Iterator[tuple[str, Any]]  # a str is quoted, an Enum is not, an iterator is a message


class Enum(str):
    """A value of an enumeration."""


@dataclass(frozen=True)
class Tensor:
    """An input or output, without the batch axis where the model has one.

    ``scalar``: the model wants [batch], which Triton cannot say: it reshapes [batch, 1].
    """

    name: str
    data_type: str  # "UINT64", "STRING", …
    dims: tuple[int, ...]
    scalar: bool = False

    def fields(self) -> Fields:
        yield "name", self.name
        yield "data_type", Enum(f"TYPE_{self.data_type}")
        for size in self.dims:
            yield "dims", size
        if self.scalar:
            yield "reshape", iter(())


@dataclass(frozen=True)
class InstanceGroup:
    """Where one instance runs: ``kind`` "CPU" or "GPU"; ``gpus`` empty: one on each."""

    kind: str
    gpus: tuple[int, ...] = ()

    def fields(self) -> Fields:
        yield "count", 1
        for gpu in self.gpus:
            yield "gpus", gpu
        yield "kind", Enum(f"KIND_{self.kind}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of a repository; ``platform`` or ``backend`` says what runs it."""

    name: str
    platform: str = ""
    backend: str = ""
    max_batch_size: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    instances: InstanceGroup
    file: str = ""  # of the model, where it is not the backend's usual one
    dynamic_batching: bool = False
    decoupled: bool = False  # any number of responses to a request
    response_cache: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> Fields:
        yield "name", self.name
        if self.platform:
            yield "platform", self.platform
        yield "max_batch_size", self.max_batch_size
        for tensor in self.inputs:
            yield "input", tensor.fields()
        for tensor in self.outputs:
            yield "output", tensor.fields()
        yield "instance_group", self.instances.fields()
        if self.file:
            yield "default_model_filename", self.file
        if self.dynamic_batching:
            yield "dynamic_batching", iter(())
        for key, value in sorted(self.parameters.items()):
            told = iter([("string_value", value)])
            yield "parameters", iter([("key", key), ("value", told)])
        if self.backend:
            yield "backend", self.backend
        if self.decoupled:
            yield "model_transaction_policy", iter([("decoupled", True)])
        if self.response_cache:
            yield "response_cache", iter([("enable", True)])

    def text(self) -> str:
        """The file's contents."""
        return "".join(_lines(self.fields(), ""))


def _lines(fields: Fields, indent: str) -> Iterator[str]:
    for name, value in fields:
        if isinstance(value, Iterator):
            yield f"{indent}{name} {{\n"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}\n"
        else:
            yield f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Enum):
        return json.dumps(value, ensure_ascii=False)  # its escapes are protobuf's too
    return str(value)
