"""What fills a folder with pictures: the engine of this process, or those of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lutdeploy.artefacts.sample_folder import Folder
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.engines import Engine, EngineRequest, open_engine
from lutdeploy.errors import UsageError
from lutdeploy.schedule import Schedule, ScheduleRequest


class Sampler(Protocol):
    """Follows one schedule. Use :func:`open_sampler`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Of the engine, wherever it is; see :class:`lutdeploy.engines.Engine`."""

    @property
    def schedule(self) -> Schedule: ...

    def stepping(self) -> Engine:
        """The engine, to look at its steps.

        Raises:
            UsageError: it is elsewhere, or takes no single steps.
        """

    def fill(self, folder: Folder, n: int, batch: int, first: int) -> Generator[int, None, None]:
        """Make what is missing of images first … first+n−1; yields how many were finished."""


@dataclass(frozen=True)
class LocalSampler:
    """The engine of this process."""

    engine: Engine
    schedule: Schedule

    @property
    def identity(self) -> dict[str, Any]:
        return self.engine.identity

    def stepping(self) -> Engine:
        if self.engine.whole_trajectory:
            raise UsageError("a loop export shows no steps; --gif and --trajectory need another")
        return self.engine

    def fill(self, folder: Folder, n: int, batch: int, first: int) -> Generator[int, None, None]:
        yield from folder.fill(self.engine, self.schedule, n, batch, first)


@contextlib.contextmanager
def open_sampler(
    engine: EngineRequest,
    schedule: ScheduleRequest,
    cluster: str | None,
    actors: int | None,
    note: Callable[[str], None],
) -> Iterator[Sampler]:
    """Open the engine that is asked for, here or on a cluster, for as long as the block runs.

    Args:
        engine, schedule: what is asked for.
        cluster: None for this process; else as :func:`lutdeploy.engines.ray.connected` takes it.
        actors: of a cluster.
        note: told what was opened and chosen.
    """
    if cluster is None:
        with open_engine(engine, note) as opened:
            yield LocalSampler(opened, resolve_schedule(schedule, engine.path, opened, note))
        return
    from lutdeploy.engines.ray import connected

    with connected(cluster, engine, schedule, actors, note) as connection:
        yield connection
