"""What turns images into features: EfficientNet-Lite0, or the user's Inception weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lutdeploy.artefacts import files
from lutdeploy.artefacts.state_dicts import read_mapping
from lutdeploy.device import find_device
from lutdeploy.errors import ArtefactError, NonFiniteError
from lutdeploy.reference import full_float32
from lutdeploy.training.evaluation import efficientnet
from lutdeploy.training.evaluation.distances import Features, Pixels
from lutdeploy.training.evaluation.inception import Inception

BATCH = 64
PUBLISHED_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # named by the hash's beginning


@dataclass(frozen=True)
class Extractor:
    """Images to features, and what the distances between those may be called."""

    network: Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] to [B, D]
    device: str
    name: str  # for people: whose features these are
    sha256: str  # of the weights' file
    frechet_name: str
    kernel_name: str

    @torch.inference_mode()
    @full_float32()
    def __call__(self, pixels: Pixels) -> Features:
        """uint8 [n, C, S, S], C being 1 or 3, to float32 [n, D]."""
        found = []
        for start in range(0, len(pixels), BATCH):
            block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH]))
            colour = block.expand(-1, 3, -1, -1)  # grey becomes colour
            found.append(self.network(colour.to(self.device)))
        features = torch.cat(found).float().cpu()
        if not features.isfinite().all():
            raise NonFiniteError("NaN or Inf in the features: the extractor's weights are damaged")
        return features.numpy()


def open_extractor(path: Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor of a file of Inception weights, or for None EfficientNet-Lite0."""
    find_device(device)
    if path is None:
        return Extractor(
            network=efficientnet.load_network(efficientnet.weights_file(), device),
            device=device,
            name="EfficientNet-Lite0",
            sha256=efficientnet.SHA256,
            frechet_name="Fréchet distance (EfficientNet-Lite0)",
            kernel_name="kernel distance (EfficientNet-Lite0)",
        )
    state = {name: value.to(device) for name, value in _read_state(path).items()}
    try:
        network = Inception(state)
    except ArtefactError as error:
        raise ArtefactError(
            f"{path} does not hold the Inception weights that FID is defined by "
            f"({PUBLISHED_INCEPTION}): {error}"
        ) from error
    digest = files.sha256(path)
    known = "as published" if digest[:8] in PUBLISHED_INCEPTION else "not the published file"
    return Extractor(
        network=network,
        device=device,
        name=f"Inception, weights {path.name} ({known})",
        sha256=digest,
        frechet_name="FID",
        kernel_name="KID",
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch.save file; no pickled code is executed."""
    state = dict(read_mapping(path))
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ArtefactError(f"{path}: entry {key!r} is no tensor: not a plain state dict")
    return state
