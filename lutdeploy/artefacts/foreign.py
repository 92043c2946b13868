"""What a file is that is not what its name promises: lost on its way here, or of another kind."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from lutdeploy.errors import ArtefactError

HEAD = 1024  # bytes that tell
TEXT_SHOWN = 60
TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of torch.save before it wrote zip files
ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}
OTHERS = {b"\x89HDF\r\n": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF file"}


def unreadable(path: Path, error: Exception) -> ArtefactError:
    """Why a file of weights cannot be read, and what to do."""
    what = describe(path)
    if what is None:
        # torch advises to trust the file before it says what is wrong.
        told = re.sub(r"(?s).*WeightsUnpickler error:", "", str(error)).strip()
        reason = told.partition("\n")[0].removesuffix(".")[:120]
        why = f" ({reason})" if reason else ""
        what = f"is damaged or no file of weights{why}; get the file again"
    return ArtefactError(f"{path} {what}")


def describe(path: Path) -> str | None:
    """What the file is and what to do, to follow its name in a sentence.

    None where nothing tells it from a damaged file of the right kind.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "is empty: its download or copy did not finish; get it again"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d{1,15})$", head, re.MULTILINE)
        large = f" of {int(size[1]) / 1e6:.1f} MB" if size else ""
        return f"is a Git LFS pointer to a file{large}; `git lfs pull` in its folder gets that file"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml)\b", head, re.IGNORECASE):
        return "is a web page, not the file that its link promised; download the file itself"
    for start, name in ARCHIVES.items():
        if head.startswith(start):
            return f"is a {name} archive; unpack it first"
    for start, name in OTHERS.items():
        if head.startswith(start):
            return f"is {name}, which holds no weights that lutdeploy reads"
    if head.startswith(b"\x80") and TORCH_MAGIC not in head[:16]:
        return "is a pickle that torch.save did not write; torch.save(state_dict, FILE) writes one"
    if head.startswith(b"PK\x03\x04"):
        return _describe_zip(path)
    if head[8:9] == b"{":
        return _describe_safetensors(path)
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c in "\t\r\n" for c in text):
        shown = " ".join(text.split())[:TEXT_SHOWN]
        return f"is text that begins with {shown!r}, no file of weights; get the file again"
    return None


def is_compressed_zip(path: Path) -> bool:
    """Whether a zip file has a part that is not stored as it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _describe_zip(path: Path) -> str | None:
    """The same for a file that begins as a zip file, which those of torch.save are."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "is cut off or damaged: a zip file without its end; download or copy it again"
    parts = {name.partition("/")[2] for name in names}
    if "constants.pkl" in parts:
        return "is a TorchScript program; save the weights: torch.save(model.state_dict(), FILE)"
    if "data.pkl" in parts:
        return None
    return f"is a zip file without weights of torch.save ({', '.join(names[:3])}); unpack it first"


def _describe_safetensors(path: Path) -> str | None:
    """The same for a file that begins as a safetensors file: eight bytes of length, then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < size else b""
    if not header:
        return f"is cut off: it has {size} bytes, its header alone {length}; get it again"
    try:
        parts = json.loads(header).items()
        end = max(int(part["data_offsets"][1]) for name, part in parts if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    whole = 8 + length + end
    return f"is cut off: it has {size} of {whole} bytes; get it again" if size < whole else None
