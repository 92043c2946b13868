"""Train the feature network on a folder of images, without labels.

    python -m lutdeploy.training.evaluation.train_features --data faces/ --out features.safetensors

Contrastive learning (SimCLR, Chen et al. 2020, equation 1): two views of an image should lie
closer together than views of other images. A blurred, a noisy and a shuffled copy of an image
count as other images, and a second head names which of them it sees (CSI, Tack et al. 2020,
section 2.2), so that the features keep what tells a real picture from a worn one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lutdeploy.errors import LutDeployError
from lutdeploy.training.data import batch_indices, load_folder
from lutdeploy.training.evaluation.distances import smooth
from lutdeploy.training.evaluation.feature_network import SIDE, WIDTHS, FeatureNetwork, save_network

SHIFTS = ("none", "blur", "noise", "shuffle")
TEMPERATURE = 0.2
PROJECTION = 128
HELD_OUT, HELD_OUT_SEED = 0.05, 0  # the split of `lutdeploy train` by default: never seen here


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the weights."""

    steps: int = 800
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    warmup: int = 50
    seed: int = 0
    bf16: bool = True  # autocast of the convolutions


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each of [B, 3, S, S] in [0, 1]: crop, turn, flip, colour."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(x), generator=generator) * (high - low) + low

    scale, angle = uniform(0.65, 1.0), uniform(-0.15, 0.15)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    place = [uniform(-1, 1) * (1 - scale) for _ in range(2)]
    entries = [cos * flip, -sin, place[0], sin * flip, cos, place[1]]
    affine = torch.stack(entries, 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, uniform(0.4, 1.4)[:, None, None, None])
    level = x.mean((1, 2, 3), keepdim=True)
    x = torch.lerp(level, x, uniform(0.7, 1.3)[:, None, None, None])
    return (x + uniform(-0.15, 0.15)[:, None, None, None]).clamp(0, 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """[B, C, S, S] under a Gaussian of ``sigma`` pixels, edges mirrored."""
    radius = max(1, math.ceil(3 * sigma))
    at = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    return smooth(x, kernel / kernel.sum())


def shuffle_patches(x: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """[B, C, S, S] cut into patches×patches squares, laid in one new order."""
    count, channels, side, _ = x.shape
    inner = side // patches
    tiles = x.reshape(count, channels, patches, inner, patches, inner)
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    tiles = tiles[torch.randperm(patches**2, generator=generator)]
    tiles = tiles.unflatten(0, (patches, patches)).permute(2, 3, 0, 4, 1, 5)
    return tiles.reshape(x.shape)


def shifted(x: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """[B, 3, S, S] in [0, 1] worn in one way, of a random strength."""
    strength = torch.rand((), generator=generator).item()
    if SHIFTS[kind] == "blur":
        return blur(x, 0.5 + 1.5 * strength)
    if SHIFTS[kind] == "noise":
        noise = torch.randn(x.shape, generator=generator)
        return (x + noise * (0.03 + 0.15 * strength)).clamp(0, 1)
    return shuffle_patches(x, (2, 4, 8)[int(3 * strength)], generator)


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent (SimCLR, equation 1) of two views' projections, each [B, D]."""
    z = F.normalize(torch.cat([first, second]).float(), dim=1)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(first))
    return F.cross_entropy(similarity, partner)


def train_network(images: NDArray[np.uint8], settings: FeatureSettings) -> FeatureNetwork:
    """Train on uint8 [n, 3, 64, 64]; the same settings and images give the same weights."""
    torch.manual_seed(settings.seed)
    network = FeatureNetwork()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = sum(WIDTHS[1:])
    project = nn.Sequential(
        nn.Linear(features, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, PROJECTION)
    )
    name_shift = nn.Linear(features, len(SHIFTS))
    parameters = [p for m in (network, project, name_shift) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = batch_indices(len(images), settings.batch, settings.seed, 0)
    for step in range(settings.steps):
        x = torch.from_numpy(images[next(batches)]).float() / 255
        kind = 1 + step % (len(SHIFTS) - 1)
        views = []
        for _ in range(2):
            view = augment(x, generator)
            views += [view, shifted(augment(x, generator), kind, generator)]
        batch = torch.cat(views) * 2 - 1  # [4B, 3, S, S]: plain, worn, plain, worn
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            pooled = network.pooled(batch.contiguous(memory_format=torch.channels_last)).float()
        names = torch.tensor([0, kind, 0, kind]).repeat_interleave(len(x))
        first, second = project(pooled).chunk(2)
        contrast = contrastive_loss(first, second)
        naming = F.cross_entropy(name_shift(pooled), names)
        progress = step / settings.steps
        for group in optimizer.param_groups:
            ramp = min(1.0, (step + 1) / settings.warmup)
            group["lr"] = settings.lr * ramp * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad(set_to_none=True)
        (contrast + naming).backward()
        optimizer.step()
        if step % 20 == 0 or step + 1 == settings.steps:
            click.echo(f"step {step + 1}: contrast {contrast:.3f}, naming {naming:.3f}", err=True)
    _standardise(network.eval(), images)
    return network


@torch.no_grad()
def _standardise(network: FeatureNetwork, images: NDArray[np.uint8]) -> None:
    """Set the mean and the scale of the features to those of the images."""
    blocks = torch.from_numpy(images).split(256)
    pooled = torch.cat([network.pooled(block.float() / 127.5 - 1) for block in blocks])
    network.mean.copy_(pooled.mean(0))
    # A feature that is almost always zero would otherwise outweigh the rest.
    spread = pooled.std(0)
    network.scale.copy_(spread.clamp_min(0.1 * float(spread.median())))


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(min=1), default=FeatureSettings.steps)
@click.option("--batch", type=click.IntRange(min=2), default=FeatureSettings.batch)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@click.option("--threads", type=click.IntRange(1), default=1)
def main(data: Path, out: Path, steps: int, batch: int, seed: int, threads: int) -> None:
    """Train the network that `lutdeploy evaluate` takes features from."""
    torch.set_num_threads(threads)
    try:
        found = load_folder(data, SIDE)
    except LutDeployError as error:
        raise click.ClickException(str(error)) from error
    for line in found.all_remarks():
        click.echo(line, err=True)
    chosen, _ = found.split(HELD_OUT, HELD_OUT_SEED)
    settings = FeatureSettings(steps=steps, batch=batch, seed=seed)
    save_network(train_network(found.images[chosen], settings), out)
    click.echo(out)


if __name__ == "__main__":
    main()
