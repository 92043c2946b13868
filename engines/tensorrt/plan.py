"""Plans of both TensorRTs on disk: an engine's key, its record, and why it no longer fits.

A plan is valid for exactly what it was built from, so its name is a hash over that. Beside
each ``KEY.plan`` stands ``KEY.json``, the record: every field of the key in the clear, the
plan's own hash. Nothing here needs TensorRT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, Manifest, read_manifest
from lutdeploy.artefacts.run import KEY_DIGITS, Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts
from lutdeploy.engines.tensorrt.library import RTX, TENSORRT, TITLES
from lutdeploy.errors import ArtefactError, UsageError

RECORD_FORMAT = 3  # before 3, of one TensorRT and one profile
# The first bytes of a plan. TensorRT's are as in its samples/common/sampleEngines.cpp; those of
# TensorRT for RTX were seen.
PLAN_TAGS = {TENSORRT: b"ftrt", RTX: b"vtrt"}
HEADER_BYTES = 28
AMPERE = (8, 0)


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes of an optimization profile; one size alone makes a static engine."""

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


def parse_batches(text: str) -> tuple[BatchProfile, ...]:
    """The profiles of one engine: "N", "MIN:OPT:MAX", or several sizes as "1,8,64,256".

    Of several, each profile is tuned for its size and takes all batches above the size before.
    """
    if "," not in text:
        return (BatchProfile.parse(text),)
    sizes = [BatchProfile.parse(part) for part in text.split(",")]
    if not all(size.static for size in sizes):
        raise UsageError(f"batch {text!r}: several profiles are single sizes, such as 1,8,64,256")
    below = [0, *(size.max for size in sizes)]
    if sorted(set(below)) != below:
        raise UsageError(f"batch {text!r}: write the sizes in ascending order")
    return tuple(
        BatchProfile(low + 1, size.opt, size.max)
        for low, size in zip(below[:-1], sizes, strict=True)
    )


@dataclass(frozen=True)
class BuildOptions:
    """What a user asks of the builder; all of it decides the plan and is in its key."""

    profiles: tuple[BatchProfile, ...] = (BatchProfile(1, 64, 256),)
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

    @property
    def batches(self) -> str:
        """The profiles in words, as :func:`read_profiles` reads them."""
        return ",".join(map(str, self.profiles))


def read_profiles(text: str) -> tuple[BatchProfile, ...]:
    """The profiles of a record."""
    return tuple(map(BatchProfile.parse, text.split(",")))


@dataclass(frozen=True)
class Machine:
    """One of the two TensorRTs on this machine, and the GPU; without one those fields are None."""

    backend: str  # TENSORRT or RTX
    tensorrt: str  # version
    cuda: str | None = None  # version of the CUDA runtime in the process
    gpu: str | None = None
    compute_capability: str | None = None  # "9.0"


def key_fields(
    manifest: Manifest,
    graph: str,
    options: BuildOptions,
    machine: Machine,
    architectures: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that decides the plan of a graph file, by name; plain JSON values.

    Args:
        architectures: compute capabilities that a plan of TensorRT for RTX is compiled for.
    """
    request = {k: v for k, v in asdict(options).items() if k != "profiles"}
    tied = asdict(machine)
    if machine.backend == RTX:  # compiled for architectures, on any machine
        tied = {"backend": RTX, "tensorrt": machine.tensorrt, "architectures": [*architectures]}
    return {**export_fields(manifest, graph), "batch": options.batches, **request, **tied}


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
    types: dict[str, int]  # of the network's layers, see network.NetworkTypes.counts
    created: str
    build_seconds: float

    @property
    def key(self) -> str:
        return key_of(self.fields)

    @property
    def plan(self) -> Path:
        return self.path.with_suffix(".plan")

    @property
    def backend(self) -> str:
        return str(self.fields["backend"])

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        return read_profiles(self.fields["batch"])

    @property
    def static(self) -> bool:
        """Whether the engine takes one batch size only."""
        return len(self.profiles) == 1 and self.profiles[0].static

    def runtime_cache(self, capability: str) -> Path:
        """Where kernels are kept that TensorRT for RTX compiles on a GPU of this capability."""
        return self.path.with_suffix(f".sm{capability.replace('.', '')}.cache")

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
        found = plan_version(data, self.backend)
        if found is not None and self.fields["tensorrt"].split(".")[:3] != found.split("."):
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
        _ = record.profiles, PLAN_TAGS[record.backend]
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


def plan_version(data: bytes, backend: str) -> str | None:
    """The TensorRT version in a plan's header, "major.minor.patch".

    None for TensorRT for RTX, whose header is not documented; its runtime checks it
    (``Runtime.get_engine_validity``).
    """
    if len(data) < HEADER_BYTES or not data.startswith(PLAN_TAGS[backend]):
        raise ArtefactError(f"not a plan of {TITLES[backend]}: its header has another tag")
    return ".".join(str(part) for part in data[24:27]) if backend == TENSORRT else None


def differences(
    record: PlanRecord, wanted: Mapping[str, Any], machine: Machine | None
) -> list[str]:
    """A line for each field in which an engine differs from its export or from this machine.

    An engine built hardware-compatible may run on another GPU from Ampere on, one built
    version-compatible under a later TensorRT of the same major version. What a machine does not
    have, a GPU for instance, is not compared.
    """
    lines = []
    here = asdict(machine) if machine else {}
    for name, value in {**wanted, **here}.items():
        built = record.fields.get(name)
        if name == "compute_capability" and record.backend == RTX:
            name, built = "architectures", ", ".join(record.fields["architectures"])
            value = built if value in record.fields["architectures"] else value
        if value is None or (record.backend == RTX and name in ("cuda", "gpu")):
            continue
        if built == value or _tolerated(name, record.fields, built, value):
            continue
        shown = [str(value) for value in (built, value)]
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
        """ "passed", "FAILED", or "compiled, not run"."""
        if self.verdict is None:
            return "compiled, not run"
        return "passed" if self.verdict.passed else "FAILED"


def verdict_on(record: PlanRecord, verdicts: Iterable[Verdict]) -> Verdict | None:
    """What the check after its build found of an engine."""
    return next((v for v in verdicts if v.engine_sha256 == record.plan_sha256), None)


def survey(run: Run, machines: Mapping[str, Machine]) -> list[PlanState]:
    """Every engine of a run beside the run's exports and this machine.

    Records and the plans' headers are read, no plan is deserialised.

    Args:
        machines: the TensorRTs that are here, by backend; engines of another are compared with
            their exports alone.
    """
    states = []
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
        wanted = export_fields(manifest, record.graph_file)
        reasons = differences(record, wanted, machines.get(record.backend))
        try:
            record.check_header()
        except ArtefactError as error:
            reasons.append(str(error))
        states.append(PlanState(path, record, tuple(reasons), verdict_on(record, verdicts)))
    return states
