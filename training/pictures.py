"""What a model paints, and what with: pictures for people."""

from __future__ import annotations

import torch

from lutdeploy import images
from lutdeploy.images import Pixels
from lutdeploy.model import LutTransformer
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import batch_noise, trajectory
from lutdeploy.schedule import Schedule, solver_schedule

PICTURE_IMAGES = 8
REFERENCE = solver_schedule("euler", 64)


def of_model(model: LutTransformer, schedule: Schedule = REFERENCE) -> dict[str, Pixels]:
    """``trajectory`` of a schedule, ``lut`` and ``gram``; each uint8 [H, W, C]."""
    device = next(model.parameters()).device
    denoiser = TorchDenoiser(model, str(device))
    noise = batch_noise(0, range(PICTURE_IMAGES), model.config.image_shape)
    states = [s.x for s in trajectory(denoiser, noise, schedule)]
    half = schedule.steps // 2
    at = torch.full((1,), schedule.times[half], device=device)
    with torch.no_grad():  # a dynamic LUT is drawn as computed half-way to the first sample
        entries = model.lut_patches(torch.from_numpy(states[half][:1]).to(device), at)
    lut = entries.detach().float().cpu().numpy()
    return {
        "trajectory": images.trajectory_rows(states),
        "lut": images.lut_sheet(lut),
        "gram": images.gram_picture(lut),
    }
