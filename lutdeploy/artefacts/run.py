"""The run folder and its file names, which no other module knows.

    runs/NAME/
      model.safetensors        weights and config (training: the EMA)
      train.json train.jsonl   settings and log of the training
      images.sha256            the images of the training, as sha256sum lists files
      training-state.safetensors   all that --resume needs
      paths.f16                the teacher's paths, of a distilled model
      samples/                 pictures made while training
      onnx/EXPORT/             graphs, one weights file, manifest.json
      verdicts/                what the checks of exports and engines found, a file each
      bench.json bench.png     the last speed measurement
      steps.json               schedules fitted to the model, by `lutdeploy tune-steps`
      evaluation.json evaluation.html   how good the pictures are, by `lutdeploy evaluate`
      engines/KEY.plan         a TensorRT engine, and beside it KEY.json: what it was built from
      engines/timing.cache     what its builder measured

Every file is written beside its place and renamed into it, so that a reader sees a whole
file or none, whenever a writer is killed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.errors import UsageError

RUNS = Path("runs")
MODEL = "model.safetensors"
EVALUATION = "evaluation.json"
EVALUATION_PAGE = "evaluation.html"
KEY_DIGITS = 20  # of an engine's key in its file names


@dataclass(frozen=True)
class Run:
    """A run folder; nothing is read until asked for."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def settings(self) -> Path:
        return self.path / "train.json"

    @property
    def log(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def images(self) -> Path:
        """The images of the training (:mod:`lutdeploy.training.data`)."""
        return self.path / "images.sha256"

    @property
    def training_state(self) -> Path:
        return self.path / "training-state.safetensors"

    @property
    def paths(self) -> Path:
        """What a distilled model learns from (:mod:`lutdeploy.training.few_steps.distill`)."""
        return self.path / "paths.f16"

    @property
    def averages(self) -> Path:
        """Where the averages of the weights that training kept are, one model file each."""
        return self.path / "averages"

    def average(self, decay: float) -> Path:
        return self.averages / f"{decay_name(decay)}.safetensors"

    @property
    def pictures(self) -> Path:
        return self.path / "samples"

    @property
    def verdicts(self) -> Path:
        """Folder of the checks' verdicts (:mod:`lutdeploy.artefacts.verdicts`)."""
        return self.path / "verdicts"

    @property
    def old_verdicts(self) -> Path:
        """Where earlier versions kept what `lutdeploy parity` found."""
        return self.path / "parity.json"

    @property
    def bench(self) -> Path:
        """What `lutdeploy bench` measured."""
        return self.path / "bench.json"

    @property
    def bench_plot(self) -> Path:
        """The same as a plot; it has the name of the JSON, wherever that is written."""
        return self.bench.with_suffix(".png")

    @property
    def tuned_steps(self) -> Path:
        """Schedules fitted to the run's model (:mod:`lutdeploy.artefacts.tuned_steps`)."""
        return tuned_steps_file(self.model)

    @property
    def exports_folder(self) -> Path:
        """Locked by whoever writes exports or what describes them."""
        return self.path / "onnx"

    def export_folder(self, name: str) -> Path:
        return self.exports_folder / name

    def float32_step(self, source_sha256: str) -> Path | None:
        """The float32 ``step`` export of a model file; None where there is none of it."""
        folder = self.export_folder("step-fp32")
        if (folder / MANIFEST).is_file() and read_manifest(folder).source_sha256 == source_sha256:
            return folder
        return None

    @property
    def engines(self) -> Path:
        return self.path / "engines"

    def plan(self, key: str) -> Path:
        """The TensorRT engine of a key (:mod:`lutdeploy.engines.tensorrt.plan`)."""
        return self.engines / f"{key[:KEY_DIGITS]}.plan"

    def plan_record(self, key: str) -> Path:
        """What an engine was built from; the engine itself stands beside it."""
        return self.engines / f"{key[:KEY_DIGITS]}.json"

    def plan_records(self) -> list[Path]:
        """The records of all engines, by name."""
        return sorted(self.engines.glob("[0-9a-f]*.json"))

    @property
    def timing_cache(self) -> Path:
        return self.engines / "timing.cache"

    def exports(self) -> list[Path]:
        """Export folders, newest first (by the time in the manifest, not the file's)."""
        folder = self.exports_folder
        found = [
            entry
            for entry in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if not entry.name.startswith(".") and (entry / MANIFEST).is_file()
        ]
        created = {entry: read_manifest(entry).created for entry in found}
        return sorted(found, key=lambda entry: created[entry], reverse=True)


@dataclass(frozen=True)
class Located:
    """What a path given by a user stands for; at least one of model and export is there."""

    model: Path | None
    export: Path | None  # only when the path names one export folder
    run: Run | None

    def exports(self) -> list[Path]:
        """The export folders that the path stands for, newest first.

        A model file alone has at most one, around it: an export that reads its weights from it.
        """
        if self.export is not None:
            return [self.export]
        if self.run is not None:
            return self.run.exports()
        folder = self.model.parent if self.model else None
        return [folder] if folder and (folder / MANIFEST).is_file() else []


def require_text(path: Path) -> None:
    """Refuse a name for models whose bytes are no text: safetensors and the runtimes need UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{path}: this name has bytes that are no text ({sys.getfilesystemencoding()}), and "
            "the libraries that read models need text; rename it, or set PYTHONUTF8=1"
        ) from error


def locate(path: Path) -> Located:
    """Tell a run folder, an export folder and a model file apart."""
    if path.exists():
        require_text(path)
    if path.is_file() and path.suffix == ".safetensors":
        return Located(path, None, None)
    if path.is_file():
        weights = path.suffix in (".pth", ".pt", ".ckpt", ".bin")
        hint = "; `lutdeploy import` reads it" if weights else ""
        raise UsageError(f"{path} is neither a run, an export nor a model.safetensors{hint}")
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a link to {os.readlink(path)}, which is not there")
    if not path.is_dir():
        names = sorted(str(found.parent) for found in RUNS.glob(f"*/{MODEL}"))
        there = f"there are {', '.join(names)}" if names else f"there is none under {RUNS}/"
        raise UsageError(f"{path}: no such run; {there}")
    if (path / MANIFEST).is_file():
        # Where it was named, else where its files are: exports and runs may be links.
        places = (Path(os.path.abspath(path)), path.resolve())
        runs = (Run(place.parent.parent) for place in places)
        found = next((run for run in runs if run.model.is_file()), None)
        return Located(found.model if found else None, path, found)
    run = Run(path)
    if not run.model.is_file():
        started = run.settings.is_file()
        why = "its training has saved no checkpoint yet" if started else "it is no run"
        if run.model.is_symlink():
            why = f"it is a link to {os.readlink(run.model)}, which is not there"
        raise UsageError(f"{path} holds no {MODEL}: {why}")
    return Located(run.model, None, run)


def decay_name(decay: float) -> str:
    """The name of an average of the weights, in files and in the training state."""
    return f"ema-{decay:g}"


def tuned_steps_file(model: Path) -> Path:
    """Where the fitted schedules of a model file are: beside it."""
    name = "steps.json" if model.name == MODEL else f"{model.stem}.steps.json"
    return model.parent / name


def newest_run(root: Path = RUNS) -> Run | None:
    """The run under ``root`` whose model was written last; None when there is none."""
    models = list(root.glob(f"*/{MODEL}")) if root.is_dir() else []
    newest = max(models, key=lambda path: path.stat().st_mtime_ns, default=None)
    return Run(newest.parent) if newest else None
