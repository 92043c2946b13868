"""How many pictures per second `lutdeploy sample` writes when they are computed already.

    python -m benchmarks.pictures --pictures FOLDER

FOLDER was made by `lutdeploy sample`; its pictures are written again and again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np

from lutdeploy.artefacts import sample_folder
from lutdeploy.images import Pixels, encode_pictures, encode_png
from lutdeploy.machine import this_machine
from lutdeploy.sampling import batch_noise
from lutdeploy.training.evaluation.data import read_samples


@dataclass(frozen=True)
class Cost:
    """Of one round, for each picture."""

    seconds: float
    processor_seconds: float
    size: float  # bytes of all files


def write(pixels: Pixels, out: Path, file_format: str, batch: int) -> Cost:
    """Fill a new folder with uint8 [n, S, S, C]."""
    n = len(pixels)
    wall, processor = time.perf_counter(), time.process_time()
    with (
        sample_folder.open_folder(out, {"seed": 0, "format": file_format}) as folder,
        sample_folder.Storing(folder.writer) as storing,
    ):
        for start in range(0, n, batch):
            storing.put(range(n)[start : start + batch], pixels[start : start + batch])
        storing.finish()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    size = sum(path.stat().st_size for path in out.iterdir())
    return Cost(wall / n, processor / n, size / n)


def alone(pixels: Pixels) -> Iterator[str]:
    """What takes time for every picture, each on its own in one thread."""
    _, side, _, channels = pixels.shape
    for name, work in (
        ("PNG: encode_pictures", encode_pictures),
        ("PNG: Pillow's default", lambda batch: [encode_png(picture) for picture in batch]),
        ("noise", lambda batch: batch_noise(0, range(len(batch)), (channels, side, side))),
    ):
        start = time.process_time()
        made = work(pixels)
        cost = (time.process_time() - start) / len(pixels)
        size = sum(map(len, made)) / len(pixels) if isinstance(made, list) else None
        yield f"| {name} | {1e3 * cost:.3f} | {f'{size:,.0f}' if size else '–'} |"


@click.command()
@click.option("--pictures", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-n", "count", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(pictures: Path, count: int, batch: int, rounds: int) -> None:
    """Time every format, in turns."""
    pixels = np.ascontiguousarray(np.moveaxis(read_samples(pictures, count).pixels, 1, -1))
    costs: dict[str, list[Cost]] = {name: [] for name in sample_folder.FORMATS}
    # Nothing is deleted meanwhile: ext4 is slow to make files where many were just removed.
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for name, found in costs.items():
                out = Path(scratch) / f"{name}-{number}"
                found.append(write(pixels, out, name, batch))
    click.echo(f"{this_machine().describe()}; {len(pixels)} pictures, {rounds} rounds")
    click.echo("\n| format | pictures/s, median | min … max | processor ms | bytes |")
    click.echo("|---|---:|---:|---:|---:|")
    for name, found in costs.items():
        rates = [1 / cost.seconds for cost in found]
        processor = 1e3 * median(cost.processor_seconds for cost in found)
        click.echo(
            f"| {name} | {median(rates):,.0f} | {min(rates):,.0f} … {max(rates):,.0f} | "
            f"{processor:.3f} | {found[0].size:,.0f} |"
        )
    click.echo("\n| one thread | processor ms | bytes |\n|---|---:|---:|")
    for line in alone(pixels):
        click.echo(line)


if __name__ == "__main__":
    main()
