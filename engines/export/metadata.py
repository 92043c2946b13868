"""What a graph says of itself: its ONNX metadata, for whoever has the file without its manifest.

All of it follows from the model and the plan. What PyTorch's exporter records, stack traces with
the paths of one machine among it, is left out before (:mod:`lutdeploy.engines.export.graphs`), so
that an export has the same bytes anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import onnx

from lutdeploy.artefacts import files, shipped
from lutdeploy.config import ModelConfig
from lutdeploy.schedule import Schedule

LICENSE = "model_license"  # ONNX's own name: https://onnx.ai/onnx/repo-docs/MetadataProps.html
PREFIX = "lutdeploy."


def describe_graphs(
    folder: Path,
    graphs: Sequence[str],
    kind: str,
    precision: str,
    config: ModelConfig,
    schedule: Schedule | None,
    model_sha256: str,
    license: str | None = None,
) -> None:
    """Write the metadata into the graphs of an export, once they and their weights are complete.

    Args:
        folder: of the export.
        graphs: file names, in step order.
        kind, precision: of the export.
        config: of the model.
        schedule: of the export, if it holds one.
        model_sha256: of the model file.
        license: of the model, an SPDX identifier or the like; that of a model of the package is
            known, and none is stated for others.
    """
    if license is None and shipped.named(model_sha256) is not None:
        license = shipped.LICENSE
    outside = sorted(path for path in folder.iterdir() if path.name not in graphs)
    told = {
        "graph": kind,
        "precision": precision,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "model_sha256": model_sha256,
        "weights_sha256": json.dumps({path.name: files.sha256(path) for path in outside}),
    }
    if schedule is not None:
        told["schedule"] = json.dumps(msgspec.to_builtins(schedule), sort_keys=True)
    named = {f"{PREFIX}{name}": value for name, value in told.items()}
    if license is not None:
        named[LICENSE] = license
    for step, name in enumerate(graphs):
        model = onnx.load(folder / name, load_external_data=False)
        own = {f"{PREFIX}step": str(step)} if kind == "per-step" else {}
        onnx.helper.set_model_props(model, named | own)
        files.write_atomic(folder / name, model.SerializeToString(deterministic=True))
