"""The store of verdicts: one kind of record, found by what was judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import Verdict, read_verdicts, require_passed, store_verdict
from lutdeploy.errors import ArtefactError, ParityError

# What earlier versions kept in parity.json.
OLD: dict[str, Any] = {
    "backend": "onnxruntime",
    "device": "CPUExecutionProvider",
    "export": "step-fp16",
    "engine_sha256": "e" * 64,
    "model_sha256": "m" * 64,
    "lutdeploy": "0.1.0",
    "machine": {"cpu": "a", "processors": 2, "gpus": [], "versions": {"torch": "2.13.0"}},
    "passed": False,
    "precision": "fp16",
    "solver": "euler-64",
    "images": 4,
    "final": {"max_abs": "inf", "rms": 0.5, "psnr": 40.1, "cosine": 1.0},
    "drift_rms": [0.1, "inf"],
    "checks": [
        {
            "level": "picture",
            "what": "images",
            "measure": "PSNR dB",
            "value": 30.5,
            "limit": 40.0,
            "passed": False,
        }
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.model.touch()
    return run


def verdict(**changes: Any) -> Verdict:
    return msgspec.convert({**OLD, **changes}, Verdict)


def identity(of: Verdict) -> dict[str, Any]:
    names = ("backend", "device", "export", "engine_sha256", "model_sha256")
    return {name: getattr(of, name) for name in names}


def test_a_later_check_of_the_same_engine_takes_the_place_of_the_earlier(run: Run) -> None:
    first, other = verdict(check="export"), verdict(device="CPU fp32", backend="openvino")
    for stored in (first, other, verdict(passed=True)):
        store_verdict(run, stored)
    assert {(v.backend, v.check, v.passed) for v in read_verdicts(run)} == {
        ("onnxruntime", "parity", True),
        ("openvino", "parity", False),
    }


def test_verdicts_of_an_earlier_version_are_read_until_they_are_replaced(run: Run) -> None:
    files.write_json(run.old_verdicts, {"step-fp16 onnxruntime CPUExecutionProvider": OLD})
    (old,) = read_verdicts(run)
    assert old == verdict()
    with pytest.raises(ParityError, match="export step-fp16 failed parity"):
        require_passed(run.path, identity(old), print)
    store_verdict(run, verdict(passed=True))
    assert [v.passed for v in read_verdicts(run)] == [True]


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"passed": True}, 0),
        ({"passed": True, "check": "export"}, 1),
        ({"engine_sha256": "another"}, 1),
        ({"device": "another"}, 1),
    ],
)
def test_only_the_verdict_on_this_very_engine_counts(
    run: Run, changes: dict[str, Any], notes: int
) -> None:
    store_verdict(run, verdict(**changes))
    said: list[str] = []
    require_passed(run.path, identity(verdict()), said.append)
    assert len(said) == notes
    assert all("`lutdeploy parity` has not judged it yet" in text for text in said)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"passed": "yes"}, r"Expected `bool`, got `str` - at `\$.passed`"),
        ({"unknown": 1}, "unknown field `unknown`"),
        ({"backend": "torch"}, "is the verdict on another engine"),
    ],
)
def test_damage_is_told_in_one_line(run: Run, change: dict[str, Any], told: str) -> None:
    store_verdict(run, verdict())
    (path,) = run.verdicts.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError, match=f"{path.name}.*{told}.*delete it and run"):
        read_verdicts(run)
