"""Models on the Hugging Face Hub: hf://OWNER/NAME[@REVISION], and its cache of downloads.

What `lutdeploy package hub` writes is a run folder, so that a download of it is one. The cache
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache) holds it as
``models--OWNER--NAME/snapshots/COMMIT``, whose files are links to ``blobs``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lutdeploy import __version__
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import MODEL, Run, tuned_steps_file
from lutdeploy.errors import (
    ArtefactError,
    BackendError,
    UsageError,
    first_line,
    needing,
    ran_out_of_memory,
)

CONFIG = "config.json"  # the model's config, and the library that reads it
LIBRARY = "lutdeploy"
# A Path has one slash in the place of two.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^@]+))?")
_SCHEME = "hf:/"


def is_address(path: Path) -> bool:
    """Whether a path that a user gave is an address on the Hub."""
    return path.as_posix().startswith(_SCHEME)


def download(address: Path, note: Callable[[str], None]) -> Path:
    """The run folder of an address, in the cache of downloads; fetched where it is not there.

    Args:
        address: hf://OWNER/NAME[@REVISION], also with a Path's single slash.
        note: told which commit it is, and where.

    Raises:
        UsageError: no such address, repository or revision.
        BackendError: huggingface_hub is not installed, or the Hub cannot be reached.
        ArtefactError: the repository holds no model of lutdeploy.
    """
    match = _ADDRESS.fullmatch(address.as_posix())
    if match is None:
        asked = f"hf://{address.as_posix().removeprefix(_SCHEME).lstrip('/')}"
        raise UsageError(f"{asked}: an address on the Hub is hf://OWNER/NAME or …@REVISION")
    repo, revision = match["repo"], match["revision"]
    shown = f"hf://{repo}" + (f"@{revision}" if revision else "")
    with needing(shown):
        import huggingface_hub as library  # noqa: F401
    # The config alone first: whatever else is in a repository that is none of ours stays there.
    folder = _snapshot(shown, repo, revision, [CONFIG])
    config = folder / CONFIG
    told = files.read_json(config) if config.is_file() else None
    if not isinstance(told, dict) or told.get("library_name") != LIBRARY:
        raise ArtefactError(
            f"{shown} has no {CONFIG} of lutdeploy: it is no model that `lutdeploy package hub` "
            "packaged"
        )
    run = Run(folder)
    kept = (run.exports_folder, run.verdicts)
    patterns = [CONFIG, MODEL, tuned_steps_file(run.model).name, *(f"{f.name}/*" for f in kept)]
    note(f"hub: {shown} at commit {folder.name[:12]}, {folder}")
    return _snapshot(shown, repo, folder.name, patterns)


def _snapshot(shown: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """A bar on a terminal alone, and none for the one small file that comes first."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options["disable"] = True if patterns == [CONFIG] else None  # None: by the stream
            super().__init__(*arguments, **options)

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                library_name=LIBRARY,
                library_version=__version__,
                tqdm_class=Bar,
            )
        )
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{shown} asks for its terms to be accepted, on its page, and for `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{shown}: no such repository, or a private one for which `hf auth login` is needed"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{shown}: the repository has no such revision") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{shown}: {first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        raise BackendError(
            f"{shown} is not, or not whole, in the cache of downloads, and the Hub cannot be "
            "reached (no network, or HF_HUB_OFFLINE is set)"
        ) from error
    except Exception as error:  # of its HTTP library, which differs from version to version
        if ran_out_of_memory(error):
            raise
        raise BackendError(f"{shown} could not be downloaded: {first_line(error)}") from error


def snapshot_name(folder: Path) -> str | None:
    """NAME, where a folder is a download in the Hub's cache; None elsewhere."""
    place = Path(os.path.abspath(folder))
    kind, *names = place.parent.parent.name.split("--")
    if place.parent.name != "snapshots" or kind != "models" or not names:
        return None
    return names[-1]
