"""PyTorch where it is the float32 reference: a model file behind the Denoiser protocol.

On a GPU ``engines.cuda.torch`` runs instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.device import find_device
from lutdeploy.reference import TorchDenoiser


class TorchEngine(TorchDenoiser):
    """The float32 PyTorch model on a device.

    Args:
        model: a model.safetensors.
        device: "cpu" or "mps".
        threads: of one operator, for the whole process, which is how torch sets it; None
            changes nothing.
    """

    def __init__(self, model: Path, device: str = "cpu", threads: int | None = None) -> None:
        find_device(device)
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
