"""PyTorch: a model file behind the Denoiser protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.errors import BackendError, first_line
from lutdeploy.reference import TorchDenoiser


class TorchEngine(TorchDenoiser):
    """The float32 PyTorch model on a device.

    Args:
        model: a model.safetensors.
        device: "cpu", "cuda" or another torch device.
        threads: of one operator, for the whole process, which is how torch sets it; None
            changes nothing.
    """

    def __init__(self, model: Path, device: str = "cpu", threads: int | None = None) -> None:
        check_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        super().__init__(load_model(model), device)
        self.model_sha256 = files.sha256(model)

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to free: the model goes with its last reference."""

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, device and hashes."""
        return {
            "backend": "torch",
            "device": str(self.device),
            "export": None,
            "engine_sha256": self.model_sha256,
            "model_sha256": self.model_sha256,
        }


def check_device(device: str) -> None:
    """Raise a BackendError where torch does not know a device or does not have it."""
    try:
        torch.zeros(1, device=device).cpu()  # device "meta" fails at .cpu(): it computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu"] + [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        raise BackendError(
            f"torch has no device {device!r} here; there are {', '.join(there)} "
            f"({first_line(error)})"
        ) from error
