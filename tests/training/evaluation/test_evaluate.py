"""`lutdeploy evaluate`: splits, rows, alarms, results on disk, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from lutdeploy import images, sampling
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import EVALUATION, EVALUATION_PAGE, Run
from lutdeploy.config import ModelConfig, model_config
from lutdeploy.errors import UsageError
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Denoiser
from lutdeploy.schedule import solver_schedule
from lutdeploy.training.data import draw_set, load_folder
from lutdeploy.training.evaluation.data import (
    RealImages,
    Trained,
    draw_samples,
    load_real,
    read_samples,
)
from lutdeploy.training.evaluation.evaluate import ErrorCurve, compare_sets, evaluate, x0_errors
from lutdeploy.training.evaluation.features import Extractor, open_extractor
from lutdeploy.training.evaluation.report import chart, metric_table, page
from tests.command import fail, invoke, succeed
from tests.conftest import golden_model

Pixels = NDArray[np.uint8]
Runs = Callable[[str], Run]


def quarters(pixels: torch.Tensor) -> torch.Tensor:
    """Cheap features: the mean of each quarter of an image."""
    return F.avg_pool2d(pixels.float() / 255, pixels.shape[-1] // 2).flatten(1)


MEANS = Extractor(quarters, "cpu", "quarters", "0", frechet_name="FID", kernel_name="KID")


def faces(count: int, seed: int = 0) -> Pixels:
    return draw_set(64, count=count, seed=seed).images


def write_pictures(folder: Path, pixels: Pixels) -> Path:
    folder.mkdir()
    for index, picture in enumerate(np.moveaxis(pixels, 1, -1)):
        Image.fromarray(picture).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 real images."""
    return write_pictures(tmp_path_factory.mktemp("data") / "faces", faces(64))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run trained for a step on ``data``, a third held out."""
    run = tmp_path_factory.mktemp("trained") / "cats"
    small = ("--size", "tiny", "--steps", 1, "--batch", 2)
    succeed("train", "--data", data, "--held-out", "0.33", "--seed", 5, "--out", run, *small)
    return run


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder of 20 pictures."""
    return write_pictures(tmp_path / "pictures", faces(20, seed=1))


def read(folder: Path) -> Any:
    return files.read_json(folder / EVALUATION)


def split_of(data: Path, trained: Trained | None) -> RealImages:
    return load_real(str(data), None, 64, 3, trained)


# The command


def test_a_run_end_to_end(trained: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "cats")
    options = ("-n", 18, "--steps", 2, "--batch", 7)
    result = succeed("evaluate", run, "--data", data, *options)
    assert result.stdout.strip() == str(run / EVALUATION_PAGE)
    assert "Fréchet distance" in result.stderr and "FID" not in result.stderr
    found = read(run)
    assert [(row["what"], row["metrics"]["images"]) for row in found["rows"]] == [
        ("samples", 18),
        ("real", 18),
        ("samples", 18),
        ("held-out", 18),
    ]
    assert found["settings"]["training_images"] == 43 and found["settings"]["held_out_images"] == 21
    assert found["settings"]["split"].endswith("seed 5, as in the model's training")
    assert found["settings"]["model_sha256"] == files.sha256(Run(run).model)
    assert any(note.startswith("18 images are fewer than the 1,280") for note in found["notes"])
    assert found["errors"]["images"] == 21 and len(found["errors"]["held_out"]) == 12
    assert [m["space"] for m in found["memorisation"]] == ["pixels", "features"]
    assert found["memorisation"][0]["held_out"]["images"] == 21
    text = (run / EVALUATION_PAGE).read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # nothing is loaded
    assert text.count("data:image/png;base64,") == 2 + 16 + 16

    succeed("evaluate", run, *options, "--out", tmp_path / "again")  # --data is known
    assert read(tmp_path / "again") == found


def test_a_folder_of_samples_equals_the_run(trained: Path, data: Path, tmp_path: Path) -> None:
    succeed("sample", trained, "-n", 18, "--steps", 2, "--out", tmp_path / "s")
    succeed("evaluate", tmp_path / "s", "--data", data, "--json", tmp_path / "x" / "s.json")
    found = files.read_json(tmp_path / "x" / "s.json")
    assert not (tmp_path / "s" / EVALUATION).exists()
    assert (tmp_path / "s" / EVALUATION_PAGE).is_file()
    assert found["settings"]["steps"] == 2 and found["settings"]["pictures"] == 18
    assert found["settings"]["model_sha256"] == files.sha256(Run(trained).model)
    assert found["errors"] is None
    assert "split here" in found["settings"]["split"]
    assert any("may have been trained on" in note for note in found["notes"])
    out = tmp_path / "run"
    succeed("evaluate", trained, "--data", data, "-n", 18, "--steps", 2, "--out", out)
    # Not to the last bit: features are computed in batches, and the two split the images otherwise.
    ours, theirs = read(out)["rows"][0]["metrics"], found["rows"][0]["metrics"]
    assert ours.pop("sliced_wasserstein") == theirs.pop("sliced_wasserstein")
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_loop_export_has_no_error_curve(
    exported: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    loop = exported("static-tanh-64", "loop")
    succeed("evaluate", loop, "--data", data, "-n", 16, "--out", tmp_path)
    found = read(tmp_path)
    assert found["errors"] is None
    assert any("holds its own timesteps alone" in note for note in found["notes"])


def test_held_out_folder(trained: Path, data: Path, drawn: Path, tmp_path: Path) -> None:
    small = ("-n", 16, "--steps", 1, "--out", tmp_path)
    succeed("evaluate", trained, "--data", data, "--held-out", drawn, *small)
    found = read(tmp_path)
    assert found["settings"]["held_out_images"] == 20
    assert found["settings"]["training_images"] == 43  # what the run held out is left out
    assert found["settings"]["split"] == f"held out: {drawn}"


def test_interrupted_or_full_disk_keeps_what_was_there(
    drawn: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("evaluate", drawn, "--data", data)
    before = {name: (drawn / name).read_bytes() for name in (EVALUATION, EVALUATION_PAGE)}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lutdeploy.training.evaluation.evaluate.sliced_wasserstein", stop)
        assert "interrupted" in fail(130, "evaluate", drawn, "--data", data)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lutdeploy.artefacts.files.os.fsync", full)
        result = invoke("evaluate", drawn, "--data", data)
    assert result.exit_code == 1
    assert "Fréchet" in result.stderr  # what was computed is on the screen
    assert f"{EVALUATION}: No space left" in result.stderr
    assert {name: (drawn / name).read_bytes() for name in before} == before
    assert sorted(p.name for p in drawn.iterdir() if p.suffix != ".png") == sorted(before)


# What goes wrong


def test_too_few_pictures(trained: Path, data: Path, drawn: Path, tmp_path: Path) -> None:
    few = write_pictures(tmp_path / "few", faces(10, seed=1))
    assert "10 images are too few; at least 16" in fail(2, "evaluate", few, "--data", data)
    assert "-n 8: 8 images are too few" in fail(2, "evaluate", trained, "-n", 8)
    assert "half of the real images: 5 images" in fail(2, "evaluate", drawn, "--data", few)


def test_pictures_that_do_not_fit(drawn: Path, data: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(drawn / "000007.png")
    line = fail(2, "evaluate", drawn, "--data", data)
    assert "000007.png is 32×32, the pictures before it 64×64" in line
    Image.new("RGB", (32, 64)).save(tmp_path / "pictures" / "000000.png")
    assert "000000.png is 32×64; square" in fail(2, "evaluate", drawn, "--data", data)
    small = write_pictures(tmp_path / "small", faces(32)[..., ::2, ::2])
    line = fail(2, "evaluate", data, "--data", small)
    assert "32 of 32 real images are smaller than the pictures, which are 64×64 (000000" in line


def test_unreadable_pictures_are_skipped_and_named(drawn: Path, data: Path) -> None:
    (drawn / "000003.png").write_bytes(b"no picture")
    succeed("evaluate", drawn, "--data", data)
    found = read(drawn)
    assert found["settings"]["pictures"] == 19
    assert any("1 unreadable files skipped" in n and "000003.png" in n for n in found["notes"])
    for path in drawn.glob("*.png"):
        path.write_bytes(b"no picture")
    assert "no picture is readable; first: " in fail(2, "evaluate", drawn, "--data", data)


def test_folders_without_pictures_and_files_without_features(
    tmp_path: Path, data: Path, drawn: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = fail(2, "evaluate", empty, "--data", data)
    assert f"{empty} holds neither a model.safetensors nor pictures" in line
    Image.new("RGB", (64, 64)).save(empty / "grid.png")  # a picture about pictures
    (empty / "manifest.jsonl").write_text('{"solver": "euler", "steps": 4, "seed": 0}\n')
    line = fail(2, "evaluate", empty, "--data", data)
    assert "holds neither" in line and "1 of lutdeploy's own pictures left out (grid.png)" in line
    assert "no such folder of images" in fail(2, "evaluate", drawn, "--data", tmp_path / "no")
    assert "no such run" in fail(2, "evaluate", tmp_path / "no", "--data", data)
    assert "--data is needed" in fail(2, "evaluate", drawn)
    features = tmp_path / "inception.pth"
    features.write_bytes(b"no weights")
    assert "inception.pth" in fail(1, "evaluate", drawn, "--data", data, "--features", features)


def test_results_that_belong_nowhere(
    golden_runs: Runs, data: Path, drawn: Path, tmp_path: Path
) -> None:
    model = shutil.copy(golden_runs("static-tanh-64").model, tmp_path / "m.safetensors")
    assert "--out names a folder for the results" in fail(2, "evaluate", model, "--data", data)
    assert "--data is needed: " in fail(2, "evaluate", model)
    line = fail(2, "evaluate", drawn, "--data", data, "--json", tmp_path)
    assert f"--json names a file; {tmp_path} is a folder" in line
    assert "is a file; --out names" in fail(2, "evaluate", drawn, "--data", data, "--out", model)


@pytest.mark.parametrize(
    "option",
    [("--steps", 4), ("--solver", "fitted"), ("--backend", "torch"), ("--shift", 2)],
)
def test_options_of_a_run_beside_a_folder(
    option: tuple[object, ...], drawn: Path, data: Path
) -> None:
    line = fail(2, "evaluate", drawn, "--data", data, *option)
    assert f"{option[0]} is for a RUN; {drawn} holds pictures" in line


@pytest.mark.parametrize("module", ["torchmetrics.image.kid", "jinja2"])
def test_without_the_extra(
    module: str, drawn: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'lutdeploy[evaluate]'" in fail(1, "evaluate", drawn, "--data", data)


def test_with_a_torchvision_for_another_torch(drawn: Path, data: Path, tmp_path: Path) -> None:
    """It is installed, and its compiled part fails when torchmetrics imports it."""
    site = tmp_path / "site"
    about = site / "torchvision-0.15.2.dist-info"
    (site / "torchvision").mkdir(parents=True)
    about.mkdir()
    reason = "operator torchvision::nms does not exist"
    (site / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({reason!r})")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.15.2\n")

    source = ("--data", str(data))
    training = "train --size tiny --perceptual lpips --out run".split()
    commands = [["evaluate", str(drawn), *source], [*training, *source], ["doctor"]]
    code = """if True:
        import json, sys
        from tests.command import invoke
        print(json.dumps([invoke(*command).output for command in json.loads(sys.argv[1])]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[3]}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    evaluated, trained, doctor = json.loads(done.stdout.splitlines()[-1])
    for text in (evaluated, trained, doctor):
        assert f"does not import ({reason}); install the torchvision built for torch" in text
        assert "pip install" not in text.split(reason)[0].splitlines()[-1]
    findings = {line[8:].split()[0]: line.split()[0] for line in doctor.splitlines()}
    assert findings["evaluate"] == findings["lpips"] == "-"


# Splits


def test_the_split_is_the_one_of_the_training(trained: Path, data: Path) -> None:
    real = split_of(data, Trained.of_run(Run(trained)))
    chosen, held = load_folder(data, 64).split(0.33, 5)
    everything = load_folder(data, 64).images
    np.testing.assert_array_equal(real.training, everything[chosen])
    np.testing.assert_array_equal(real.held_out, everything[held])
    assert real.warnings == ()


def test_what_was_trained_on_is_never_held_out(trained: Path, data: Path, tmp_path: Path) -> None:
    """By the files' hashes: their names and their folder may be others, and images new."""
    known = Trained.of_run(Run(trained))
    chosen, held = load_folder(data, 64).split(0.33, 5)
    moved = tmp_path / "moved"
    moved.mkdir()
    paths = sorted(data.iterdir())
    for place, path in enumerate(paths):
        shutil.copy(path, moved / f"{(place * 37) % 64:03d}.png")
    write_pictures(moved / "more", faces(70)[64:])
    real = split_of(moved, known)
    assert (len(real.training), len(real.held_out)) == (len(chosen), len(held) + 6)
    seen = {image.tobytes() for image in load_folder(data, 64).images[chosen]}
    assert {image.tobytes() for image in real.training} == seen
    assert not any(image.tobytes() in seen for image in real.held_out)
    assert real.split.endswith("by the files' hashes") and real.warnings == ()

    only_seen = tmp_path / "seen"
    only_seen.mkdir()
    for index in chosen:
        shutil.copy(paths[index], only_seen)
    real = split_of(only_seen, known)
    assert len(real.held_out) == 0 and "was trained on all of" in real.warnings[0]
    with pytest.raises(UsageError, match=r"--held-out .*: the model was trained on 43 of its 43"):
        load_real(str(data), only_seen, 64, 3, known)
    other = write_pictures(tmp_path / "other", faces(20, seed=1))
    real = split_of(other, known)
    assert f"the model was trained on {data}" in real.split and real.warnings == ()


def test_a_split_that_nothing_vouches_for_is_refused(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    """Runs of earlier versions do not list their images: the number has to tell."""
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    run.images.unlink()
    chosen, held = load_folder(data, 64).split(0.33, 5)
    real = split_of(data, Trained.of_run(run))
    assert (len(real.training), len(real.held_out)) == (len(chosen), len(held))
    values = files.read_json(run.settings)
    more = write_pictures(tmp_path / "more", faces(70))
    files.write_json(run.settings, {**values, "data": str(more)})
    with pytest.raises(UsageError, match=r"the model saw 43: which of them it saw cannot be told"):
        split_of(more, Trained.of_run(run))
    files.write_json(run.settings, {**values, "data": "synthetic"})
    real = split_of(data, Trained.of_run(run))
    assert real.warnings == () and "the model was trained on synthetic" in real.split


def test_a_run_that_held_nothing_out_has_no_held_out_images(data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "all")
    small = ("--size", "tiny", "--steps", 1, "--batch", 2)
    succeed("train", "--data", data, "--held-out", 0, "--out", run.path, *small)
    for _ in range(2):  # with the list of its images, and without it, as of an earlier version
        real = split_of(data, Trained.of_run(run))
        assert (len(real.training), len(real.held_out)) == (64, 0)
        assert "was trained on all of" in real.warnings[0]
        run.images.unlink(missing_ok=True)


def test_a_model_of_the_package_knows_its_split(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how many images it was trained on: a name of their folder it does not have."""
    training = {"held_out": 0.33, "seed": 5, "training_images": 43}
    monkeypatch.setattr("lutdeploy.artefacts.shipped.facts", lambda name: {"training": training})
    path = shipped.model_path()
    real = split_of(data, Trained.of_model(path))
    chosen, held = load_folder(data, 64).split(0.33, 5)
    assert (len(real.training), len(real.held_out)) == (len(chosen), len(held)) == (43, 21)
    assert real.warnings == () and "as in the model's training" in real.split
    training["training_images"] = 44
    real = split_of(data, Trained.of_model(path))
    assert "the model saw 44" in real.warnings[0] and "split here" in real.split


# From Python


def test_compare_sets_is_repeatable_and_zero_for_itself() -> None:
    a, b = faces(32), faces(32, seed=1)
    extractor = open_extractor()
    found = compare_sets(a, b, extractor)
    assert compare_sets(a, b, extractor) == found
    assert found.images == 32 and list(found.sliced_wasserstein) == [64, 32, 16]
    same = compare_sets(a, a, extractor)
    assert same.frechet_distance < 1e-3 < found.frechet_distance
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    with pytest.raises(UsageError, match="two sets of one shape"):
        compare_sets(a, b[:20], extractor)
    with pytest.raises(UsageError, match="at least 16"):
        compare_sets(a[:8], b[:8], extractor)


def test_copies_and_collapse_raise_their_alarms() -> None:
    real = RealImages(faces(64), faces(20, seed=1), "")
    copies = np.concatenate([real.training[:10], real.training[10:20, ..., ::-1]])
    found = evaluate(copies, real, MEANS)
    assert sum("memorisation: 100.0% of the samples" in alarm for alarm in found.alarms) == 2
    assert found.memorisation[0].closest[0].distance == 0
    assert not evaluate(faces(20, seed=2), real, MEANS).alarms
    found = evaluate(np.repeat(faces(1, seed=2), 20, axis=0), real, MEANS)
    assert any(alarm.startswith("collapse: ") for alarm in found.alarms)


class Recalling:
    """A denoiser that knows its training images by heart and blurs all others."""

    schedule, whole_trajectory = None, False

    def __init__(self, known: Pixels) -> None:
        self.known = known.astype(np.float32) / 127.5 - 1

    @property
    def config(self) -> ModelConfig:
        return model_config("static-tanh-64", "tiny")

    def predict_x0(self, x: sampling.Images, t: NDArray[np.float32]) -> sampling.Images:
        pairs = zip(x, t, strict=True)
        distances = [np.square(at * self.known - x_t).mean((1, 2, 3)) for x_t, at in pairs]
        return self.known[np.argmin(distances, axis=1)]


def test_a_model_that_knows_its_training_images_raises_the_alarm_of_overfitting() -> None:
    real = RealImages(faces(48), faces(20, seed=1), "")
    denoiser: Denoiser = Recalling(real.training)  # type: ignore[assignment]
    found = evaluate(faces(20, seed=2), real, MEANS, denoiser)
    assert any(alarm.startswith("overfitting: ") for alarm in found.alarms)
    assert found.errors is not None and found.errors.gap > 0


def test_x0_errors_are_the_mean_squares(golden_runs: Runs) -> None:
    denoiser = TorchDenoiser(golden_model("static-tanh-64"))
    held, training = faces(5), faces(9, seed=1)
    curve = x0_errors(denoiser, held, training)
    assert curve.images == 5
    x = held.astype(np.float32) / 127.5 - 1
    noise = sampling.batch_noise(2, range(5), x.shape[1:])
    t = np.full(5, 0.3, np.float32)
    x0 = denoiser.predict_x0(np.float32(0.3) * x + np.float32(0.7) * noise, t)
    assert curve.held_out[3] == pytest.approx(float(np.square(x0 - x).mean()), rel=1e-5)
    same = x0_errors(denoiser, held, held)
    assert same.held_out == same.training and same.gap == 0


def test_samples_in_memory_are_those_of_the_folder(tmp_path: Path, golden_runs: Runs) -> None:
    run = golden_runs("static-tanh-64")
    denoiser = TorchDenoiser(golden_model("static-tanh-64"))
    drawn = draw_samples(denoiser, 5, solver_schedule("euler", 2), seed=3, batch=2)
    common = ("-n", 5, "--steps", 2, "--seed", 3, "--batch", 2)
    for form in ("png", "npz", "webdataset"):
        out = tmp_path / form
        succeed("sample", run.path, *common, "--backend", "torch", "--format", form, "--out", out)
        found = read_samples(out, 10)
        np.testing.assert_array_equal(found.pixels, drawn)
        assert found.origin["seed"] == 3
        assert not {"index", "image", "file", "format"} & found.origin.keys()
        assert len(read_samples(out, 3).pixels) == 3


def test_float32_pictures_of_earlier_versions_are_read(tmp_path: Path) -> None:
    made = sampling.batch_noise(2, range(2), (3, 8, 8))
    for index, image in enumerate(made):
        np.savez_compressed(tmp_path / f"{index:06d}.npz", image=image)
    found = read_samples(tmp_path, 10)
    np.testing.assert_array_equal(np.moveaxis(found.pixels, 1, -1), images.to_uint8(made))


def test_too_few_held_out_images_are_said(data: Path) -> None:
    real = RealImages(faces(40), faces(3, seed=1), "")
    found = evaluate(faces(16, seed=2), real, MEANS)
    assert [row.what for row in found.rows] == ["samples", "real"]
    assert any("3 held-out images are too few" in note for note in found.notes)
    none = replace(real, held_out=real.held_out[:0])
    denoiser: Denoiser = Recalling(real.training)  # type: ignore[assignment]
    found = evaluate(faces(16, seed=2), none, MEANS, denoiser)
    assert found.errors is None and found.memorisation[0].held_out is None
    assert "no held-out images: no x0 error curve" in found.notes
    seen = RealImages(real.training, real.training[:16], "")
    note = "some held-out images are training images, to the last pixel"
    assert note in evaluate(faces(16, seed=2), seen, MEANS).notes


def test_only_inception_is_called_fid() -> None:
    real = RealImages(faces(40), faces(16, seed=1), "")
    found = evaluate(faces(16, seed=2), real, MEANS)
    assert [row[0] for row in metric_table(found, MEANS).rows][:2] == ["FID", "KID × 1000"]
    own = page(found, open_extractor(), faces(16), real.training, "<title>", {"a": "<b>"})
    text = re.sub(r"base64,[^\"]*", "", own)
    assert "FID" not in text and "KID" not in text
    assert "<title>&lt;title&gt;</title>" in own and "&lt;b&gt;" in own


def test_the_chart_spans_its_values() -> None:
    drawn = chart(ErrorCurve(2, (0.0, 0.5), (1.0, 0.01), (0.5, 0.01), 0.0, 0.0))
    assert [label for _, label in drawn["y_ticks"]] == ["1e-2", "1e-1", "1e0"]
    first, last = (tuple(map(float, p.split(","))) for p in drawn["held_out"].split())
    assert first == (drawn["left"], drawn["top"]) and last[1] == drawn["bottom"]


def test_grey_pictures(tmp_path: Path) -> None:
    grey = faces(40)[:, :1]
    found = evaluate(grey[:16], RealImages(grey, grey[20:36], ""), open_extractor())
    assert found.rows[0].metrics.images == 16
    assert images.decode_png(images.encode_png(np.moveaxis(grey[0], 0, -1))).shape == (64, 64, 1)
