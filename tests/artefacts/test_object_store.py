"""Shards in an object store: what is in it, kills between any two requests, many tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.object_store import ObjectFolder, Store
from lutdeploy.artefacts.picture_files import MANIFEST, TarShards, task_manifest
from lutdeploy.errors import ArtefactError, UsageError
from tests.artefacts.object_server import BUCKET, object_server
from tests.artefacts.test_sample_folder import (
    SCHEDULE,
    N,
    Noise,
    before_a_call,
    contents,
    expected,
    folders_of_the_killed,
)
from tests.artefacts.test_sample_folder import fill as fill_folder

SETTINGS = {"seed": 3, "backend": "none", "format": "webdataset"}


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_server(tmp_path_factory.mktemp("moto")) as found:
        yield found


@pytest.fixture
def url(
    variables: dict[str, str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A place of the test's own, in which shards have 10 pictures."""
    monkeypatch.setattr(TarShards, "per_file", 10)
    monkeypatch.setattr(sample_folder, "SHARD_IMAGES", 10)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


def fill(url: str, n: int = N, images: range | None = None, **more: Any) -> int:
    """How many pictures were made."""
    first = images.start if images else 0
    folder = ObjectFolder(url, {**SETTINGS, **more}, False, images)
    return sum(folder.fill(Noise(), SCHEDULE, len(images or range(n)), 4, first))


def objects(url: str) -> dict[str, bytes]:
    store = Store(url)
    names = sorted(store.sizes())
    return dict(zip(names, store.read(names), strict=True))


@pytest.fixture
def whole(url: str, tmp_path: Path) -> dict[str, bytes]:
    """What one command writes into a folder of this machine."""
    fill_folder(tmp_path / "whole", "webdataset")
    return contents(tmp_path / "whole")


def test_the_same_bytes_as_on_a_disk(url: str, whole: dict[str, bytes]) -> None:
    assert fill(url) == N
    assert objects(url) == whole
    assert fill(url) == 0
    folder = ObjectFolder(url, SETTINGS, False, None)
    np.testing.assert_array_equal(folder.first(N), expected())


def test_more_pictures_are_added(url: str, whole: dict[str, bytes]) -> None:
    """Only the last shard, which was not full, is written again."""
    assert fill(url, 13) == 13
    assert fill(url) == N - 13
    assert objects(url) == whole


def test_killed_between_any_two_requests(
    url: str, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(out: Path) -> str:
        return f"{url}-{out.name}"

    kill = before_a_call((Store, "write"), (Store, "upload"), (Store, "remove"))
    killed = 0
    for out in folders_of_the_killed(lambda out: fill(place(out)), kill, tmp_path, monkeypatch):
        killed += 1
        made = fill(place(out))
        assert made % 10 in (0, 5), "whole shards alone are made again"
        assert objects(place(out)) == whole
    assert killed > 6


def test_tasks_that_share_a_place(url: str, whole: dict[str, bytes]) -> None:
    for images in (range(20, 25), range(0, 20)):
        assert fill(url, images=images) == len(images)
        assert fill(url, images=images) == 0
    assert MANIFEST not in objects(url)
    assert {task_manifest(first) for first in (0, 10, 20)} <= set(objects(url))
    assert fill(url) == 0
    assert objects(url) == whole


def test_a_shard_that_was_lost(url: str, whole: dict[str, bytes]) -> None:
    fill(url)
    Store(url).remove(["000001.tar"])
    assert fill(url) == 10
    assert objects(url) == whole


def test_other_pictures_are_refused(url: str) -> None:
    store = Store(url)
    store.write("000000.tar", b"mine")
    with pytest.raises(UsageError, match=r"such as 000000\.tar but no manifest\.jsonl"):
        fill(url)
    store.remove(["000000.tar"])
    fill(url)
    with pytest.raises(UsageError, match="seed 3 → 4"):
        fill(url, seed=4)
    store.write("mine.txt", b"mine")
    ObjectFolder(url, {**SETTINGS, "seed": 4}, True, None)
    assert objects(url) == {
        "mine.txt": b"mine",
        MANIFEST: json.dumps({**SETTINGS, "seed": 4}).encode() + b"\n",
    }


def test_what_a_store_refuses_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match=r"s3://nobody/x: .*; check the address, the rights"):
        fill("s3://nobody/x")
    with pytest.raises(UsageError, match="--out banana://x: Protocol not known: banana"):
        fill("banana://x")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(ArtefactError, match=r"s3://cats/x: .*credentials"):
        fill(f"s3://{BUCKET}/x")
