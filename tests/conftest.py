"""Small models, exports made once, golden vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import filelock
import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import from_author_state, load_model, save_model
from lutdeploy.artefacts.manifest import MANIFEST
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.config import PRESETS, ModelConfig, model_config
from lutdeploy.engines.export.graphs import ExportPlan, export_model
from lutdeploy.engines.tensorrt.library import MODULES
from lutdeploy.model import LutTransformer
from lutdeploy.schedule import solver_schedule
from tests import traces
from tests.artefact_files import make_artefacts
from tests.command import succeed
from tests.doubles import install
from tests.doubles.tensorrt_double import VERSIONS, Controls

GOLDEN = Path(__file__).parent / "golden"


# The suite tries the same inputs each time; HYPOTHESIS_PROFILE=fuzz tries many, always others.
hypothesis.settings.register_profile("suite", max_examples=20, derandomize=True, database=None)
hypothesis.settings.register_profile("fuzz", max_examples=1000, database=None, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_configure() -> None:
    torch.set_num_threads(1)  # on tiny models, threads only wait for each other
    # A fifth of an export's time, in which torch lists the same operators each time.
    read = cache(ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(read)  # type: ignore[method-assign]


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


@pytest.fixture(scope="session", autouse=True)
def traced_once(shared_folder: Path) -> Iterator[None]:
    """Every export of the session gets the graph of its network from :mod:`tests.traces`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.onnx, "export", traces.remembering(shared_folder))
        yield


@pytest.fixture(scope="session")
def golden_runs(shared_folder: Path) -> Callable[[str], Run]:
    """A run folder for each preset, with the golden model."""

    @cache
    def make(preset: str) -> Run:
        run = Run(shared_folder / preset)
        with filelock.FileLock(shared_folder / "models.lock"):
            if not run.model.is_file():
                save_model(golden_model(preset), run.model)
        return run

    return make


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Folders in which nothing can be written: by a mount for root, whom no permissions bind."""
    changed: list[Path] = []

    def make(folder: Path) -> Path:
        changed.append(folder)
        if os.geteuid() != 0:
            for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
                path.chmod(0o500)
            return folder
        done = subprocess.run(
            ["mount", "--bind", "-o", "ro", folder, folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no read-only folder for root here: {done.stderr.strip()}")
        return folder

    if os.name != "posix" or (os.geteuid() == 0 and shutil.which("mount") is None):
        pytest.skip("no read-only folders here: permissions do not bind root, and mount is missing")
    yield make
    for folder in changed:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], capture_output=True)
        else:
            for path in (folder, *folder.rglob("*")):
                if path.is_dir():
                    path.chmod(0o700)


def quantizer(model: LutTransformer, kept: tuple[str, ...] = ()) -> Callable[[Path], Any]:
    """What export_model asks for in order to make an int8 export."""
    from lutdeploy.engines.export.int8 import quantize_graph

    return partial(quantize_graph, model=model, kept=kept)


@pytest.fixture(scope="session")
def exported(golden_runs: Callable[[str], Run], shared_folder: Path) -> Callable[..., Path]:
    """Export folders by (preset, graph, precision, solver, steps), each made once.

    They are shared: a test that changes one works on a copy.
    """

    @cache
    def make(
        preset: str = "static-tanh-64",
        graph: str = "step",
        precision: str = "fp32",
        solver: str = "dpmpp-3m",  # one of its five steps needs two x0 from the past
        steps: int = 5,
    ) -> Path:
        run = golden_runs(preset)
        schedule = None if graph == "step" else solver_schedule(solver, steps)
        plan = ExportPlan(graph, precision, schedule)
        folder = run.export_folder(plan.name)
        with filelock.FileLock(shared_folder / f"{preset}-{plan.name}.lock"):
            if not folder.is_dir():
                model, source = load_model(run.model), files.sha256(run.model)
                quantize = quantizer(model) if precision == "int8" else None
                export_model(model, plan, run, source, quantize=quantize)
        return folder

    return make


@pytest.fixture(scope="session")
def artefacts(exported: Callable[..., Path], shared_folder: Path) -> Path:
    """A folder with one artefact of each kind; tests work on copies."""
    ready = shared_folder / "artefacts"
    with filelock.FileLock(shared_folder / "artefacts.lock"):
        if not ready.is_dir():
            stage = shared_folder / "artefacts-stage"
            stage.mkdir()
            make_artefacts(stage, exported)
            stage.rename(ready)
    return ready


@dataclass(frozen=True)
class TensorRT:
    """The double in place of TensorRT, and the handles of a test on it."""

    module: Any
    controls: Controls
    again: Callable[..., Any]  # put it in place once more, as another machine

    @property
    def backend(self) -> str:
        return next(name for name, module in MODULES.items() if module == self.module.__name__)


# For tests in which the TensorRT makes no difference, and for those of one of the two.
one_version = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
rtx_only = pytest.mark.parametrize("tensorrt", ["rtx-1.7"], indirect=True)


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """The double of each TensorRT, and a CPU in place of the GPU."""
    controls = Controls()

    def put(version: str = request.param, **device: Any) -> Any:
        module = install(monkeypatch, version, controls, **device)
        # Two images are enough to tell right from wrong.
        monkeypatch.setattr("lutdeploy.engines.tensorrt.job.IMAGES", 2)
        return module

    return TensorRT(put(), controls, put)


@pytest.fixture
def exported_run(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """A run of the test's own with the named exports, ready for `lutdeploy build`."""

    def make(*graphs: str, preset: str = "static-tanh-64", precision: str = "fp16") -> Run:
        run = Run(tmp_path / "run")
        for graph in graphs or ("step",):
            _copy_export(exported(preset, graph, precision), run)
        if precision == "fp16":
            _add_reference(exported(preset), run)
        return run

    return make


def _copy_export(source: Path, run: Run) -> None:
    shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)


def _add_reference(source: Path, run: Run) -> None:
    """The float32 step export that a build compares with, older than the others."""
    _copy_export(source, run)
    manifest = run.export_folder(source.name) / MANIFEST
    files.write_json(manifest, {**files.read_json(manifest), "created": "2000-01-01"})


@pytest.fixture
def built_run(
    tensorrt: TensorRT, exported: Callable[..., Path], shared_folder: Path, tmp_path: Path
) -> Callable[..., Run]:
    """A run of the test's own with an export and its checked engines, batch 1:2:4."""

    def make(graph: str = "step") -> Run:
        source = exported("static-tanh-64", graph, "fp16")
        ready = shared_folder / f"built-{tensorrt.module.__version__}-{graph}"
        with filelock.FileLock(shared_folder / f"{ready.name}.lock"):
            if not Run(ready).plan_records():
                shutil.rmtree(ready, ignore_errors=True)
                _add_reference(exported("static-tanh-64"), Run(ready))
                _copy_export(source, Run(ready))
                succeed("build", ready, "--backend", tensorrt.backend, "--batch", "1:2:4")
        shutil.copytree(ready, tmp_path / "run")
        for name in ("builds", "deserialized", "executions", "evaluations", "compiled"):
            setattr(tensorrt.controls, name, 0)
        return Run(tmp_path / "run")

    return make
