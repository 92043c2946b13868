"""The pictures of docs/solvers.md, from what `lutdeploy tune-steps` stored.

    python -m benchmarks.few_steps --model static-tanh-64-small --out docs

Writes steps-NAME.pictures.png: images 0 to 7 of seed 0; from top to bottom 64 Euler steps, then for
each number of steps the best formula and the fit.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import tuned_steps_file
from lutdeploy.artefacts.tuned_steps import read_tuned_steps
from lutdeploy.schedule import solver_schedule

SHOWN = 8


@click.command()
@click.option("--model", "name", type=click.Choice(shipped.names()), default=shipped.DEFAULT)
@click.option("--out", type=click.Path(path_type=Path), default="docs", show_default=True)
def main(name: str, out: Path) -> None:
    """Write the pictures."""
    known = read_tuned_steps(tuned_steps_file(shipped.model_path(name)))
    denoiser = lutdeploy.load(shipped.model_path(name))
    schedules = [solver_schedule("euler", 64)]
    for entry in known.entries:
        schedules += [entry.formula.schedule, entry.fitted.schedule]
    made = [lutdeploy.sample(denoiser, SHOWN, schedule=schedule) for schedule in schedules]
    sheet = images.grid(images.to_uint8(np.concatenate(made)), columns=SHOWN)
    files.write_atomic(out / f"steps-{name}.pictures.png", images.encode_png(sheet))
    for schedule in schedules:
        click.echo(schedule.describe())


if __name__ == "__main__":
    main()
