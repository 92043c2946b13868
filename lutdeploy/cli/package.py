"""`lutdeploy package`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.requests import LICENSE, PATH, RUN, engine_request, schedule_request
from lutdeploy.engines import EngineRequest
from lutdeploy.schedule import ScheduleRequest

OUT = click.option("--out", type=PATH, required=True, help="Folder to write.")


@click.group("package")
def command() -> None:
    """Package a model for where it is to run."""


@command.command("triton")
@engine_request(
    backends=("onnxruntime", "tensorrt"),
    default="onnxruntime",
    backend_help="What the server computes with: ONNX Runtime, on the CPU unless --device cuda, or "
    "an engine of `lutdeploy build`.",
    leave_out=("provider", "precision", "threads", "unverified"),
)
@OUT
@click.option("--name", help="Of the models. Default: the run's.")
@schedule_request
def triton(engine: EngineRequest, schedule: ScheduleRequest, out: Path, name: str | None) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    NAME answers SEED and INDEX with IMAGE, NAME_png with IMAGE_PNG, NAME_stream with a picture
    after every step; --batch is the most pictures at once. README.md in it says how to serve it.
    """
    from lutdeploy.artefacts import shipped
    from lutdeploy.engines.packaging.triton import package_triton

    if shipped.is_shipped(engine.path):
        engine = replace(engine, path=find_run(engine.path, note).path)
    name = package_triton(engine, schedule, out, name, note)
    note(f"models: {name}, {name}_png, {name}_stream; {out}/README.md says how to serve them")
    answer(out)


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


@command.command("hub")
@RUN
@OUT
@click.option("--repo", metavar="OWNER/NAME", help="Its address on the Hub, for the model card.")
@LICENSE
def hub(run: Path | None, out: Path, repo: str | None, license: str | None) -> None:
    """Write a folder for the Hugging Face Hub.

    It holds the model card, the weights, a checked ONNX export and samples.
    `hf upload OWNER/NAME DIR` uploads it. Where a RUN is taken, so are the folder and
    hf://OWNER/NAME.
    """
    from lutdeploy.engines.packaging.hub import package_hub

    size = package_hub(find(run, note), out, repo, license, note)
    note(f"{size / 1e6:.1f} MB; `hf upload {repo or 'OWNER/NAME'} {out}` uploads it")
    answer(out)
