"""`lutdeploy package`."""

from __future__ import annotations

from pathlib import Path

import click

from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.requests import PATH, RUN

OUT = click.option("--out", type=PATH, required=True, help="Folder to write.")


@click.group("package")
def command() -> None:
    """Package a model for where it is to run."""


@command.command("web")
@RUN
@OUT
@click.option(
    "--runtime",
    type=PATH,
    metavar="DIR",
    help="Copy the files of onnxruntime-web from here, for offline use, instead of a CDN.",
)
def web(run: Path | None, out: Path, runtime: Path | None) -> None:
    """Write a static page that makes the model's pictures in browsers.

    Any web server can serve the folder; `python -m http.server` will do.
    """
    from lutdeploy.engines.packaging.web import package_web

    size = package_web(find_run(find(run, note), note), out, runtime, note)
    note(f"{size / 1e6:.1f} MB; `python -m http.server --directory {out}` serves it")
    answer(out)
