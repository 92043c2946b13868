"""Small models, exports made once, golden vectors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lutdeploy import bundle
from lutdeploy.checkpoint import from_author_state, load_model, save_model
from lutdeploy.config import PRESETS, ModelConfig, model_config
from lutdeploy.export import ExportPlan, export_model
from lutdeploy.model import LutTransformer
from lutdeploy.solvers import step_table
from tests.doubles import install
from tests.doubles.tensorrt_double import VERSIONS, Controls

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # a process for each core: more threads only get in the way


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


@dataclass(frozen=True)
class Golden:
    """Reference numbers from the original implementation."""

    config: ModelConfig
    state: dict[str, torch.Tensor]
    arrays: dict[str, NDArray[np.float32]]


@cache
def read_golden(preset: str) -> Golden:
    with np.load(GOLDEN / f"{preset}.npz") as file:
        values = {name: file[name] for name in file.files}
    told = json.loads(str(values["config"]))
    config = model_config(
        preset, "tiny", width=told["dim"], depth=told["depth"], heads=told["heads"]
    )
    state = {
        name.removeprefix("state/"): torch.from_numpy(value)
        for name, value in values.items()
        if name.startswith("state/")
    }
    return Golden(config, state, values)


@pytest.fixture(params=tuple(PRESETS))
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def golden(preset: str) -> Golden:
    return read_golden(preset)


def golden_model(preset: str) -> LutTransformer:
    """The tiny model of the golden vectors: outputs of about unit scale."""
    found = read_golden(preset)
    return from_author_state(found.state, found.config)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, the same in all processes that pytest-xdist starts."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def golden_runs(shared_folder: Path) -> Callable[[str], bundle.Run]:
    """A run folder for each preset, with the golden model."""

    @cache
    def make(preset: str) -> bundle.Run:
        run = bundle.Run(shared_folder / preset)
        with filelock.FileLock(shared_folder / "models.lock"):
            if not run.model.is_file():
                save_model(golden_model(preset), run.model)
        return run

    return make


@pytest.fixture(scope="session")
def exported(golden_runs: Callable[[str], bundle.Run], shared_folder: Path) -> Callable[..., Path]:
    """Export folders by (preset, graph, precision, solver, steps), each made once.

    They are shared: a test that changes one works on a copy.
    """

    @cache
    def make(
        preset: str = "static-tanh-64",
        graph: str = "step",
        precision: str = "fp32",
        solver: str = "dpmpp-2m",
        steps: int = 5,
    ) -> Path:
        run = golden_runs(preset)
        table = None if graph == "step" else step_table(solver, steps)
        plan = ExportPlan(graph, precision, table)
        folder = run.export_folder(plan.name)
        with filelock.FileLock(shared_folder / f"{preset}-{plan.name}.lock"):
            if not folder.is_dir():
                export_model(load_model(run.model), plan, run, bundle.sha256(run.model))
        return folder

    return make


@dataclass(frozen=True)
class TensorRT:
    """The double in place of TensorRT, and the handles of a test on it."""

    module: Any
    controls: Controls
    again: Callable[..., None]  # put it in place once more, as another machine


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """TensorRT's double, in both versions, and a CPU in place of the GPU."""
    controls = Controls()

    def again(version: str = request.param, **device: Any) -> None:
        install(monkeypatch, version, controls, **device)

    return TensorRT(install(monkeypatch, request.param, controls), controls, again)


@pytest.fixture
def built_run(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., bundle.Run]:
    """A run of its own with the named exports, ready for `lutdeploy build`."""

    def make(*graphs: str, preset: str = "static-tanh-64", precision: str = "fp16") -> bundle.Run:
        run = bundle.Run(tmp_path / "run")
        for graph in graphs or ("step",):
            source = exported(preset, graph, precision)
            shutil.copytree(source, run.export_folder(source.name))
            shutil.copy(source.parent.parent / bundle.MODEL, run.model)
        return run

    return make
