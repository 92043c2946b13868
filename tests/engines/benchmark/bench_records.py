"""A bench.json for tests, with the figures that a test asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lutdeploy.config import model_config
from lutdeploy.engines.benchmark.measure import choose_settings
from lutdeploy.engines.benchmark.result import Loop, Model, Participant, Peak, Result, Row
from lutdeploy.machine import Machine
from lutdeploy.schedule import solver_schedule

MACHINE = Machine("a processor", 2, 2**30, "Linux", (), (), {"python": "3.12.0", "torch": "2.13.0"})


def row(path: str, batch: int = 16, seconds: float = 1.0, **others: Any) -> Row:
    """A contender at a batch size, called as its backend and precision are."""
    backend, _, precision = path.partition("-")
    place = {"onnxruntime": "CPUExecutionProvider", "openvino": f"CPU {precision}"}
    about: dict[str, Any] = {
        "backend": backend,
        "precision": precision,
        "device": "cpu",
        "export": None if backend == "torch" else "step-fp32",
        "engine_sha256": "e",
        "computes_on": place.get(backend, "cpu"),
        "sample_options": ["--precision", "bf16"] if precision == "bf16" else [],
        "step_seconds_min": 0.9 * seconds,
        "step_seconds_max": 1.2 * seconds,
        "ratio_to_original": 2.0,
        "ratio_min": 1.9,
        "ratio_max": 2.1,
        "ratio_stable": True,
        "stable": True,
        "windows": 3,
        "images_per_second": batch / seconds / 64,
        "flops_per_second": 1e9,
        "share_of_peak": 0.5,
        "peak_bytes": 2**28,
    }
    return Row(path, batch=batch, step_seconds=seconds, **{**about, **others})


def make_result(rows: Sequence[Row], sha256: str = "m", **others: Any) -> Result:
    """What was measured of contenders that are at their best at their largest batch size."""
    config = model_config("static-tanh-64", "tiny")
    largest = {row.path: row for row in sorted(rows, key=lambda row: row.batch)}
    contenders = [
        Participant(
            *(row.path, row.backend, row.precision, row.device, row.export, row.engine_sha256),
            *("measured", None, {"seconds": 2.5}, row.batch),
            Loop(row.batch, "euler-64", 1.0, 3, 5.0),
            None,
        )
        for row in largest.values()
    ]
    fields: dict[str, Any] = {
        "format": 1,
        "lutdeploy": "0",
        "created": "2026-01-01T00:00:00+00:00",
        "interrupted": False,
        "model": Model("a | model", "static-tanh-64", config, sha256, 2 * config.multiply_adds()),
        "machine": MACHINE,
        "fingerprint": MACHINE.fingerprint(),
        "peaks": {"cpu": Peak({"fp32": 2e11, "bf16": 4e11}, 1e10, 2048)},
        "settings": choose_settings(solver_schedule("euler", 64)),
        "used_by_others": 0.01,
        "contenders": contenders,
        "rows": list(rows),
        "notes": [],
    }
    return Result(**{**fields, **others})
