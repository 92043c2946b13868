"""What `lutdeploy bench` measures: a model file, and the exports of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, Run, locate
from lutdeploy.config import ModelConfig
from lutdeploy.errors import UsageError


@dataclass(frozen=True)
class Subject:
    """One model, by all its files."""

    name: str  # for people
    model: Path
    config: ModelConfig
    exports: tuple[Path, ...]  # newest first
    run: Run | None  # the user's own
    scratch: Path  # a folder that goes when the benchmark has ended


@contextlib.contextmanager
def given(path: Path, on_export: Callable[[str], None]) -> Iterator[Subject]:
    """A run, a model.safetensors, or one export with its run around it.

    A run without a float32 ``step`` export gets one in the scratch folder.

    Args:
        path: as a user gives it.
        on_export: told before that is made.

    Raises:
        UsageError: nothing there, or an export without its model, whose layout the original's
            is made of.
        ArtefactError: a damaged file, or an export of another model.
    """
    from lutdeploy.artefacts.checkpoint import read_metadata
    from lutdeploy.engines import require_same_model

    located = locate(path)
    if located.model is None:
        raise UsageError(f"{path} has no {MODEL} beside it to compare with")
    config, _ = read_metadata(located.model)
    with tempfile.TemporaryDirectory(prefix="lutdeploy-bench-") as folder:
        scratch = Path(folder)
        if located.export is not None:
            exports: tuple[Path, ...] = (located.export,)
        else:
            exports = tuple(located.run.exports()) if located.run else ()
            kinds = [(m.graph, m.precision) for m in map(read_manifest, exports)]
            if ("step", "fp32") not in kinds:
                on_export("export: step-fp32, for this benchmark alone")
                exports = (*exports, _export(located.model, Run(scratch / "run")))
        for export in exports:
            require_same_model(read_manifest(export), located.model)
        name = path.stem if shipped.is_shipped(path) else str(path)
        yield Subject(name, located.model, config, exports, located.run, scratch)


@contextlib.contextmanager
def random(config: ModelConfig, name: str) -> Iterator[Subject]:
    """A model with random weights: speed asks for no others."""
    import torch

    from lutdeploy.artefacts.checkpoint import save_model
    from lutdeploy.model import LutTransformer

    with tempfile.TemporaryDirectory(prefix="lutdeploy-bench-") as folder:
        run = Run(Path(folder) / "run")
        torch.manual_seed(0)
        save_model(LutTransformer(config), run.model)
        exports = (_export(run.model, run), _export_int8(run))
        yield Subject(name, run.model, config, exports, None, Path(folder))


def _export(model: Path, run: Run) -> Path:
    """A float32 ``step`` export; the benchmark compares it with the original by itself."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.export.graphs import ExportPlan, export_model

    if not run.model.exists():
        files.write_atomic(run.model, model.read_bytes())
    return export_model(load_model(run.model), ExportPlan(), run, files.sha256(run.model))


def _export_int8(run: Run) -> Path:
    """An int8 ``step`` export with all products in int8."""
    from functools import partial

    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.export.graphs import ExportPlan, export_model
    from lutdeploy.engines.export.int8 import quantize_graph

    model = load_model(run.model)
    plan, source = ExportPlan(precision="int8"), files.sha256(run.model)
    return export_model(model, plan, run, source, quantize=partial(quantize_graph, model=model))
