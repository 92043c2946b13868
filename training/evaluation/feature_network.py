"""The small network whose features lutdeploy measures with, and the file it is kept in."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lutdeploy.artefacts import files
from lutdeploy.errors import ArtefactError, ran_out_of_memory

WEIGHTS = Path(__file__).parent / "models" / "features.safetensors"
# Of the file that comes with the package; other weights would give other numbers.
SHA256 = "1c7ded83ab41213a86b0fc3d544af40f78cd8c1b59f86e51378b046b30b2e198"
SIDE = 64  # pixels, at which it was trained
WIDTHS = (32, 64, 128, 192)
FEATURES = sum(WIDTHS[1:])


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    """Two 3×3 convolutions around a shortcut: [B, C, H, W] to [B, C, H, W], not negative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, 1)
        self.second = _convolution(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class FeatureNetwork(nn.Module):
    """Images [B, 3, 64, 64] in [−1, 1] to features [B, 384].

    The features are the spatial means at 16×16, 8×8 and 4×4, so that fine texture counts
    beside shape; each is shifted and scaled to mean 0 and variance 1 over the images of the
    training, so that none outweighs the others.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, WIDTHS[0], 2)
        self.down = nn.ModuleList(_convolution(a, b, 2) for a, b in itertools.pairwise(WIDTHS))
        self.blocks = nn.ModuleList(Residual(width) for width in WIDTHS[1:])
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def pooled(self, x: Tensor) -> Tensor:
        """The features before they are shifted and scaled."""
        x = torch.relu(self.stem(x))  # [B, 32, 32, 32]
        means = []
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(torch.relu(down(x)))  # [B, 64, 16, 16], [B, 128, 8, 8], [B, 192, 4, 4]
            means.append(x.mean((2, 3)))
        return torch.cat(means, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.pooled(x) - self.mean) / self.scale


def save_network(network: FeatureNetwork, path: Path) -> None:
    """Write the network as float16 safetensors, atomically."""
    tensors = {
        name: value.detach().half().cpu().contiguous()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    files.write_atomic(path, save(tensors))


def load_network(path: Path = WEIGHTS, sha256: str = SHA256) -> FeatureNetwork:
    """Read the network into float32, in eval mode; another file than the expected is refused."""
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: install lutdeploy again")
    found = files.sha256(path)
    if found != sha256:
        raise ArtefactError(
            f"{path} has sha256 {found[:12]}…, not {sha256[:12]}…: damaged or replaced, and its "
            "distances would mean nothing; install lutdeploy again"
        )
    network = FeatureNetwork()
    counts = {k: v for k, v in network.state_dict().items() if k.endswith("_tracked")}
    try:
        state = {name: value.float() for name, value in load_file(path).items()}
        network.load_state_dict(counts | state)
    except (SafetensorError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise
        raise ArtefactError(f"{path} does not hold the feature network: {error}") from error
    return network.eval().requires_grad_(False)
