"""How much memory the driver of `lutdeploy sample --ray` takes, by the number of tasks.

The actors do nothing. `python -m benchmarks.ray_driver` prints a row for each thousand tasks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lutdeploy.artefacts import shipped
from lutdeploy.artefacts.picture_files import Task
from lutdeploy.engines import EngineRequest
from lutdeploy.engines import ray as cluster
from lutdeploy.schedule import ScheduleRequest

PICTURES = 10_000  # in a task, as in a shard


class Idle:
    """In the place of an actor that samples."""

    def __init__(self, *given: Any) -> None:
        pass

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "error": [""] * len(rows["task"])}


class Nowhere:
    """In the place of a folder."""

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        return (Task(first, PICTURES) for first in range(0, n, PICTURES))

    def opener(self) -> None:
        return None

    def adopt(self, task: Task) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def main(tasks: int) -> None:
    cluster.Actor = Idle  # type: ignore[assignment,misc]
    engine = EngineRequest(Path(shipped.model_path()), "onnxruntime")
    print("| tasks | pictures | MB of the driver | seconds |\n|---:|---:|---:|---:|")
    start, process = time.perf_counter(), psutil.Process()
    with cluster.connected("local", engine, ScheduleRequest(), 2, lambda text: None) as found:
        place: Any = Nowhere()
        for done, _ in enumerate(found.fill(place, tasks * PICTURES, 64, 0), 1):
            if done % 1000 == 0:
                megabytes = process.memory_info().rss / 1e6
                seconds = time.perf_counter() - start
                print(
                    f"| {done} | {done * PICTURES:,} | {megabytes:.0f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
