"""A test double of NVIDIA's ``tensorrt`` module: it is NOT TensorRT.

ONNX Runtime computes on the CPU, "device" addresses are addresses of ordinary memory, plans
are ONNX models behind a TensorRT header. It shows that callers use the API of one version
rightly and meet its failures; it says nothing about what TensorRT computes, or how fast.

``tensorrt-api.json`` describes the classes, methods, arguments, properties and enums of
TensorRT 11.1 and how 10.13 differs; the module is generated from it. The classes below are
the behaviour behind these names, and the annotations of their parameters are checked on every
call. A name of the surface without behaviour raises :class:`DoubleLacks` when it is used.

    controls = Controls()
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("11.1.0.106", controls))
"""

from __future__ import annotations

import ctypes
import enum
import functools
import hashlib
import importlib.machinery
import importlib.resources
import inspect
import json
import math
import operator
import re
import struct
import sys
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

if TYPE_CHECKING:  # generated enums: their names are what the annotations of parameters need
    from typing import Any as BuilderFlag
    from typing import Any as ExecutionContextAllocationStrategy
    from typing import Any as HardwareCompatibilityLevel
    from typing import Any as LayerInformationFormat
    from typing import Any as MemoryPoolType
    from typing import Any as ProfilingVerbosity
    from typing import Any as Severity

VERSIONS = ("10.13.0.35", "11.1.0.106")
GPU_NAME = "TensorRT double (ONNX Runtime on the CPU)"
ALIGNMENT = 256  # of tensor addresses and device memory
TAG = 0x74727466
HEADER = struct.Struct("<II16x4B")  # tag, serialization version, TensorRT version
CACHE_TAG = b"TensorRT double: timing cache\n"

# ONNX element types as (name in DataType, name in the parser's list of operators).
TYPES: dict[int, tuple[str, str]] = {
    onnx.TensorProto.FLOAT: ("FLOAT", "FP32"),
    onnx.TensorProto.FLOAT16: ("HALF", "FP16"),
    onnx.TensorProto.INT32: ("INT32", "INT32"),
    onnx.TensorProto.INT64: ("INT64", "INT64"),
    onnx.TensorProto.BOOL: ("BOOL", "BOOL"),
}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16}  # of inputs and outputs


class DoubleLacks(RuntimeError):  # noqa: N818 - reads as what it says
    """A name of TensorRT's surface that the double has no behaviour for."""


@functools.cache
def _operators() -> dict[str, dict[str, Any]]:
    """What the parser takes: types by operator."""
    folder = importlib.resources.files("lutdeploy.engines.tensorrt")
    supported: dict[str, dict[str, Any]] = json.loads(
        (folder / "operators.json").read_text("utf-8")
    )["supported"]
    return supported


@dataclass
class Controls:
    """Faults to inject and what has been seen; shared by all that a module makes."""

    gpu_name: str = GPU_NAME
    # Faults.
    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)  # node, operator, text
    build_returns_none: bool = False
    deserialize_returns_none: bool = False
    execute_false_at: int | None = None  # the n-th execute_async_v3, from 0
    input_shape_false: bool = False
    tensor_address_false: bool = False
    missing_output_shapes: bool = False  # get_tensor_shape of outputs stays -1
    inspector: str = "normal"  # float32: of half products; unfused: no mha
    perturb: float = 0.0  # added to every output: an engine that is silently wrong
    perturb_from: int = 0  # from this execute_async_v3 on
    step_seconds: float = 0.0  # slept in every step of a build's progress
    building: Path | None = None  # a file that is made when a build's progress begins
    # Observations.
    log: list[tuple[str, str]] = field(default_factory=list)  # severity, message
    builds: int = 0
    executions: int = 0
    deserialized: int = 0
    timing_cache_loaded: bytes | None = None  # the last one that a config took


# The module: surface of a version, generated classes.


def _surface(version: str) -> dict[str, Any]:
    """The description of a version: that of 11.1, with the differences undone for 10.13."""
    api: dict[str, Any] = json.loads(
        Path(__file__).with_name("tensorrt-api.json").read_text("utf-8")
    )
    if version == VERSIONS[1]:
        return api
    classes, enums, delta = api["classes"], api["enum_values"], api["versus_10.13"]
    for name, added in delta["new_since"].items():
        if added == "whole class":
            del classes[name]
            continue
        described = classes[name]
        described["properties"] = [p for p in described["properties"] if p not in added]
        described["methods"] = {m: a for m, a in described["methods"].items() if m not in added}
    for name, methods in delta["changed_signatures"].items():
        overloads = classes[name].setdefault("overloads", {})
        overloads.update({method: both["10.13"] for method, both in methods.items()})
    for name, members in delta["removed"].items():
        classes[name]["removed"] = members
    for name in delta["removed_classes"]:
        classes[name] = {"constructors": [[]], "methods": {}, "properties": []}
    for name, members in delta["new_enum_members"].items():
        if members == "whole enum":
            del enums[name]
        else:
            enums[name] = {m: v for m, v in enums[name].items() if m not in members}
    for name, changed in delta["changed_enum_values"].items():
        enums[name].update({member: both["10.13"] for member, both in changed.items()})
    for name, members in delta["removed_enum_members"].items():
        enums[name].update(members)
    for name in delta["removed_enums"]:
        enums[name] = {}
    return api


class _Enum(enum.Enum):
    """An enum of a binding: no int, but convertible to one."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class _PybindType(type):
    """As in a binding, a subclass cannot do without the constructor of its base."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not hasattr(made, "_trt"):
            name = next(base for base in cls.__mro__ if base.__module__ == "tensorrt").__name__
            raise TypeError(f"tensorrt.{name}.__init__() must be called when overriding __init__")
        return made


class _Calls:
    """The argument lists a method takes, and the check of a call against them."""

    def __init__(
        self, trt: Library, label: str, overloads: list[list[str]], optional: Mapping[str, str]
    ) -> None:
        self.trt, self.label, self.overloads = trt, label, overloads
        self.signatures = [self._signature(names, optional) for names in overloads]

    @staticmethod
    def _signature(names: list[str], optional: Mapping[str, str]) -> inspect.Signature:
        required = max((k for k, name in enumerate(names, 1) if name not in optional), default=0)
        parameter = inspect.Parameter
        parameters = []
        for k, name in enumerate(names):
            nameless = re.fullmatch(r"arg\d+", name)
            kind = parameter.POSITIONAL_ONLY if nameless else parameter.POSITIONAL_OR_KEYWORD
            default = parameter.empty if k < required else None
            parameters.append(parameter(name, kind, default=default))
        return inspect.Signature(parameters)

    def refuse(self, why: str) -> TypeError:
        return TypeError(
            f"{self.label}(): incompatible function arguments. "
            f"The following are supported: {self.overloads}. {why}"
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; those left to their default are absent."""
        why = ""
        for signature in self.signatures:
            try:
                return signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                why = str(error)
        raise self.refuse(why)

    def check(self, function: Any, arguments: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Hold arguments against the annotations of the function that gets them."""
        known = inspect.signature(function).parameters
        named = {prefix + name: value for name, value in arguments.items()}
        for name, value in named.items():
            if name not in known:
                raise DoubleLacks(f"the double has no tensorrt.{self.label} with {name}")
            if not self.trt.fits(value, str(known[name].annotation)):
                raise self.refuse(f"Invoked with {name} = {value!r}")
        return named


class Library:
    """What one generated module is made of; every object of it knows its library."""

    def __init__(self, version: str, controls: Controls) -> None:
        self.version, self.controls = version, controls
        self.numbers = tuple(int(part) for part in version.split("."))
        self.typed = self.numbers[0] >= 11  # every network is strongly typed
        self.surface = _surface(version)
        self.enums: dict[str, Any] = {}
        for name, members in self.surface["enum_values"].items():
            make: Any = _Enum
            short = name.rpartition(".")[2]
            self.enums[short] = make(short, members, module="tensorrt", qualname=name)
        self.classes: dict[str, Any] = {}
        for name in self.surface["classes"]:
            self._class(name)

    def _class(self, name: str) -> Any:
        """The generated class, made on first use because bases may be described later."""
        if name not in self.classes:
            described, behaviour = self.surface["classes"][name], BEHAVIOURS.get(name)
            bases = [self._class(base) for base in described.get("bases", ())]
            members = self._members(name, described, behaviour)
            leaked = [n for n in vars(behaviour or object) if n[0] != "_" and n not in members]
            assert not leaked, f"{name} of TensorRT {self.version} has no {leaked}"
            self.classes[name] = _PybindType(
                name, (*filter(None, [behaviour]), *bases) or (Native,), members
            )
        return self.classes[name]

    def _members(self, name: str, described: Any, behaviour: type | None) -> dict[str, Any]:
        optional = described.get("defaults", {})
        members: dict[str, Any] = {
            "__slots__": (),
            "__module__": "tensorrt",
            "__init__": self._constructor(name, described, behaviour),
        }
        for method, arguments in described["methods"].items():
            overloads = described.get("overloads", {}).get(method, [arguments])
            calls = _Calls(self, f"{name}.{method}", overloads, optional.get(method, {}))
            found = _own(behaviour, method)
            if found is None and method in ("__str__", "__repr__"):
                continue
            members[method] = _method(calls, found, method in described.get("static", ()))
        for prop in described["properties"]:
            members[prop] = self._property(name, described, behaviour, prop)
        for removed in described.get("removed", ()):
            members[removed] = property(_lacking(f"{name}.{removed}"))
        exported = self.surface["exported_into_class"].get(name, ())
        if exported:
            severity = self.enums["Severity"]
            members |= {"Severity": severity} | {m.name: m for m in severity}
        return members

    def _constructor(self, name: str, described: Any, behaviour: Any) -> Callable[..., None]:
        overloads = described.get("constructors")
        optional = described.get("defaults", {}).get("__init__", {})
        calls = _Calls(self, f"{name}.__init__", overloads or [], optional)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if overloads is None:
                raise TypeError(f"tensorrt.{name}: No constructor defined!")
            arguments = calls.bind(args, kwargs)
            if behaviour is None:
                raise DoubleLacks(f"the double has no tensorrt.{name}")
            construct = behaviour.__init__
            construct(self, calls.trt, **calls.check(construct, arguments, prefix="_"))

        return __init__

    def _property(self, name: str, described: Any, behaviour: Any, prop: str) -> property:
        found, lacks = _own(behaviour, prop), _lacking(f"{name}.{prop}")
        writable = prop not in described.get("read_only", ())
        # The behaviour sets its own slots, which a read-only property would hide from it.
        assert writable or found is None or isinstance(found, property), f"{name}.{prop}"
        stores = found is not None and (not isinstance(found, property) or found.fset)
        annotation = getattr(behaviour, "__annotations__", {}).get(prop, "")

        def write(self: Any, value: Any) -> None:
            if not stores:
                lacks()
            if not self._trt.fits(value, annotation):
                raise TypeError(f"tensorrt.{name}.{prop}: incompatible value {value!r}")
            found.__set__(self, value)

        readable = prop not in described.get("write_only", ())
        read = lacks if found is None else found.__get__
        return property(
            (lambda self: read(self)) if readable else None, write if writable else None
        )

    def fits(self, value: Any, annotation: str) -> bool:
        """Whether a value is of the annotated type; annotations of other things always are."""
        kind = annotation.removesuffix(" | None")
        if value is None and kind != annotation:
            return True
        if kind == "int":
            return hasattr(type(value), "__index__")
        plain: dict[str, type] = {"str": str, "bool": bool}
        wanted = plain.get(kind) or self.enums.get(kind) or self.classes.get(kind)
        return wanted is None or isinstance(value, wanted)

    def new(self, name: str, *state: Any) -> Any:
        """An object of a class that has no constructor in Python."""
        made = self.classes[name].__new__(self.classes[name])
        BEHAVIOURS[name].__init__(made, self, *state)
        return made

    def say(self, logger: Any, severity: str, text: str) -> None:
        self.controls.log.append((severity, text))
        call_back(logger.log, self.enums["Severity"][severity], text)


def make_tensorrt(version: str, controls: Controls | None = None) -> types.ModuleType:
    """A module to stand in for ``tensorrt`` of exactly this version.

    Raises:
        ValueError: a version the double does not know.
    """
    if version not in VERSIONS:
        raise ValueError(f"the double is of TensorRT {' or '.join(VERSIONS)}, not {version}")
    trt = Library(version, Controls() if controls is None else controls)
    module = types.ModuleType("tensorrt", f"{GPU_NAME}, surface of {version}; not TensorRT.")
    members = {**trt.enums, **trt.classes, "__version__": version}
    del members["Severity"]  # it is ILogger.Severity
    for alias, member in trt.surface["dtype_aliases"].items():
        members[alias] = trt.enums["DataType"][member.rpartition(".")[2]]
    for name in trt.surface["functions"]:
        members[name] = _lacking(name)
    vars(module).update(members)
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # importlib asks for one
    return module


def call_back(override: Callable[..., Any], *args: Any) -> Any:
    """Call what Python overrides. Its exceptions, Ctrl-C too, end here as they do in C++."""
    try:
        return override(*args)
    except BaseException as error:
        name = getattr(override, "__name__", "override")
        print(f"[ERROR] Exception caught in {name}(): {error}", file=sys.stderr)
        return None


def _own(behaviour: type | None, name: str) -> Any:
    """An attribute of a behaviour; what every object has does not count."""
    classes = behaviour.__mro__[:-1] if behaviour else ()
    return next((vars(c)[name] for c in classes if name in vars(c)), None)


def _lacking(name: str) -> Callable[..., Any]:
    def lacks(*_: object) -> Any:
        raise DoubleLacks(f"the double has no tensorrt.{name}")

    return lacks


def _method(calls: _Calls, found: Any, static: bool = False) -> Any:
    def method(*args: Any, **kwargs: Any) -> Any:
        bound = calls.bind(args if static else args[1:], kwargs)
        if found is None:
            raise DoubleLacks(f"the double has no tensorrt.{calls.label}")
        return found(*args[: not static], **calls.check(found, bound))

    method.__name__ = calls.label.rpartition(".")[2]
    return staticmethod(method) if static else method


# Behaviour. A class here has the name of the class it stands for; what begins with an
# underscore is its own. Slots: like a binding's objects, these take no other attributes.

BEHAVIOURS: dict[str, Any] = {}
T = TypeVar("T")


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def native(cls: type[T]) -> type[T]:
    made = dataclass(slots=True, eq=False, repr=False)(cls)
    BEHAVIOURS[made.__name__] = made
    return made


@dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class Native:
    """What every object has: the library it is of."""

    _trt: Library


@dataclass(slots=True, eq=False, repr=False)
class Speaker(Native):
    """An object that tells a logger what it refuses."""

    _logger: ILogger

    def _refuse(self, text: str) -> bool:
        self._trt.say(self._logger, "ERROR", text)
        return False


@native
class ILogger(Native):
    """Python overrides ``log``."""

    log: ClassVar[Any]


@native
class Logger(ILogger):
    _min_severity: Severity | None = None

    def log(self, severity: Severity, msg: str) -> None:
        if int(severity) <= int(self._min_severity or self._trt.enums["Severity"].WARNING):
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


@native
class IProgressMonitor(Native):
    """Python overrides these; what they return is what it returned."""

    phase_start: ClassVar[Any]
    step_complete: ClassVar[Any]
    phase_finish: ClassVar[Any]


@native
class Dims(Native):
    _shape: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, arg0: Any) -> Any:
        return self._shape[arg0]


class IHostMemory(bytearray):
    """A read-only buffer that has nothing else. A bytearray, because before Python 3.12 no
    class written in Python can offer a buffer of its own."""

    __slots__ = ("_trt",)
    _trt: Library

    def __init__(self, trt: Library, data: bytes) -> None:
        bytearray.__init__(self, data)
        self._trt = trt

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "nbytes":
            raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute {name!r}")
        return bytearray.__getattribute__(self, name)

    @property
    def nbytes(self) -> int:
        return bytearray.__len__(self)


for _name in "len getitem setitem delitem iter contains add iadd mul rmul imul mod rmod".split():
    setattr(IHostMemory, f"__{_name}__", None)
BEHAVIOURS["IHostMemory"] = IHostMemory


# Networks.


class Node(NamedTuple):
    name: str
    operator: str
    inputs: list[str]
    outputs: list[str]


@dataclass
class Graph:
    """What the double keeps of a parsed model. Sizes are numbers or names of free axes."""

    model: onnx.ModelProto
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    tensors: dict[str, tuple[str, list[int | str]]]  # dtype and sizes; no weights among them


def _sizes(tensor: onnx.TypeProto.Tensor) -> list[int | str]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]


def _fixed(sizes: Sequence[int | str]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in sizes]


@native
class INetworkDefinition(Native):
    _flags: int
    _graph: Graph = field(init=False)

    @property
    def _strongly_typed(self) -> bool:
        flag = self._trt.enums["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
        return self._trt.typed or bool(self._flags >> int(flag) & 1)


@native
class ParserError(Native):
    _code: str
    _text: str
    _node: str
    _operator: str

    def code(self) -> Any:
        return self._trt.enums["ErrorCode"][self._code]

    def node_name(self) -> str:
        return self._node

    def node_operator(self) -> str:
        return self._operator

    def desc(self) -> str:
        return self._text


@native
class OnnxParser(Speaker):
    _network: INetworkDefinition
    _errors: list[ParserError] = field(default_factory=list)

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def supports_operator(self, op_name: str) -> bool:
        if op_name not in _operators():
            return False
        since = str(_operators()[op_name].get("since", "0"))
        return self._trt.numbers >= tuple(int(part) for part in since.split("."))

    def parse(self, model: Any, path: str | None = None) -> bool:
        for node, operation, text in self._trt.controls.parser_errors:
            self._fail("UNSUPPORTED_NODE", text, node, operation)
        proto = None if self._errors else self._read(bytes(memoryview(model)), path)
        types = self._check(proto) if proto else {}
        if self._errors or proto is None:
            return False
        graph = proto.graph
        weights = {tensor.name for tensor in graph.initializer}
        self._network._graph = Graph(
            model=proto,
            inputs=[value.name for value in graph.input],
            outputs=[value.name for value in graph.output],
            nodes=[
                Node(n.name, n.op_type, list(n.input), list(n.output))
                for n in graph.node
                if n.op_type != "Constant"
            ],
            tensors={
                name: (TYPES[tensor.elem_type][0], _sizes(tensor))
                for name, tensor in types.items()
                if name not in weights
            },
        )
        return True

    def _fail(self, code: str, text: str, node: str = "", operation: str = "") -> None:
        self._errors.append(self._trt.new("ParserError", code, text, node, operation))
        self._refuse(f"node {node} ({operation}): {code}: {text}")

    def _read(self, data: bytes, path: str | None) -> onnx.ModelProto | None:
        """The model with its weights inside."""
        try:
            proto = onnx.load_model_from_string(data)
        except Exception as error:  # protobuf's, which it does not export
            self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to parse the ONNX: {error}")
            return None
        if not proto.graph.node:
            self._fail("INVALID_GRAPH", "The model has no graph.")
            return None
        try:
            folder = str(Path(path).parent) if path else ""
            onnx.external_data_helper.load_external_data_for_model(proto, folder)
        except Exception as error:  # files that are missing, too short or outside the folder
            self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to open external weights: {error}")
            return None
        return proto

    def _check(self, proto: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
        """The types of all tensors; failures for operators and types that are not supported."""
        for node in proto.graph.node:
            if node.domain not in ("", "ai.onnx") or not self.supports_operator(node.op_type):
                text = f"No importer registered for op: {node.op_type}"
                self._fail("UNSUPPORTED_NODE", text, node.name, node.op_type)
        if self._errors:
            return {}
        try:
            proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        except Exception as error:  # InferenceError, or a ValueError for some malformed models
            self._fail("INVALID_GRAPH", str(error).strip())
            return {}
        graph = proto.graph
        values = (*graph.input, *graph.value_info, *graph.output)
        types = {value.name: value.type.tensor_type for value in values}
        numbers = {name: tensor.elem_type for name, tensor in types.items()}
        numbers |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            number = numbers.get([*node.input, *node.output][0], 0)
            _, kind = TYPES.get(number, ("", f"ONNX type {number}"))
            if number and kind not in _operators()[node.op_type]["types"]:
                text = f"{node.op_type} does not take {kind}"
                self._fail("UNSUPPORTED_NODE_DATATYPE", text, node.name, node.op_type)
        return types


# Builds.


@native
class IOptimizationProfile(Native):
    _shapes: dict[str, list[list[int]]] = field(default_factory=dict)  # min, opt, max

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = [[operator.index(size) for size in shape] for shape in (min, opt, max)]
        lower = [[0] * len(shapes[0]), *shapes[:2]]
        for which, low, high in zip(("min", "opt", "max"), lower, shapes, strict=True):
            if len(low) != len(high) or not all(map(operator.le, low, high)):
                raise RuntimeError(f"Shape provided for {which} is inconsistent with other shapes.")
        self._shapes[input] = shapes


@native
class ITimingCache(Native):
    _device: list[str]  # TensorRT version and GPU it is of
    _operators: list[str]  # that a build has timed
    _loaded: bytes = b""

    def serialize(self) -> Any:
        text = json.dumps({"device": self._device, "operators": self._operators})
        return self._trt.new("IHostMemory", CACHE_TAG + text.encode())


@native
class IBuilderConfig(Speaker):
    flags: int = 0
    progress_monitor: IProgressMonitor | None = None
    profiling_verbosity: ProfilingVerbosity = field(init=False)
    hardware_compatibility_level: HardwareCompatibilityLevel = field(init=False)
    builder_optimization_level: int = 3
    _profiles: list[IOptimizationProfile] = field(default_factory=list)
    _limits: dict[Any, int] = field(default_factory=dict)
    _cache: ITimingCache | None = None

    def __post_init__(self) -> None:
        enums = self._trt.enums
        self.profiling_verbosity = enums["ProfilingVerbosity"].LAYER_NAMES_ONLY
        self.hardware_compatibility_level = enums["HardwareCompatibilityLevel"].NONE
        self.set_flag(enums["BuilderFlag"].TF32)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags &= ~(1 << int(flag))

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool] = pool_size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._limits[pool]

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(memoryview(serialized_timing_cache))
        if not data:
            here = [self._trt.version, self._trt.controls.gpu_name]
            return self._trt.new("ITimingCache", here, [])
        try:
            read = json.loads(data.removeprefix(CACHE_TAG))
        except ValueError:
            self._refuse("The timing cache cannot be read.")
            return None
        return self._trt.new("ITimingCache", read["device"], read["operators"], data)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        here = [self._trt.version, self._trt.controls.gpu_name]
        if cache._device != here and not ignore_mismatch:
            return self._refuse(f"The timing cache is of {cache._device}, not of {here}.")
        self._cache = cache
        self._trt.controls.timing_cache_loaded = cache._loaded or None
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def _problem(self, graph: Graph) -> str | None:
        """Why these profiles do not go with the inputs of a network."""
        for name in graph.inputs:
            sizes = _fixed(graph.tensors[name][1])
            if -1 in sizes and not self._profiles:
                return "Network has dynamic inputs, but no optimization profile has been defined."
            for k, profile in enumerate(self._profiles):
                shapes = profile._shapes.get(name)
                if shapes is None and -1 in sizes:
                    return f"Profile {k} has no shapes for the dynamic input {name}."
                for shape in shapes or ():
                    if len(shape) != len(sizes) or any(
                        given not in (want, -1) for want, given in zip(shape, sizes, strict=True)
                    ):
                        return f"Profile {k} gives input {name} {shape}; the network has {sizes}."
        return None


@native
class Builder(Speaker):
    def create_network(self, flags: int = 0) -> Any:
        return self._trt.new("INetworkDefinition", operator.index(flags))

    def create_builder_config(self) -> Any:
        return self._trt.new("IBuilderConfig", self._logger)

    def create_optimization_profile(self) -> Any:
        return self._trt.new("IOptimizationProfile")

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        trt, graph = self._trt, network._graph
        trt.controls.builds += 1
        trt.say(self._logger, "INFO", f"Building for {trt.controls.gpu_name}")
        problem = config._problem(graph)
        if not network._strongly_typed:
            problem = "The double builds strongly typed networks only; this one is weakly typed."
        elif problem is None and not self._progress(config.progress_monitor):
            problem = "The progress monitor cancelled the build."
        if trt.controls.build_returns_none:
            problem = "Error Code 10: Could not find any implementation for node {ForeignNode[]}."
        if problem:
            self._refuse(problem)
            return None
        if config._cache is not None:
            timed = {*config._cache._operators, *(node.operator for node in graph.nodes)}
            config._cache._operators = sorted(timed)
        return trt.new("IHostMemory", _plan(trt, graph, config))

    def _progress(self, monitor: IProgressMonitor | None) -> bool:
        """Go through the phases of a build; False when the monitor ends it."""
        if monitor is None:
            return True
        if self._trt.controls.building is not None:
            self._trt.controls.building.touch()
        for name in ("Optimising graph", "Timing tactics"):
            call_back(monitor.phase_start, name, None, 5)
            for step in range(5):
                time.sleep(self._trt.controls.step_seconds)
                if not call_back(monitor.step_complete, name, step):
                    return False
            call_back(monitor.phase_finish, name)
        return True


# Plans.


def _plan(trt: Library, graph: Graph, config: IBuilderConfig) -> bytes:
    fixed = {name: [_fixed(graph.tensors[name][1])] * 3 for name in graph.inputs}
    about = {
        "version": trt.version,
        "gpu": trt.controls.gpu_name,
        "flags": [f.name for f in trt.enums["BuilderFlag"] if config.flags >> int(f) & 1],
        "verbosity": config.profiling_verbosity.name,
        "hardware": config.hardware_compatibility_level.name,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "nodes": graph.nodes,
        "tensors": graph.tensors,
        "profiles": [fixed | profile._shapes for profile in config._profiles] or [fixed],
    }
    text = json.dumps(about, sort_keys=True).encode()
    body = struct.pack("<I", len(text)) + text + graph.model.SerializeToString(deterministic=True)
    return HEADER.pack(TAG, 0, *trt.numbers) + hashlib.sha256(body).digest() + body


@native
class Runtime(Speaker):
    engine_host_code_allowed: bool = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        plan = bytes(memoryview(serialized_engine))
        body = plan[HEADER.size + 32 :]
        about: dict[str, Any] = {}
        if len(plan) < HEADER.size or HEADER.unpack_from(plan)[:2] != (TAG, 0):
            problem: str | None = "Error Code 1: Serialization (Magic tag does not match.)"
        elif hashlib.sha256(body).digest() != plan[HEADER.size : HEADER.size + 32]:
            problem = "Error Code 1: Serialization (Checksum does not match.)"
        else:
            (length,) = struct.unpack_from("<I", body)
            about, model = json.loads(body[4 : 4 + length]), body[4 + length :]
            problem = self._mismatch(about)
        if self._trt.controls.deserialize_returns_none:
            problem = "Error Code 1: Serialization (Serialization assertion failed.)"
        if problem:
            self._refuse(problem)
            return None
        self._trt.controls.deserialized += 1
        return self._trt.new("ICudaEngine", self._logger, weakref.ref(self), about, model)

    def _mismatch(self, about: Mapping[str, Any]) -> str | None:
        """Of two versions of the double, neither runs the other's version-compatible plans."""
        gpu = self._trt.controls.gpu_name
        if about["version"] != self._trt.version:
            return (
                "Error Code 6: API Usage Error (The engine plan file is not compatible with this "
                f"version of TensorRT, expecting library version {self._trt.version} got "
                f"{about['version']}, please rebuild.)"
            )
        if about["hardware"] == "NONE" and about["gpu"] != gpu:
            return (
                "Error Code 6: API Usage Error (The engine plan file is generated on an "
                f"incompatible device, expecting {gpu} got {about['gpu']}, please rebuild.)"
            )
        return None


@native
class ICudaEngine(Speaker):
    _runtime: weakref.ref[Runtime]
    _about: dict[str, Any]
    _model: bytes
    _session: ort.InferenceSession | None = None

    def _alive(self) -> bool:
        return self._runtime() is not None or self._refuse("The Runtime of this engine is gone.")

    _names = property(lambda self: [*self._about["inputs"], *self._about["outputs"]])
    num_io_tensors = property(lambda self: len(self._names))
    refittable = property(lambda self: "REFIT" in self._about["flags"])
    hardware_compatibility_level = property(
        lambda self: self._trt.enums["HardwareCompatibilityLevel"][self._about["hardware"]]
    )
    profiling_verbosity = property(
        lambda self: self._trt.enums["ProfilingVerbosity"][self._about["verbosity"]]
    )

    @property
    def device_memory_size_v2(self) -> int:
        profiles = self._about["profiles"]
        return max(self._scratch([s[2] for s in shapes.values()]) for shapes in profiles)

    @staticmethod
    def _scratch(shapes: Sequence[Sequence[int]]) -> int:
        """Invented: what grows with the inputs."""
        return ALIGNMENT * (1 + sum(map(math.prod, shapes)) // 8)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.enums["TensorIOMode"]
        return modes.INPUT if name in self._about["inputs"] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.enums["DataType"][self._about["tensors"][name][0]]

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.new("Dims", _fixed(self._about["tensors"][name][1]))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        shapes = self._about["profiles"][profile_index].get(name, ())
        return [self._trt.new("Dims", shape) for shape in shapes]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | None = None
    ) -> Any:
        if not self._alive():
            return None
        managed = strategy is not None and strategy.name == "USER_MANAGED"
        return self._trt.new("IExecutionContext", self._logger, weakref.ref(self), managed)

    def create_engine_inspector(self) -> Any:
        return self._trt.new("EngineInspector", weakref.ref(self)) if self._alive() else None

    def _run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if self._session is None:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            # Planning the reuse of buffers takes time quadratic in the number of nodes.
            options.enable_mem_reuse = len(self._about["nodes"]) < 2000
            providers = ["CPUExecutionProvider"]
            self._session = ort.InferenceSession(self._model, options, providers=providers)
        results: list[NDArray[Any]] = self._session.run(self._about["outputs"], feeds)
        return results


@native
class IExecutionContext(Speaker):
    _engine: weakref.ref[ICudaEngine]
    _managed: bool
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _addresses: dict[str, int] = field(default_factory=dict)
    _memory: tuple[int, int] = (0, 0)  # address and size

    engine = property(lambda self: self._engine())
    active_optimization_profile = property(lambda self: 0)

    def _about(self) -> dict[str, Any]:
        """What the plan says; nothing is left of it once the engine or its Runtime is gone."""
        engine = self._engine()
        if engine is None:
            self._refuse("The engine of this context is gone.")
        gone: dict[str, Any] = {"inputs": [], "outputs": []}
        return engine._about if engine is not None and engine._alive() else gone

    def set_input_shape(self, name: str, shape: Any) -> bool:
        about, given = self._about(), tuple(operator.index(size) for size in shape)
        if name not in about["inputs"]:
            return self._refuse(f"There is no input {name}.")
        low, _, high = about["profiles"][0][name]
        inside = len(given) == len(low) and all(map(operator.le, low, given))
        inside = inside and all(map(operator.le, given, high))
        if not inside or self._trt.controls.input_shape_false:
            return self._refuse(f"Input {name}: {given} is not within profile 0: {low} to {high}.")
        self._shapes[name] = given
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        about = self._about()
        known = name in about["inputs"] + about["outputs"]
        if not known or self._trt.controls.tensor_address_false:
            return self._refuse(f"The address of {name} cannot be set.")
        self._addresses[name] = operator.index(memory)
        return True

    def _known(self, about: dict[str, Any]) -> dict[str, list[int]]:
        """The shapes of inputs and outputs as far as they are known, -1 where not."""
        axes: dict[str | int, int] = {}
        for name, shape in self._shapes.items():
            axes.update(zip(about["tensors"][name][1], shape, strict=True))
        shapes: dict[str, list[int]] = {}
        for name in about["inputs"]:
            shapes[name] = list(self._shapes.get(name) or _fixed(about["tensors"][name][1]))
        for name in about["outputs"]:
            shapes[name] = _fixed([axes.get(size, size) for size in about["tensors"][name][1]])
        return shapes

    def infer_shapes(self) -> list[str]:
        about = self._about()
        shapes = self._known(about)
        return [name for name in about["inputs"] if -1 in shapes[name]]

    def get_tensor_shape(self, name: str) -> Any:
        about = self._about()
        shape = self._known(about)[name]
        if self._trt.controls.missing_output_shapes and name in about["outputs"]:
            shape = _fixed(about["tensors"][name][1])
        return self._trt.new("Dims", shape)

    def update_device_memory_size_for_shapes(self) -> int:
        about = self._about()
        shapes = self._known(about)
        if any(-1 in shape for shape in shapes.values()):
            self._refuse("The size of the device memory needs all input shapes.")
            return 0
        return ICudaEngine._scratch([shapes[name] for name in about["inputs"]])

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (operator.index(memory), size)

    def _problem(self, shapes: Mapping[str, list[int]], stream: int) -> str | None:
        """Why an execution would fail."""
        for name, shape in shapes.items():
            if -1 in shape:
                return f"The shape of {name} has not been set."
            if not self._addresses.get(name):
                return f"The address of {name} has not been set."
            if self._addresses[name] % ALIGNMENT:
                return f"The address of {name} is not aligned to {ALIGNMENT} bytes."
        if not stream:
            return "The double refuses executions on the default stream."
        if self._managed:
            address, size = self._memory
            needed = self.update_device_memory_size_for_shapes()
            if not address or address % ALIGNMENT or size < needed:
                return "The device memory has not been set, is not aligned or is too small."
        return None

    def _array(self, name: str, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """The memory at a tensor's address."""
        kind, count = np.dtype(NUMPY[dtype]), math.prod(shape)
        memory: Any = (ctypes.c_ubyte * (count * kind.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(memory, kind, count).reshape(shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        controls = self._trt.controls
        call = controls.executions
        controls.executions += 1
        about, engine = self._about(), self._engine()
        if engine is None or not about["inputs"]:
            return False
        shapes = self._known(about)
        problem = self._problem(shapes, stream_handle)
        if call == controls.execute_false_at:
            problem = "Error Code 1: Cask (Cask convolution execution)"
        if problem:
            return self._refuse(problem)
        arrays = {n: self._array(n, about["tensors"][n][0], shape) for n, shape in shapes.items()}
        results = engine._run({name: arrays[name] for name in about["inputs"]})
        wrong = controls.perturb if call >= controls.perturb_from else 0
        for name, result in zip(about["outputs"], results, strict=True):
            arrays[name][...] = result + wrong if wrong else result
        return True


# The inspector.

PRODUCTS = ("MatMul", "Gemm", "Einsum")
MHA, GEMM, CONV, KGEN = "mha", "gemm", "CaskConvolution", "kgen"


def _attentions(nodes: list[Node], tensors: Mapping[str, Any]) -> dict[str, list[Node]]:
    """The chains MatMul-Softmax-MatMul in half precision, by the name of each of their nodes."""
    by_output = {name: node for node in nodes for name in node.outputs}
    by_input = {node.inputs[0]: node for node in nodes if node.operator == "MatMul"}
    found: dict[str, list[Node]] = {}
    for node in nodes:
        if node.operator != "Softmax" or tensors[node.outputs[0]][0] != "HALF":
            continue
        before, after = by_output.get(node.inputs[0]), by_input.get(node.outputs[0])
        if before is not None and before.operator == "MatMul" and after is not None:
            chain = [before, node, after]
            found |= {each.name: chain for each in chain}
    return found


def _groups(about: Mapping[str, Any], fuse: bool) -> list[tuple[str, list[Node]]]:
    """The nodes of each layer, with its kind. Neighbours that are not products become one."""
    nodes = [Node(*node) for node in about["nodes"]]
    attentions = _attentions(nodes, about["tensors"]) if fuse else {}
    groups: list[tuple[str, list[Node]]] = []
    for node in nodes:
        chain = attentions.get(node.name)
        if chain is not None:
            if node is chain[-1]:
                groups.append((MHA, chain))
        elif node.operator in PRODUCTS:
            groups.append((GEMM, [node]))
        elif node.operator == "Conv":
            groups.append((CONV, [node]))
        elif groups and groups[-1][0] == KGEN:
            groups[-1][1].append(node)
        else:
            groups.append((KGEN, [node]))
    return groups


def _layers(trt: Library, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers as the inspector tells them in detail."""
    mode = trt.controls.inspector
    return [
        _layer(about, k, kind, nodes, mode == "float32" and kind != KGEN)
        for k, (kind, nodes) in enumerate(_groups(about, fuse=mode != "unfused"))
    ]


def _layer(
    about: Mapping[str, Any], index: int, kind: str, nodes: list[Node], float32: bool
) -> dict[str, Any]:
    """One layer; ``float32``: it runs half-precision tensors in float32."""
    tensors = about["tensors"]
    made = {name for node in nodes for name in node.outputs}
    used = dict.fromkeys(n for node in nodes for n in node.inputs if n in tensors and n not in made)

    def describe(name: str) -> dict[str, Any]:
        dtype = tensors[name][0]
        dtype = "FLOAT" if float32 and dtype == "HALF" else dtype
        spelled = dtype.capitalize()
        if kind == CONV:
            spelled = f"Row major linear {'FP16 format' if dtype == 'HALF' else 'FP32'}"
        return {"Name": name, "Format/Datatype": spelled}

    half = tensors[nodes[0].outputs[0]][0] == "HALF" and not float32
    product = "tf32f32" if "TF32" in about["flags"] else "f32f32"
    types = "f16f16_f16f16_f16" if half else f"f32f32_{product}_f32"
    name, tactic = {
        MHA: (f"_gemm_mha_v2_myl0_{index}", f"_gemm_mha_v2_0x{index:08x}"),
        GEMM: (f"{nodes[0].name}_myl0_{index}", f"sm90_xmma_gemm_{types}_nn_n"),
        CONV: (nodes[0].name, f"sm90_xmma_fprop_implicit_gemm_{types}_nhwckrsc_nhwc"),
        KGEN: (f"__myl_myl0_{index}", f"__myl_0x{index:08x}"),
    }[kind]
    return {
        "Name": name,
        "LayerType": GEMM if kind == MHA else kind,
        "Inputs": [describe(each) for each in used],
        "TacticName": tactic,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node.name}]" for node in nodes),
    }


@native
class EngineInspector(Native):
    _engine: weakref.ref[ICudaEngine]

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format.name != "JSON":
            raise DoubleLacks("the inspector of the double writes JSON only")
        engine = self._engine()
        if engine is None or not engine._alive():
            return json.dumps({"Layers": []})
        layers: list[Any] = _layers(self._trt, engine._about)
        if engine._about["verbosity"] != "DETAILED":
            layers = [layer["Name"] for layer in layers]
        names = "I/O Tensors" if self._trt.typed else "Bindings"
        return json.dumps({"Layers": layers, names: engine._names})
