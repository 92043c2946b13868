"""Bad input: one line says what was wrong and what to do; nothing already made is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import save_author_file
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.metadata import METADATA_KEY, read_metadata
from lutdeploy.artefacts.run import Run
from tests.command import fail, succeed
from tests.conftest import golden_model

Runs = Callable[[str], Run]
Exports = Callable[..., Path]

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.fixture
def model_run(tmp_path: Path, golden_runs: Runs) -> Path:
    """A run of the test's own, without exports."""
    made = Run(tmp_path / "cats")
    made.path.mkdir()
    shutil.copy(golden_runs("static-tanh-64").model, made.model)
    return made.path


@pytest.fixture
def export_run(model_run: Path, exported: Exports) -> Path:
    """A run of the test's own, with a step export."""
    shutil.copytree(exported(), Run(model_run).export_folder("step-fp32"))
    return model_run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with two good pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("one.png", "two.jpg"):
        Image.effect_noise((80, 70), 50).convert("RGB").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was trained for one step, and its pictures."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = folder / "pictures"
    pictures.mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64), (80 * k, 0, 0)).save(pictures / f"{k}.png")
    succeed(*train(pictures, folder / "cats"))
    return folder / "cats", pictures


def train(data: object, out: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a training run of one small step; ``more`` overrides them."""
    small = ("--size", "tiny", "--steps", 1, "--batch", 2)
    return ("train", "--data", data, "--out", out, *small, *more)


def sample(run: Path, out: Path, *more: object) -> tuple[object, ...]:
    """Arguments to sample two images in two steps; ``more`` overrides them."""
    return ("sample", run, "--out", out, "-n", 2, "--steps", 2, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Runs


@pytest.mark.parametrize("command", ["sample", "export", "parity", "inspect"])
def test_no_such_run(command: str, model_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_run.parent)
    assert "dogs: no such run; there is none under runs/" in fail(2, command, "dogs")
    model_run.rename("moved")
    Path("runs").mkdir()
    Path("moved").rename("runs/cats")
    assert "dogs: no such run; there are runs/cats" in fail(2, command, "dogs")


@pytest.mark.parametrize("command", ["sample", "export", "parity", "inspect"])
def test_not_a_run(command: str, pictures: Path) -> None:
    assert "holds no model.safetensors: it is no run" in fail(2, command, pictures)
    picture = pictures / "one.png"
    if command == "inspect":  # which reads pictures of `sample`
        assert "does not say what made it" in fail(1, command, picture)
    else:
        assert "neither a run, an export nor a model" in fail(2, command, picture)


def test_run_without_export(model_run: Path) -> None:
    assert "run `lutdeploy export` first" in fail(2, "parity", model_run)
    assert "run `lutdeploy export" in fail(2, "sample", model_run, "--backend", "onnxruntime")


def test_torch_runs_no_export(export_run: Path, tmp_path: Path) -> None:
    export, torch_ = ("--export", "step-fp32"), ("--backend", "torch")
    assert "runs the model" in fail(2, *sample(export_run, tmp_path / "out", *export, *torch_))
    assert "runs the model" in fail(2, "parity", export_run, *export, *torch_)
    assert "runs the model" in fail(2, "parity", export_run, "--fp16", *torch_)


def test_no_export_of_this_name(export_run: Path, tmp_path: Path) -> None:
    line = fail(2, *sample(export_run, tmp_path / "out", "--export", "step-int8"))
    assert "no export 'step-int8'; it has step-fp32" in line


# Training images


def test_data_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert "no such folder of images" in fail(2, *train(tmp_path / "none", tmp_path / "out"))


def test_data_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert "holds no image (PNG, JPEG, " in fail(2, *train(tmp_path, tmp_path / "out"))


def test_no_data(tmp_path: Path) -> None:
    assert "--data is needed" in fail(2, "train", "--out", tmp_path / "out")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and which holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def spoil(folder: Path) -> list[str]:
    """Put one unreadable file of each kind into a folder of pictures; their names."""
    noise = io.BytesIO()
    Image.effect_noise((90, 90), 80).save(noise, "PNG")
    photo = io.BytesIO()
    Image.effect_noise((90, 90), 80).save(photo, "JPEG")
    bad = {
        "text.png": b"this is no picture\n",
        "empty.png": b"",
        "cut.png": noise.getvalue()[: len(noise.getvalue()) // 2],
        "cut.jpg": photo.getvalue()[: len(photo.getvalue()) // 2],
        "zero.png": png_of_size(0, 0),
        "line.png": png_of_size(64, 0),
        "hollow.png": png_of_size(64, 64),
        "page.webp": b"<html></html>",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return list(bad)


def test_unreadable_images_are_skipped_counted_and_named(pictures: Path, tmp_path: Path) -> None:
    names = spoil(pictures)
    result = succeed(*train(pictures, tmp_path / "out"))
    assert f"data: 2 images, {len(names)} unreadable" in result.stderr
    skipped = [line for line in result.stderr.splitlines() if line.startswith("  skipped ")]
    assert len(skipped) == len(names)
    for name in names:
        assert any(f"{os.sep}{name}: " in line for line in skipped)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_no_readable_image_is_left(tmp_path: Path) -> None:
    count = len(spoil(tmp_path))
    line = fail(2, *train(tmp_path, tmp_path / "out"))
    assert f"none of {count} image files is readable; first: " in line


def test_decoder_that_says_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object) -> None:
        raise EOFError

    monkeypatch.setattr("lutdeploy.training.data.decode", decode)
    assert "one.png: EOFError" in fail(2, *train(pictures, tmp_path / "out"))


# Model files


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def spoil_metadata(path: Path) -> None:
    save_file(load_file(path), path, {METADATA_KEY: '{"config": {"width": 64}}'})


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    config, about = read_metadata(path)
    tensors = load_file(path)
    change(tensors)
    metadata = json.dumps({"config": config.to_dict(), "about": about})
    save_file(tensors, path, {METADATA_KEY: metadata})


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 534064\n"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half": (halve, "is cut off: it has 266992 of 533984 bytes; get it again"),
    "empty": (lambda path: path.write_bytes(b""), "is empty: its download or copy did not finish"),
    "text": (lambda path: path.write_text("weights"), "is text that begins with 'weights'"),
    "pointer": (lambda path: path.write_text(LFS_POINTER), "is a Git LFS pointer to a file of 0.5"),
    "noise": (lambda path: path.write_bytes(bytes(range(256))), "is damaged or no file of weights"),
    "torch": (lambda path: torch.save({}, path), "is no safetensors file; try `lutdeploy import`"),
    "saved again": (drop_metadata, "holds no lutdeploy metadata, which a model of lutdeploy has"),
    "metadata": (spoil_metadata, "unreadable lutdeploy metadata: model config with missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["sample", "inspect", "export"])
def test_damaged_model(command: str, damage: str, model_run: Path) -> None:
    spoil, words = DAMAGES[damage]
    spoil(Run(model_run).model)
    line = fail(1, command, model_run)
    assert words in line
    assert "model.safetensors" in line


def test_weights_that_do_not_fit_the_config(model_run: Path, tmp_path: Path) -> None:
    model = Run(model_run).model
    whole = model.read_bytes()
    for change, words in (
        (lambda t: t.update({"head.weight": torch.zeros(64, 32)}), "head.weight has shape [64, 32"),
        (lambda t: t.pop("blocks.1.out.bias"), "key blocks.1.out.bias is missing"),
        (lambda t: t.update({"more": torch.zeros(1)}), "key more is unknown"),
        (
            lambda t: t["lut.entries"].mul_(float("nan")),
            "key lut.entries holds NaN or Inf (12288 of",
        ),
        (lambda t: t["head.bias"][3:4].fill_(float("inf")), "head.bias holds NaN or Inf (1 of 64"),
        (lambda t: t.update({"head.bias": torch.zeros(64).long()}), "key head.bias holds int64, "),
    ):
        model.write_bytes(whole)
        change_weights(model, change)
        line = fail(1, *sample(model_run, tmp_path / "out"))
        assert words in line
        assert fail(1, "inspect", model_run) == line
    assert not (tmp_path / "out").exists()


# The author's checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "author.pth"
    save_author_file(golden_model("static-tanh-64"), path)
    return path


def change_state(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = dict(torch.load(path, weights_only=True))  # without what it says of itself
    change(state)
    torch.save(state, path)


class Malice:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    state = {"lut": torch.zeros(1), "evil": Malice(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    line = fail(1, "import", path, "--out", tmp_path / "run")
    assert "evil.pth holds more than tensors (io.open), which only the code of its script" in line
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [10, 1000, -1000])
def test_truncated_checkpoint(kept: int, checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    line = fail(1, "import", checkpoint, "--out", tmp_path / "run")
    assert "author.pth is cut off or damaged: a zip file without its end" in line


def test_state_dict_of_another_model(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    line = fail(1, "import", tmp_path / "other.pth", "--out", tmp_path / "run")
    assert "other.pth holds no state dict of a LUT model" in line
    assert line.endswith("it holds conv.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("time_mlp.0.bias"), "key time_mlp.0.bias is missing"),
        (lambda s: s.update({"lut": torch.zeros(64, 3, 8, 4)}), "key lut has shape [64, 3, 8, 4]"),
        (lambda s: s.pop("backbone.7.norm2.bias"), "key backbone.7.norm2.bias is missing"),
        (lambda s: s.update({"expand.weight": torch.zeros(0)}), "key expand.weight has shape [0]"),
        (lambda s: s.update({"backbone.9.attn.q.0.bias": torch.zeros(64)}), "backbone.8."),
        (lambda s: s.update({"backbone.99999999.attn.q.0.bias": torch.zeros(64)}), "backbone.8."),
        (lambda s: s.update({"more": torch.zeros(1)}), "key more is unknown"),
        (
            lambda s: s["lut"].mul_(float("nan")),
            "key lut holds NaN or Inf (12288 of 12288 numbers)",
        ),
        (
            lambda s: s["lut"].view(-1)[0].fill_(float("inf")),
            "key lut holds NaN or Inf (1 of 12288 numbers",
        ),
        (lambda s: s.update({k: v.long() for k, v in s.items()}), "holds int64, no floating-point"),
        (lambda s: s.update({"lut": s["lut"].to_sparse()}), "key lut is no plain tensor"),
        (lambda s: s.update({"lut": s["lut"].to("meta")}), "key lut is no plain tensor"),
    ],
)
def test_first_key_that_does_not_fit_is_named(
    change: Callable[[dict[str, torch.Tensor]], object],
    words: str,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    change_state(checkpoint, change)
    assert words in fail(1, "import", checkpoint, "--heads", 4, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {}, {"epoch": 3}, {1: torch.zeros(1)}])
def test_checkpoint_that_is_no_state_dict(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "other.pth")
    line = fail(1, "import", tmp_path / "other.pth", "--out", tmp_path / "run")
    assert "other.pth" in line
    assert "state dict" in line


def test_import_of_no_file(tmp_path: Path) -> None:
    assert "no such file" in fail(2, "import", tmp_path / "none.pth", "--out", tmp_path / "run")


def test_import_with_impossible_heads(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("import", checkpoint, "--heads", 7, "--out", tmp_path / "run")
    line = fail(2, *arguments)
    assert (
        "author.pth is of a model with heads 4, which it says itself; leave out --heads 7" in line
    )
    torch.save(dict(torch.load(checkpoint, weights_only=True)), checkpoint)
    assert "width 64 is not divisible by heads 7; see --heads" in fail(2, *arguments)


def test_import_into_a_run_that_is_trained(checkpoint: Path, model_run: Path) -> None:
    before = Run(model_run).model.read_bytes()
    with files.lock(model_run, "`lutdeploy train`"):
        line = fail(2, "import", checkpoint, "--out", model_run, "--overwrite")
    assert f"{model_run} is in use by another command; wait for it to end" in line
    assert Run(model_run).model.read_bytes() == before


def test_import_into_an_existing_run(checkpoint: Path, model_run: Path) -> None:
    before = contents(model_run)
    arguments = ("import", checkpoint, "--heads", 4, "--out", model_run)
    assert "exists; choose another --out, or --overwrite" in fail(2, *arguments)
    assert contents(model_run) == before
    succeed(*arguments, "--overwrite")
    assert contents(model_run) != before


# Exports


def readers(run: Path) -> list[tuple[object, ...]]:
    """Every command that reads the exports of a run."""
    out = run.parent / "out"
    return [sample(run, out), ("inspect", run), ("parity", run, "--steps", 2)]


def refused(run: Path, *words: str) -> None:
    """Every command that reads the export refuses it in these words, before anything runs."""
    before = contents(run)
    for arguments in readers(run):
        line = fail(1, *arguments)
        for word in words:
            assert word in line
    assert contents(run) == before
    assert not (run.parent / "out").exists()


def edit_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = Run(run).export_folder("step-fp32") / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..\\model", "more/weights.bin", "..", ""]
)
def test_manifest_that_names_a_file_outside_its_folder(name: str, export_run: Path) -> None:
    edit_manifest(export_run, lambda v: v["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(export_run, f"names {name!r}, a file outside its folder: refused")
    edit_manifest(export_run, lambda v: (v["files"].pop(name), v["graphs"].insert(0, name)))
    refused(export_run, f"names {name!r}, a file outside its folder: refused")


def test_link_to_another_file_in_an_export(export_run: Path) -> None:
    weights = Run(export_run).export_folder("step-fp32") / "weights.bin"
    weights.rename(export_run / "elsewhere.bin")
    weights.symlink_to(export_run / "elsewhere.bin")
    succeed("inspect", export_run)
    flip_a_byte(export_run / "elsewhere.bin")
    refused(export_run, "weights.bin has hash mismatch")
    (export_run / "elsewhere.bin").unlink()
    refused(export_run, "weights.bin is a link to nothing")


def test_a_pointer_of_git_lfs_in_an_export(export_run: Path) -> None:
    (Run(export_run).export_folder("step-fp32") / "weights.bin").write_text(LFS_POINTER)
    refused(export_run, "its manifest says", "it is a Git LFS pointer", "`git lfs pull`")


def test_truncated_manifest(export_run: Path) -> None:
    halve(Run(export_run).export_folder("step-fp32") / MANIFEST)
    refused(export_run, "manifest.json is unreadable or truncated")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("graphs"), "incomplete or damaged"),
        (lambda v: v.update(config={**v["config"], "width": 3}), "incomplete or damaged"),
        (lambda v: v["files"]["weights.bin"].update(bytes=float("inf")), "incomplete or damaged"),
        (lambda v: v.update(graphs=[1]), "Expected `str`, got `int` - at `$.graphs[0]`"),
        (lambda v: v.update(graphs=[]), "contradicts itself"),
        (lambda v: v.update(graph="per-step"), "contradicts itself"),
        (lambda v: v.update(graph="spiral"), "contradicts itself"),
        (lambda v: v.update(precision="int8"), "contradicts itself"),
        (lambda v: v.update(format=99), "has format 99"),
        (lambda v: v["files"].pop("step.onnx"), "lists graph 'step.onnx' without its hash"),
    ],
)
def test_manifest_that_contradicts_itself(
    change: Callable[[dict[str, Any]], object], words: str, export_run: Path
) -> None:
    edit_manifest(export_run, change)
    refused(export_run, words)


def test_manifest_that_is_no_object(export_run: Path) -> None:
    (Run(export_run).export_folder("step-fp32") / MANIFEST).write_text("[1, 2]")
    refused(export_run, "manifest.json is incomplete or damaged")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (flip_a_byte, "hash mismatch"),
        (halve, "bytes, its manifest says"),
        (Path.unlink, "is missing; export again"),
    ],
)
@pytest.mark.parametrize("file", ["weights.bin", "step.onnx"])
def test_tampered_export(
    file: str, tamper: Callable[[Path], object], words: str, export_run: Path
) -> None:
    tamper(Run(export_run).export_folder("step-fp32") / file)
    refused(export_run, file, words)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"graph": "per-step"}, "got inputs ['x'], expected ['x', 't', 'a', 'b', 'c', 'x0_prev']"),
        ({"preset": "static-softmax-512"}, "cannot load the graph"),
    ],
)
def test_graph_of_another_model(
    other: dict[str, str],
    words: str,
    export_run: Path,
    exported: Exports,
    capfd: pytest.CaptureFixture[str],
) -> None:
    graph = Run(export_run).export_folder("step-fp32") / "step.onnx"
    foreign = exported(**other)
    shutil.copy(foreign / read_manifest(foreign).graphs[0], graph)
    refused(export_run, "step.onnx has ", "its manifest says")
    told = {"bytes": graph.stat().st_size, "sha256": files.sha256(graph)}
    edit_manifest(export_run, lambda v: v["files"].update({"step.onnx": told}))
    capfd.readouterr()
    for arguments in (command for command in readers(export_run) if command[0] != "inspect"):
        assert words in fail(1, *arguments)
    assert capfd.readouterr().err == ""  # the runtime itself prints nothing either


def test_graph_that_fails_when_it_runs(
    export_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    def run(*arguments: object) -> None:
        raise RuntimeError("Failed to allocate memory\nfor requested buffer")

    monkeypatch.setattr(ort.InferenceSession, "run", run)
    line = fail(1, *sample(export_run, tmp_path / "out"))
    assert "ONNX Runtime failed in step.onnx: Failed to allocate memory" in line


def test_torch_out_of_memory(
    model_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: object) -> None:
        torch.empty(2**50)  # what PyTorch raises when it finds no memory

    monkeypatch.setattr("lutdeploy.model.LutTransformer.forward", forward)
    line = fail(1, *sample(model_run, tmp_path / "out"))
    assert "out of memory; try a smaller --batch" in line


def test_stale_export(export_run: Path, tmp_path: Path) -> None:
    model = Run(export_run).model
    change_weights(model, lambda tensors: tensors["head.bias"].add_(1))
    for arguments in (command for command in readers(export_run) if command[0] != "inspect"):
        line = fail(1, *arguments)
        assert "was exported from another model.safetensors" in line
        assert "export again" in line
    assert "STALE" in succeed("inspect", export_run).stdout
    succeed(*sample(export_run, tmp_path / "out", "--backend", "torch"))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"step-fp32 onnxruntime CPU": 1}'])
def test_damaged_verdicts(text: str, export_run: Path) -> None:
    for path in (Run(export_run).old_verdicts, Run(export_run).verdicts / "0a.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        for arguments in readers(export_run):
            if arguments[0] != "parity":  # which writes a new verdict without reading old ones
                assert f"{path.name} is " in fail(1, *arguments)
        path.unlink()


def test_steps_that_an_export_does_not_hold(model_run: Path, exported: Exports) -> None:
    export = exported(graph="per-step")
    shutil.copytree(export, Run(model_run).export_folder(export.name))
    for arguments in (
        ("sample", model_run, "--steps", 7, "--out", model_run / "out"),
        ("sample", model_run, "--solver", "euler", "--out", model_run / "out"),
        ("parity", model_run, "--shift", 2),
    ):
        assert "this export holds the steps of dpmpp-3m-5, not " in fail(2, *arguments)
    assert not (model_run / "out").exists()


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-n", 0),
        ("--batch", 0),
        ("--steps", 0),
        ("--steps", "many"),
        ("--shift", 0),
        ("--seed", -1),
        ("--seed", 2**64),
        ("--solver", "heun"),
        ("--backend", "tvm"),
        ("--format", "jpg"),
        ("--threads", 0),
        ("--threads", 100_000),
    ],
)
def test_sample_option_out_of_range(
    option: str, value: object, model_run: Path, tmp_path: Path
) -> None:
    line = fail(2, *sample(model_run, tmp_path / "out", option, value))
    assert option in line
    assert str(value) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nan", "shift must be a positive number, not nan"),
        ("inf", "shift must be a positive number, not inf"),
        ("1e20", "shift 1e+20 leaves no time between some of 9 steps"),
    ],
)
def test_impossible_shift(value: str, words: str, model_run: Path, tmp_path: Path) -> None:
    arguments = sample(model_run, tmp_path / "out", "--steps", 9, "--shift", value)
    assert words in fail(2, *arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", 0),
        ("--steps", 0),
        ("--lr", 0),
        ("--ema", 1),
        ("--held-out", 1),
        ("--checkpoint-every", 0),
        ("--preset", "static-relu-9"),
        ("--size", "huge"),
        ("--recipe", "old"),
    ],
)
def test_train_option_out_of_range(
    option: str, value: object, pictures: Path, tmp_path: Path
) -> None:
    line = fail(2, *train(pictures, tmp_path / "out", option, value))
    assert option in line
    assert str(value) in line


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("width", "write FIELD=VALUE"),
        ("width=30", "width 30 is not divisible by heads 4"),
        ("width=wide", "width must be an integer, not 'wide'"),
        ("depth=0", "depth must be at least 1, not 0"),
        ("colour=3", "there is no field 'colour'"),
        ("patch_size=7", "image_size 64 is not divisible by patch_size 7"),
    ],
)
def test_impossible_model(assignment: str, words: str, pictures: Path, tmp_path: Path) -> None:
    assert words in fail(2, *train(pictures, tmp_path / "out", "--set", assignment))


def test_a_mistake_leaves_no_empty_run(pictures: Path, tmp_path: Path) -> None:
    fail(2, *train(pictures, tmp_path / "out", "--set", "dropout=2"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    fail(2, *train(pictures, tmp_path / "mine", "--set", "dropout=2"))
    assert (tmp_path / "mine").is_dir(), "a folder that was there stays"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("dropout=2", "dropout cannot be 2"),
        ("optimizer=sgd", "optimizer cannot be 'sgd'"),
        ("t_std=wide", "t_std cannot be 'wide'"),
        ("ema=[]", "ema cannot be []"),
        ("ema=0.9", "ema cannot be 0.9: expected `array`"),
        ("stem_channels=2", "start copy needs stem_channels of 3 at least, not 2"),
    ],
)
def test_impossible_recipe(assignment: str, words: str, pictures: Path, tmp_path: Path) -> None:
    assert words in fail(2, *train(pictures, tmp_path / "out", "--set", assignment))


def test_learning_rate_that_is_no_number(pictures: Path, tmp_path: Path) -> None:
    assert "lr cannot be nan" in fail(2, *train(pictures, tmp_path / "out", "--lr", "nan"))


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m"])
def test_one_step_is_enough(solver: str, model_run: Path, tmp_path: Path) -> None:
    succeed(*sample(model_run, tmp_path, "--solver", solver, "--steps", 1))
    assert {"000000.png", "000001.png", "grid.png"} <= set(contents(tmp_path))


def test_no_command_shows_help() -> None:
    assert "Commands:" in succeed().stdout


def test_unknown_command_and_option() -> None:
    assert "No such command 'smaple'" in fail(2, "smaple")
    assert "No such option" in fail(2, "sample", "--batches", 3)


# Devices


@no_cuda
def test_no_cuda_for_training(pictures: Path, tmp_path: Path) -> None:
    line = fail(1, *train(pictures, tmp_path / "out", "--device", "cuda"))
    assert "no CUDA device 'cuda' here; torch sees none; see `lutdeploy doctor`" in line


@no_cuda
def test_no_cuda_for_sampling(export_run: Path, tmp_path: Path) -> None:
    arguments = sample(export_run, tmp_path / "out", "--device", "cuda")
    assert "no CUDA device 'cuda' here; torch sees none" in fail(
        1, *arguments, "--backend", "torch"
    )
    line = fail(1, *arguments, "--backend", "onnxruntime")
    assert "CUDAExecutionProvider" in line
    assert "CPUExecutionProvider" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["quantum", "meta"])
def test_no_such_device(device: str, export_run: Path, tmp_path: Path) -> None:
    arguments = sample(export_run, tmp_path / "out", "--device", device)
    no_device = f"'{device}' is no device; write cpu, cuda, cuda:N or mps"
    assert no_device in fail(2, *arguments, "--backend", "torch")
    assert no_device in fail(2, *arguments)  # auto
    line = fail(1, *arguments, "--backend", "onnxruntime")
    assert f"ONNX Runtime has no {device} here; there are " in line


# Folders to write into


def test_out_is_a_file(model_run: Path, pictures: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    for arguments in (
        sample(model_run, out),
        train(pictures, out),
        ("import", checkpoint, "--heads", 4, "--out", out),
    ):
        assert "file is a file; --out names a " in fail(2, *arguments)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("kind", ["below a file", "read only"])
def test_out_that_cannot_be_written(
    kind: str,
    model_run: Path,
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "read only":
        out = tmp_path / "locked"
        out.mkdir(mode=0o500)
        if os.access(out, os.W_OK):  # permissions do not bind root; pretend
            monkeypatch.setattr(os, "access", lambda path, mode: path != out)
    else:
        out = pictures / "one.png" / "out"
    for arguments in (
        sample(model_run, out),
        train(pictures, out),
        ("import", checkpoint, "--heads", 4, "--out", out),
    ):
        line = fail(2, *arguments)
        assert str(out) in line
        assert "choose another --out" in line


def test_sampling_into_pictures_of_other_settings(model_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed(*sample(model_run, out, "--seed", 1))
    before = contents(out)
    line = fail(2, *sample(model_run, out, "--seed", 2, "--steps", 3))
    assert "made with other settings (steps 2 → 3, seed 1 → 2)" in line
    assert "--overwrite" in line
    assert contents(out) == before
    (out / "mine.txt").write_text("kept")
    (out / "7.png").write_bytes(b"somebody's own")
    succeed(*sample(model_run, out, "--seed", 2, "--steps", 3, "-n", 1, "--overwrite"))
    assert (out / "7.png").read_bytes() == b"somebody's own"
    after = contents(out)
    assert after["000000.png"] != before["000000.png"]
    assert "000001.png" not in after  # it was of the other settings
    assert after["mine.txt"] == b"kept"


def test_sampling_beside_foreign_pictures(model_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "000001.png").write_bytes(b"a picture of mine")
    before = contents(out)
    line = fail(2, *sample(model_run, out))
    assert "000001.png but no manifest.jsonl" in line
    assert "choose another --out" in line
    assert {**contents(out), ".lock": b""} == {**before, ".lock": b""}


def test_damaged_picture_is_named(model_run: Path, tmp_path: Path) -> None:
    arguments = sample(model_run, tmp_path / "out")
    succeed(*arguments)
    picture = tmp_path / "out" / "000001.png"
    halve(picture)
    line = fail(1, *arguments)
    assert f"{picture} is damaged; delete it" in line
    picture.unlink()
    succeed(*arguments)


@pytest.mark.parametrize("file_format", ["npz", "webdataset"])
def test_a_damaged_file_of_pictures_is_made_again(
    file_format: str, model_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = sample(model_run, out, "--format", file_format)
    succeed(*arguments)
    before = contents(out)
    (name,) = set(before) - {".lock", "grid.png", "manifest.jsonl"}
    halve(out / name)
    succeed(*arguments)
    assert contents(out) == before
    succeed(*sample(model_run, out, "--overwrite"))
    assert name not in contents(out)


# Training runs


def test_training_into_an_existing_run(trained: tuple[Path, Path]) -> None:
    run, pictures = trained
    before = contents(run)
    line = fail(2, *train(pictures, run))
    assert "already holds a run: --resume continues it, or choose another --out" in line
    assert contents(run) == before


def test_resuming_nothing(pictures: Path, tmp_path: Path) -> None:
    line = fail(2, *train(pictures, tmp_path / "out", "--resume"))
    assert "holds no training run to resume" in line


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--batch", 3), "--batch 3: "),
        (("--lr", 1), "--lr 1.0: "),
        (("--preset", "dynamic-64"), "lut dynamic: "),
        (("--size", "small"), "width 256: "),
        (("--set", "heads=2"), "heads 2: "),
        (("--set", "dropout=0.5"), "dropout 0.5: "),
        (("--ema", 0.5), "--ema "),
    ],
)
def test_resuming_with_other_settings(
    changed: tuple[object, ...], words: str, trained: tuple[Path, Path]
) -> None:
    run, _ = trained
    before = contents(run)
    line = fail(2, "train", "--out", run, "--resume", *changed)
    assert words in line
    assert "was started with" in line
    assert contents(run) == before


def test_resuming_with_other_images(trained: tuple[Path, Path], pictures: Path) -> None:
    run, _ = trained
    before = contents(run)
    line = fail(2, "train", "--out", run, "--resume", "--steps", 2, "--data", pictures)
    assert "A resumed run needs the same files in the same order" in line
    assert contents(run) == before


def test_resuming_with_the_same_command(pictures: Path, tmp_path: Path) -> None:
    arguments = train(pictures, tmp_path / "out", "--set", "width=32", "--set", "weights=softmax")
    succeed(*arguments)
    succeed(*arguments, "--resume", "--steps", 2)
    assert read_metadata(Run(tmp_path / "out").model)[1]["step"] == 2
    settings = Run(tmp_path / "out").settings.read_bytes()
    line = fail(2, *arguments, "--resume", "--steps", 1)
    assert line.endswith(f"--steps 1: {tmp_path / 'out'} has 2 steps already")
    assert Run(tmp_path / "out").settings.read_bytes() == settings


@pytest.mark.parametrize("file", ["training_state", "settings"])
def test_resuming_a_damaged_run(file: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = Run(tmp_path / "copy")
    shutil.copytree(trained[0], run.path)
    damaged: Path = getattr(run, file)
    halve(damaged)
    model = run.model.read_bytes()
    line = fail(1, "train", "--out", run.path, "--resume", "--steps", 2)
    assert damaged.name in line
    assert run.model.read_bytes() == model


def test_lpips_without_torchvision(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    arguments = train(pictures, tmp_path / "out", "--perceptual", "lpips")
    line = fail(1, *arguments)
    assert "pass --perceptual none to train without it" in line
    succeed(*arguments, "--perceptual", "none")
