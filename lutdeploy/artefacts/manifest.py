"""The manifest of an export folder: what was exported, from which model, and every file's hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.schedule import Schedule
from lutdeploy.signature import GRAPHS, PRECISIONS

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an export folder holds. ``graphs`` are file names in step order."""

    folder: Path
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
    files: dict[str, dict[str, Any]]
    quantization: dict[str, Any] | None = None  # of an int8 export: engines/export/int8.py
    tuned: tuple[Schedule, ...] = ()  # the model's, as steps.json had them

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
            "table": self.schedule.to_dict() if self.schedule else None,
            "islands": list(self.islands),
            "opset": self.opset,
            "created": self.created,
            "versions": self.versions,
            "source_sha256": self.source_sha256,
            "graphs": list(self.graphs),
            "files": self.files,
            **quantization,
            **({"tuned": [schedule.to_dict() for schedule in self.tuned]} if self.tuned else {}),
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
            digest = files.sha256(path)
            if digest != expected["sha256"]:
                raise ArtefactError(
                    f"{path} has hash mismatch: sha256 {digest[:12]}…, its manifest says "
                    f"{expected['sha256'][:12]}…; export again"
                )


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest; the files are checked by :meth:`Manifest.verify`.

    Raises:
        ArtefactError: unreadable, incomplete, or naming a file outside its folder.
    """
    path = folder / MANIFEST
    values = files.read_json(path)
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
            schedule=Schedule.from_dict(values["table"]) if values["table"] else None,
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
            tuned=tuple(Schedule.from_dict(schedule) for schedule in values.get("tuned", ())),
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


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name, size and hash of every file of an export folder but the manifest."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        for name in names
    }
