"""The key of an engine, its record, and what makes it stale. Nothing here knows TensorRT."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.library import RTX, TENSORRT
from lutdeploy.errors import ArtefactError, UsageError

HERE = plan.Machine(TENSORRT, "11.1.0.106", "13.0", "GPU A", "9.0")
HERE_RTX = dataclasses.replace(HERE, backend=RTX, tensorrt="1.7.1.116", compute_capability="8.9")
PLAN = struct.pack("<4sI16x4B", b"ftrt", 0, 11, 1, 0, 106) + b"code"


@pytest.fixture
def run(exported_run: Callable[..., Run]) -> Run:
    return exported_run("step")


def record_of(run: Run, machine: plan.Machine = HERE, **options: Any) -> plan.PlanRecord:
    """A plan and its record in the run, as a build leaves them; of RTX for 8.6 and 8.9."""
    manifest, capabilities = read_manifest(run.exports()[0]), ("8.6", "8.9")
    fields = plan.key_fields(
        *(manifest, "step.onnx", plan.BuildOptions(**options), machine),
        capabilities if machine.backend == RTX else (),
    )
    data = PLAN if machine.backend == TENSORRT else b"vtrt" + PLAN[4:]
    record = plan.PlanRecord(
        path=run.plan_record(plan.key_of(fields)),
        fields=fields,
        export="step-fp16",
        graph_file="step.onnx",
        plan_bytes=len(data),
        plan_sha256=hashlib.sha256(data).hexdigest(),
        types={"MATRIX_MULTIPLY float16": 41},
        created="2026-01-01T00:00:00",
        build_seconds=1.5,
    )
    files.write_atomic(record.plan, data)
    record.write()
    return record


@pytest.mark.parametrize(
    ("text", "sizes", "shown"),
    [("64", (64, 64, 64), "64"), ("1:64:256", (1, 64, 256), "1:64:256"), ("2:2:2", (2, 2, 2), "2")],
)
def test_batch_profiles(text: str, sizes: tuple[int, int, int], shown: str) -> None:
    profile = plan.BatchProfile.parse(text)
    assert dataclasses.astuple(profile) == sizes
    assert str(profile) == shown
    assert plan.BatchProfile.parse(str(profile)) == profile


def test_several_sizes_are_profiles_without_gaps() -> None:
    profiles = plan.parse_batches("1,8,64,256")
    assert list(map(str, profiles)) == ["1", "2:8:8", "9:64:64", "65:256:256"]
    options = plan.BuildOptions(profiles)
    assert plan.read_profiles(options.batches) == profiles
    assert plan.parse_batches("1:64:256") == (plan.BatchProfile(1, 64, 256),)


@pytest.mark.parametrize(
    "text",
    ["", "a", "1:2", "1:2:3:4", "0", "4:2:8", "1:9:8", "-1:1:1", "8,1", "1,1", "1:2:4,8", "1,"],
)
def test_impossible_batch_profiles_say_so(text: str) -> None:
    with pytest.raises(UsageError, match="batch"):
        plan.parse_batches(text)


def test_every_field_changes_the_key(run: Run) -> None:
    manifest = read_manifest(run.exports()[0])

    def fields_of(
        manifest: Manifest = manifest, machine: plan.Machine = HERE, **options: Any
    ) -> dict[str, Any]:
        return plan.key_fields(manifest, "step.onnx", plan.BuildOptions(**options), machine)

    fields = fields_of()
    variants = [
        fields_of(**change)
        for change in (
            {"profiles": plan.parse_batches("1:64:128")},
            {"profiles": plan.parse_batches("1,64,256")},
            {"workspace_mib": 64},
            {"optimization_level": 5},
            {"hardware_compatible": True},
            {"version_compatible": True},
            {"refittable": True},
        )
    ]
    for name in ("tensorrt", "cuda", "gpu", "compute_capability"):
        variants.append(fields_of(machine=dataclasses.replace(HERE, **{name: "other"})))
    for name in ("step.onnx", "weights.bin"):
        files = {**manifest.files, name: FileRecord(manifest.files[name].bytes, "0" * 64)}
        variants.append(fields_of(msgspec.structs.replace(manifest, files=files)))
    variants.append(fields_of(msgspec.structs.replace(manifest, precision="fp32")))
    for capabilities in ((), ("8.9",), ("8.6", "8.9")):
        variants.append(
            plan.key_fields(
                manifest, "step.onnx", plan.BuildOptions(), HERE_RTX, architectures=capabilities
            )
        )
    keys = {plan.key_of(f) for f in (fields, *variants)}
    assert len(keys) == len(variants) + 1
    assert plan.key_of(dict(reversed(fields.items()))) == plan.key_of(fields)


def test_an_engine_of_rtx_is_the_same_wherever_it_was_built(run: Run) -> None:
    manifest = read_manifest(run.exports()[0])
    elsewhere = plan.Machine(RTX, HERE_RTX.tensorrt)
    keys = {
        plan.key_of(plan.key_fields(manifest, "step.onnx", plan.BuildOptions(), machine, ("8.9",)))
        for machine in (HERE_RTX, elsewhere)
    }
    assert len(keys) == 1


@pytest.mark.parametrize("machine", [HERE, HERE_RTX])
def test_a_record_comes_back_as_it_was_written(run: Run, machine: plan.Machine) -> None:
    record = record_of(run, machine)
    assert plan.read_record(record.path) == record
    assert record.read_plan()[4:] == PLAN[4:]


@pytest.mark.parametrize("length", [0, 1, 20, 400])
def test_a_truncated_record_is_named(run: Run, length: int) -> None:
    path = record_of(run).path
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtefactError, match=path.name):
        plan.read_record(path)


def test_a_record_of_another_key_is_refused(run: Run) -> None:
    record = record_of(run)
    values = files.read_json(record.path)
    values["fields"]["gpu"] = "GPU B"
    files.write_json(record.path, values)
    with pytest.raises(ArtefactError, match="another engine"):
        plan.read_record(record.path)
    renamed = record.path.with_name("0" * 20 + ".json")
    record.write()
    record.path.rename(renamed)
    with pytest.raises(ArtefactError, match="another engine"):
        plan.read_record(renamed)


def test_a_plan_that_is_not_the_recorded_one_is_refused(run: Run) -> None:
    record = record_of(run)
    record.plan.write_bytes(PLAN[:-1] + b"E")
    with pytest.raises(ArtefactError, match="refused: sha256"):
        record.read_plan()
    record.plan.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        record.read_plan()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"ELF" + PLAN[3:], "another tag"),
        (PLAN[:20], "another tag"),
        (b"vtrt" + PLAN[4:], "not a plan of TensorRT: "),
        (struct.pack("<4sI16x4B", b"ftrt", 0, 10, 13, 0, 35) + b"code", "TensorRT 10.13.0"),
    ],
)
def test_a_plans_header_is_read_before_its_code(run: Run, data: bytes, told: str) -> None:
    record = msgspec.structs.replace(
        record_of(run), plan_bytes=len(data), plan_sha256=hashlib.sha256(data).hexdigest()
    )
    record.plan.write_bytes(data)
    with pytest.raises(ArtefactError, match=told):
        record.read_plan()


@pytest.mark.parametrize(
    ("options", "change", "stale"),
    [
        ({}, {"gpu": "GPU B"}, ["gpu: built with GPU A, here GPU B"]),
        ({}, {"tensorrt": "11.1.0.107"}, ["tensorrt: built with 11.1.0.106, here 11.1.0.107"]),
        ({}, {"cuda": "12.9", "gpu": "GPU B"}, ["cuda", "gpu"]),
        ({"hardware_compatible": True}, {"gpu": "GPU B", "compute_capability": "8.6"}, []),
        ({"hardware_compatible": True}, {"compute_capability": "7.5"}, ["compute_capability"]),
        ({"version_compatible": True}, {"tensorrt": "11.2.0.1", "cuda": "13.3"}, []),
        ({"version_compatible": True}, {"tensorrt": "11.0.0.1"}, ["tensorrt"]),
        ({"version_compatible": True}, {"tensorrt": "12.0.0.1"}, ["tensorrt"]),
    ],
)
def test_each_field_that_differs_is_named(
    run: Run, options: dict[str, Any], change: dict[str, str], stale: list[str]
) -> None:
    record_of(run, **options)
    (state,) = plan.survey(run, {TENSORRT: dataclasses.replace(HERE, **change)})
    assert len(state.reasons) == len(stale)
    for reason, expected in zip(state.reasons, stale, strict=True):
        assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"compute_capability": "8.6", "gpu": "GPU B", "cuda": "12.9"}, []),
        ({"compute_capability": None, "gpu": None, "cuda": None}, []),
        (
            {"compute_capability": "12.0"},
            ["architectures: built with 8.6, 8.9, here 12.0"],
        ),
        ({"tensorrt": "1.8.0.1"}, ["tensorrt: built with 1.7.1.116, here 1.8.0.1"]),
    ],
)
def test_an_engine_of_rtx_fits_the_architectures_it_was_built_for(
    run: Run, change: dict[str, Any], stale: list[str]
) -> None:
    record = record_of(run, HERE_RTX)
    (state,) = plan.survey(run, {RTX: dataclasses.replace(HERE_RTX, **change), TENSORRT: HERE})
    assert list(state.reasons) == stale and state.outcome == "compiled, not run"
    assert record.runtime_cache("12.0").name == f"{record.path.stem}.sm120.cache"


def test_survey_without_a_machine_compares_the_export(run: Run) -> None:
    record = record_of(run)
    (state,) = plan.survey(run, {})
    assert state.reasons == ()
    manifest = run.exports()[0] / MANIFEST
    values = files.read_json(manifest)
    values["files"]["weights.bin"]["sha256"] = "f" * 64
    files.write_json(manifest, values)
    (state,) = plan.survey(run, {})
    assert [reason.split(":")[0] for reason in state.reasons] == ["weights_sha256"]
    record.plan.unlink()
    (state,) = plan.survey(run, {TENSORRT: HERE})
    assert state.reasons[-1] == f"{record.plan.name} is missing or unreadable"
    record.plan.write_bytes(b"ftrt")
    (state,) = plan.survey(run, {TENSORRT: HERE})
    assert "another tag" in state.reasons[-1]


def test_survey_names_what_is_damaged_or_gone(run: Run, tmp_path: Path) -> None:
    record = record_of(run)
    run.exports()[0].rename(tmp_path / "elsewhere")
    (state,) = plan.survey(run, {TENSORRT: HERE})
    assert state.reasons == ("its export step-fp16 is gone",)
    record.path.write_text("{")
    (state,) = plan.survey(run, {TENSORRT: HERE})
    assert state.record is None
    assert record.path.name in state.reasons[0]


def test_only_a_whole_engine_is_found(run: Run) -> None:
    record = record_of(run)
    assert plan.find_plan(run, record.fields) == record
    assert plan.find_plan(run, {**record.fields, "gpu": "GPU B"}) is None
    record.plan.write_bytes(b"")
    assert plan.find_plan(run, record.fields) is None
