"""The training objective (spec "Training as in the post", and the velocity loss)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutdeploy.errors import BackendError
from lutdeploy.lut import StaticLut
from lutdeploy.model import Block, LutTransformer
from lutdeploy.training.augmentation import PARAMETERS
from lutdeploy.training.dct import dct_matrix
from lutdeploy.training.recipes import TrainSettings

Perceptual = Callable[[Tensor, Tensor], Tensor]  # two [B, 3, S, S] to distances [B]

# JPEG's example tables (ITU-T T.81, tables K.1 and K.2): steps of brightness and of colour.
BRIGHTNESS_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
COLOUR_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# RGB to brightness and two colour differences (JFIF, after ITU-R BT.601), without offsets.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def sample_timesteps(n: int, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """t [n] in (0, 1): uniform, or logit-normal (Esser et al. 2024, eq. 19)."""
    device = generator.device
    if settings.t_mean is None:
        return torch.rand(n, generator=generator, device=device)
    normal = torch.randn(n, generator=generator, device=device)
    return torch.sigmoid(settings.t_mean + settings.t_std * normal)


def frequency_weights(channels: int) -> Tensor:
    """The map [C·64, C·64] from an 8×8 block of C channels to weighted DCT coefficients.

    Colour conversion (of three channels), orthonormal DCT-II, division by JPEG's steps; scaled
    so that white noise keeps its mean square.
    """
    blocks = torch.kron(dct_matrix(8), dct_matrix(8))  # [64, 64]
    if channels == 3:
        colours = torch.tensor(YCBCR, dtype=torch.float64)
        steps = torch.tensor([BRIGHTNESS_STEPS, COLOUR_STEPS, COLOUR_STEPS], dtype=torch.float64)
    else:
        colours = torch.eye(channels, dtype=torch.float64)
        steps = torch.tensor([BRIGHTNESS_STEPS] * channels, dtype=torch.float64)
    weights = torch.kron(colours, blocks) / steps.flatten()[:, None]
    return (weights * math.sqrt(len(weights)) / weights.norm()).float()


def weighted_frequencies(error: Tensor, weights: Tensor) -> Tensor:
    """Mean square [B] of images [B, C, S, S] after :func:`frequency_weights` of each block."""
    blocks = F.pixel_unshuffle(error, 8).flatten(2)  # [B, C·64, blocks]
    return (weights @ blocks).square().mean(dim=(1, 2))


def denoising_loss(
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    velocity_floor: float | None,
    dct_weight: float = 0.0,
    frequencies: Tensor | None = None,
) -> Tensor:
    """mean (x0−x)², or with a floor mean (x0−x)²/max(1−t, floor)².

    The latter is the error of the velocity (x0−x_t)/(1−t), kept finite near t = 1.

    Args:
        x0, x: predicted and clean images, [B, C, S, S].
        t: timesteps, [B].
        velocity_floor: the smallest 1−t that counts, or None.
        dct_weight: of the error in weighted frequencies, added to (x0−x)².
        frequencies: from :func:`frequency_weights`, where ``dct_weight`` is not 0.
    """
    error = x0 - x
    squared = error.square().mean(dim=(1, 2, 3))  # [B]
    if frequencies is not None:
        squared = squared + dct_weight * weighted_frequencies(error, frequencies)
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

    Raises:
        BackendError: the package or its VGG weights cannot be had; names the way out.
    """
    way_out = "pass --perceptual none to train without it"
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError when broken
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"LPIPS needs the train extra (pip install 'lutdeploy[train]'): {reason}; {way_out}"
        ) from error
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
    """The scalar loss of a batch, and all that is trained with it.

    One module, so that it can be compiled and spread over devices as a whole.
    """

    frequencies: Tensor | None

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
        # What the network is told of augmentation: 0 where there was none, as at inference.
        self.told = (
            nn.Linear(PARAMETERS, model.config.stem_channels, bias=False)
            if settings.affine
            else None
        )
        weights = frequency_weights(model.config.channels) if settings.dct_weight else None
        self.register_buffer("frequencies", weights, persistent=False)

    def forward(
        self, x: Tensor, noise: Tensor, t: Tensor, augmented: Tensor | None = None
    ) -> Tensor:
        """The loss, float32.

        Args:
            x: clean images in [−1, 1], [B, C, S, S].
            noise: N(0, I) of the same shape.
            t: timesteps in [0, 1], [B].
            augmented: from :func:`lutdeploy.training.augmentation.affine`, [B, PARAMETERS].
        """
        settings, model = self.settings, self.model
        at = t[:, None, None, None]
        x_t = at * x + (1 - at) * noise
        autocast = settings.precision == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            if self.told is None or augmented is None:
                x0 = model(x_t, t).float()
            else:
                x0 = model(x_t, t, self.told(augmented)).float()
        loss = denoising_loss(
            x0, x, t, settings.velocity_floor, settings.dct_weight, self.frequencies
        )
        if self.perceptual is not None:
            counts = t >= settings.perceptual_from
            loss = loss + settings.perceptual_weight * (self.perceptual(x0, x) * counts).mean()
        if settings.gram_weight and isinstance(model.lut, StaticLut):
            loss = loss + settings.gram_weight * gram_penalty(model.lut.entries)
        return loss
