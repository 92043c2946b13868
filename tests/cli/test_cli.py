"""The daily commands, one after the other, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.picture_files import pictures_in
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.cli import COMMANDS, cli
from lutdeploy.engines.doctor import PROBE
from lutdeploy.sampling import batch_noise
from lutdeploy.training.data import no_progress
from tests.conftest import golden_model, read_golden


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def few_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing all would take longer than the trainings here."""
    few = (3, 8, 0, no_progress, None)
    monkeypatch.setattr("lutdeploy.training.data.draw_set.__defaults__", few)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for a few steps on a folder of small pictures."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "faces").mkdir()
    pixels = images.to_uint8(np.tanh(batch_noise(0, range(12), (3, 16, 16))))
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "faces" / f"{index}.png")
    path = folder / "runs" / "tiny"
    result = run(
        "train",
        "--data",
        folder / "faces",
        "--size",
        "tiny",
        "--steps",
        4,
        "--batch",
        4,
        "--set",
        "image_size=16",
        "--set",
        "depth=1",
        "--out",
        path,
        "--lr",
        0.001,
        "--held-out",
        0.25,
        "--precision",
        "bf16",
    )
    assert "12 images, 0 unreadable" in result.stderr
    run("export", path)
    run("export", path, "--fp16")
    return path


@pytest.fixture
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the folder that has runs/."""
    monkeypatch.chdir(trained.parent.parent)
    yield trained


def test_pipeline_leaves_verified_exports(trained: Path) -> None:
    names = {export.name for export in Run(trained).exports()}
    assert names == {"step-fp32", "step-fp16"}
    config = load_model(Run(trained).model).config
    assert (config.image_size, config.depth) == (16, 1)


def test_parity_is_recorded_and_shown(trained: Path) -> None:
    for flag in ((), ("--fp16",)):
        export = ("--export", "step-fp32") if not flag else ()
        result = run("parity", trained, "-n", 2, "--steps", 8, *flag, *export)
        assert "parity: passed" in result.stdout
        assert "trajectory" in result.stderr
    verdicts = [v for v in read_verdicts(Run(trained)) if v.check == "parity"]
    assert {verdict.export for verdict in verdicts} == {"step-fp32", "step-fp16"}
    assert all(verdict.passed for verdict in verdicts)


def test_torch_backend_has_parity_with_itself(trained: Path) -> None:
    result = run("parity", trained, "--backend", "torch", "-n", 1, "--steps", 4)
    assert "parity: passed" in result.stdout


def test_sample_takes_the_newest_run_and_says_so(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    result = run(
        "sample",
        "-n",
        5,
        "--batch",
        2,
        "--out",
        out,
        "--steps",
        3,
        "--seed",
        7,
        "--gif",
        "--trajectory",
    )
    assert "run: runs/tiny (the newest)" in result.stderr
    assert "backend: onnxruntime on CPUExecutionProvider, export step-fp16" in result.stderr
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    pictures = [f"{index:06d}.png" for index in range(5)]
    assert names == [*pictures, "grid.png", "manifest.jsonl", "trajectory.gif", "trajectory.png"]
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == pictures
    assert [line["index"] for line in lines] == list(range(5))
    expected = {"seed": 7, "solver": "euler", "steps": 3, "backend": "onnxruntime"}
    for line in lines:
        assert expected.items() <= line.items()
        assert len(line["model_sha256"]) == len(line["engine_sha256"]) == 64
    with Image.open(out / "trajectory.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 4  # the noise and three steps


def test_pictures_are_those_of_the_library(trained: Path, tmp_path: Path) -> None:
    run(
        "sample",
        trained,
        "-n",
        3,
        "--batch",
        2,
        "--out",
        tmp_path,
        "--steps",
        4,
        "--backend",
        "torch",
        "--solver",
        "dpmpp-2m",
        "--shift",
        1.5,
    )
    expected = lutdeploy.sample(lutdeploy.load(trained), 3, steps=4, solver="dpmpp-2m", shift=1.5)
    for index in range(3):
        pixels = images.decode_png((tmp_path / f"{index:06d}.png").read_bytes())
        difference = pixels.astype(int) - images.to_uint8(expected[index])
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("file_format", ["npz", "webdataset"])
def test_many_pictures_in_one_file(file_format: str, trained: Path, tmp_path: Path) -> None:
    options = ("-n", 2, "--out", tmp_path, "--steps", 2, "--backend", "torch")
    run("sample", trained, *options, "--format", file_format)
    name = {"npz": "pictures.npz", "webdataset": "000000.tar"}[file_format]
    found = np.stack(list(pictures_in(tmp_path / name)))
    expected = images.to_uint8(lutdeploy.sample(lutdeploy.load(trained), 2, steps=2))
    assert np.abs(found.astype(int) - expected).max() <= 1
    with Image.open(tmp_path / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid), images.grid(found))


def test_more_images_extend_a_folder(trained: Path, tmp_path: Path) -> None:
    command = ("sample", trained, "--out", tmp_path, "--steps", 2, "--no-grid")
    run(*command, "-n", 2)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.png")}
    result = run(*command, "-n", 4, "--batch", 3)
    assert "2 of 4 images are there already" in result.stderr
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.png")}
    assert before.items() <= after.items()
    assert sorted(after) == [f"{index:06d}.png" for index in range(4)]
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 4


def test_per_step_and_loop_exports_bring_their_own_steps(trained: Path, tmp_path: Path) -> None:
    for graph in ("per-step", "loop"):
        run("export", trained, "--graph", graph, "--steps", 3, "--solver", "dpmpp-2m")
        folder = trained / "onnx" / f"{graph}-fp32-dpmpp-2m-3"
        result = run("sample", folder, "-n", 2, "--out", tmp_path / graph)
        assert f"export {folder.name}" in result.stderr
    for index in range(2):
        one, other = (
            images.decode_png((tmp_path / graph / f"{index:06d}.png").read_bytes()).astype(int)
            for graph in ("per-step", "loop")
        )
        assert np.abs(one - other).max() <= 1
    result = run(
        "sample",
        trained,
        "--export",
        "loop-fp32-dpmpp-2m-3",
        "--gif",
        "--out",
        tmp_path / "gif",
        code=2,
    )
    assert "loop export shows no steps" in result.stderr


def test_failed_parity_stops_sampling_unless_told(trained: Path, tmp_path: Path) -> None:
    command = ("sample", trained, "--export", "step-fp32", "-n", 1, "--steps", 1)
    run("parity", trained, "--export", "step-fp32", "-n", 1, "--steps", 2)
    verdict = next(v for v in read_verdicts(Run(trained)) if v.export == "step-fp32")
    store_verdict(Run(trained), msgspec.structs.replace(verdict, passed=False))
    result = run(*command, "--out", tmp_path / "a", code=1)
    assert "failed parity" in result.stderr
    run(*command, "--out", tmp_path / "b", "--unverified")
    store_verdict(Run(trained), verdict)


def test_inspect_says_what_things_are(trained: Path) -> None:
    text = run("inspect", trained).stdout
    for word in ("static-tanh-64", "step-fp16", "float32 islands", "16×16×3", "sha256"):
        assert word in text
    found = json.loads(run("inspect", trained, "--json").stdout)
    assert found["kind"] == "run"
    assert found["model"]["config"]["image_size"] == 16
    export = trained / "onnx" / "step-fp16"
    values = json.loads(run("inspect", export, "--json").stdout)
    assert values["islands"]
    assert values["opset"] == 20
    assert values["model_sha256"] == found["model"]["model_sha256"]
    model = json.loads(run("inspect", trained / "model.safetensors", "--json").stdout)
    weights = load_model(Run(trained).model).state_dict()
    assert model["parameters"] == sum(value.numel() for value in weights.values())


def test_inspect_names_a_stale_export(tmp_path: Path) -> None:
    path = Run(tmp_path / "r")
    save_model(golden_model("static-tanh-64"), path.model)
    run("export", path.path)
    save_model(golden_model("static-softmax-512"), path.model)
    assert "STALE" in run("inspect", path.path).stdout
    result = run("sample", path.path, "-n", 1, "--out", tmp_path / "s", code=1)
    assert "exported from another" in result.stderr


def test_import_says_what_it_inferred_and_goes_back(tmp_path: Path, preset: str) -> None:
    import torch

    golden = read_golden(preset)
    torch.save(golden.state, tmp_path / "theirs.pth")
    result = run("import", tmp_path / "theirs.pth", "--out", tmp_path / "r", "--heads", 4)
    for word in (preset, "width 64", "depth 2", f"K {golden.config.entries}", "4 heads"):
        assert word in result.stderr
    assert load_model(Run(tmp_path / "r").model).config == golden.config
    run("export", tmp_path / "r", "--author-format", tmp_path / "ours.pth")
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert set(back) == set(golden.state)
    assert all(torch.equal(back[key], value) for key, value in golden.state.items())


DRAWN = ("--data", "synthetic", "--size", "tiny", "--set", "image_size=16", "--batch", 2)


def test_training_on_drawn_images(tmp_path: Path) -> None:
    options = ("--preset", "dynamic-64", "--steps", 2, "--compile", "off")
    run("train", *DRAWN, *options, "--out", tmp_path / "r")
    assert load_model(Run(tmp_path / "r").model).config.lut == "dynamic"


@pytest.mark.parametrize(("speedup", "warned"), [(0.01, True), (2.0, False)])
def test_training_says_where_bf16_is_slow(
    speedup: float, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lutdeploy.engines.doctor.bf16_speedup", lambda: speedup)
    options = ("--steps", 1, "--device", "cpu", "--precision", "bf16", "--out", tmp_path / "r")
    note = "--precision fp32 trains faster here"
    assert (note in run("train", *DRAWN, *options).stderr) == warned


def test_a_model_of_the_package_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("sample", "-n", 2, "--steps", 2)
    assert f"model: {shipped.DEFAULT} (of the package" in result.stderr
    assert (
        f"backend: onnxruntime on CPUExecutionProvider, export {shipped.DEFAULT}" in result.stderr
    )
    assert (tmp_path / "samples" / "grid.png").is_file()
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the package's names in its place; those of its size take ten seconds to export."""
    names, folder = shipped.names(), tmp_path / "package"
    monkeypatch.setattr(shipped, "FOLDER", folder)
    for name in names:
        (folder / name).mkdir(parents=True)
        save_model(golden_model(name.removesuffix("-small")), shipped.model_path(name))


@pytest.mark.usefixtures("small_package")
def test_an_export_of_the_default_is_in_a_run_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("export", "--fp16")
    assert (tmp_path / "runs" / shipped.DEFAULT / "onnx" / "step-fp16").is_dir()


@pytest.mark.usefixtures("small_package")
def test_model_stands_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, whatever runs there are."""
    monkeypatch.chdir(tmp_path)
    run("train", "--data", "synthetic", "--size", "tiny", "--steps", 1, "--out", "runs/newer")
    name = shipped.names()[-1]
    run("sample", "--model", name, "-n", 1, "--steps", 2)
    manifest = (tmp_path / "samples" / "manifest.jsonl").read_text()
    assert files.sha256(shipped.model_path(name)) in manifest
    run("export", "--model", name)
    assert (tmp_path / "runs" / name / "onnx" / "step-fp32").is_dir()
    assert not (tmp_path / "runs" / "newer" / "onnx").exists()
    run("parity", "--model", name, "-n", 1, "--steps", 2)
    assert read_verdicts(Run(tmp_path / "runs" / name)), "of the export that --model made"
    line = run("sample", "runs/newer", "--model", name, code=2).output
    assert f"--model {name} stands for a RUN; leave out runs/newer" in line
    assert "Invalid value for '--model'" in run("sample", "--model", "dogs", code=2).output


def test_a_model_of_the_package_replaces_no_trained_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a training has its name."""
    monkeypatch.chdir(tmp_path)
    trained = Run(Path("runs") / shipped.DEFAULT)
    run("train", "--data", "synthetic", "--size", "tiny", "--steps", 1, "--out", trained.path)
    before = trained.model.read_bytes()
    for command in (("export",), ("parity",), ("tune-steps", "--steps", 2)):
        line = run(*command, "--model", shipped.DEFAULT, code=2).output
        assert f"{trained.path} was trained here" in line
    assert trained.model.read_bytes() == before


def test_models_are_listed_the_default_first() -> None:
    listed = json.loads(run("models", "--json").stdout)
    assert [model["name"] for model in listed] == list(shipped.names())
    assert listed[0]["name"] == shipped.DEFAULT
    shown = run("models").stdout
    for model in listed:
        assert model["name"] in shown
        if model["features"] == listed[0]["features"]:
            assert f"{model['metrics']['frechet_distance']:.0f}" in shown


def test_the_default_has_the_least_error_on_held_out_images() -> None:
    errors = {name: sum(shipped.facts(name)["x0_errors"]["held_out"]) for name in shipped.names()}
    assert min(errors, key=lambda name: errors[name]) == shipped.DEFAULT


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_models_are_fp16_told_of_and_paint(name: str) -> None:
    path = shipped.model_path(name)
    assert path.stat().st_size < 15e6
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["dtypes"] == ["F16"]
    assert found["config"] == shipped.facts(name)["training"]["model"]
    docs = Path(__file__).parents[2] / "docs" / "models"
    card = (docs / f"{name}.md").read_text()
    for word in ("Data", "Recipe", "Steps", "Images seen", "Fréchet"):
        assert word in card
    for picture in ("samples", "trajectory", "lut", "gram"):
        assert (docs / f"{name}.{picture}.png").is_file()
    made = lutdeploy.sample(lutdeploy.load(path), 4, steps=16, solver="dpmpp-2m")
    assert np.isfinite(made).all()
    assert 0.2 < made.std() < 1
    assert np.abs(made).max() < 2.5
    spread = (made - made.mean(axis=0)).std()
    assert spread > 0.15, "four samples should be four pictures"


def test_doctor_tells_what_computes() -> None:
    findings = {f["subject"]: f for f in json.loads(run("doctor", "--json").stdout)}
    assert findings["onnxruntime CPUExecutionProvider"]["works"]
    assert findings["torch cpu"]["works"]
    for finding in findings.values():
        assert finding["works"] or not finding["required"]


def test_the_graph_that_doctor_computes_is_what_its_source_says() -> None:
    text = '<ir_version: 10, opset_import: ["": 20]>\n'
    text += "probe (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }"
    assert onnx.parser.parse_model(text).SerializeToString() == PROBE


def test_doctor_fails_when_something_needed_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "raise RuntimeError('built for another torch\\nlong story')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lutdeploy.engines.doctor.PACKAGES", ("numpy", "broken", "missing"))
    result = run("doctor", code=1)
    assert "missing or broken: broken, missing" in result.stderr
    assert "built for another torch; pip install broken" in result.stdout
    assert "No module named 'missing'; pip install missing" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    text = run(command, "--help").stdout
    assert f"Usage: cli {command} " in text
    assert "..." not in text.replace("COMMAND [ARGS]...", "")  # of a group


def test_the_short_help_is_whole() -> None:
    text = run("--help").stdout
    assert all(short in text for short in COMMANDS.values())


def test_it_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lutdeploy.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"lutdeploy, version {lutdeploy.__version__}"
