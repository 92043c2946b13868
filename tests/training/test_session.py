"""What surrounds a training run: requests, resumed settings, a longer run's learning rate."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import save_model
from lutdeploy.artefacts.run import Run
from lutdeploy.config import ModelConfig
from lutdeploy.errors import (
    ArtefactError,
    BackendError,
    ConfigError,
    LutDeployError,
    Terminated,
    UsageError,
)
from lutdeploy.model import LutTransformer
from lutdeploy.training import session
from lutdeploy.training.data import ImageSet, draw_set
from lutdeploy.training.processes import Processes
from lutdeploy.training.recipes import RECIPE_FIELDS, TrainSettings, field_problem
from lutdeploy.training.session import (
    Request,
    extended,
    new_settings,
    parse_overrides,
    resumed_settings,
)
from lutdeploy.training.state import TrainingState

DEFAULTS: dict[str, Any] = {
    "data": "faces",
    "recipe": "modern",
    "steps": 100,
    "batch": 8,
    "seed": 0,
    "init": None,
    "lr": None,
    "t_mean": None,
    "gram_weight": None,
    "ema": (),
    "held_out": 0.05,
    "perceptual": None,
    "precision": "fp32",
}


def request(
    *overrides: str, compile: str = "off", warm_restart: bool = False, **given: Any
) -> Request:
    """A command line on which the ``given`` options stand."""
    model = {name: given.pop(name, default) for name, default in MODEL.items()}
    names = {*given, *(name for name in model if model[name] != MODEL[name])}
    return Request(
        given=frozenset({*names, "compile"}),
        overrides=overrides,
        compile=compile,
        warm_restart=warm_restart,
        fields={**DEFAULTS, **given},
        **model,
    )


MODEL = {"preset": "static-tanh-64", "size": "tiny"}


@pytest.fixture
def said() -> list[str]:
    return []


def test_options_and_overrides_make_the_settings(said: list[str]) -> None:
    asked = request("width=32", "dropout=0.1", "clip_norm=null", "ema=[0.5]", lr=0.1, ema=(0.9,))
    settings = new_settings(asked, said.append)
    assert (settings.model.width, settings.model.depth) == (32, 2)
    assert (settings.lr, settings.dropout, settings.clip_norm) == (0.1, 0.1, None)
    assert settings.ema == (0.5,), "--set comes last"
    assert new_settings(request(), said.append).ema == (0.99, 0.998, 0.9998)
    assert said == []


@pytest.mark.parametrize(
    ("steps", "problem", "compiles"),
    [(999, None, False), (1000, None, True), (1000, "no Python.h", False)],
)
def test_long_runs_compile_where_that_works(
    steps: int,
    problem: str | None,
    compiles: bool,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "compile_problem", {"cuda:1": problem}.__getitem__)
    asked = request(compile="auto", steps=steps)
    assert new_settings(asked, said.append, "cuda:1").compile == compiles
    assert said == (
        [] if problem is None else ["no Python.h; training without it, which is slower"]
    )


def test_what_was_compiled_goes_on_as_it_can(
    run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = new_settings(request(), print)
    files.write_json(run.settings, stored.changed(compile=True))
    monkeypatch.setattr(session, "compile_problem", lambda device: None)
    assert resumed_settings(run, request(compile="auto"), print).compile
    assert not resumed_settings(run, request(compile="off"), print).compile
    monkeypatch.setattr(session, "compile_problem", lambda device: "no Python.h")
    assert not resumed_settings(run, request(compile="auto"), said.append).compile
    assert said == ["no Python.h; training without it, which is slower"]
    with pytest.raises(BackendError, match=r"no Python.h; --compile off trains without it"):
        resumed_settings(run, request(compile="on"), print)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("cosine=True", "cosine cannot be 'True': .*; write cosine=true or cosine=false"),
        ("ema=0.99", r"ema cannot be 0.99: .*; write ema=\[0.99,0.998,0.9998\]"),
        ("start=copied", "start cannot be 'copied': .*; write start=noise or start=copy"),
        ("flip=2", "flip cannot be 2: .*; write flip=0.5"),
        ("steps=5", "it has an option of its own, --steps 5"),
        ("held-out=0.5", "it has an option of its own, --held-out 0.5"),
        ("preset=dynamic-64", "it has an option of its own, --preset dynamic-64"),
        ("nothing=1", "there is no field 'nothing'; there are betas, .*, width"),
        ("Widht=96", r"there is no field 'Widht'; did you mean width=96\?"),
        ("weight-decay=0", r"there is no field 'weight-decay'; did you mean weight_decay=0\?"),
        ("width", "write FIELD=VALUE, such as --set width=96"),
    ],
)
def test_overrides_say_what_to_write(pair: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--set {pair}: {message}"):
        new_settings(request(pair), print)


def test_every_field_can_be_written_as_its_example() -> None:
    """What a message advises is accepted."""
    for name in RECIPE_FIELDS:
        advice = field_problem(name, {})
        assert advice is not None
        for form in advice.partition("; write ")[2].split(" or "):
            model, recipe = parse_overrides((form,), ())
            assert not model and set(recipe) == {name}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was started and has saved nothing yet."""
    run = Run(tmp_path / "run")
    files.write_json(run.settings, new_settings(request("width=32"), print))
    return run


def test_a_command_is_repeated_with_the_model_that_it_began_with(
    run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent)
    save_model(LutTransformer(new_settings(request(), print).model), Run(Path("other")).model)
    settings = new_settings(request(init="other"), said.append)
    assert settings.init == str(run.path.parent / "other")
    for stored in (settings.init, "other"):  # the latter by an earlier version
        files.write_json(run.settings, settings.changed(init=stored))
        assert resumed_settings(run, request(init="other"), print).init == stored
        with pytest.raises(UsageError, match=r"--init .*third: .* was started with"):
            resumed_settings(run, request(init="third"), print)


def test_averages_have_names_of_their_own() -> None:
    """Of decays that print alike, one average would overwrite the other."""
    with pytest.raises(ConfigError, match=r"needs a name of its own in six digits"):
        new_settings(request(ema=(0.99999991, 0.99999992)), print)
    assert new_settings(request(ema=(0.99999, 0.999999)), print).ema == (0.99999, 0.999999)


def test_a_resumed_run_keeps_its_settings(run: Run, said: list[str]) -> None:
    stored = new_settings(request("width=32"), print)
    assert resumed_settings(run, request(), said.append) == stored
    same = request("width=32", "dropout=0", compile="auto", batch=8, size="small", steps=100)
    with pytest.raises(UsageError, match=r"depth 8: .*run was started with 2"):
        resumed_settings(run, same, said.append)
    moved = resumed_settings(run, request("width=32", "ema=[0.99,0.998,0.9998]", data="b"), print)
    assert moved == stored.changed(data=str(Path("b").absolute()))
    with pytest.raises(UsageError, match=r"--batch 4: .*run was started with 8"):
        resumed_settings(run, request(batch=4), said.append)
    assert said == []


def test_a_run_can_begin_with_the_weights_of_another(tmp_path: Path, said: list[str]) -> None:
    other = Run(tmp_path / "other")
    model = LutTransformer(ModelConfig(width=32, depth=2, heads=2))
    save_model(model, other.model)
    settings = new_settings(request(init=str(other.path)), said.append)
    assert settings.model == model.config
    first = TrainingState(settings, torch.device("cpu")).model
    assert first.training
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)
    assert said == [f"first weights: {other.model}"]
    with pytest.raises(UsageError, match=r"--init .* decides the model"):
        new_settings(request("width=64", init=str(other.path)), said.append)
    save_model(LutTransformer(model.config), other.model)
    with pytest.raises(ArtefactError, match="is not the model any more"):
        TrainingState(settings, torch.device("cpu"))


def settings_of(**values: Any) -> TrainSettings:
    return new_settings(request(), print).changed(warmup=10, **values)


def test_a_longer_run_says_where_its_rate_jumps(said: list[str]) -> None:
    settings = settings_of(steps=100)
    longer = extended(settings, 200, 100, False, said.append)
    assert longer == settings.changed(steps=200)
    rate = longer.learning_rate(100)
    assert rate > 0.4 * settings.lr > 1e-3 * settings.lr > settings.learning_rate(100)
    (line,) = said
    assert f"{rate:.3g} at step 101, where the run of 100 steps had 0;" in line
    assert "--warm-restart" in line


def test_a_warm_restart_warms_up_and_decays_over_what_is_left(said: list[str]) -> None:
    settings = settings_of(steps=100)
    restarted = extended(settings, 150, 100, True, said.append)
    assert restarted == settings.changed(steps=150, restart=100)
    rates = [restarted.learning_rate(step) for step in range(100, 151)]
    assert rates[0] == settings.lr / 10
    assert max(rates) == rates[10] == settings.lr
    assert math.isclose(rates[-1], 0, abs_tol=1e-12)
    assert "begin again and end at step 150" in said.pop()
    assert extended(restarted, 150, 120, True, said.append) == restarted, "the command repeated"
    assert extended(restarted, 150, 120, False, said.append) == restarted
    assert said == []


def test_nothing_is_said_where_the_rate_stays(said: list[str]) -> None:
    settings = settings_of(steps=100)
    assert extended(settings, 100, 50, False, said.append) == settings
    assert extended(settings, 200, 5, False, said.append).steps == 200, "in the warm-up"
    constant = settings.changed(cosine=False)
    assert extended(constant, 200, 100, False, said.append).steps == 200
    assert said == []


def test_a_warm_restart_that_makes_no_sense(said: list[str]) -> None:
    settings = settings_of(steps=100)
    with pytest.raises(UsageError, match="beyond the run's 100"):
        extended(settings, 100, 50, True, said.append)
    with pytest.raises(UsageError, match="this run's is constant"):
        extended(settings.changed(cosine=False), 200, 100, True, said.append)
    with pytest.raises(UsageError, match="it needs --resume"):
        new_settings(request(warm_restart=True), said.append)


def test_a_description_names_unreadable_files_and_slow_bf16(said: list[str]) -> None:
    data = ImageSet(draw_set(8, count=2).images, tuple(f"{k}.png: broken" for k in range(30)))
    settings = settings_of(precision="bf16")
    session.describe(settings, data, Processes("cpu"), lambda: 0.25, said.append)
    assert said[0].startswith("data: 2 images, 30 unreadable; model: static-tanh-64, width 64")
    assert said[1] == "  skipped 0.png: broken"
    assert said[21] == "  … and 10 more"
    assert "0.25 × the speed of float32; --precision fp32" in said[22]


def test_devices_have_the_same_words_as_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, device in (("auto", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert session.choose_device(name) == device
    with pytest.raises(BackendError, match=r"no CUDA device 'cuda:2' .* sees cuda:0, cuda:1;"):
        session.choose_device("cuda:2")
    with pytest.raises(BackendError, match="no MPS device 'mps' here; torch sees none"):
        session.choose_device("mps")
    with pytest.raises(UsageError, match="'gpu' is no device; write cpu, cuda, cuda:N or mps"):
        session.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert session.choose_device("auto") == "cpu"
    peaks = {("cuda:1", "bf16"): 3.0}
    assert session.peak_of(Processes("cuda:1"), "bf16", lambda *of: peaks[of]) == 3.0
    assert session.peak_of(Processes("mps"), "fp32", lambda device, precision: 5.0) is None


@pytest.mark.parametrize(("count", "peak"), [(1, 5), (2, None)])
def test_processes_that_share_a_cpu_have_no_peak(count: int, peak: float | None) -> None:
    processes = Processes("cpu")
    processes.count = count
    assert session.peak_of(processes, "fp32", lambda device, precision: 5.0) == peak


def test_a_signal_is_a_request_and_a_second_an_interrupt(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with session.stoppable(run, Processes("cpu")) as requests:
        handler = signal.getsignal(signal.SIGTERM)  # called, not sent: it would end the worker
        assert callable(handler) and not requests
        handler(signal.SIGTERM, None)
        assert requests == [signal.SIGTERM]
        with pytest.raises(Terminated):
            handler(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) is before
    new = Run(run.path.with_name("new"))
    with pytest.raises(LutDeployError, match="x: No space; nothing was saved yet"):
        with session.stoppable(new, Processes("cpu")):
            raise OSError(28, "No space", "x")
    with pytest.raises(LutDeployError, match="x: No space; what was saved before is kept"):
        with session.stoppable(run, Processes("cpu")):
            raise OSError(28, "No space", "x")
