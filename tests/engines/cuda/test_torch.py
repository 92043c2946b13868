"""PyTorch's step on a device: the loop's numbers are those of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lutdeploy
from benchmarks import gpu
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser
from lutdeploy.reference import TorchDenoiser
from tests.conftest import golden_model
from tests.doubles.cpu_device import CpuDevice


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 3e-2), ("bf16", 2.5e-1)])
def test_a_trajectory_on_the_device(preset: str, precision: str, limit: float) -> None:
    reference = TorchDenoiser(golden_model(preset))
    device = CpuDevice()
    with TorchDeviceDenoiser(golden_model(preset), device, precision) as denoiser:
        for solver in ("euler", "dpmpp-3m"):
            found = lutdeploy.sample(denoiser, 3, steps=5, solver=solver, batch=2)
            expected = lutdeploy.sample(reference, 3, steps=5, solver=solver)
            assert np.abs(found - expected).max() < limit
    assert device.captures == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 3e-2), ("bf16", 2.5e-1)])
def test_a_real_gpu_gives_the_numbers_of_the_cpu(
    preset: str, precision: str, limit: float, compile: bool
) -> None:
    reference = TorchDenoiser(golden_model(preset))
    expected = lutdeploy.sample(reference, 5, steps=8, solver="dpmpp-2m")
    model = golden_model(preset)
    with TorchDeviceDenoiser(model, CudaDevice(), precision, compile=compile) as denoiser:
        for batch in (5, 2):
            found = lutdeploy.sample(denoiser, 5, steps=8, solver="dpmpp-2m", batch=batch)
            assert np.abs(found - expected).max() < limit


def test_the_gpu_report_needs_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = CliRunner().invoke(gpu.main, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output


def test_the_gpu_report_says_whose_figures_these_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flow, with commands that are not run; on a double every figure is the double's."""

    def commands(arguments: tuple[object, ...]) -> dict[str, Any]:
        code = int(arguments[0] == "parity")
        return {"command": str(arguments[0]), "exit_code": code, "seconds": 1.0, "said": "x|y"}

    monkeypatch.setattr(gpu, "run_command", commands)
    monkeypatch.setattr(gpu, "peak_flops", lambda: 1e12)
    monkeypatch.setattr("lutdeploy.engines.cuda.device.CudaDevice", CpuDevice)
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "PRESETS", {"dynamic-64": {}})
    options = ("--size", "tiny", "--batch", "2", "--seconds", "0", "--out", tmp_path)
    plain = {"PyTorch fp16, eager": 1, "ONNX Runtime fp16, CUDA": 1}
    every = gpu.contenders
    monkeypatch.setattr(
        gpu, "contenders", lambda *a: {n: o for n, o in every(*a).items() if n in plain}
    )
    result = CliRunner().invoke(gpu.main, [str(option) for option in options])
    assert result.exit_code == 1
    assert 'failed: ["parity"]' in result.output
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# TensorRT double")
    assert "not here: " in text
    report = json.loads((tmp_path / "report.json").read_text())
    (found,) = report["presets"].values()
    assert [done["command"] for done in found["commands"]] == ["export", "build", "parity"]
    timed, missing = found["speed"]
    assert timed["images_per_second"] == pytest.approx(2 / timed["seconds"])
    assert "has no export" in missing["missing"]
