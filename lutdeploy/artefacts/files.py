"""How files come to disk and are read back: atomic writes, locks, staged folders, hashes.

Every file is written beside its place and renamed into it, so that a reader sees a whole
file or none, whenever a writer is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lutdeploy.errors import ArtefactError, LutDeployError, UsageError

T = TypeVar("T")

# What decoders raise: msgspec's errors are ValueErrors, and text may be nested too deep.
BAD_JSON = (ValueError, RecursionError)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to disk, rename it over ``path``.

    Raises:
        OSError: as the system says (a full disk, no permission); ``path`` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that is read-only refuses even this
            temporary.unlink(missing_ok=True)
        _name(error, path, temporary)
        raise


def open_append(path: Path) -> io.FileIO:
    """Open a file to write at its end, without a buffer.

    Where it is a link, symbolic or hard (as `cp -al` makes them), it first becomes a file of its
    own: what is appended in one folder does not grow in another.
    """
    if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
        write_atomic(path, path.read_bytes())
    return path.open("ab", buffering=0)


def _beside(path: Path, prefix: str = ".") -> Path:
    """A new name in the folder of ``path``. What is made there gets the mode that the umask says.

    ``tempfile`` would make it private, and only changing the process's umask tells what it is.
    """
    return path.with_name(f"{prefix}{path.name}.{secrets.token_hex(8)}")


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


def _name(error: BaseException, path: Path, temporary: Path | None = None) -> None:
    """Name the file that a failed write was for; a full disk, for one, names none."""
    if isinstance(error, OSError) and error.filename in (None, str(temporary)):
        error.filename = str(path)


def write_json(path: Path, value: Any) -> None:
    """Write a record, or plain JSON values, as readable JSON, atomically."""
    import msgspec

    try:
        text = msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=1)
    except UnicodeEncodeError:  # a file's name whose bytes are no text: Python's JSON escapes them
        text = json.dumps(msgspec.to_builtins(value, enc_hook=_plain), indent=1).encode()
    write_atomic(path, text + b"\n")


def _plain(value: Any) -> Any:
    """Text and numbers of other types, such as NumPy's, as Python's own."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in a JSON file")


def read_record(path: Path, kind: type[T], remedy: str) -> T:
    """Read a JSON file as a typed record.

    Args:
        path: the file.
        kind: a frozen dataclass or msgspec.Struct; its field types are checked.
        remedy: what to do about a damaged file, for the message: "export again".

    Raises:
        ArtefactError: missing, unreadable, or with a missing, unknown or misshapen field.
    """
    import msgspec

    try:
        data = path.read_bytes()
        if b"\\udc" in data:  # see write_json; msgspec does not read these escapes
            return msgspec.convert(json.loads(data), type=kind)
        return msgspec.json.decode(data, type=kind)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing; {remedy}") from error
    except (OSError, *BAD_JSON, LutDeployError) as error:
        raise ArtefactError(f"{path} is damaged or truncated: {error}; {remedy}") from error


def read_json(path: Path) -> Any:
    """Read JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing") from error
    except (OSError, *BAD_JSON) as error:
        raise ArtefactError(f"{path} is unreadable or truncated: {error}") from error


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output_folder(path: Path) -> None:
    """Make the folder that --out names, where there is none."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out names a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror}; choose another --out") from error
    require_writable(path, "choose another --out")


def require_writable(folder: Path, remedy: str = "work on a copy of it elsewhere") -> None:
    """Refuse a folder, there or still to be made, in which nothing can be written."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{there} is not writable; {remedy}")


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
    patience: float = 0,
) -> Iterator[None]:
    """Hold a folder for one process; released by the system however the process ends.

    Args:
        folder: made if it is not there.
        what: the command that holds it, for messages.
        on_wait: told before waiting for another process; None refuses instead.
        name: of the lock's file, for commands that do not shut each other out.
        patience: seconds to wait for another process before that.

    Raises:
        UsageError: another process holds it, and ``on_wait`` is None; or it is not writable.
    """
    import filelock

    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name).is_symlink():  # of a cache of downloads; filelock follows none
        (folder / name).unlink(missing_ok=True)
    held = filelock.FileLock(folder / name)
    try:
        held.acquire(timeout=patience)
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
    stage = _beside(target)
    stage.mkdir()
    try:
        yield stage
        if target.exists():
            old = _beside(target, ".old-")
            old.mkdir()
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
