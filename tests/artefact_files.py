"""One of each kind of file, as the commands write it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model, save_author_file
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.tuned_steps import Entry, Measured, TunedSteps
from lutdeploy.schedule import fitted_schedule, solver_schedule
from tests.command import succeed

# How the sample folders were sampled, two pictures each.
SAMPLED = (
    "--export",
    "step-fp32",
    "--no-grid",
    "--batch",
    "1",
    "--steps",
    "1",
    "--solver",
    "euler",
)


def make_artefacts(folder: Path, exported: Callable[..., Path]) -> None:
    """Fill ``folder``; ``exported`` gives ready exports."""
    export = exported()
    run = Run(folder / "run")
    for source in (export, exported(graph="loop")):
        shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(export.parent.parent / MODEL, run.model)
    euler = solver_schedule("euler", 2)
    entry = Entry(Measured(fitted_schedule(euler.rows), 0.1), Measured(euler, 0.2))
    TunedSteps(files.sha256(run.model), 0, 1, 0, "euler-256", (entry,)).write(run.tuned_steps)
    succeed("parity", run.path, "--export", "step-fp32", "--solver", "euler", "--steps", 2)
    faces = folder / "faces"
    faces.mkdir()
    for k, name in enumerate(("0.png", "1.jpg", "2.png", "3.png", "4.jpg")):
        Image.effect_noise((48, 40), 20 * k + 5).convert("RGB").save(faces / name)
    small = ("--size", "tiny", "--set", "depth=1", "--batch", 2, "--held-out", 0.25)
    succeed("train", "--data", faces, "--out", folder / "trained", "--steps", 2, *small)
    for out, kind in (("drawn", "png"), ("packed", "npz"), ("shards", "webdataset")):
        succeed("sample", run.path, "--out", folder / out, "--format", kind, "-n", 2, *SAMPLED)
    if find_spec("tensorrt_rtx"):
        shutil.copytree(run.path, folder / "built")
        rtx = ("--backend", "tensorrt-rtx", "--architecture", "8.9")
        succeed("build", folder / "built", "--export", "step-fp32", *rtx)
    save_author_file(load_model(run.model), folder / "author.pth")
