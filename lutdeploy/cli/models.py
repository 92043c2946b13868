"""`lutdeploy models`."""

from __future__ import annotations

import json
from typing import Any

import click

from lutdeploy.artefacts import shipped
from lutdeploy.cli.console import answer, console


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """List the trained models of the package, the default first.

    `--model NAME` puts one in the place of a RUN, in any command that takes one. Distances
    are those of `lutdeploy evaluate`, and left out where they were measured with other features
    than the default's, which compares with nothing; the JSON has them all.
    """
    found = [_described(name) for name in shipped.names()]
    if as_json:
        answer(json.dumps(found, indent=1))
        return
    from rich.table import Table

    heads = ("name", "parameters", "images seen", "sampled with", "Fréchet", "real", "precision")
    table = Table(*heads, "recall")
    for model in found:
        metrics, floor = model["metrics"], model["floor"]
        comparable = model["features"] == found[0]["features"]
        measured = (
            model["sampling"]["steps"],
            f"{metrics['frechet_distance']:.0f}",
            f"{floor['frechet_distance']:.1f}",
            f"{metrics['precision']:.2f}",
            f"{metrics['recall']:.2f}",
        )
        table.add_row(
            model["name"] + (" (default)" if model["name"] == shipped.DEFAULT else ""),
            f"{model['parameters'] / 1e6:.2f} M",
            f"{model['training']['images_seen']:,}",
            *(measured if comparable else "–" * len(measured)),
        )
    console(stderr=False).print(table)


def _described(name: str) -> dict[str, Any]:
    path = shipped.model_path(name)
    return {"name": name, "path": str(path), "bytes": path.stat().st_size, **shipped.facts(name)}
