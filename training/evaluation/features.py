"""What turns images into features: lutdeploy's own network, or the user's Inception weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import read_author_file
from lutdeploy.errors import ArtefactError, BackendError, NonFiniteError, UsageError
from lutdeploy.training.evaluation.distances import Features, Pixels
from lutdeploy.training.evaluation.feature_network import SHA256, SIDE, load_network
from lutdeploy.training.evaluation.inception import Inception

BATCH = 64
# The file of published figures, pt_inception-2015-12-05-6726825d.pth, begins its hash so.
PUBLISHED_INCEPTION = "6726825d"


class Extractor(Protocol):
    """Images to features, and what the distances between those may be called."""

    @property
    def name(self) -> str:
        """For people: whose features these are."""

    @property
    def sha256(self) -> str:
        """Of the weights' file."""

    @property
    def frechet_name(self) -> str: ...

    @property
    def kernel_name(self) -> str: ...

    def __call__(self, pixels: Pixels) -> Features:
        """uint8 [n, C, S, S], C being 1 or 3, to float32 [n, D]."""


def _batches(pixels: Pixels) -> Iterator[torch.Tensor]:
    """uint8 [64, 3, S, S] at a time; grey becomes colour."""
    for start in range(0, len(pixels), BATCH):
        block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH]))
        yield block.expand(-1, 3, -1, -1) if block.shape[1] == 1 else block


def _joined(rows: list[torch.Tensor]) -> Features:
    """[n, D] from batches of features.

    Raises:
        NonFiniteError: NaN or Inf, which only damaged weights give.
    """
    features = torch.cat(rows).float().cpu()
    if not features.isfinite().all():
        raise NonFiniteError("NaN or Inf in the features: the extractor's weights are damaged")
    return features.numpy()


@dataclass(frozen=True)
class LutdeployFeatures:
    """The network that comes with lutdeploy. Its distances are no FID and no KID.

    Images of another side than 64 are resized (bilinear, antialiased).
    """

    network: Callable[[torch.Tensor], torch.Tensor]
    device: str
    name: str = "lutdeploy features"
    sha256: str = SHA256
    frechet_name: str = "Fréchet distance (lutdeploy features)"
    kernel_name: str = "kernel distance (lutdeploy features)"

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Features:
        rows = []
        for block in _batches(pixels):
            x = block.to(self.device).float().div(127.5).sub(1)
            if x.shape[-1] != SIDE:
                x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
            rows.append(self.network(x))
        return _joined(rows)


@dataclass(frozen=True)
class InceptionFeatures:
    """Inception's 2048 pooled features, by its own resize and scaling."""

    network: Callable[[torch.Tensor], torch.Tensor]
    device: str
    name: str
    sha256: str
    frechet_name: str = "FID"
    kernel_name: str = "KID"

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Features:
        return _joined([self.network(block.to(self.device)) for block in _batches(pixels)])


def open_extractor(path: Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor of a file of Inception weights, or lutdeploy's own for None.

    Raises:
        UsageError: no such file.
        ArtefactError: it does not hold Inception's weights, or lutdeploy's own are damaged.
        BackendError: no such device.
    """
    if path is None:
        return LutdeployFeatures(_placed(load_network(), device), device)
    state = _read_state(path)
    digest = files.sha256(path)
    known = "as published" if digest.startswith(PUBLISHED_INCEPTION) else "not the published file"
    name = f"Inception, weights {path.name} ({known})"
    return InceptionFeatures(_placed(_inception(path, state), device), device, name, digest)


def _placed(network: torch.nn.Module, device: str) -> torch.nn.Module:
    """The network on a device."""
    try:
        return network.to(device)
    except (AssertionError, RuntimeError) as error:  # as a torch without CUDA, and with it, says
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"device {device}: torch cannot use it ({reason}); see `lutdeploy doctor`"
        ) from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch.save file; no pickled code is executed."""
    if path.suffix != ".safetensors":
        return read_author_file(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise ArtefactError(f"{path} is damaged or no safetensors file: {error}") from error


def _inception(path: Path, state: dict[str, torch.Tensor]) -> Inception:
    """Inception with these weights."""
    network = Inception()
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("_tracked")}  # of no use here
    for name in (*expected, *given):
        if name not in expected:
            wrong = f"key {name} is unknown"
        elif name not in given:
            wrong = f"key {name} is missing"
        elif given[name].shape != expected[name].shape:
            shapes = [list(s[name].shape) for s in (given, expected)]
            wrong = f"key {name} has shape {shapes[0]}, expected {shapes[1]}"
        else:
            continue
        raise ArtefactError(
            f"{path} does not hold the Inception weights that FID is defined by "
            f"(pt_inception-2015-12-05-6726825d.pth): {wrong}"
        )
    network.load_state_dict(given, strict=False)
    return network.eval().requires_grad_(False)
