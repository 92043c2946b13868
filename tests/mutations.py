"""Files as disks, networks and strangers change them: strategies of Hypothesis."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HEAD = 600  # bytes in which most formats say what follows
EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
OUTSIDE = "../outside/secret"  # a name that no reader may follow

_LEAVES = st.sampled_from(
    f"""null true false 0 1 -1 3 1000000 {2**63} 1e40 0.5 -0.0 1e308 1e999 NaN "" "a" "nan" [] {{}}
    [[]] {{"a":1}} "{OUTSIDE}" "/etc/passwd" "\\u0000" "\\ud800" "{"é" * 300}" """.split()
).map(json.loads)


@st.composite
def mutated_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """``original`` cut off, or with a few places overwritten, inserted, removed or repeated."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        last = max(len(data) - 1, 0)
        near = st.integers(0, min(HEAD, last)) | st.integers(0, last)
        at = draw(near)
        kind = draw(
            st.sampled_from(("flip", "number", "cut", "insert", "remove", "repeat", "zero"))
        )
        if kind == "flip":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from(EXTREMES)) % (1 << 8 * width)
            data[at : at + width] = value.to_bytes(width, draw(st.sampled_from(("little", "big"))))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        else:
            end = draw(st.integers(at, min(at + 200, len(data))))
            part = bytes(data[at:end])
            data[at:end] = {"remove": b"", "repeat": 2 * part, "zero": bytes(len(part))}[kind]
    return bytes(data)


@st.composite
def mutated_value(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with one to three of its parts replaced, renamed, removed or added."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    """``value`` changed at one place, which is as likely deep as shallow."""
    inside = isinstance(value, dict | list) and len(value) and draw(st.integers(0, 5))
    if not inside:
        return draw(_LEAVES)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    kind = draw(st.sampled_from(("deeper", "deeper", "deeper", "remove", "add")))
    if kind == "deeper":
        value[key] = _mutate(draw, value[key])
    elif kind == "remove":
        del value[key]
    elif isinstance(value, dict):
        value[draw(st.sampled_from(("", "unknown", OUTSIDE)))] = draw(_LEAVES)
    else:
        value.insert(key, value[key])
    return value


def mutated_json(original: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file: of other values, or of damaged text."""
    values = mutated_value(json.loads(original)).map(lambda value: json.dumps(value).encode())
    deep = st.just(b"[" * 100_000)
    return st.one_of(values, values, values, mutated_bytes(original), deep)


def mutated_json_lines(original: bytes) -> st.SearchStrategy[bytes]:
    """A log of JSON, a value a line."""
    lines = original.splitlines()

    def replaced(place: int) -> st.SearchStrategy[bytes]:
        changed = mutated_json(lines[place])
        return changed.map(
            lambda line: b"\n".join([*lines[:place], line, *lines[place + 1 :], b""])
        )

    return st.integers(0, len(lines) - 1).flatmap(replaced) | mutated_bytes(original)


def mutated_safetensors(original: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file: its header's JSON, the JSON in its metadata, or any bytes."""
    (length,) = struct.unpack("<Q", original[:8])
    header, body = json.loads(original[8 : 8 + length]), original[8 + length :]

    def packed(changed: Any) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + body

    def with_metadata(name: str) -> st.SearchStrategy[bytes]:
        inner = mutated_value(json.loads(header["__metadata__"][name]))
        return inner.map(
            lambda value: packed({**header, "__metadata__": {name: json.dumps(value)}})
        )

    choices = [mutated_value(header).map(packed), mutated_bytes(original)]
    choices += map(with_metadata, header.get("__metadata__", {}))
    return st.one_of(choices)


def mutated_zip(inner: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """A zip archive whose checksums hold: the member that ends in ``inner`` is changed, or any."""

    def strategy(original: bytes) -> st.SearchStrategy[bytes]:
        with zipfile.ZipFile(io.BytesIO(original)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(name for name in members if name.endswith(inner))

        def packed(changed: bytes) -> bytes:
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, changed if member == name else data)
            return out.getvalue()

        return mutated_bytes(members[name]).map(packed) | mutated_bytes(original)

    return strategy
