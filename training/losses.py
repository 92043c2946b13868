"""The training objective (spec "Training as in the post", and the velocity loss)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lutdeploy.errors import BackendError
from lutdeploy.lut import StaticLut
from lutdeploy.machine import import_problem
from lutdeploy.model import Block, LutTransformer
from lutdeploy.training.recipes import TrainSettings

# Where an image's brightness and colours are decided: its mean stands out of the noise from
# t ≈ 0.01 on, and logit t ~ N(−0.6, 1.2²) puts 2.5% of the timesteps below 0.05.
LOW_T = (0.001, 0.1)

Perceptual = Callable[[Tensor, Tensor], Tensor]  # two [B, 3, S, S] to distances [B]


def sample_timesteps(n: int, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """t [n] in (0, 1): uniform, or logit-normal (Esser et al. 2024, eq. 19).

    A share ``t_low`` of them is log-uniform in ``LOW_T`` instead.
    """
    device = generator.device
    if settings.t_mean is None:
        t = torch.rand(n, generator=generator, device=device)
    else:
        normal = torch.randn(n, generator=generator, device=device)
        t = torch.sigmoid(settings.t_mean + settings.t_std * normal)
    if settings.t_low == 0:
        return t
    chosen, place = torch.rand(2, n, generator=generator, device=device)
    low, high = map(math.log, LOW_T)
    return torch.where(chosen < settings.t_low, (low + (high - low) * place).exp(), t)


def denoising_loss(x0: Tensor, x: Tensor, t: Tensor, velocity_floor: float | None) -> Tensor:
    """mean (x0−x)², or with a floor mean (x0−x)²/max(1−t, floor)².

    The latter is the error of the velocity (x0−x_t)/(1−t), kept finite near t = 1. Predicted x0
    and clean x are [B, C, S, S], timesteps t [B].
    """
    squared = (x0 - x).square().mean(dim=(1, 2, 3))  # [B]
    if velocity_floor is not None:
        squared = squared / (1 - t).clamp_min(velocity_floor).square()
    return squared.mean()


def gram_penalty(entries: Tensor) -> Tensor:
    """mean((G⊙(1−I))²) with G = L·Lᵀ, for a LUT [K, C, P, P] as L [K, C·P·P]."""
    flat = entries.flatten(1)
    gram = flat @ flat.T
    return (gram - torch.diag(gram.diagonal())).square().mean()


def load_perceptual(device: torch.device) -> Perceptual:
    """LPIPS (Zhang et al. 2018) on VGG features, of both images clamped to [0, 1], per image.

    The spec clamps, it does not rescale: what is darker than 0 counts as 0.
    """
    way_out = "pass --perceptual none to train without it"
    problem = import_problem("lpips", "torchvision", "torchmetrics.image.lpip")
    if problem:
        raise BackendError(f"LPIPS cannot be used: {problem}; {way_out}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True)
    except OSError as error:  # URLError: torch.hub found no network
        raise BackendError(
            f"LPIPS needs the VGG16 weights, and torch.hub cannot fetch them: {error}; {way_out}"
        ) from error
    network = metric.net.to(device).eval().requires_grad_(False)

    def perceptual(x0: Tensor, x: Tensor) -> Tensor:
        distance: Tensor = network(x0.clamp(0, 1), x.clamp(0, 1), normalize=True)
        return distance.flatten()

    return perceptual


class Objective(nn.Module):
    """The scalar loss of a batch.

    One module around the model, so that it can be compiled and spread over devices as a whole.
    """

    def __init__(
        self, model: LutTransformer, settings: TrainSettings, perceptual: Perceptual | None = None
    ) -> None:
        """``perceptual``: from :func:`load_perceptual`, where the settings want it."""
        super().__init__()
        self.model = model
        self.settings = settings
        self.perceptual = perceptual
        for block in model.blocks:
            assert isinstance(block, Block)
            block.dropout = settings.dropout

    def forward(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss, float32, of clean images x [B, C, S, S] in [−1, 1]; noise N(0, I), t [B]."""
        settings, model = self.settings, self.model
        at = t[:, None, None, None]
        x_t = at * x + (1 - at) * noise
        bf16 = settings.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            x0 = model(x_t, t).float()
        loss = denoising_loss(x0, x, t, settings.velocity_floor)
        if self.perceptual is not None:
            counts = t >= settings.perceptual_from
            loss = loss + settings.perceptual_weight * (self.perceptual(x0, x) * counts).mean()
        if settings.gram_weight and isinstance(model.lut, StaticLut):
            loss = loss + settings.gram_weight * gram_penalty(model.lut.entries)
        return loss
