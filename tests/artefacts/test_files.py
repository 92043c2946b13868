"""Files written beside their place and renamed into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lutdeploy.artefacts import files

if os.name != "posix":
    pytest.skip("modes as POSIX has them", allow_module_level=True)


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o026)
    yield 0o026
    os.umask(before)


def test_threads_that_write_leave_the_umask_alone(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask belongs to the whole process, where other threads make files meanwhile."""

    def write(name: str) -> None:
        for _ in range(20):
            files.write_atomic(tmp_path / name, name.encode())
            with files.staged(tmp_path / f"{name}-folder") as stage:
                (stage / "file").touch()

    def refuse(mask: int) -> int:
        raise AssertionError("the umask of the process was changed")

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(os, "umask", refuse)
        list(pool.map(write, ("one", "other")))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("one", "one-folder", "other", "other-folder")
    }
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask
