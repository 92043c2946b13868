"""Which files below a folder are pictures to train on or to judge, and which are left out."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lutdeploy import decoding
from lutdeploy.artefacts.picture_files import manifests
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.sample_folder import EXTRAS
from lutdeploy.errors import UsageError

# Where file managers, network drives and archivers keep pictures of pictures and deleted ones.
SERVICE_FOLDERS = frozenset(
    {
        "@eaDir",
        "@Recycle",
        "@Recently-Snapshot",
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "__MACOSX",
        "__pycache__",
    }
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
NAMED = 4  # names, or endings, that a line about what was left out has

# What is left out, with its plural.
OTHER = ("file of other kinds", "files of other kinds")
HIDDEN = ("hidden or service folder", "hidden or service folders")
HIDDEN_FILE = ("hidden picture", "hidden pictures")
RUN = ("run", "runs")
SAMPLES = ("folder of samples", "folders of samples")
OWN = ("of lutdeploy's own pictures", "of lutdeploy's own pictures")
LINKED = ("linked folder", "linked folders")
CLOSED = ("folder that cannot be opened", "folders that cannot be opened")


@dataclass(frozen=True)
class Found:
    """The pictures below a folder."""

    files: tuple[Path, ...]  # sorted by path
    left_out: Mapping[tuple[str, str], tuple[str, ...]]  # by kind: names below the folder

    def lines(self) -> tuple[str, ...]:
        """What was left out, a line for each kind."""
        return tuple(
            f"{in_words(kind, len(names))} left out ({some(names, by_suffix=kind == OTHER)})"
            for kind, names in self.left_out.items()
        )


def in_words(kind: tuple[str, str], number: int) -> str:
    """A number of things in words."""
    return f"{number} {kind[number != 1]}"


def some(names: Iterable[str], by_suffix: bool = False) -> str:
    """A few of the names; or how many have each ending, the commonest first."""
    if by_suffix:
        endings = Counter(Path(name).suffix.lower() or "no ending" for name in names)
        shown = [f"{ending} {number}" for ending, number in endings.most_common()]
    else:
        shown = list(names)
    return ", ".join(shown[:NAMED]) + (", …" if len(shown) > NAMED else "")


def printable(path: Path) -> str:
    """A path as text that any file and console takes: bytes that are no UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_pictures(folder: Path, option: str = "--data") -> Found:
    """Every picture file below a folder, at least one, sorted by path.

    Left out are hidden and service folders, runs and folders of samples below this one, and the
    pictures that lutdeploy makes about others. ``option`` named the folder, for messages.
    """
    _require_folder(folder, option)
    files: list[Path] = []
    left_out: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    def leave_out(kind: tuple[str, str], path: Path) -> None:
        left_out[kind].append(printable(path.relative_to(folder)))

    def closed(error: OSError) -> None:
        leave_out(CLOSED, Path(error.filename))

    own = _own_pictures(folder)
    for place, folders, names in os.walk(folder, onerror=closed):
        here = Path(place)
        entered = []
        for name in sorted(folders):
            kind = _why_not(here / name, own)
            if kind is None:
                entered.append(name)
            else:
                leave_out(kind, here / name)
        folders[:] = entered
        for name in sorted(names):
            path = here / name
            picture = path.suffix.lower() in decoding.suffixes()
            if name.startswith("."):
                if picture:
                    leave_out(HIDDEN_FILE, path)
            elif path in own:
                leave_out(OWN, path)
            elif picture:
                files.append(path)
            else:
                leave_out(OTHER, path)
    found = Found(tuple(sorted(files)), {kind: tuple(names) for kind, names in left_out.items()})
    if not files:
        hint = f"; {option} names such a folder to use its pictures" if SAMPLES in left_out else ""
        lines = "".join(f"; {line}" for line in found.lines())
        kinds = ", ".join(decoding.formats())
        raise UsageError(f"{folder} holds no image ({kinds}){lines}{hint}")
    return found


def _require_folder(path: Path, option: str) -> None:
    if path.is_dir():
        return
    if path.exists():
        remedy = "; unpack it first" if path.suffix.lower() in ARCHIVES else ""
        raise UsageError(f"{path} is a file, {option} takes a folder of images{remedy}")
    here = "" if path.is_absolute() else f" (a relative path, looked for from {Path.cwd()})"
    raise UsageError(f"{path}: no such folder of images{here}; {option} says where it is now")


def _why_not(folder: Path, own: frozenset[Path]) -> tuple[str, str] | None:
    """The kind of a folder that is not entered."""
    if folder.name.startswith(".") or folder.name in SERVICE_FOLDERS:
        return HIDDEN
    if folder.is_symlink():
        return LINKED
    if folder in own:
        return OWN
    if _is_run(folder):
        return RUN
    return SAMPLES if _holds_samples(folder) else None


def _is_run(folder: Path) -> bool:
    run = Run(folder)
    return run.settings.is_file() or run.model.is_file()


def _holds_samples(folder: Path) -> bool:
    """Whether `lutdeploy sample` filled a folder: others name files manifest.jsonl as well."""
    try:
        with manifests(folder)[0].open("rb") as lines:
            first = json.loads(lines.readline())
        return {"solver", "steps", "seed"} <= set(first)
    except (OSError, IndexError, ValueError, TypeError):
        return False


def _own_pictures(folder: Path) -> frozenset[Path]:
    """What lutdeploy itself puts into a folder that is a run, or that it filled with samples."""
    own: set[Path] = set()
    if _is_run(folder):
        run = Run(folder)
        own |= {run.pictures, run.bench_plot}
    if _holds_samples(folder):
        own |= {folder / name for name in EXTRAS}
    return frozenset(own)
