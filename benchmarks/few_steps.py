"""The plot and the pictures of docs/solvers.md, from what `lutdeploy tune-steps` stored.

    python -m benchmarks.few_steps --model static-tanh-64-small --out docs

Writes steps-NAME.png (RMS and Fréchet distance over steps, fitted and by formula) and
steps-NAME.pictures.png: images 0 to 7 of seed 0; from top to bottom 64 Euler steps, then for each
number of steps the best formula and the fit.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.run import tuned_steps_file
from lutdeploy.artefacts.tuned_steps import TunedSteps, read_tuned_steps
from lutdeploy.schedule import solver_schedule

SHOWN = 8
KINDS = ("fitted", "formula")  # of TunedSteps.entries
MEASURES = {"rms": "RMS to 256 Euler steps", "frechet": "Fréchet distance"}


def plot(known: TunedSteps) -> Figure:
    """RMS and, where there is one, Fréchet distance over steps; logarithmic both ways."""
    measures = MEASURES if known.pictures else {"rms": MEASURES["rms"]}
    figure = Figure(figsize=(4.5 * len(measures), 3.6), dpi=100, layout="constrained")
    entries = sorted(known.entries, key=lambda entry: entry.fitted.schedule.steps)
    steps = [entry.fitted.schedule.steps for entry in entries]
    for axes, (name, label) in zip(
        np.atleast_1d(figure.subplots(1, len(measures))), measures.items(), strict=True
    ):
        for kind in KINDS:
            values = [getattr(getattr(entry, kind), name) for entry in entries]
            axes.plot(steps, values, marker=".", label=kind.replace("formula", "best formula"))
        axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=label)
        axes.set_xticks(steps, [str(count) for count in steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


@click.command()
@click.option("--model", "name", type=click.Choice(shipped.names()), default=shipped.DEFAULT)
@click.option("--out", type=click.Path(path_type=Path), default="docs", show_default=True)
def main(name: str, out: Path) -> None:
    """Write the plot and the pictures."""
    known = read_tuned_steps(tuned_steps_file(shipped.model_path(name)))
    plot(known).savefig(out / f"steps-{name}.png", metadata={"Software": None})
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
