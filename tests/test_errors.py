"""What an exception means is decided by its type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lutdeploy.artefacts import picture_files
from lutdeploy.cli import cli
from lutdeploy.errors import BackendError, needing, ran_out_of_memory
from lutdeploy.training.data import load_folder

TOO_LARGE = 2**50  # bytes


def accelerator_error(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error")
    vars(error)["error_code"] = code  # as torch sets it
    return error


def raised_by_torch() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_LARGE, dtype=torch.uint8)
    return caught.value


def raised_by_numpy() -> Exception:
    with pytest.raises(MemoryError) as caught:
        np.empty(TOO_LARGE, np.uint8)
    return caught.value


def test_memory_ran_out_by_the_type_of_what_says_so() -> None:
    for error in (
        MemoryError(),
        raised_by_numpy(),
        raised_by_torch(),
        torch.OutOfMemoryError("Allocation on device"),
        accelerator_error(2),
    ):
        assert ran_out_of_memory(error), repr(error)
    for error in (
        RuntimeError("g++: out of memory, cannot allocate; DefaultCPUAllocator"),
        type("CompilerError", (RuntimeError,), {})(str(raised_by_torch())),
        OSError("cannot allocate memory"),
        accelerator_error(700),
    ):
        assert not ran_out_of_memory(error), repr(error)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full")])
def test_a_command_says_that_memory_ran_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("lutdeploy.engines.doctor.examine", fails)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert result.stderr == "error: out of memory; try a smaller --batch\n"


def test_a_command_takes_no_words_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("fatal error: cannot allocate memory")

    def fails() -> None:
        raise error

    monkeypatch.setattr("lutdeploy.engines.doctor.examine", fails)
    assert CliRunner().invoke(cli, ["doctor"]).exception is error, "a bug, with its traceback"


def test_pictures_are_not_damaged_where_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise MemoryError

    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(b"")
    monkeypatch.setattr("lutdeploy.training.data.decode", fails)
    with pytest.raises(MemoryError):
        load_folder(tmp_path, 8)
    monkeypatch.setattr("lutdeploy.images.decode_png", fails)
    monkeypatch.setattr(picture_files, "_npz_images", fails)
    (tmp_path / "pictures.npz").write_bytes(b"")
    with pytest.raises(MemoryError):
        list(picture_files.pictures_in(tmp_path / "pictures.npz"))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ModuleNotFoundError("No module named 'torch._C'", name="torch._C"), "is not installed"),
        (ImportError("libgomp.so.1: no such file\n…", name="torch"), "does not load here (libgomp"),
    ],
)
def test_a_package_that_is_missing_or_broken_is_named(error: ImportError, state: str) -> None:
    with pytest.raises(BackendError, match=r": pip install 'lutdeploy\[train\]'$") as caught:
        with needing("this"):
            raise error
    assert str(caught.value).startswith(f"this needs PyTorch, which {state}")


def test_an_import_of_our_own_that_fails_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("cannot import name 'examine'", name="lutdeploy.engines.doctor")

    def fails() -> None:
        raise error

    monkeypatch.setattr("lutdeploy.engines.doctor.examine", fails)
    assert CliRunner().invoke(cli, ["doctor"]).exception is error
