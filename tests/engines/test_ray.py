"""`lutdeploy sample --ray` on real clusters of this machine, with actors and drivers killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
from s3fs import S3FileSystem

from lutdeploy.artefacts import sample_folder, shipped
from lutdeploy.artefacts.picture_files import Task
from lutdeploy.engines import EngineRequest
from lutdeploy.engines.ray import Actor, Opened, Share, look, raise_told, room, share_of
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.schedule import ScheduleRequest
from tests.artefacts.object_server import BUCKET, object_server
from tests.command import fail, succeed

if os.name != "posix":
    pytest.skip("signals as POSIX has them", allow_module_level=True)

IMAGES = 160
# The package's model by its ONNX export: nothing here needs PyTorch. Tasks of 16 pictures.
SAMPLE = ("sample", "--model", "static-tanh-64-small", "--solver", "euler", "--steps", "1")
SMALL = (*SAMPLE, "-n", IMAGES, "--batch", 4)
# A shell may have told background jobs to ignore Ctrl-C; these must not.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from lutdeploy.cli import cli; cli()"
)
CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default, which beside other tests is no progress at all
}


@contextlib.contextmanager
def started(
    program: str, *arguments: object, variables: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    pipe, environment = subprocess.PIPE, {**ENVIRONMENT, **(variables or {})}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: object, variables: dict[str, str] | None = None) -> str:
    """What a command that succeeds says on stderr."""
    with started(PROGRAM, *arguments, variables=variables) as process:
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(12_000):
        if happened():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("nothing happened for four minutes")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors below a process that started a cluster."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "MapWorker(MapBatches(Actor))" in child.cmdline()[0]]


def pictures(out: Path) -> int:
    return len(list(out.glob("[0-9]*.png")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the command writes without Ray."""
    out = tmp_path_factory.mktemp("whole")
    succeed(*SMALL, "--out", out)
    return contents(out)


@pytest.mark.slow
def test_actors_and_drivers_are_killed(whole: dict[str, bytes], tmp_path: Path) -> None:
    """On a cluster that runs by itself."""
    with object_server(tmp_path) as store, started(CLUSTER, variables=store | TOKEN) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        ray = ("--ray", address, "--actors", 2)
        out = tmp_path / "out"
        with started(PROGRAM, *SMALL, *ray, "--out", out, variables=TOKEN) as process:
            wait_until(lambda: pictures(out) > 48, process)
            process.kill()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("00000[0-9].png")}
        there = pictures(out)

        with started(PROGRAM, *SMALL, *ray, "--out", out, variables=TOKEN) as process:
            wait_until(lambda: pictures(out) > there + 16, process)
            workers(cluster)[0].kill()  # the other one may still be starting
            _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "ray: 2 actors of 1 thread" in stderr
        (line,) = [line for line in stderr.splitlines() if "images are there already" in line]
        assert there - 32 <= int(line.split()[0]) < IMAGES, "at most a batch of each actor is lost"
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        found, expected = contents(out), dict(whole)
        lines, expected_lines = found.pop("manifest.jsonl"), expected.pop("manifest.jsonl")
        assert sorted(lines.splitlines()) == expected_lines.splitlines()
        assert found == expected

        shards = (*SAMPLE, "-n", 24, "--no-grid", "--format", "webdataset")
        run(*shards, *ray, "--out", f"s3://{BUCKET}/shards", variables=store | TOKEN)
        succeed(*shards, "--out", tmp_path / "shards")
        files = S3FileSystem(
            key="test",
            secret="test",
            endpoint_url=store["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        written = files.cat(files.ls(f"{BUCKET}/shards"))
        named = {path.rpartition("/")[2]: data for path, data in written.items()}
        assert named == contents(tmp_path / "shards")
        cluster.communicate(timeout=60)  # it ends with its stdin, and takes Ray's processes along


@pytest.mark.slow
def test_a_cluster_of_its_own_ends_with_the_command(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(PROGRAM, *SMALL, "--ray", "--actors", 2, "--out", out) as process:
        wait_until(lambda: pictures(out) > 24, process)
        below = psutil.Process(process.pid).children(recursive=True)
        assert workers(process)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    there = pictures(out)
    line = stderr.splitlines()[-1]
    assert line.startswith("error: interrupted: ")
    assert f" of {IMAGES} images are in {out}; the same command makes the others" in line
    assert there - 16 <= int(line.split()[2]) <= there
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []
    succeed(*SMALL, "--out", out)  # and one without Ray completes it
    assert contents(out) == whole


def test_what_an_actor_takes(tmp_path: Path) -> None:
    def share(backend: str, device: str | None = None, threads: int | None = None) -> Share:
        return share_of(EngineRequest(tmp_path, backend, device, threads=threads))

    assert share("onnxruntime") == share("auto") == Share(threads=1, gpus=0)
    assert share("torch", "cpu", 4) == Share(threads=4, gpus=0)
    assert share("torch", "cuda") == share("tensorrt") == Share(threads=1, gpus=1)
    assert share("onnxruntime", "CUDAExecutionProvider").gpus == 1
    assert share("onnxruntime", "CPUExecutionProvider").gpus == 0
    with pytest.raises(UsageError, match="--device cuda:1: Ray gives each actor a GPU"):
        share("torch", "cuda:1")


def test_an_actors_error_is_that_of_the_command(tmp_path: Path) -> None:
    model = shipped.model_path("static-tanh-64-small")
    request = EngineRequest(model, "onnxruntime", threads=1)
    opened = look(request, ScheduleRequest("euler", 1))
    task = msgspec.json.encode(Task(0, 2)).decode()

    def told(opened: Opened, opener: Callable[[Task], Any]) -> str:
        done = Actor(request, opened, opener, 2, 1)({"task": [task]})
        assert done["task"] == [task]
        return str(done["error"][0])

    def full(task: Task) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/shared/000001.png")

    with pytest.raises(OSError, match=r"No space left on device: '/shared/000001\.png'"):
        raise_told(told(opened, full))
    other = replace(opened, identity={**opened.identity, "engine_sha256": "another"})
    with pytest.raises(
        BackendError, match=r"not the same on all machines .* another engine_sha256"
    ):
        raise_told(told(other, full))
    settings = sample_folder.settings(opened.identity, opened.schedule, 0, "png")
    raise_told(told(opened, partial(sample_folder.open_task, tmp_path, settings)))
    assert pictures(tmp_path) == 2


def test_how_many_actors_a_cluster_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"CPU": 16.0, "GPU": 2.0}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: there))
    assert room(Share(threads=1, gpus=0), None) == 16
    assert room(Share(threads=6, gpus=0), None) == 2
    assert room(Share(threads=1, gpus=1), None) == 2
    assert room(Share(threads=1, gpus=0), 3) == 3
    with pytest.raises(UsageError, match="has room for 2 actors of 1 processor and a GPU each"):
        room(Share(threads=1, gpus=1), 3)
    with pytest.raises(UsageError, match="has room for 0 actors of 17 processors each"):
        room(Share(threads=17, gpus=0), None)


def test_what_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("--out", tmp_path / "out")
    assert "--ray runs/cats: no address" in fail(2, *SMALL, *out, "--ray", "runs/cats")
    assert "no address" in fail(2, *SMALL, *out, "--ray", "ray://head:10001")
    assert "no cluster answers there" in fail(1, *SMALL, *out, "--ray", "127.0.0.1:1")
    assert "npz is one file" in fail(2, *SMALL, *out, "--ray", "--format", "npz")
    assert "leave out --ray" in fail(2, *SMALL, *out, "--ray", "--gif")
    assert "--actors" in fail(2, *SMALL, *out, "--actors", 2)
    assert "takes --format webdataset, not png" in fail(2, *SMALL, "--out", "s3://cats/x")
    monkeypatch.setitem(sys.modules, "ray", None)
    line = fail(1, *SMALL, *out, "--ray")
    assert line == "error: --ray needs Ray, which is not installed: pip install 'lutdeploy[ray]'"
    monkeypatch.setitem(sys.modules, "s3fs", None)
    line = fail(1, *SMALL, "--format", "webdataset", "--out", "s3://cats/x")
    assert "needs s3fs, which is not installed: pip install 'lutdeploy[cloud]'" in line
    assert not (tmp_path / "out").exists()
