"""TensorRT plans on disk: the key of an engine, its record, and why it no longer fits.

A plan is valid for exactly what it was built from, so its name is a hash over that. Beside
each ``KEY.plan`` stands ``KEY.json``, the record: every field of the key in the clear, the
plan's own hash. Nothing here needs TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, Manifest, read_manifest
from lutdeploy.artefacts.run import KEY_DIGITS, Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts
from lutdeploy.errors import ArtefactError, UsageError

RECORD_FORMAT = 2  # 1 held the verdict too, which now has a place of its own
PLAN_TAG = 0x74727466  # "ftrt", little-endian, as in TensorRT's samples/common/sampleEngines.cpp
HEADER_BYTES = 28
AMPERE = (8, 0)


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes of an engine; one size alone makes a static engine."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"batch {self.min}:{self.opt}:{self.max}: wanted 1 ≤ MIN ≤ OPT ≤ MAX")

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """From "N" or "MIN:OPT:MAX"."""
        try:
            sizes = [int(part) for part in text.split(":")]
        except ValueError:
            sizes = []
        if len(sizes) not in (1, 3):
            raise UsageError(f"batch {text!r}: write N or MIN:OPT:MAX, such as 64 or 1:64:256")
        return cls(*(sizes * 3 if len(sizes) == 1 else sizes))

    @property
    def static(self) -> bool:
        return self.min == self.max

    def __str__(self) -> str:
        return str(self.min) if self.static else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class BuildOptions:
    """What a user asks of the builder; all of it decides the plan and is in its key."""

    batch: BatchProfile = BatchProfile(1, 64, 256)
    workspace_mib: int | None = None  # None: what TensorRT takes by itself
    optimization_level: int = 3  # 0 to 5
    hardware_compatible: bool = False  # Ampere and later instead of this GPU alone
    version_compatible: bool = False  # later minor versions of TensorRT too
    refittable: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(f"optimization level {self.optimization_level}: wanted 0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace {self.workspace_mib} MiB: wanted at least 1")


@dataclass(frozen=True)
class Machine:
    """What a plan is tied to besides its contents."""

    tensorrt: str  # version
    cuda: str  # version of the CUDA runtime in the process
    gpu: str
    compute_capability: str  # "9.0"


def key_fields(
    manifest: Manifest, graph: str, options: BuildOptions, machine: Machine
) -> dict[str, Any]:
    """Everything that decides the plan of a graph file, by name; plain JSON values."""
    request = {**asdict(options), "batch": str(options.batch)}
    return {**export_fields(manifest, graph), **request, **asdict(machine)}


def export_fields(manifest: Manifest, graph: str) -> dict[str, Any]:
    """The fields of the key that an export decides."""
    others = {
        name: file.sha256 for name, file in manifest.files.items() if name not in manifest.graphs
    }
    return {
        "graph": manifest.graph,
        "precision": manifest.precision,
        "graph_sha256": manifest.files[graph].sha256,
        "weights_sha256": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest(),
    }


def key_of(fields: Mapping[str, Any]) -> str:
    """The SHA-256 over the fields, hexadecimal."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record beside a plan: what it was built from, and the plan's hash."""

    path: Path  # of the record; not in the JSON
    fields: dict[str, Any]  # of the key
    export: str  # the export's name
    graph_file: str
    plan_bytes: int
    plan_sha256: str
    created: str
    build_seconds: float

    @property
    def key(self) -> str:
        return key_of(self.fields)

    @property
    def plan(self) -> Path:
        return self.path.with_suffix(".plan")

    @property
    def profile(self) -> BatchProfile:
        return BatchProfile.parse(self.fields["batch"])

    def write(self) -> None:
        """Write the record, atomically."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "path"}
        files.write_json(self.path, {"format": RECORD_FORMAT, "key": self.key, **values})

    def read_plan(self) -> bytes:
        """The plan's bytes, checked against the record and by their header.

        A plan is code that the GPU box will run, so one that is not the recorded one is
        refused before anything looks into it.

        Raises:
            ArtefactError: missing, changed, or no plan of the recorded TensorRT version.
        """
        try:
            data = self.plan.read_bytes()
        except OSError as error:
            raise ArtefactError(f"{self.plan} is missing or unreadable; build again") from error
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != self.plan_bytes or digest != self.plan_sha256:
            raise ArtefactError(
                f"{self.plan} refused: sha256 {digest[:12]}…, its record says "
                f"{self.plan_sha256[:12]}…; build again"
            )
        self.check_header(data)
        return data

    def check_header(self, data: bytes | None = None) -> None:
        """Hold the plan's tag and version bytes against the record.

        Args:
            data: the plan, or its beginning; None reads that and no more.

        Raises:
            ArtefactError: missing, no plan, or of another TensorRT version.
        """
        if data is None:
            try:
                with self.plan.open("rb") as file:
                    data = file.read(HEADER_BYTES)
            except OSError as error:
                raise ArtefactError(f"{self.plan.name} is missing or unreadable") from error
        found = plan_version(data)
        if self.fields["tensorrt"].split(".")[:3] != found.split("."):
            raise ArtefactError(
                f"{self.plan} was written by TensorRT {found}, its record says "
                f"{self.fields['tensorrt']}; build again"
            )


def read_record(path: Path) -> PlanRecord:
    """Read a record.

    Raises:
        ArtefactError: unreadable, incomplete, or not the record of its key.
    """
    values = files.read_json(path)
    try:
        if values.pop("format") != RECORD_FORMAT:
            raise ArtefactError(f"{path} was written by another version; build again")
        key = values.pop("key")
        record = msgspec.convert({**values, "path": path}, PlanRecord)
        if key != record.key or path.stem != record.key[:KEY_DIGITS]:
            raise ArtefactError(f"{path} is the record of another engine; build again")
        _ = record.profile
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise ArtefactError(f"{path} is incomplete or damaged: {error}; build again") from error
    return record


def find_plan(run: Run, fields: Mapping[str, Any]) -> PlanRecord | None:
    """The engine of exactly these fields, if it is whole; a damaged one counts as none."""
    try:
        record = read_record(run.plan_record(key_of(fields)))
        record.read_plan()
    except ArtefactError:
        return None
    return record


def plan_version(data: bytes) -> str:
    """The TensorRT version in a plan's header, "major.minor.patch"."""
    if len(data) < HEADER_BYTES or struct.unpack_from("<I", data)[0] != PLAN_TAG:
        raise ArtefactError("not a TensorRT plan: its header has another tag")
    return ".".join(str(part) for part in data[24:27])


def differences(record: PlanRecord, fields: Mapping[str, Any]) -> list[str]:
    """A line for each of the wanted fields in which an engine differs.

    An engine built hardware-compatible may run on another GPU from Ampere on, one built
    version-compatible under a later TensorRT of the same major version.
    """
    lines = []
    for name, wanted in fields.items():
        built = record.fields.get(name)
        if built == wanted or _tolerated(name, record.fields, built, wanted):
            continue
        shown = [str(value) for value in (built, wanted)]
        if name.endswith("sha256"):
            shown = [value[:12] + "…" for value in shown]
        lines.append(f"{name}: built with {shown[0]}, here {shown[1]}")
    return lines


def _tolerated(name: str, fields: Mapping[str, Any], built: Any, wanted: Any) -> bool:
    if name == "gpu":  # what counts is the compute capability
        return bool(fields.get("hardware_compatible"))
    if name == "compute_capability" and fields.get("hardware_compatible"):
        return min(_numbers(built), _numbers(wanted)) >= AMPERE
    if name == "cuda":
        return bool(fields.get("version_compatible"))
    if name == "tensorrt" and fields.get("version_compatible"):
        return _numbers(built)[0] == _numbers(wanted)[0] and _numbers(built) <= _numbers(wanted)
    return False


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in str(version).split("."))


@dataclass(frozen=True)
class PlanState:
    """One engine of a run, and why it cannot be used as things are; no reason: it can."""

    path: Path  # of the record
    record: PlanRecord | None  # None when damaged
    reasons: tuple[str, ...]
    verdict: Verdict | None = None

    @property
    def outcome(self) -> str:
        """ "passed", "FAILED" or "not checked"."""
        if self.verdict is None:
            return "not checked"
        return "passed" if self.verdict.passed else "FAILED"


def verdict_on(record: PlanRecord, verdicts: Iterable[Verdict]) -> Verdict | None:
    """What the check after its build found of an engine."""
    return next((v for v in verdicts if v.engine_sha256 == record.plan_sha256), None)


def survey(run: Run, machine: Machine | None) -> list[PlanState]:
    """Every engine of a run beside the run's exports and this machine.

    Records and the plans' headers are read, no plan is deserialised. ``machine`` is None where
    TensorRT or a GPU is missing; its fields are not compared then.
    """
    states = []
    here = asdict(machine) if machine else {}
    verdicts = read_verdicts(run)
    manifests: dict[str, Manifest] = {}  # 64 engines may come from one export
    for path in run.plan_records():
        try:
            record = read_record(path)
            if record.export not in manifests:
                folder = run.export_folder(record.export)
                if not (folder / MANIFEST).is_file():
                    raise ArtefactError(f"its export {record.export} is gone")
                manifests[record.export] = read_manifest(folder)
            manifest = manifests[record.export]
            if record.graph_file not in manifest.graphs:
                raise ArtefactError(f"export {record.export} has no {record.graph_file} any more")
        except ArtefactError as error:
            states.append(PlanState(path, None, (str(error),)))
            continue
        reasons = differences(record, {**export_fields(manifest, record.graph_file), **here})
        try:
            record.check_header()
        except ArtefactError as error:
            reasons.append(str(error))
        states.append(PlanState(path, record, tuple(reasons), verdict_on(record, verdicts)))
    return states
