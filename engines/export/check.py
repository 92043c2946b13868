"""Exports that are held against PyTorch before they take their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts, store_verdict, verdict_of
from lutdeploy.engines.export.graphs import ExportPlan, OnPhase, export_model
from lutdeploy.engines.export.int8 import export_int8
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.errors import ParityError
from lutdeploy.model import LutTransformer
from lutdeploy.parity import compare
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import Schedule


def export_checked(
    model: LutTransformer,
    plan: ExportPlan,
    run: Run,
    source_sha256: str,
    tuned: Sequence[Schedule],
    note: Callable[[str], None],
    on_phase: OnPhase = lambda phase: None,
    license: str | None = None,
) -> Path:
    """Export into the run folder and keep the export where it passes :func:`check_export`.

    Args:
        model: the float32 model, on the CPU.
        plan: what to export. Of an int8 export, matmuls that int8 spoils stay float32.
        run: gets the export, in the place of one of the same name, and its verdict.
        source_sha256: of the model file, for the manifest.
        tuned: the model's tuned schedules, for the manifest.
        note: told what is measured, tried and found.
        on_phase: told what is done now.
        license: of the model, for the graphs.

    Returns:
        The export folder.

    Raises:
        ParityError: the export differs from PyTorch. The run is left as it was.
    """
    verdicts: list[Verdict] = []

    def check(folder: Path) -> None:
        verdicts.append(check_export(model, plan, folder, note))

    export = partial(
        export_model,
        *(model, plan, run, source_sha256, check),
        tuned=tuned,
        on_phase=on_phase,
        license=license,
    )
    folder = export_int8(model, export, note) if plan.precision == "int8" else export()
    verdict = verdicts[-1]
    # Where the same bytes were judged before, `lutdeploy parity` may have asked more of them.
    if not any(known.key == verdict.key for known in read_verdicts(run)):
        store_verdict(run, verdict)
    return folder


def check_export(
    model: LutTransformer, plan: ExportPlan, folder: Path, note: Callable[[str], None]
) -> Verdict:
    """Hold an export in ONNX Runtime against PyTorch.

    Raises:
        ParityError: they differ by more than the limits of the precision.
    """
    levels: tuple[str, ...] = ("step",)
    if plan.graph == "loop":
        levels = ("trajectory", "picture")
    if plan.precision == "int8":
        levels = ("step", "trajectory", "picture")
    noise = batch_noise(0, range(1 if plan.graph == "loop" else 2), model.config.image_shape)
    with OnnxRuntimeDenoiser(read_manifest(folder)) as engine:
        report = compare(model, engine, plan.precision, noise=noise, levels=levels)
        identity = {**engine.identity, "export": plan.name}
    if not report.passed:
        raise ParityError(
            f"{plan.name} differs from PyTorch and was not kept: {report.failures()[0]}"
        )
    if plan.precision == "int8":
        note(f"pictures: PSNR {report.final.psnr:.1f} dB to float32")
    return verdict_of(report, identity, "export")
