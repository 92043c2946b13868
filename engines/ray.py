"""Sampling on a Ray cluster: Ray Data hands out tasks to a pool of actors, one engine in each.

The actors write the pictures, since Ray Data's own writers cannot name a file for each row. A task
is a range of images, locked while it is made, that goes on where an earlier try of it stopped. Only
its number travels: the driver takes over what a task says of its pictures, in their order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from lutdeploy.artefacts.picture_files import Task
from lutdeploy.artefacts.sample_folder import Folder, TaskOpener, fill
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.device import parse_device
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.tensorrt.library import MODULES
from lutdeploy.errors import BackendError, LutDeployError, UsageError, first_line, needing
from lutdeploy.machine import processors
from lutdeploy.schedule import Schedule, ScheduleRequest

LOCAL = "local"
BATCHES = 4  # of PNGs, in a task
TASKS_AT_ONCE = 1000  # that the driver holds; its memory does not grow beyond
OBJECT_STORE = 80 * 2**20  # bytes of a local cluster's, through which only numbers go


@dataclass(frozen=True)
class Share:
    """What each actor takes of the cluster."""

    threads: int
    gpus: int


def share_of(request: EngineRequest) -> Share:
    """A GPU where the engine computes on one, and as many processors as it has threads.

    Raises:
        UsageError: a GPU is named by its number.
    """
    device = request.device or ("cuda" if request.backend in MODULES else "cpu")
    if device.endswith("ExecutionProvider"):
        return Share(request.threads or 1, int(device != "CPUExecutionProvider"))
    if parse_device(device).kind == "cuda" and ":" in device:
        raise UsageError(f"--device {device}: Ray gives each actor a GPU; say --device cuda")
    return Share(request.threads or 1, int(device == "cuda"))


@dataclass(frozen=True)
class Opened:
    """What an engine on the cluster says of itself, and the schedule that it follows."""

    identity: dict[str, Any]
    schedule: Schedule
    notes: tuple[str, ...]


def look(engine: EngineRequest, schedule: ScheduleRequest) -> Opened:
    """Open the engine for a moment."""
    notes: list[str] = []
    with open_engine(engine, notes.append) as denoiser:
        followed = resolve_schedule(schedule, engine.path, denoiser, notes.append)
        return Opened(dict(denoiser.identity), followed, tuple(notes))


class Sampler:
    """An actor: opens its engine once, and makes one task after another."""

    def __init__(
        self, engine: EngineRequest, opened: Opened, opener: TaskOpener, batch: int, threads: int
    ) -> None:
        self._denoiser = open_engine(engine)
        made = self._denoiser.identity
        if made != opened.identity:
            different = [key for key in made if made[key] != opened.identity.get(key)]
            raise BackendError(
                f"{engine.path} is not the same on all machines of the cluster: another "
                f"{', '.join(different)}"
            )
        self._schedule, self._opener = opened.schedule, opener
        self._batch, self._threads = batch, threads

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        for text in rows["task"]:
            task = msgspec.json.decode(text, type=Task)
            with self._opener(task) as folder:
                for _ in fill(
                    folder,
                    self._denoiser,
                    self._schedule,
                    task.count,
                    self._batch,
                    task.first,
                    self._threads,
                ):
                    pass
        return rows


class Cluster:
    """A cluster that this process is connected to. Use :func:`connected`."""

    def __init__(self, engine: EngineRequest, opened: Opened, share: Share, actors: int) -> None:
        self._engine, self._opened, self._share, self._actors = engine, opened, share, actors

    @property
    def identity(self) -> dict[str, Any]:
        """Of the engine in every actor."""
        return self._opened.identity

    @property
    def schedule(self) -> Schedule:
        """What the actors follow."""
        return self._opened.schedule

    def fill(self, folder: Folder, n: int, batch: int) -> Generator[int, None, None]:
        """Make the missing ones of images 0 … n−1; yields how many each task finished.

        Where it ends early it leaves the cluster, and the folder has all that was made.
        """
        try:
            tasks = folder.tasks(n, BATCHES * batch)
            while some := list(islice(tasks, TASKS_AT_ONCE)):
                for task in self._done(some, folder.opener(), batch):
                    folder.adopt(task)
                    yield task.count
            folder.finish()
        except BaseException:
            import ray

            ray.shutdown()
            folder.reload()
            raise

    def _done(self, tasks: list[Task], opener: TaskOpener, batch: int) -> Iterator[Task]:
        """The tasks, in their order, as the actors finish them.

        Ray Data replaces an actor that dies, as often as that happens, and tries its task again.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.execution_options.preserve_order = True
        texts = [{"task": msgspec.json.encode(task).decode()} for task in tasks]
        rows = ray.data.from_items(texts, override_num_blocks=len(texts))
        size = min(self._actors, len(tasks))
        done = rows.map_batches(
            Sampler,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(self._engine, self._opened, opener, batch, self._share.threads),
            num_cpus=self._share.threads,
            num_gpus=self._share.gpus or None,
        )
        with _one_line():
            for row in done.iter_rows():
                yield msgspec.json.decode(row["task"], type=Task)


@contextlib.contextmanager
def connected(
    address: str,
    engine: EngineRequest,
    schedule: ScheduleRequest,
    actors: int | None,
    note: Callable[[str], None],
) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine for as long as the block runs.

    Args:
        address: "local" starts one; "auto" or HOST:PORT is one that runs.
        engine: what each actor opens; with one thread, unless it says otherwise.
        schedule: what the actors shall follow.
        actors: as many as the cluster has room for by default.
        note: told of the engine, the schedule and the actors.

    Raises:
        UsageError: the address is none, or the cluster has no room for the actors.
        BackendError: no cluster there, or no Ray here.
    """
    share = share_of(engine)
    engine = replace(engine, path=Path(engine.path).resolve(), threads=share.threads)
    if address not in (LOCAL, "auto") and not _is_address(address):
        raise UsageError(
            f"--ray {address}: no address of a cluster; write HOST:PORT or auto, or nothing for a "
            "cluster on this machine"
        )
    # Read when Ray is imported: no reports to its makers, no log of what it mends, and nobody else
    # on a cluster of our own; Ray would write a token into the home folder.
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    if address == LOCAL:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    with needing("--ray"):
        import ray
        import ray.data
    local: dict[str, Any] = {}
    opened = None
    if address == LOCAL:
        opened = look(engine, schedule)
        local = {
            "num_cpus": max(processors(), share.threads * (actors or 1)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:
        raise BackendError(
            f"--ray {address}: {first_line(error)}; a cluster that runs already needs this version "
            "of Ray, and here RAY_AUTH_MODE and the token that it was started with"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray has one of its own for SIGTERM
            signal.signal(number, handler)
    try:
        actors = room(share, actors)
        if opened is None:  # where the actors will be: this machine may lack their GPU
            with _one_line():
                task = ray.remote(look).options(num_cpus=share.threads, num_gpus=share.gpus)
                opened = ray.get(task.remote(engine, schedule))
        for line in opened.notes:
            note(line)
        note(f"ray: {_counted(actors, 'actor')} of {_counted(share.threads, 'thread')}")
        yield Cluster(engine, opened, share, actors)
    finally:
        ray.shutdown()


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal()


def room(share: Share, wanted: int | None) -> int:
    """How many actors fit into the cluster; as many as are wanted."""
    import ray

    there = ray.cluster_resources()
    room = int(there.get("CPU", 0)) // share.threads
    if share.gpus:
        room = min(room, int(there.get("GPU", 0)) // share.gpus)
    if room < (wanted or 1):
        what = _counted(share.threads, "processor") + (" and a GPU" if share.gpus else "")
        raise UsageError(
            f"the cluster has room for {_counted(room, 'actor')} of {what} each; ask for fewer "
            "--actors or --threads"
        )
    return wanted or room


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Raise our own error that an actor met, or make one line of Ray's."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LutDeployError) and not isinstance(cause, ray.exceptions.RayError):
                raise cause from error
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise BackendError(f"Ray: {first_line(error)}") from error
