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
@click.option("--key", help="State dict to take where FILE holds several. Default: the average.")
@click.option("--heads", type=POSITIVE, help="Default: what FILE says, else 8.")
@click.option(
    "--weights",
    type=click.Choice(("tanh", "softmax")),
    help="Default: what FILE says, else softmax for a static LUT with K 512.",
)
@click.option("--image-size", type=POSITIVE, help="Default: what FILE says, else 64.")
@click.option("--overwrite", is_flag=True, help="Replace the model of an existing run.")
def command(
    file: Path,
    out: Path,
    key: str | None,
    heads: int | None,
    weights: str | None,
    image_size: int | None,
    overwrite: bool,
) -> None:
    """Read a checkpoint (.pth, .pt, .ckpt, .safetensors) into a run.

    Nothing in the file is executed. Preset, width, depth and K come from the shapes.
    """
    from lutdeploy.artefacts.checkpoint import import_file, save_model

    require_text(out)
    run = Run(out)
    if run.model.exists() and not overwrite:
        raise UsageError(f"{run.model} exists; choose another --out, or --overwrite")
    found = import_file(file, key, heads, weights, image_size)
    for text in found.state.notes:
        note(text)
    config = found.model.config
    note(
        f"inferred: preset {config.preset()}, width {config.width}, depth {config.depth}, "
        f"K {config.entries}, {config.heads} heads, {config.weights} weights, "
        f"{config.image_size} pixels"
    )
    if found.assumed:
        values = ", ".join(f"{name} {getattr(config, name)}" for name in found.assumed)
        options = ", ".join(f"--{name.replace('_', '-')}" for name in found.assumed)
        note(
            f"warning: {values}: assumed, since {file.name} does not tell; a wrong one spoils the "
            f"pictures without an error; {options} say otherwise"
        )
    files.output_folder(out)
    about = {"origin": "import", "file": file.name, "key": found.state.name}
    with files.lock(out, "command"):  # a training that goes on would replace the model again
        save_model(found.model, run.model, about=about)
    answer(run.model)
