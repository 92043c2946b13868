"""Modules in the likeness of NVIDIA's Python bindings, from what was read of them.

A module of :func:`make_module` has the classes, methods, arguments, properties and enums of one
version, and nothing else (``tests/data/tensorrt``). Behaviour comes from classes of the same
names; a name that has none raises :class:`DoubleLacks` when it is used.
"""

from __future__ import annotations

import enum
import functools
import importlib.machinery
import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

DATA = Path(__file__).parents[1] / "data" / "tensorrt"


class DoubleLacks(RuntimeError):  # noqa: N818 - reads as what it says
    """A name of TensorRT's surface that the double has no behaviour for."""


def read_surface(version: str) -> dict[str, Any]:
    """What was read of one version's bindings."""
    found: dict[str, Any] = json.loads((DATA / f"api-{version}.json").read_text("utf-8"))
    return found


class BoundEnum(enum.Enum):
    """An enum of a binding: no int, but convertible to one."""

    def __int__(self) -> int:
        return int(self.value)


@dataclass(frozen=True)
class Stored:
    """A property that keeps what it is given; a default of an enum is written "Enum.MEMBER"."""

    kind: str
    default: Any


class Signatures:
    """The overloads of one method, as pybind11 writes them."""

    def __init__(self, module: types.ModuleType, lines: Sequence[str]) -> None:
        self.module, self.lines = module, lines
        self.overloads = [self._parse(line) for line in lines]

    @staticmethod
    def _parse(line: str) -> inspect.Signature:
        inside = line[line.index("(") + 1 : line.rindex(") ->")]
        parameters = []
        for name, kind, default in re.findall(
            r"(\w+): (.+?)(?: = (.+?))?(?=, \w+: |$)", inside.partition(", ")[2]
        ):
            nameless = re.fullmatch(r"arg\d+", name)
            where = inspect.Parameter.POSITIONAL_ONLY if nameless else None
            parameters.append(
                inspect.Parameter(
                    name,
                    where or inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=default or inspect.Parameter.empty,
                    annotation=kind + " | None" * (default == "None"),
                )
            )
        return inspect.Signature(parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; those left to their default are absent."""
        for signature in self.overloads:
            try:
                bound = signature.bind(*args, **kwargs).arguments
            except TypeError:
                continue
            kinds = {name: p.annotation for name, p in signature.parameters.items()}
            if all(fits(self.module, value, kinds[name]) for name, value in bound.items()):
                return bound
        raise TypeError(
            f"incompatible function arguments. The following are supported: {self.lines}. "
            f"Invoked with: {args} {kwargs}"
        )


def fits(module: types.ModuleType, value: Any, kind: str) -> bool:
    """Whether a binding takes a value for an argument of a kind."""
    if kind.endswith(" | None"):
        return value is None or fits(module, value, kind.removesuffix(" | None"))
    if kind in ("int", "typing.SupportsInt"):
        return hasattr(type(value), "__index__")
    if kind in ("buffer", "typing_extensions.Buffer"):
        return isinstance(value, bytes | bytearray | memoryview)
    if re.match(r"(list|List|collections\.abc\.Sequence)\[", kind):
        return isinstance(value, list | tuple)
    plain: dict[str, type] = {"str": str, "bool": bool, "tuple": tuple, "list": list}
    path: Any = kind.rpartition("::")[2].split(".")
    wanted: Any = plain.get(kind) or functools.reduce(getattr, path, module)
    return isinstance(value, wanted)


class Native:
    """What the classes of a module derive from. Names with an underscore are the double's own."""

    _trt: ClassVar[types.ModuleType]
    _controls: ClassVar[Any]
    _writable: ClassVar[frozenset[str]]
    _owned: ClassVar[bool]  # a class of the bindings, and none that derives from it in Python

    def __init_subclass__(cls) -> None:
        cls._owned = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._owned and not name.startswith("_") and name not in self._writable:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to set")
        object.__setattr__(self, name, value)

    def _new(self, name: str, *state: Any) -> Any:
        """An object of a class that has no constructor in Python."""
        made = object.__new__(getattr(self._trt, name))
        made._open(*state)
        return made

    def _refuse(self, text: str) -> bool:
        """Tell the logger; False, as TensorRT reports it."""
        self._controls.errors.append(text)
        self._logger.log(self._trt.ILogger.Severity.ERROR, text)  # type: ignore[attr-defined]
        return False


def show(
    module: types.ModuleType,
    name: str,
    api: dict[str, Any],
    own: Mapping[str, Any],
    shared: dict[str, Any],
) -> type:
    """The class of a module: what ``own`` does, behind the signatures of the bindings."""
    members = {n: v for n, v in own.items() if n.startswith("_")} | shared
    members |= {"_trt": module, "__module__": module.__name__}
    members["__init__"] = _method(module, name, api.get("constructors", ()), own.get("__init__"))
    for method, lines in api["methods"].items():
        members[method] = _method(module, f"{name}.{method}", lines, own.get(method))
    for prop, access in api["properties"].items():
        members[prop] = _property(module, f"{name}.{prop}", own.get(prop), access)
    writable = {n for n, access in api["properties"].items() if access == "read-write"}
    members["_writable"] = frozenset(writable)
    made = type(name, (Native,), members)
    made._owned = True  # type: ignore[attr-defined]
    return made


def _method(module: types.ModuleType, label: str, lines: Sequence[str], found: Any) -> Any:
    signatures = Signatures(module, lines)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not lines:
            raise TypeError(f"{label}: No constructor defined!")
        bound = signatures.bind(args, kwargs)
        if found is None:
            if "." in label:
                raise DoubleLacks(f"the double has no {label}")
            return None
        return found(self, **bound)

    return method


def _property(module: types.ModuleType, label: str, found: Any, access: str) -> property:
    key = f"_stored_{label.rpartition('.')[2]}"

    def read(self: Any) -> Any:
        if isinstance(found, property):
            return found.__get__(self)
        if not isinstance(found, Stored):
            raise DoubleLacks(f"the double has no {label}")
        default = found.default
        if isinstance(default, str):
            default = functools.reduce(getattr, default.split("."), module)
        return getattr(self, key, default)

    def write(self: Any, value: Any) -> None:
        if not isinstance(found, Stored):
            raise DoubleLacks(f"the double does not let {label} be set")
        if not fits(module, value, found.kind):
            raise TypeError(f"{label}: incompatible value {value!r}")
        object.__setattr__(self, key, value)

    return property(read, write if access == "read-write" else None)


def make_module(
    version: str, behaviours: Mapping[str, type], shared: dict[str, Any]
) -> types.ModuleType:
    """The module of a version.

    Args:
        version: as in the names of the files in ``tests/data/tensorrt``.
        behaviours: classes by name.
        shared: attributes of every class.
    """
    surface = read_surface(version)
    module: Any = types.ModuleType(surface["module"], "A test double, not TensorRT.")
    module.__version__ = surface["version"]
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    for name, api in surface["classes"].items():
        own = vars(behaviours[name]) if name in behaviours else {}
        setattr(module, name, show(module, name, api, own, shared))
    for path, values in surface["enums"].items():
        owner, _, name = path.rpartition(".")
        if made := getattr(module, owner, None) if owner else module:
            ordered = sorted(values.items(), key=lambda item: item[1])
            setattr(made, name, BoundEnum(name, ordered))  # type: ignore[call-arg]  # members
    return module
