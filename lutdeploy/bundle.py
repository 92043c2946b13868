"""The run folder: its file names, manifests and hashes. No other module knows a file name.

    runs/NAME/
      model.safetensors        weights and config (training: the EMA)
      train.json train.jsonl   settings and log of the training
      training-state.safetensors   all that --resume needs
      samples/                 pictures made while training
      onnx/EXPORT/             graphs, one weights file, manifest.json
      parity.json              the last verdict on every export
      bench.json bench.png     the last speed measurement
      steps.json steps.png     tuned time grids, and what they were compared with
      evaluation.json evaluation.html   how good the pictures are, by `lutdeploy evaluate`
      engines/KEY.plan         a TensorRT engine, and beside it KEY.json: what it was built from
      engines/timing.cache     what its builder measured

Every file is written beside its place and renamed into it, so that a reader sees a whole
file or none, whenever a writer is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, UsageError
from lutdeploy.signature import GRAPHS, PRECISIONS
from lutdeploy.solvers import StepTable

RUNS = Path("runs")
MODEL = "model.safetensors"
MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
EVALUATION_PAGE = "evaluation.html"
MANIFEST_FORMAT = 1
KEY_DIGITS = 20  # of an engine's key in its file names


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to disk, rename it over ``path``.

    Raises:
        OSError: as the system says (a full disk, no permission); ``path`` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        _name(error, path, temporary)
        raise


def clear_leftovers(folder: Path, names: str) -> None:
    """Remove what killed writers left in a folder; the caller is now its only writer.

    Args:
        folder: where they wrote; it need not exist.
        names: the file or folder that they were writing, or a pattern such as ``*.png``.
    """
    for left in folder.glob(f".{names}.*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _name(error: BaseException, path: Path, temporary: str | None = None) -> None:
    """Tell a failed write which file it was for; a full disk, for one, does not say."""
    if isinstance(error, OSError) and error.filename in (None, temporary):
        error.filename = str(path)


def _umask() -> int:
    """The process's umask; mkstemp ignores it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ArtefactError: missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is unreadable or truncated: {error}") from error


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output_folder(path: Path) -> None:
    """Make the folder that --out names, where there is none.

    Raises:
        UsageError: it is a file, or cannot be made or written.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out names a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror}; choose another --out") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{path} is not writable; choose another --out")


def remove_if_empty(folder: Path, lock_name: str = ".lock") -> None:
    """Take away a folder that holds nothing but its lock; whoever holds that may do so."""
    if [path.name for path in folder.iterdir()] == [lock_name]:
        (folder / lock_name).unlink()
        folder.rmdir()


@contextlib.contextmanager
def lock(
    folder: Path,
    what: str,
    on_wait: Callable[[str], None] | None = None,
    name: str = ".lock",
) -> Iterator[None]:
    """Hold a folder for one process; released by the system however the process ends.

    Args:
        folder: made if it is not there.
        what: the command that holds it, for messages.
        on_wait: told before waiting for another process; None refuses instead.
        name: of the lock's file, for commands that do not shut each other out.

    Raises:
        UsageError: another process holds it, and ``on_wait`` is None.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / name)
    try:
        held.acquire(blocking=False)
    except filelock.Timeout as error:
        if on_wait is None:
            raise UsageError(f"{folder} is in use by another {what}; wait for it to end") from error
        on_wait(f"{folder} is in use by another {what}: waiting for it")
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that takes ``target``'s place when the block ends without an error.

    The caller holds a lock: whatever else looks like a stage of ``target`` was left by a kill.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".old-{target.name}.*"):
        if (old / target.name).is_dir() and not target.exists():  # killed between two renames
            os.replace(old / target.name, target)
        shutil.rmtree(old)
    clear_leftovers(target.parent, target.name)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield stage
        os.chmod(stage, 0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".old-{target.name}."))
            os.replace(target, old / target.name)
            os.replace(stage, target)
            shutil.rmtree(old)
        else:
            os.replace(stage, target)
    except OSError as error:
        _name(error, target)
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """A run folder; nothing is read until asked for."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def settings(self) -> Path:
        return self.path / "train.json"

    @property
    def log(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def training_state(self) -> Path:
        return self.path / "training-state.safetensors"

    @property
    def averages(self) -> Path:
        """Where the averages of the weights that training kept are, one model file each."""
        return self.path / "averages"

    def average(self, decay: float) -> Path:
        return self.averages / f"ema-{decay:g}.safetensors"

    @property
    def pictures(self) -> Path:
        return self.path / "samples"

    @property
    def parity(self) -> Path:
        return self.path / "parity.json"

    @property
    def bench(self) -> Path:
        """What `lutdeploy bench` measured; its plot has the same name and ends in .png."""
        return self.path / "bench.json"

    @property
    def tuned_steps(self) -> Path:
        """Time grids searched for the run's model (:mod:`lutdeploy.tuned_steps`)."""
        return tuned_steps_file(self.model)

    @property
    def steps_plot(self) -> Path:
        return self.path / "steps.png"

    @property
    def exports_folder(self) -> Path:
        """Locked by whoever writes exports or what describes them."""
        return self.path / "onnx"

    def export_folder(self, name: str) -> Path:
        return self.exports_folder / name

    def float32_step(self, source_sha256: str) -> Path | None:
        """The float32 ``step`` export of a model file; None where there is none of it."""
        folder = self.export_folder("step-fp32")
        if (folder / MANIFEST).is_file() and read_manifest(folder).source_sha256 == source_sha256:
            return folder
        return None

    @property
    def engines(self) -> Path:
        return self.path / "engines"

    def plan(self, key: str) -> Path:
        """The TensorRT engine of a key (:mod:`lutdeploy.plan`)."""
        return self.engines / f"{key[:KEY_DIGITS]}.plan"

    def plan_record(self, key: str) -> Path:
        """What an engine was built from; the engine itself stands beside it."""
        return self.engines / f"{key[:KEY_DIGITS]}.json"

    def plan_records(self) -> list[Path]:
        """The records of all engines, by name."""
        return sorted(self.engines.glob("[0-9a-f]*.json"))

    @property
    def timing_cache(self) -> Path:
        return self.engines / "timing.cache"

    @property
    def provider_cache(self) -> Path:
        """Where ONNX Runtime's TensorRT provider keeps its own engines."""
        return self.engines / "onnxruntime"

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """What `lutdeploy parity` found last, by export, backend and device.

        Raises:
            ArtefactError: damaged.
        """
        known = read_json(self.parity) if self.parity.is_file() else {}
        if not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
            raise ArtefactError(f"{self.parity} is damaged; delete it and run `lutdeploy parity`")
        return known

    def exports(self) -> list[Path]:
        """Export folders, newest first (by the time in the manifest, not the file's)."""
        folder = self.exports_folder
        found = [
            entry
            for entry in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if not entry.name.startswith(".") and (entry / MANIFEST).is_file()
        ]
        created = {entry: read_manifest(entry).created for entry in found}
        return sorted(found, key=lambda entry: created[entry], reverse=True)


@dataclass(frozen=True)
class Located:
    """What a path given by a user stands for; at least one of model and export is there."""

    model: Path | None
    export: Path | None  # only when the path names one export folder
    run: Run | None


def locate(path: Path) -> Located:
    """Tell a run folder, an export folder and a model file apart.

    Raises:
        UsageError: nothing there, or none of the three; says what is near.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return Located(path, None, None)
    if path.is_file():
        hint = "; `lutdeploy import` reads it" if path.suffix in (".pth", ".pt") else ""
        raise UsageError(f"{path} is neither a run, an export nor a model.safetensors{hint}")
    if not path.is_dir():
        names = sorted(str(found.parent) for found in RUNS.glob(f"*/{MODEL}"))
        there = f"there are {', '.join(names)}" if names else f"there is none under {RUNS}/"
        raise UsageError(f"{path}: no such run; {there}")
    if (path / MANIFEST).is_file():
        run = Run(path.resolve().parent.parent)
        found = run if run.model.is_file() else None
        return Located(found.model if found else None, path, found)
    run = Run(path)
    if not run.model.is_file():
        started = run.settings.is_file()
        why = "its training has saved no checkpoint yet" if started else "it is no run"
        raise UsageError(f"{path} holds no {MODEL}: {why}")
    return Located(run.model, None, run)


def tuned_steps_file(model: Path) -> Path:
    """Where the tuned time grids of a model file are: beside it."""
    name = "steps.json" if model.name == MODEL else f"{model.stem}.steps.json"
    return model.parent / name


def newest_run(root: Path = RUNS) -> Run | None:
    """The run under ``root`` whose model was written last; None when there is none."""
    models = list(root.glob(f"*/{MODEL}")) if root.is_dir() else []
    newest = max(models, key=lambda path: path.stat().st_mtime_ns, default=None)
    return Run(newest.parent) if newest else None


@dataclass(frozen=True)
class Manifest:
    """What an export folder holds. ``graphs`` are file names in step order."""

    folder: Path
    config: ModelConfig
    graph: str
    precision: str
    table: StepTable | None
    islands: tuple[str, ...]
    opset: int
    created: str
    versions: dict[str, str]
    source_sha256: str
    graphs: tuple[str, ...]
    files: dict[str, dict[str, Any]]
    quantization: dict[str, Any] | None = None  # of an int8 export: see engines/quantizer.py
    tuned: tuple[StepTable, ...] = ()  # the model's, as steps.json had them

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights_sha256(self) -> str:
        """One hash over every file: the identity of this export."""
        lines = "".join(f"{name} {self.files[name]['sha256']}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the folder."""
        quantization = {"quantization": self.quantization} if self.quantization else {}
        return {
            "format": MANIFEST_FORMAT,
            "config": self.config.to_dict(),
            "graph": self.graph,
            "precision": self.precision,
            "table": self.table.to_dict() if self.table else None,
            "islands": list(self.islands),
            "opset": self.opset,
            "created": self.created,
            "versions": self.versions,
            "source_sha256": self.source_sha256,
            "graphs": list(self.graphs),
            "files": self.files,
            **quantization,
            **({"tuned": [table.to_dict() for table in self.tuned]} if self.tuned else {}),
        }

    def verify(self) -> None:
        """Check every file's size and hash.

        Raises:
            ArtefactError: names the first file that is missing or differs.
        """
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ArtefactError(f"{path} is missing; export again")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise ArtefactError(
                    f"{path} has {size} bytes, its manifest says {expected['bytes']}: "
                    "truncated or replaced; export again"
                )
            digest = sha256(path)
            if digest != expected["sha256"]:
                raise ArtefactError(
                    f"{path} has hash mismatch: sha256 {digest[:12]}…, its manifest says "
                    f"{expected['sha256'][:12]}…; export again"
                )


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name, size and hash of every file of an export folder but the manifest."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest; the files are checked by :meth:`Manifest.verify`.

    Raises:
        ArtefactError: unreadable, incomplete, or naming a file outside its folder.
    """
    path = folder / MANIFEST
    values = read_json(path)
    try:
        if values["format"] != MANIFEST_FORMAT:
            raise ArtefactError(
                f"{path} has format {values['format']!r}, this version reads {MANIFEST_FORMAT}; "
                "export again"
            )
        manifest = Manifest(
            folder=folder,
            config=ModelConfig.from_dict(values["config"]),
            graph=str(values["graph"]),
            precision=str(values["precision"]),
            table=StepTable.from_dict(values["table"]) if values["table"] else None,
            islands=tuple(values["islands"]),
            opset=int(values["opset"]),
            created=str(values["created"]),
            versions=dict(values["versions"]),
            source_sha256=str(values["source_sha256"]),
            graphs=tuple(str(name) for name in values["graphs"]),
            files={
                str(name): {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])}
                for name, file in values["files"].items()
            },
            quantization=dict(values["quantization"]) if "quantization" in values else None,
            tuned=tuple(StepTable.from_dict(table) for table in values.get("tuned", ())),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as error:
        raise ArtefactError(f"{path} is incomplete or damaged: {error!r}") from error
    for name in (*manifest.files, *manifest.graphs):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
            raise ArtefactError(f"{path} names {name!r}, a file outside its folder: refused")
        if (folder / name).is_symlink():
            raise ArtefactError(f"{folder / name} is a link: refused")
        if name not in manifest.files:
            raise ArtefactError(f"{path} lists graph {name!r} without its hash: refused")
    steps = manifest.table.steps if manifest.table else 0
    if (
        manifest.graph not in GRAPHS
        or manifest.precision not in PRECISIONS
        or (steps == 0) != (manifest.graph == "step")
        or (manifest.quantization is None) == (manifest.precision == "int8")
        or len(manifest.graphs) != (steps if manifest.graph == "per-step" else 1)
    ):
        raise ArtefactError(
            f"{path} contradicts itself: {len(manifest.graphs)} graphs and {steps} steps in an "
            f"export of kind {manifest.graph!r} and precision {manifest.precision!r}"
        )
    return manifest
