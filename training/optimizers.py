"""The optimisers of a recipe, and what they keep between steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lutdeploy.training.recipes import TrainSettings

Optimizers = list[torch.optim.Optimizer]


class Float32Muon(torch.optim.Muon):
    """Muon whose matrix products are in float32.

    PyTorch's rounds to bfloat16 whatever the training's precision. On a CPU without bfloat16
    instructions that takes several times as long as all else in a step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; there is no ``closure``."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = orthogonalize(gradient.lerp(buffer, momentum), group["ns_coefficients"])
                scale = 0.2 * math.sqrt(max(parameter.shape))  # to AdamW's root mean square
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], iterations: int = 5
) -> Tensor:
    """A matrix [n, m] with singular values moved near 1, in the matrix's own precision.

    The quintic Newton–Schulz iteration of Muon (Jordan et al. 2024): X ← aX + (bG + cG²)X with
    G = XXᵀ, for the shorter side of X.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def open_optimizers(module: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW; with "muon", Muon for the matrices of the blocks and AdamW for all else.

    Muon (Jordan et al. 2024) makes the update of a matrix nearly orthogonal. Its rate is
    AdamW's: an update is scaled to the root mean square that AdamW's has (Liu et al. 2025,
    "Muon is scalable for LLM training", eq. 4).
    """
    hidden: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        matrix_of_block = parameter.ndim == 2 and name.startswith("model.blocks.")
        chosen = hidden if settings.optimizer == "muon" and matrix_of_block else others
        chosen.append((name, parameter))
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizers: Optimizers = [torch.optim.AdamW(others, betas=settings.betas, fused=True, **common)]
    if hidden:
        muon = Float32Muon if settings.precision == "fp32" else torch.optim.Muon
        optimizers.append(muon(hidden, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def _names(state_dict: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The index of each parameter in an optimiser's state_dict, and the parameter's name."""
    for group in state_dict["param_groups"]:
        yield from zip(group["params"], group["param_names"], strict=True)


def state_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """What the optimisers keep, by names such as ``exp_avg/model.head.weight``."""
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        for index, name in _names(saved):
            tensors |= {f"{kind}/{name}": value for kind, value in saved["state"][index].items()}
    return tensors


def restore(optimizers: Optimizers, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Take back what :func:`state_tensors` gave after ``steps``; other tensors do not matter."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        saved["state"] = {index: by_name[name] for index, name in _names(saved)}
        if isinstance(optimizer, torch.optim.AdamW):
            for kept in saved["state"].values():  # files of earlier versions hold no step
                kept.setdefault("step", torch.tensor(float(steps)))
        optimizer.load_state_dict(saved)
