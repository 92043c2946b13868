"""Checkpoints as training scripts save them, and files that are none."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lutdeploy.artefacts.checkpoint import import_file, load_model, save_author_file, save_model
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.state_dicts import read_state_dict
from lutdeploy.model import LutTransformer
from tests.command import fail, succeed
from tests.conftest import golden_model, read_golden

State = dict[str, Tensor]


class Original(nn.Module):
    """A module whose state dict has the author's keys, for PyTorch's own wrappers."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(name, nn.Parameter(value.clone()))


@pytest.fixture
def state() -> State:
    return dict(read_golden("static-tanh-64").state)


def same(model: LutTransformer, scale: float = 1.0) -> None:
    """The golden model, its weights times ``scale``."""
    expected = golden_model("static-tanh-64").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key] * scale), key


def compiled(module: nn.Module) -> nn.Module:
    """Not compiled before its first call, which never comes."""
    wrapped: Any = torch.compile(module)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "data parallel": (lambda s: nn.DataParallel(Original(s)).state_dict(), "module."),
    "compiled": (lambda s: compiled(Original(s)).state_dict(), "_orig_mod."),
    "both": (
        lambda s: compiled(nn.DataParallel(Original(s))).state_dict(),
        "_orig_mod.module.",
    ),
    "the other way": (
        lambda s: nn.DataParallel(compiled(Original(s))).state_dict(),
        "module._orig_mod.",
    ),
    "averaged": (lambda s: AveragedModel(Original(s)).state_dict(), "module."),
    "averaged, compiled": (
        lambda s: compiled(AveragedModel(Original(s))).state_dict(),
        "_orig_mod.module.",
    ),
    "a part compiled": (
        lambda s: {k.replace("backbone.", "backbone._orig_mod."): v for k, v in s.items()},
        "_orig_mod.",
    ),
    "in a larger model": (lambda s: {**prefixed("net.", s), "other.weight": s["lut"]}, "net."),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_prefixes_are_taken_off_and_said(how: str, state: State, tmp_path: Path) -> None:
    wrap, prefix = WRAPPED[how]
    wrapped = wrap(state)
    assert any(key.startswith(prefix) or f".{prefix}" in key for key in wrapped)
    torch.save(wrapped, tmp_path / "x.pth")
    result = succeed("import", tmp_path / "x.pth", "--heads", 4, "--out", tmp_path / "run")
    assert f"prefix taken off: {prefix}\n" in result.stderr
    for left in {"n_averaged", "_orig_mod.n_averaged", "other.weight"} & set(wrapped):
        assert f"left out: {left}\n" in result.stderr
    same(load_model(Run(tmp_path / "run").model))


def test_the_average_is_preferred_and_key_chooses(state: State, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    half = {key: value / 2 for key, value in state.items()}
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    beside = {"step": 3, "optimizer": optimizer.state_dict()}
    averaged = AveragedModel(Original(half)).state_dict()
    flat = {**prefixed("net.", state), **prefixed("net.ema.", half)}
    torch.save(flat, path)
    same(import_file(path, heads=4).model, 0.5)
    same(import_file(path, "net", heads=4).model)
    for name, ema in (("ema", half), ("model_ema", prefixed("module.", half)), ("avg2", averaged)):
        torch.save({"model": state, name: ema, **beside}, path)
        command = ("import", path, "--heads", 4, "--out", tmp_path / "run", "--overwrite")
        said = succeed(*command).stderr
        assert f"state dicts: 'model', '{name}'; taken: '{name}' (the average" in said
        same(load_model(Run(tmp_path / "run").model), 0.5)
        said = succeed(*command, "--key", "model").stderr
        assert f"state dicts: 'model', '{name}'; taken: 'model' (--key)" in said
        same(load_model(Run(tmp_path / "run").model))
    line = fail(2, *command, "--key", "schema")
    assert "x.pth holds no state dict 'schema'; --key takes one of 'model', 'avg2'" in line


def test_a_key_with_and_without_its_wrapper(state: State, tmp_path: Path) -> None:
    torch.save({**state, "backbone._orig_mod.6.norm1.bias": state["lut"]}, tmp_path / "x.pth")
    line = fail(1, "import", tmp_path / "x.pth", "--out", tmp_path / "run")
    assert "holds backbone.6.norm1.bias with and without a wrapper" in line


def test_nothing_is_guessed_between_equals(state: State, tmp_path: Path) -> None:
    for names in (("generator", "schema"), ("ema-0.99", "ema-0.999")):
        torch.save({"both": dict.fromkeys(names, state)}, tmp_path / "x.pth")
        line = fail(2, "import", tmp_path / "x.pth", "--out", tmp_path / "run")
        listed = ", ".join(f"'both.{name}'" for name in names)
        assert f"x.pth holds several state dicts; --key takes one of {listed}" in line


@pytest.mark.parametrize("zipped", [True, False])
def test_what_scripts_save_beside_weights_is_ignored(
    zipped: bool, state: State, tmp_path: Path
) -> None:
    beside = {
        "step": 3,
        "loss": np.float64(0.25),
        "best": np.float32(0.5),
        "done": np.bool_(False),
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=np.float64(1e-3), data=Path("faces")),
        "lr": torch.tensor(1e-3),
    }
    for value in ({"model": state, **beside}, {**state, **beside, "lr": 1e-3}):
        torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        same(import_file(tmp_path / "x.pth", heads=4).model)


class Trap:
    """Unpickling this calls NumPy's own constructor of arrays."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((1 << 40,), np.dtype("f8"))


def test_nothing_of_what_is_ignored_is_run(state: State, tmp_path: Path) -> None:
    """Eight terabytes would not be there."""
    torch.save({"model": state, "trap": Trap()}, tmp_path / "x.pth")
    same(import_file(tmp_path / "x.pth", heads=4).model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "x.pth")
    found = import_file(tmp_path / "x.pth", heads=4).model.state_dict()
    for key, expected in golden_model("static-tanh-64").state_dict().items():
        assert torch.equal(found[key], expected.to(dtype).float()), key


def test_tensors_saved_on_a_gpu(state: State, tmp_path: Path) -> None:
    """The pickle names the device that each tensor was on."""
    torch.save(state, tmp_path / "cpu.pth")
    changed = 0
    with (
        zipfile.ZipFile(tmp_path / "cpu.pth") as source,
        zipfile.ZipFile(tmp_path / "gpu.pth", "w") as target,
    ):
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                changed = data.count(b"X\x03\0\0\0cpu")
                data = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:1")
            target.writestr(name, data)
    assert changed
    same(import_file(tmp_path / "gpu.pth", heads=4).model)


# What no state dict tells


def test_files_of_ours_tell_what_the_shapes_do_not(preset: str, tmp_path: Path) -> None:
    golden = read_golden(preset)
    model = golden_model(preset)
    save_author_file(model, tmp_path / "a.pth")
    moved = tmp_path / "sent by mail.pth"
    (tmp_path / "a.pth").rename(moved)
    save_model(model, tmp_path / "m.safetensors")
    for path in (moved, tmp_path / "m.safetensors"):
        found = import_file(path)
        assert (found.model.config, found.assumed) == (golden.config, ())
        with pytest.raises(Exception, match="of a model with image_size 64, which it says itself"):
            import_file(path, image_size=32)
    theirs = Original(golden.state)
    theirs.load_state_dict(torch.load(moved, weights_only=True), strict=True)


def test_what_is_assumed_is_a_warning(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pth")
    command = ("import", tmp_path / "x.pth", "--out", tmp_path / "run", "--overwrite")
    said = succeed(*command).stderr
    assert "warning: heads 8, weights tanh, image_size 64: assumed, since x.pth does not" in said
    said = succeed(*command, "--heads", 4).stderr
    assert "warning: weights tanh, image_size 64: assumed" in said
    told = ("--heads", 4, "--weights", "softmax", "--image-size", 32)
    assert "warning: " not in succeed(*command, *told).stderr
    config = load_model(Run(tmp_path / "run").model).config
    assert (config.heads, config.weights, config.image_size) == (4, "softmax", 32)


def test_weights_saved_again_without_metadata(preset: str, tmp_path: Path) -> None:
    save_model(golden_model(preset), tmp_path / "m.safetensors")
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "again.safetensors")
    line = fail(1, "sample", tmp_path / "again.safetensors", "--out", tmp_path / "s")
    assert "saved again without; `lutdeploy import` reads its weights" in line
    save_file(read_golden(preset).state, tmp_path / "author.safetensors")
    expected = golden_model(preset).state_dict()
    for name in ("again", "author"):
        found = import_file(tmp_path / f"{name}.safetensors", heads=4)
        assert found.model.config == read_golden(preset).config
        assert found.assumed == ("weights", "image_size")
        for key, value in found.model.state_dict().items():
            assert torch.equal(value, expected[key]), key


# Files that are no checkpoints


def zipped(name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def legacy(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FOREIGN: dict[str, tuple[Callable[[State], bytes], str]] = {
    "pointer": (
        lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 103300000\n",
        "is a Git LFS pointer to a file of 103.3 MB; `git lfs pull` in its folder gets that file",
    ),
    "page": (lambda s: b"\n<!DOCTYPE html>\n<html><body>Sign in", "is a web page, not the file"),
    "refusal": (lambda s: b'{"error": "not found"}', 'is text that begins with \'{"error": "not'),
    "empty": (lambda s: b"", "is empty: its download or copy did not finish; get it again"),
    "zip": (lambda s: zipped("w/a.pth", b"a"), "without weights of torch.save (w/a.pth); unpack"),
    "compressed": (
        lambda s: zipped("w/a.pth", bytes(99), zipfile.ZIP_DEFLATED),
        "is a zip file without weights of torch.save (w/a.pth); unpack it first",
    ),
    "gzip": (lambda s: gzip.compress(b"weights"), "is a gzip archive; unpack it first"),
    "pickle": (lambda s: pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
    "program": (lambda s: zipped("m/constants.pkl", b""), "is a TorchScript program; save the"),
    "noise": (lambda s: bytes(range(255, 0, -1)), "is damaged or no file of weights"),
    "cut, old format": (lambda s: legacy(s)[:-9], "is damaged or no file of weights (unexpected"),
    "array": (lambda s: b"\x93NUMPY\x01\x00v\x00{'descr'", "is a NumPy array, which holds no"),
    "cut safetensors": (lambda s: b"\xff\0\0\0\0\0\0\0{", "is cut off: it has 9 bytes, its header"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_no_checkpoints(kind: str, state: State, tmp_path: Path) -> None:
    make, words = FOREIGN[kind]
    path = tmp_path / "author.pth"
    path.write_bytes(make(state))
    line = fail(1, "import", path, "--out", tmp_path / "run")
    assert f"author.pth {words}" in line or words in line
    for alarming in ("refused", "malicious", "attack", "trust", "unsafe"):
        assert alarming not in line
    assert not (tmp_path / "run").exists()


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    """It would take a thousand times its size in memory."""
    torch.save({"backbone.1.weight": torch.zeros(1 << 22)}, tmp_path / "large.pth")
    with (
        zipfile.ZipFile(tmp_path / "large.pth") as source,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert (tmp_path / "x.pth").stat().st_size < 1 << 16
    line = fail(1, "import", tmp_path / "x.pth", "--out", tmp_path / "run")
    assert "x.pth is a compressed zip file, which torch.save never writes" in line


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert "is a folder; name a file in it" in fail(2, "import", tmp_path, "--out", tmp_path / "r")


def test_a_dict_that_holds_itself(state: State, tmp_path: Path) -> None:
    knot: dict[str, Any] = {"model": state}
    knot["again"] = knot
    torch.save(knot, tmp_path / "x.pth")
    with pytest.raises(Exception, match="holds several state dicts"):
        read_state_dict(tmp_path / "x.pth")
    same(import_file(tmp_path / "x.pth", "model", heads=4).model)
