"""Data, losses, recipes, the loop: what a training run promises."""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import math
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import Run
from lutdeploy.config import PRESETS, model_config
from lutdeploy.errors import ArtefactError, BackendError, ConfigError, UsageError
from lutdeploy.lut import StaticLut, image_to_tiles, outer_entries
from lutdeploy.machine import compile_problem
from lutdeploy.model import LutTransformer, position_tables, rotate
from lutdeploy.training.data import (
    ImageSet,
    batch_indices,
    decode,
    draw_set,
    load_folder,
)
from lutdeploy.training.loop import Cadence, Progress, held_out_loss, mirror, train
from lutdeploy.training.losses import (
    Objective,
    denoising_loss,
    gram_penalty,
    load_perceptual,
    sample_timesteps,
)
from lutdeploy.training.optimizers import Float32Muon
from lutdeploy.training.recipes import RECIPES, TrainSettings, read_settings, train_settings
from lutdeploy.training.start import (
    least_rotated_channels,
    principal_directions,
    separable_directions,
)
from lutdeploy.training.state import TrainingState

CPU = torch.device("cpu")
SMALL = Cadence(checkpoint=3, picture=100, held_out=4, log=1)


def tiny_settings(preset: str = "static-tanh-64", **changes: object) -> TrainSettings:
    values: dict[str, object] = {"data": "test", "steps": 6, "batch": 4, **changes}
    model = model_config(preset, "tiny", width=16, heads=2, depth=1, image_size=16)
    return train_settings(model, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn() -> ImageSet:
    return draw_set(16, count=24)


def states_of(run: Run) -> dict[str, Tensor]:
    return load_model(run.model).state_dict()


# Data


def test_every_kind_of_file_is_decoded(tmp_path: Path) -> None:
    """RGBA, grey, palette, JPEG, WebP, nested, any size and shape."""
    nested = tmp_path / "a" / "b"
    nested.mkdir(parents=True)
    red = Image.new("RGB", (40, 20), (200, 30, 30))
    red.save(tmp_path / "wide.png")
    red.resize((9, 31)).save(nested / "tall.jpg", quality=95)
    red.save(nested / "upper.WEBP", lossless=True)
    red.quantize(4).save(tmp_path / "palette.png")
    Image.new("L", (30, 30), 90).save(tmp_path / "grey.png")
    Image.new("LA", (30, 30), (90, 0)).save(tmp_path / "clear-grey.png")
    Image.new("RGBA", (30, 30), (200, 30, 30, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (20, 20), 40000).save(tmp_path / "deep.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = load_folder(tmp_path, 16)
    assert found.images.shape == (8, 3, 16, 16)
    assert found.images.dtype == np.uint8
    assert found.skipped == ()
    by_name = {Path(name).name: x for name, x in zip(found.names, found.images, strict=True)}
    for name in ("wide.png", "tall.jpg", "upper.WEBP", "palette.png"):
        colour = by_name[name].reshape(3, -1).mean(1)
        assert np.abs(colour - (200, 30, 30)).max() < 4, name
    assert (by_name["clear.png"] == 255).all(), "transparent shows white"
    assert (by_name["clear-grey.png"] == 255).all()
    assert (by_name["grey.png"] == 90).all()
    assert (by_name["deep.png"] == round(40000 / 257)).all(), "16 bits are scaled, not clipped"
    assert load_folder(tmp_path, 8, channels=1).images.shape == (8, 1, 8, 8)


def test_images_are_cropped_to_the_centre(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 16:48] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    pixels = decode(tmp_path / "wide.png", 16).pixels
    assert pixels[:, :, 1:-1].min() > 250  # Lanczos rings by a level or two


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = decode(tmp_path / "turned.jpg", 16).pixels
    assert pixels[:, :6].max() < 10
    assert pixels[:, 10:].min() > 245


def test_a_set_too_large_for_memory_is_the_same_from_a_file(tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (20, 20), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_text("broken")
    in_memory = load_folder(tmp_path, 8)
    mapped = load_folder(tmp_path, 8, memory_limit=100, scratch=tmp_path / "run")
    assert isinstance(mapped.images, np.memmap)
    assert not isinstance(in_memory.images, np.memmap)
    assert np.array_equal(in_memory.images, mapped.images)
    assert len(mapped.skipped) == len(in_memory.skipped) == 1
    assert "2.png" in mapped.skipped[0]
    assert list((tmp_path / "run").iterdir()) == [], "the file has no name to leave behind"


def test_synthetic_images_are_reproducible_and_varied() -> None:
    one, two = draw_set(16, count=6), draw_set(16, count=12)
    assert np.array_equal(one.images, two.images[:6])
    assert len({image.tobytes() for image in two.images}) == 12
    assert two.images.std(axis=0).mean() > 20
    assert inspect.signature(draw_set).parameters["count"].default == 2048


def test_split_is_disjoint_complete_and_by_seed(drawn: ImageSet) -> None:
    kept, held = drawn.split(0.25, seed=1)
    assert len(held) == 6
    assert sorted([*kept, *held]) == list(range(24))
    assert not np.array_equal(held, drawn.split(0.25, seed=2)[1])
    kept, held = ImageSet(drawn.images[:1], ()).split(0.9, 0)
    assert (len(kept), len(held)) == (1, 0)


def test_batches_are_epochs_and_resume_anywhere() -> None:
    batches = batch_indices(10, 4, seed=3, start=0)
    first = [next(batches) for _ in range(10)]
    flat = np.concatenate(first)
    for epoch in range(4):
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert not np.array_equal(flat[:10], flat[10:20])
    later = batch_indices(10, 4, seed=3, start=7)
    assert all(np.array_equal(next(later), batch) for batch in first[7:])


# Losses and recipes


def test_denoising_loss_by_hand() -> None:
    x0, x = torch.tensor([[[[3.0]]], [[[1.0]]]]), torch.zeros(2, 1, 1, 1)
    t = torch.tensor([0.5, 0.99])
    assert denoising_loss(x0, x, t, None).item() == 5.0
    expected = (9 / 0.5**2 + 1 / 0.05**2) / 2
    assert math.isclose(denoising_loss(x0, x, t, 0.05).item(), expected, rel_tol=1e-6)


def test_mirrored_share() -> None:
    x = torch.rand(2000, 1, 2, 2)
    found = mirror(x, 0.25, torch.Generator().manual_seed(0))
    mirrored = (found == x.flip(-1)).flatten(1).all(1)
    assert abs(mirrored.float().mean().item() - 0.25) < 0.03
    assert torch.equal(found[~mirrored], x[~mirrored])


def test_gram_penalty_by_hand() -> None:
    entries = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0]]).reshape(3, 1, 1, 2)
    # G off the diagonal: G01 = 1, G02 = 0, G12 = 6, each twice, over 9 places.
    assert math.isclose(gram_penalty(entries).item(), 2 * (1 + 36) / 9, rel_tol=1e-6)


def test_post_recipe_is_the_posts(preset: str) -> None:
    """Spec, "Training as in the post"."""
    settings = train_settings(model_config(preset), "post", data="x", steps=10)
    assert (settings.batch, settings.lr, settings.weight_decay) == (64, 3e-4, 1e-2)
    assert (settings.flip, settings.ema, settings.ema_warmup) == (0.25, (0.99,), False)
    assert settings.perceptual == "lpips"
    assert settings.gram_weight == (0.2 if preset == "static-tanh-64" else 0)
    assert (settings.t_mean, settings.velocity_floor, settings.clip_norm) == (None, None, None)
    assert [settings.learning_rate(step) for step in (0, 5, 9)] == [3e-4] * 3
    assert settings.ema_decay(0.99, 0) == 0.99


@pytest.mark.parametrize(
    "changes",
    [{"recipe": "post"}, {"perceptual_weight": 0.5, "perceptual_from": 0.3, "velocity_floor": 0.5}],
    ids=["post", "from a timestep on"],
)
def test_the_objective_is_the_sum_of_its_terms(changes: dict[str, Any]) -> None:
    settings = tiny_settings(**changes)
    torch.manual_seed(0)
    model = LutTransformer(settings.model)
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
    t = torch.tensor([0.2, 0.7])
    x0 = model(t[:, None, None, None] * x + (1 - t[:, None, None, None]) * noise, t)
    seen: list[tuple[Tensor, Tensor]] = []

    def perceptual(ours: Tensor, theirs: Tensor) -> Tensor:
        seen.append((ours, theirs))
        return torch.tensor([0.25, 0.75])

    expected = denoising_loss(x0, x, t, settings.velocity_floor)
    counted = 0.25 + 0.75 if settings.perceptual_from == 0 else 0.75
    expected = expected + settings.perceptual_weight * counted / 2
    assert isinstance(model.lut, StaticLut)
    expected = expected + settings.gram_weight * gram_penalty(model.lut.entries)
    found = Objective(model, settings, perceptual)(x, noise, t)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(seen[0], (x0, x))


def test_modern_schedule_warms_up_and_ends_at_zero() -> None:
    settings = tiny_settings(steps=1000, batch=4)
    rates = [settings.learning_rate(step) for step in range(1001)]
    assert rates[0] == settings.lr / settings.warmup
    assert max(rates) == rates[settings.warmup] == settings.lr
    assert rates[1000] < 1e-9
    assert settings.ema_decay(0.9995, 0) == 0.1
    assert settings.ema_decay(0.9995, 10**6) == 0.9995
    assert max(settings.ema) > 0.999


def test_timesteps_are_logit_normal_or_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    modern = sample_timesteps(20000, tiny_settings(t_mean=-0.5, t_std=0.8, t_low=0), generator)
    logits = torch.logit(modern)
    assert abs(logits.mean().item() + 0.5) < 0.02
    assert abs(logits.std().item() - 0.8) < 0.02
    uniform = sample_timesteps(20000, tiny_settings(recipe="post"), generator)
    assert abs(uniform.mean().item() - 0.5) < 0.01
    assert 0 <= uniform.min() < uniform.max() <= 1


def test_a_share_of_the_timesteps_is_low() -> None:
    generator = torch.Generator().manual_seed(0)
    t = sample_timesteps(40000, tiny_settings(t_mean=3.0, t_std=0.1, t_low=0.25), generator)
    low = t[t < 0.5]  # logit-normal ones lie near 0.95
    assert abs(len(low) / len(t) - 0.25) < 0.01
    assert 0.001 <= low.min() < low.max() <= 0.1
    assert abs(low.log().mean().exp().item() - 0.01) < 0.0005  # √(0.001 · 0.1): log-uniform


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"held_out": 1.0},
        {"ema": (1.0,)},
        {"ema": ()},
        {"ema": (0.5, 0.5)},
        {"optimizer": "sgd"},
        {"dropout": 1.0},
        {"warmup": 2.5},
        {"start": "here"},
        {"betas": (0.9,)},
        {"cosine": 1},
        {"gram_weight": "much"},
    ],
)
def test_impossible_settings_raise_with_the_value(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        tiny_settings(**change)


@pytest.mark.parametrize("recipe", tuple(RECIPES))
def test_settings_come_back_from_their_file(recipe: str, tmp_path: Path) -> None:
    """Also from that of an earlier version, which has two fields more and one less."""
    settings, run = tiny_settings(recipe=recipe), Run(tmp_path)
    files.write_json(run.settings, settings)
    assert read_settings(run) == settings
    values = files.read_json(run.settings)
    del values["restart"]
    files.write_json(run.settings, {**values, "affine": 0.0, "dct_weight": 0})
    assert read_settings(run) == settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"affine": 0.5}, "affine is not supported any more"),
        ({"dct_weight": 1}, "dct_weight is not supported any more"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"batch": "many"}, "batch cannot be 'many'"),
        ({"model": {"width": 8}}, "model config with missing field"),
        ({"data": None}, "data cannot be None"),
    ],
)
def test_settings_that_cannot_be_read_say_why(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    files.write_json(run.settings, tiny_settings())
    values = files.read_json(run.settings)
    files.write_json(run.settings, {**values, **change})
    with pytest.raises(ArtefactError, match=words):
        read_settings(run)
    del values["lr"]
    files.write_json(run.settings, values)
    with pytest.raises(ArtefactError, match="missing required field `lr`"):
        read_settings(run)


# LPIPS: the real loading code, on a small VGG16 made here, since its weights are a download.


@pytest.fixture
def small_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torchvision with nothing but a VGG16 of random weights, in the layout LPIPS reads."""

    # Imported first: torchmetrics looks for a real torchvision, with more than a VGG16.
    lpip = pytest.importorskip("torchmetrics.functional.image.lpips")
    pytest.importorskip("torchmetrics.image.lpip")

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            channels = 3
            for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
                for _ in range(count):
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                    channels = width
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)

    models = types.ModuleType("torchvision.models")
    models.vgg16 = lambda weights=None, **_: Vgg()  # type: ignore[attr-defined]
    for name in ("VGG16_Weights", "AlexNet_Weights", "SqueezeNet1_1_Weights"):
        setattr(models, name, types.SimpleNamespace(DEFAULT=None))
    package = types.ModuleType("torchvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True, raising=False)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True, raising=False)
    yield


def test_lpips_is_loaded_and_clamps(small_torchvision: None) -> None:
    torch.manual_seed(0)
    perceptual = load_perceptual(CPU)
    x = torch.rand(2, 3, 32, 32)
    assert perceptual(x, x).tolist() == [0, 0]
    other = torch.rand(2, 3, 32, 32, requires_grad=True)
    distance = perceptual(other, x).mean()
    assert distance.item() > 0
    distance.backward()
    assert other.grad is not None
    assert torch.isfinite(other.grad).all()
    beyond = torch.where(x < 0.5, x - 1, x + 1)
    torch.testing.assert_close(perceptual(beyond, other), perceptual(beyond.clamp(0, 1), other))


def test_post_recipe_trains_with_lpips(
    small_torchvision: None, drawn: ImageSet, tmp_path: Path
) -> None:
    model = model_config("static-tanh-64", "tiny", width=16, heads=2, depth=1, image_size=32)
    settings = train_settings(model, "post", data="test", steps=2, batch=2)
    data = draw_set(32, count=4)
    losses = [p.loss for p in train(settings, data, Run(tmp_path), cadence=SMALL)]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_lpips_without_its_package_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(BackendError, match="--perceptual none"):
        load_perceptual(CPU)


def test_lpips_without_its_weights_names_the_way_out(
    small_torchvision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(**_: object) -> nn.Module:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(sys.modules["torchvision.models"], "vgg16", offline)
    with pytest.raises(BackendError, match=r"VGG16 weights.*--perceptual none"):
        load_perceptual(CPU)


# The loop


def run_all(
    settings: TrainSettings, data: ImageSet, path: Path, **options: object
) -> list[Progress]:
    options = {"cadence": SMALL, **options}
    return list(train(settings, data, Run(path), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset_name", tuple(PRESETS))
@pytest.mark.parametrize("recipe", tuple(RECIPES))
def test_every_preset_learns(
    preset_name: str,
    recipe: str,
    drawn: ImageSet,
    tmp_path: Path,
) -> None:
    """From where it starts, by the objective on the same images, timesteps and noise."""
    settings = tiny_settings(
        preset_name, recipe=recipe, steps=60, batch=16, perceptual="none", lr=3e-3, warmup=5
    )
    first = TrainingState(settings, CPU, images=torch.from_numpy(drawn.images)).model
    progress = run_all(settings, drawn, tmp_path)
    last = load_model(Run(tmp_path).model)
    before, after = (held_out_loss(m, drawn.images, settings, CPU) for m in (first, last))
    assert after < 0.97 * before  # a copy leaves less to gain
    assert progress[-1].step == 60


def test_a_run_folder_holds_what_it_should(drawn: ImageSet, tmp_path: Path) -> None:
    settings = tiny_settings("dynamic-64")
    run_all(settings, drawn, tmp_path)
    run = Run(tmp_path)
    config, about = read_metadata(run.model)
    assert config == settings.model
    assert about["step"] == 6
    assert read_settings(run) == settings
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert "held_out_loss" in lines[3]
    assert "held_out_loss" in lines[-1]
    pictures = sorted(path.name for path in run.pictures.iterdir())
    assert pictures == ["gram-000006.png", "lut-000006.png", "trajectory-000006.png"]
    with Image.open(run.pictures / "trajectory-000006.png") as picture:
        assert picture.size == (8 * 16, 17 * 16)  # 8 images; noise and every fourth of 64 steps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"optimizer": "muon", "ema": (0.5, 0.9)},
        {"dropout": 0.2},
        {"start": "noise"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_resumed_equals_unbroken_bit_for_bit(
    drawn: ImageSet, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = tiny_settings(steps=8, **changes)
    run_all(settings, drawn, tmp_path / "whole")
    # Killed in step 5: the checkpoint of step 3 is the last.
    running = train(settings, drawn, Run(tmp_path / "broken"), cadence=SMALL)
    for progress in running:
        if progress.step == 5:
            break
    running.close()  # type: ignore[attr-defined]
    progress_log = tmp_path / "broken" / "train.jsonl"
    with progress_log.open("a") as log:
        log.write('{"step": 6, "lo')  # a line that a kill cut off
    run_all(settings, drawn, tmp_path / "broken", resume=True)
    whole, broken = (states_of(Run(tmp_path / name)) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    losses = [[(line["step"], line["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_a_state_of_an_earlier_version_is_resumed(drawn: ImageSet, tmp_path: Path) -> None:
    """Those files hold no step of the optimiser."""
    settings = tiny_settings(steps=3, optimizer="muon", start="noise")
    run_all(settings, drawn, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = Run(tmp_path / "old").training_state
    tensors = {k: v for k, v in load_file(state).items() if not k.startswith("step/")}
    assert len(tensors) < len(load_file(state))
    with safe_open(state, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, state, metadata)
    for name in ("new", "old"):
        run_all(settings.changed(steps=5), drawn, tmp_path / name, resume=True)
    new, old = (states_of(Run(tmp_path / name)) for name in ("new", "old"))
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_state_without_an_optimisers_part_is_refused(drawn: ImageSet, tmp_path: Path) -> None:
    settings, run = tiny_settings(steps=3), Run(tmp_path)
    run_all(settings, drawn, tmp_path)
    with safe_open(run.training_state, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(run.training_state)
    kept = {k: v for k, v in tensors.items() if not k.endswith("/model.head.weight")}
    save_file(kept, run.training_state, metadata)
    with pytest.raises(ArtefactError, match="damaged or of another run"):
        run_all(settings.changed(steps=4), drawn, tmp_path, resume=True)


def test_another_seed_is_another_model(drawn: ImageSet, tmp_path: Path) -> None:
    for seed in (0, 1):
        run_all(tiny_settings(steps=2, seed=seed), drawn, tmp_path / str(seed))
    zero, one = (states_of(Run(tmp_path / name)) for name in ("0", "1"))
    assert not torch.equal(zero["head.weight"], one["head.weight"])


def test_stop_request_saves_at_a_steps_end(drawn: ImageSet, tmp_path: Path) -> None:
    asked = iter([False, True])
    progress = run_all(tiny_settings(), drawn, tmp_path, should_stop=lambda: next(asked))
    assert [p.step for p in progress] == [1, 2]
    assert read_metadata(Run(tmp_path).model)[1]["step"] == 2


def test_other_images_are_refused_on_resume(drawn: ImageSet, tmp_path: Path) -> None:
    settings = tiny_settings(steps=3)
    run_all(settings, drawn, tmp_path)
    fewer = ImageSet(drawn.images[:10], ())
    longer = settings.changed(steps=6)
    with pytest.raises(UsageError, match="same images"):
        run_all(longer, fewer, tmp_path, resume=True)
    assert run_all(longer, drawn, tmp_path, resume=True)[-1].step == 6


def test_ema_follows_its_formula(drawn: ImageSet, tmp_path: Path) -> None:
    settings = tiny_settings(recipe="post", perceptual="none", steps=1)
    start = TrainingState(settings, CPU)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    run_all(settings, drawn, tmp_path)
    end = TrainingState(settings, CPU)
    end.restore(Run(tmp_path), len(drawn.split(settings.held_out, 0)[0]))
    for name, value in end.model.state_dict().items():
        expected = 0.99 * before[name] + 0.01 * value
        torch.testing.assert_close(end.ema.state_dict()[name], expected)


def test_several_averages_are_kept_and_the_best_is_the_model(
    drawn: ImageSet, tmp_path: Path
) -> None:
    settings = tiny_settings(recipe="post", perceptual="none", steps=20, lr=3e-3, ema=(0.2, 0.999))
    final = run_all(settings, drawn, tmp_path)[-1]
    run = Run(tmp_path)
    assert sorted(path.name for path in run.averages.iterdir()) == [
        "ema-0.2.safetensors",
        "ema-0.999.safetensors",
    ]
    held = drawn.images[drawn.split(settings.held_out, settings.seed)[1]]
    losses = {
        decay: held_out_loss(load_model(run.average(decay)), held, settings, CPU)
        for decay in settings.ema
    }
    assert final.held_out_loss == min(losses.values()) == losses[0.2] < losses[0.999]
    assert read_metadata(run.model)[1]["ema"] == 0.2
    chosen, short = load_model(run.model).state_dict(), load_model(run.average(0.2)).state_dict()
    assert all(torch.equal(chosen[name], short[name]) for name in chosen)


def test_muon_moves_the_blocks_matrices_alone(drawn: ImageSet) -> None:
    state = TrainingState(tiny_settings(optimizer="muon"), CPU)
    adamw, muon = state.optimizers
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    moved = {names[p] for group in muon.param_groups for p in group["params"]}
    assert moved == {f"blocks.0.{name}.weight" for name in ("qkv", "out", "gated")}
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert moved | others == set(names.values())
    assert not moved & others


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_in_float32_moves_as_pytorch_would_in_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    ends = []
    for kind in (Float32Muon, torch.optim.Muon):
        weight = start.clone().requires_grad_()
        muon = kind([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            weight.grad = gradient.clone()
            muon.step()
        ends.append((weight.detach(), muon.state_dict()["state"][0]["momentum_buffer"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=5e-3)  # of moves of 0.3
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_computes_in_the_precision_of_the_training(precision: str) -> None:
    _, muon = TrainingState(tiny_settings(optimizer="muon", precision=precision), CPU).optimizers
    assert isinstance(muon, Float32Muon) == (precision == "fp32")


def test_principal_directions_are_the_best_of_their_number(drawn: ImageSet) -> None:
    config = model_config("static-tanh-64", "tiny", image_size=16)
    patches = image_to_tiles(torch.from_numpy(drawn.images).double() / 127.5 - 1, config)
    patches = patches.flatten(0, 1)
    directions, deviations = principal_directions(patches, 20)
    residual = (patches @ directions.T @ directions - patches).square().sum()
    lost = torch.linalg.svdvals(patches)[20:].square().sum()
    assert math.isclose(residual.item(), lost.item(), rel_tol=1e-6)
    torch.testing.assert_close(directions @ directions.T, torch.eye(20, dtype=torch.float64))
    found = (patches @ directions.T).square().mean(0).sqrt()
    torch.testing.assert_close(found, deviations)


def test_separable_directions_are_what_a_dynamic_lut_can_compute(drawn: ImageSet) -> None:
    config = model_config("dynamic-64", "tiny", image_size=16)
    patches = image_to_tiles(torch.from_numpy(drawn.images).double() / 127.5 - 1, config)
    directions, factors, deviations = separable_directions(patches.flatten(0, 1), config, 64)
    torch.testing.assert_close(directions @ directions.T, torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(outer_entries(factors[None], config)[0], directions)
    assert (deviations.diff() <= 0).all()


def test_what_no_start_can_make_a_copy_is_refused() -> None:
    dynamic = model_config("dynamic-64", "tiny", weights="softmax")
    assert train_settings(dynamic, data="test", steps=1).start == "noise"
    with pytest.raises(ConfigError, match="softmax weights of a dynamic one; there is start noise"):
        train_settings(dynamic, data="test", steps=1, start="copy")


@pytest.mark.parametrize("preset_name", tuple(PRESETS))
def test_a_start_as_copy_paints_what_it_sees_and_exaggerates_nothing(
    preset_name: str, drawn: ImageSet
) -> None:
    """Near t = 1, where a start from noise paints nothing of it.

    The largest factor by which x0 follows a change of x_t, by power iteration, is near 1. Where it
    is well above, a sampled patch that is a little off is painted farther off in each step.
    """
    model_of = model_config(preset_name, "tiny", width=128, image_size=16)
    settings = train_settings(model_of, data="test", steps=1, start="copy")
    pixels = torch.from_numpy(drawn.images)
    model = TrainingState(settings, CPU, images=pixels).model
    plain = TrainingState(settings.changed(start="noise"), CPU, images=pixels).model
    x, t = pixels.float() / 127.5 - 1, torch.full((len(pixels),), 0.98)
    change = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error, other = ((m(x, t) - x).square().mean() for m in (model, plain))
        for _ in range(30):
            change *= 0.1 / change.flatten(1).norm(dim=1)[:, None, None, None]
            change = model(x + change, t) - model(x, t)
    assert error < min(0.1 * x.square().mean(), 0.2 * other)
    assert change.flatten(1).norm(dim=1).max() < 1.5 * 0.1


@pytest.mark.parametrize("entries", [1, 2, 7, 64])
def test_a_convex_start_as_copy_paints_nothing_where_it_sees_nothing(
    entries: int, drawn: ImageSet
) -> None:
    """Whatever the number of entries, pairs or not."""
    model_of = model_config("static-softmax-512", "tiny", entries=entries, image_size=16)
    settings = train_settings(model_of, data="test", steps=1)
    model = TrainingState(settings, CPU, images=torch.from_numpy(drawn.images)).model
    with torch.no_grad():
        x0 = model(torch.zeros(1, 3, 16, 16), torch.ones(1))
    assert x0.abs().max() < 1e-4


def test_least_rotated_channels_are_what_the_position_turns_least() -> None:
    config = model_config("static-tanh-64", "small")
    cos, sin = position_tables(config)
    quiet = least_rotated_channels(config, 64)
    assert len(set(quiet.tolist())) == 64
    u = torch.randn(config.image_tokens, config.width, generator=torch.Generator().manual_seed(0))
    moved = (rotate(u, cos, sin) - u).abs().amax(0)
    assert moved[quiet].max() < 0.05
    turned = sin.abs().amax(0)
    others = torch.ones(config.width, dtype=torch.bool)
    others[quiet] = False
    assert turned[quiet].max() <= turned[others].min()


@pytest.mark.slow
def test_compiled_training_learns(drawn: ImageSet, tmp_path: Path) -> None:
    if problem := compile_problem():
        pytest.skip(problem)
    progress = run_all(tiny_settings(steps=2, compile=True), drawn, tmp_path)
    plain = run_all(tiny_settings(steps=2), drawn, tmp_path / "plain")
    assert math.isclose(progress[0].loss, plain[0].loss, rel_tol=1e-4)
