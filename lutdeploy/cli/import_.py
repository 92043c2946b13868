"""`lutdeploy import`."""

from __future__ import annotations

from pathlib import Path

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run, require_text
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.requests import POSITIVE
from lutdeploy.errors import UsageError


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Such as runs/NAME.")
@click.option("--heads", type=POSITIVE, default=8, show_default=True, help="Not in the file.")
@click.option("--weights", type=click.Choice(("tanh", "softmax")), help="Not in the file.")
@click.option("--image-size", type=POSITIVE, default=64, show_default=True, help="Not in the file.")
@click.option("--overwrite", is_flag=True, help="Replace the model of an existing run.")
def command(
    file: Path, out: Path, heads: int, weights: str | None, image_size: int, overwrite: bool
) -> None:
    """Read one of the original author's checkpoints (.pth) into a run.

    Nothing in the file is executed. Preset, width, depth and K come from the shapes.
    """
    from lutdeploy.artefacts.checkpoint import import_author_file, save_model

    require_text(out)
    run = Run(out)
    if run.model.exists() and not overwrite:
        raise UsageError(f"{run.model} exists; choose another --out, or --overwrite")
    model = import_author_file(file, heads, weights, image_size)
    config = model.config
    assumed = "--weights" if weights else "assumed; --weights says otherwise"
    note(
        f"inferred: preset {config.preset()}, width {config.width}, depth {config.depth}, "
        f"K {config.entries}, {config.heads} heads (--heads), {config.weights} weights ({assumed})"
    )
    files.output_folder(out)
    save_model(model, run.model, about={"origin": "import", "file": file.name})
    answer(run.model)
