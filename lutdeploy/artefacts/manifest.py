"""The manifest of an export folder: what was exported, from which model, and every file's hash."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lutdeploy.artefacts import files, foreign
from lutdeploy.artefacts.quantization_record import Quantization
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, LutDeployError
from lutdeploy.schedule import Schedule
from lutdeploy.signature import GRAPHS, PRECISIONS

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


class Manifest(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"schedule": "table"},  # the name it has in the JSON
):
    """What an export folder holds. ``graphs`` are file names in step order."""

    folder: Path  # not in the JSON
    config: ModelConfig
    graph: str
    precision: str
    schedule: Schedule | None
    islands: tuple[str, ...]
    opset: int
    created: str
    versions: dict[str, str]
    source_sha256: str
    graphs: tuple[str, ...]
    files: dict[str, FileRecord]
    quantization: Quantization | None = None  # of an int8 export
    tuned: tuple[Schedule, ...] = ()  # the model's tuned schedules when it was exported

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights_sha256(self) -> str:
        """One hash over every file: the identity of this export."""
        lines = "".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def write(self) -> None:
        """Write it into its folder, atomically."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        folder, schedule = values.pop("folder"), values.pop("schedule")
        for optional in ("quantization", "tuned"):
            if not values[optional]:
                del values[optional]
        record = {"format": MANIFEST_FORMAT, "table": schedule, **values}
        files.write_json(folder / MANIFEST, record)

    def verify(self) -> None:
        """Check every file's size and hash, also where it is a link, as in a cache of downloads."""
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file():
                what = "is a link to nothing" if path.is_symlink() else "is missing"
                raise ArtefactError(f"{path} {what}; export again")
            size = path.stat().st_size
            if size != expected.bytes:
                what = foreign.describe(path) or "is truncated or replaced; export again"
                raise ArtefactError(
                    f"{path} has {size} bytes, its manifest says {expected.bytes}: it {what}"
                )
            digest = files.sha256(path)
            if digest != expected.sha256:
                raise ArtefactError(
                    f"{path} has hash mismatch: sha256 {digest[:12]}…, its manifest says "
                    f"{expected.sha256[:12]}…; export again"
                )

    @contextlib.contextmanager
    def verified(self) -> Iterator[Path]:
        """A folder with the verified files, for a runtime to open.

        It is the export's own, except where files are links, hard or symbolic, which ONNX and
        OpenVINO refuse to read weights through: then it is one of copies, gone after the block.
        """
        self.verify()
        paths = [self.folder / name for name in self.files]
        if not any(path.is_symlink() or path.stat().st_nlink > 1 for path in paths):
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="lutdeploy-") as scratch:
            for path in paths:
                shutil.copyfile(path, Path(scratch) / path.name)
            yield Path(scratch)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest; the files are checked by :meth:`Manifest.verify`.

    Raises:
        ArtefactError: unreadable, incomplete, or naming a file outside its folder.
    """
    path = folder / MANIFEST
    values = files.read_json(path)
    try:
        if (found := values.pop("format")) != MANIFEST_FORMAT:
            raise ArtefactError(
                f"{path} has format {found!r}, this version reads {MANIFEST_FORMAT}; export again"
            )
        values |= {"config": ModelConfig.from_dict(values["config"]), "folder": folder}
        manifest = msgspec.convert(values, Manifest)
    except ArtefactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, LutDeployError) as error:
        raise ArtefactError(f"{path} is incomplete or damaged: {error}; export again") from error
    for name in (*manifest.files, *manifest.graphs):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
            raise ArtefactError(f"{path} names {name!r}, a file outside its folder: refused")
        if name not in manifest.files:
            raise ArtefactError(f"{path} lists graph {name!r} without its hash: refused")
    steps = manifest.schedule.steps if manifest.schedule else 0
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


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of an export folder but the manifest, by name."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    return {
        name: FileRecord((folder / name).stat().st_size, files.sha256(folder / name))
        for name in names
    }
