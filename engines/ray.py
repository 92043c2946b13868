"""Sampling on a Ray cluster: Ray Data hands out tasks to a pool of actors, one engine in each.

The actors write the pictures, since Ray Data's own writers cannot name a file for each row. A task
is a range of images, locked while it is made, that goes on where an earlier try of it stopped. Only
its number travels: the driver takes over what a task says of its pictures, in their order.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from lutdeploy import errors
from lutdeploy.artefacts.picture_files import Task
from lutdeploy.artefacts.sample_folder import Folder, TaskOpener, fill
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.device import parse_device
from lutdeploy.engines import Engine, EngineRequest, open_engine
from lutdeploy.engines.tensorrt.library import MODULES
from lutdeploy.errors import BackendError, LutDeployError, UsageError, first_line, needing
from lutdeploy.machine import processors
from lutdeploy.schedule import Schedule, ScheduleRequest

LOCAL = "local"
BATCHES = 4  # of PNGs, in a task
# Tasks that the driver holds, at least and for each actor; its memory does not grow beyond.
TASKS_AT_ONCE = 1000
TASKS_EACH = 16
ANSWER = 10.0  # seconds that a cluster may take to accept a connection
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


class Actor:
    """Opens its engine for its first task, and makes one after another.

    It returns its errors, since Ray would print the tracebacks of those that it raises.
    """

    def __init__(
        self, engine: EngineRequest, opened: Opened, opener: TaskOpener, batch: int, threads: int
    ) -> None:
        self._request, self._opened, self._opener = engine, opened, opener
        self._batch, self._threads = batch, threads

    @functools.cached_property
    def _engine(self) -> Engine:
        engine = open_engine(self._request)
        made, expected = engine.identity, self._opened.identity
        if made != expected:
            different = [key for key in made if made[key] != expected.get(key)]
            raise BackendError(
                f"{self._request.path} is not the same on all machines of the cluster: another "
                f"{', '.join(different)}"
            )
        return engine

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"task": rows["task"], "error": [self._make(text) for text in rows["task"]]}

    def _make(self, text: str) -> str:
        """Make a task; the error that ended it, if any, as JSON: its name and arguments."""
        task = msgspec.json.decode(text, type=Task)
        schedule, batch = self._opened.schedule, self._batch
        try:
            engine = self._engine
            with self._opener(task) as folder:
                for _ in fill(
                    folder, engine, schedule, task.count, batch, task.first, self._threads
                ):
                    pass
        except LutDeployError as error:
            return json.dumps([type(error).__name__, str(error)])
        except OSError as error:
            return json.dumps(["OSError", error.errno, error.strerror, error.filename])
        return ""


def raise_told(told: str) -> None:
    """Raise the error that an actor returned, if any."""
    if told:
        name, *arguments = json.loads(told)
        raise (OSError if name == "OSError" else getattr(errors, name))(*arguments)


class Cluster:
    """A cluster that this process is connected to, as :class:`lutdeploy.engines.sampler.Sampler`.

    Use :func:`connected`.
    """

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

    def stepping(self) -> Engine:
        """See :class:`lutdeploy.engines.sampler.Sampler`."""
        raise UsageError("the engines of a cluster show no steps here; leave out --ray")

    def fill(self, folder: Folder, n: int, batch: int, first: int) -> Generator[int, None, None]:
        """Make the missing ones of images 0 … n−1; yields how many each task finished.

        Where it ends early it leaves the cluster, and the folder has all that was made.
        """
        if first:
            raise UsageError("a cluster makes all images of a folder; leave out --first or --ray")
        try:
            tasks, most = folder.tasks(n, BATCHES * batch), TASKS_EACH * self._actors
            while some := list(islice(tasks, max(most, TASKS_AT_ONCE))):
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
            Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(self._engine, self._opened, opener, batch, self._share.threads),
            num_cpus=self._share.threads,
            num_gpus=self._share.gpus or None,
        )
        with _one_line():
            for row in done.iter_rows():
                raise_told(row["error"])
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
    if address not in (LOCAL, "auto"):
        _require_answer(address)
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


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except (OSError, OverflowError) as error:
        raise BackendError(f"--ray {address}: no cluster answers there: {error}") from error


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
    """Make one line of what Ray raises: of our own error in it, where there is one."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, LutDeployError):
            raise cause from error
        raise BackendError(f"Ray: {first_line(error)}") from error
