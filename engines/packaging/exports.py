"""The exports that packages are made of: verified ones of the run, made where there are none."""

from __future__ import annotations

from collections.abc import Callable

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, Manifest, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import usable_schedules
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.engines.onnxruntime import CPU, OnnxRuntimeDenoiser


def verified_step(
    run: Run, precision: str, note: Callable[[str], None], license: str | None = None
) -> Manifest:
    """The run's ``step`` export of a precision; made here where there is none of its model.

    Args:
        run: holds the model, and gets a new export and its verdict.
        precision: "fp32" or "fp16".
        note: told which export it is, or that one is made.
        license: of the model, for the graph of a new one.

    Raises:
        ParityError: its last check failed, or the new one differs from PyTorch.
        ArtefactError: a file that is not what the manifest says.
    """
    folder, source = run.export_folder(f"step-{precision}"), files.sha256(run.model)
    if (folder / MANIFEST).is_file() and read_manifest(folder).source_sha256 == source:
        note(f"export: {folder}")
    else:
        with files.lock(run.exports_folder, "`lutdeploy export`"):
            _export(run, precision, source, note, license)
    manifest = read_manifest(folder)
    manifest.verify()
    require_passed(
        folder,
        {
            "backend": OnnxRuntimeDenoiser.backend,
            "device": CPU,
            "export": manifest.name,
            "engine_sha256": manifest.weights_sha256,
        },
        note,
    )
    return manifest


def _export(
    run: Run, precision: str, source: str, note: Callable[[str], None], license: str | None
) -> None:
    """As `lutdeploy export` does; the one place here that needs PyTorch."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.export.check import export_checked
    from lutdeploy.engines.export.graphs import ExportPlan

    plan = ExportPlan("step", precision)
    note(f"export: {run.export_folder(plan.name)} is made and checked against PyTorch")
    tuned = usable_schedules(run.path, source, note)
    export_checked(load_model(run.model), plan, run, source, tuned, note, license=license)
