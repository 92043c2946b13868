"""Folders that `lutdeploy package` writes: each lists its files, and only those are replaced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.errors import ArtefactError, UsageError


def require_ours(out: Path, record: str) -> None:
    """Refuse a folder with anything in it that :func:`write_folder` did not write.

    Args:
        out: the folder; it need not exist.
        record: the name of the file in it that lists the others.

    Raises:
        UsageError: names what is in the way.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; --out names a folder")
    ours: set[str] = set()
    if (out / record).is_file():
        with contextlib.suppress(ArtefactError, KeyError, TypeError):
            ours = set(files.read_json(out / record)["contents"])
    there = (path.relative_to(out) for path in out.rglob("*") if not path.is_dir())
    foreign = [path for path in there if str(_source(path)) not in ours]
    if foreign:
        told = min(foreign, key=lambda path: (path.name.startswith("."), str(path)))
        raise UsageError(
            f"{out} holds {told}, which this command did not make; choose another --out"
        )


def _source(path: Path) -> Path:
    """The file that Python compiled into ``path``, such as a server's; else ``path`` itself."""
    if path.parent.name != "__pycache__":
        return path
    return path.parent.parent / f"{path.name.partition('.')[0]}.py"


def write_folder(
    out: Path, record: str, facts: Mapping[str, Any], contents: Mapping[str, bytes]
) -> None:
    """Write a package, in the place of an earlier one.

    Args:
        out: the folder.
        record: the name of the file that says what this is and lists all files.
        facts: what it says.
        contents: the other files by their paths in the folder.

    Raises:
        UsageError: as :func:`require_ours`; another process writes it; it cannot be written.
    """
    out = Path(os.path.abspath(out))
    require_ours(out, record)
    files.output_folder(out.parent)
    lock = f".{out.name}-lock"  # beside it: whoever serves the folder should not see it
    with files.lock(out.parent, "`lutdeploy package`", name=lock):
        try:
            with files.staged(out) as stage:
                for name, data in contents.items():
                    files.write_atomic(stage / name, data)
                files.write_json(stage / record, {**facts, "contents": sorted([*contents, record])})
        finally:
            (out.parent / lock).unlink(missing_ok=True)
