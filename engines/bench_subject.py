"""What `lutdeploy bench` measures: a model file, and the exports of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lutdeploy import bundle, shipped
from lutdeploy.config import ModelConfig
from lutdeploy.errors import UsageError


@dataclass(frozen=True)
class Subject:
    """One model, by all its files."""

    name: str  # for people
    model: Path
    config: ModelConfig
    exports: tuple[Path, ...]  # newest first
    run: bundle.Run | None  # the user's own
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
    from engines import require_same_model
    from lutdeploy.checkpoint import read_metadata

    located = bundle.locate(path)
    if located.model is None:
        raise UsageError(f"{path} has no {bundle.MODEL} beside it to compare with")
    config, _ = read_metadata(located.model)
    with tempfile.TemporaryDirectory(prefix="lutdeploy-bench-") as folder:
        scratch = Path(folder)
        if located.export is not None:
            exports: tuple[Path, ...] = (located.export,)
        else:
            exports = tuple(located.run.exports()) if located.run else ()
            kinds = [(m.graph, m.precision) for m in map(bundle.read_manifest, exports)]
            if ("step", "fp32") not in kinds:
                on_export("export: step-fp32, for this benchmark alone")
                exports = (*exports, _export(located.model, bundle.Run(scratch / "run")))
        for export in exports:
            require_same_model(bundle.read_manifest(export), located.model)
        name = path.stem if shipped.is_shipped(path) else str(path)
        yield Subject(name, located.model, config, exports, located.run, scratch)


@contextlib.contextmanager
def random(config: ModelConfig, name: str) -> Iterator[Subject]:
    """A model with random weights: speed asks for no others."""
    import torch

    from lutdeploy.checkpoint import save_model
    from lutdeploy.model import LutTransformer

    with tempfile.TemporaryDirectory(prefix="lutdeploy-bench-") as folder:
        run = bundle.Run(Path(folder) / "run")
        torch.manual_seed(0)
        save_model(LutTransformer(config), run.model)
        exports = (_export(run.model, run), _export_int8(run))
        yield Subject(name, run.model, config, exports, None, Path(folder))


def _export(model: Path, run: bundle.Run) -> Path:
    """A float32 ``step`` export; the benchmark compares it with the original by itself."""
    from lutdeploy.checkpoint import load_model
    from lutdeploy.export import ExportPlan, export_model

    if not run.model.exists():
        bundle.write_atomic(run.model, model.read_bytes())
    return export_model(load_model(run.model), ExportPlan(), run, bundle.sha256(run.model))


def _export_int8(run: bundle.Run) -> Path:
    """An int8 ``step`` export with all products in int8."""
    from functools import partial

    from engines.quantizer import quantize_graph
    from lutdeploy.checkpoint import load_model
    from lutdeploy.export import ExportPlan, export_model

    model = load_model(run.model)
    plan, source = ExportPlan(precision="int8"), bundle.sha256(run.model)
    return export_model(model, plan, run, source, quantize=partial(quantize_graph, model=model))
