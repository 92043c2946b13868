"""A run becomes a model of the package: what is written tells the same story."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import TunedSteps, distilled_schedule
from lutdeploy.config import model_config
from lutdeploy.schedule import solver_schedule
from lutdeploy.training.data import draw_set, no_progress
from lutdeploy.training.evaluation.data import Trained
from lutdeploy.training.few_steps.distill import student_settings
from lutdeploy.training.loop import Cadence, train
from lutdeploy.training.recipes import train_settings
from lutdeploy.training.ship import main, write_weights


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lutdeploy.training.data.draw_set.__defaults__", (3, 60, 0, no_progress, None)
    )


def trained(path: Path) -> Run:
    model = model_config("dynamic-64", "tiny", depth=1)
    settings = train_settings(model, data="synthetic", steps=2, batch=4, held_out=0.3)
    run = Run(path)
    for _ in train(settings, draw_set(64), run, cadence=Cadence(10, 10, 10, 1)):
        pass
    return run


def distilled(path: Path) -> Run:
    """A run with the settings and the metadata of a distilled model."""
    teacher = trained(path.parent / "teacher")
    rows = solver_schedule("euler", 4).rows
    settings = student_settings(
        teacher.model,
        {"backend": "torch", "model_sha256": files.sha256(teacher.model)},
        rows,
        2,
        100,
        Trained.of_model(teacher.path),
        steps=5,
        batch=4,
        seed=9,
    )
    run = Run(path)
    files.write_json(run.settings, settings)
    about = {**settings.origin(), "step": 5, "data": settings.data, "ema": 0.99}
    save_model(load_model(teacher.model), run.model, about=about)
    return run


@pytest.mark.usefixtures("few_images")
def test_a_distilled_run_is_shipped_with_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled with it alone; the split is its teacher's."""
    pytest.importorskip("torchmetrics", reason="the distances are torchmetrics'")
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(shipped, "FOLDER", folder)
    run = distilled(tmp_path / "run")
    arguments = [str(run.path), "--name", "drawn", "-n", "16", "--docs", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--data", "synthetic"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = shipped.model_path("drawn")
    assert distilled_schedule(model) == distilled_schedule(run.path)
    facts = shipped.facts("drawn")
    assert facts["sampling"]["steps"] == facts["reference"] == "distilled-2"
    assert facts["x0_errors"] is None
    found = Trained.of_model(model)
    assert found is not None
    assert (found.held_out, found.seed, found.images, found.data) == (0.3, 0, 42, None)
    card = (tmp_path / "drawn.md").read_text()
    assert "Distilled from `teacher`" in card
    assert "the split of seed 0 and fraction 0.3" in card
    assert str(tmp_path) not in json.dumps(facts) + card, "no paths of this machine"


@pytest.mark.usefixtures("few_images")
def test_a_run_is_shipped_with_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="the distances are torchmetrics'")
    folder, docs = tmp_path / "models", tmp_path / "docs"
    folder.mkdir()
    docs.mkdir()
    monkeypatch.setattr(shipped, "FOLDER", folder)
    run = trained(tmp_path / "run")
    monkeypatch.setattr(shipped, "DEFAULT", "drawn")
    stale = folder / "drawn" / "drawn.steps.json"
    stale.parent.mkdir()
    TunedSteps("other weights", 1, 24, 0, "euler-256", ()).write(stale)
    arguments = [str(run.path), "--name", "drawn", "-n", "16", "--remark", "Blocks, no cats."]
    arguments += ["--docs", str(docs)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "was fitted to another model" in result.output
    files_there = sorted(p.name for p in (folder / "drawn").iterdir())
    exported = ["manifest.json", "step.onnx", "verdicts"]
    assert files_there == ["drawn.json", "drawn.safetensors", *exported]
    assert "export: PSNR" in result.output
    kinds = ("gram.png", "lut.png", "md", "samples.png", "trajectory.png")
    assert sorted(p.name for p in docs.iterdir()) == [f"drawn.{kind}" for kind in kinds]
    assert shipped.names() == ("drawn",)
    config, about = read_metadata(shipped.model_path("drawn"))
    facts = shipped.facts("drawn")
    assert facts["training"]["model"] == config.to_dict()
    assert facts["training"]["images_seen"] == about["images_seen"] == 8
    assert facts["sampling"]["steps"] == "euler-64", "there are no fitted schedules"
    assert facts["metrics"] == facts["reference_metrics"]
    assert facts["metrics"]["images"] == facts["floor"]["images"] == 16
    card = (docs / "drawn.md").read_text()
    assert f"{facts['metrics']['frechet_distance']:.1f}" in card
    assert "Images seen: 8" in card
    assert card.rstrip().endswith("Blocks, no cats.")
    assert str(tmp_path) not in json.dumps(facts) + card, "no paths of this machine"
    assert "synthetic" not in about.values()
    again = ["--name", "drawn", "-n", "16", "--docs", str(docs)]
    result = CliRunner().invoke(main, again)
    assert "without a RUN, --data is needed" in result.output
    again += ["--data", "synthetic"]
    result = CliRunner().invoke(main, again, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    remeasured = shipped.facts("drawn")
    assert remeasured["training"] == facts["training"]
    assert (docs / "drawn.md").read_text() == card, "the same, since nothing has changed"


@pytest.mark.usefixtures("few_images")
def test_images_that_the_first_weights_had_seen_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's model takes the place of those weights, and again after it has been tuned."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    path = shipped.model_path("drawn")
    path.parent.mkdir()
    write_weights(trained(tmp_path / "first"), "drawn")
    run = Run(tmp_path / "second")
    settings = train_settings(
        model_config("dynamic-64", "tiny", depth=1),
        data="synthetic",
        steps=3,
        batch=4,
        init=str(path),
        init_sha256=files.sha256(path),
    )
    for _ in train(settings, draw_set(64), run, cadence=Cadence(10, 10, 10, 1)):
        pass
    for _ in range(2):
        _, about = read_metadata(write_weights(run, "drawn"))
        seen = {name: about[name] for name in ("images_seen", "init_images_seen")}
        assert seen == {"images_seen": 20, "init_images_seen": 8}
