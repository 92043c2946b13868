"""The optimisers of a recipe, as one list that is stepped together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lutdeploy.training.recipes import TrainSettings

# What each optimiser keeps for a parameter, beside AdamW's count of steps.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


def open_optimizers(module: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW; with "muon", Muon for the matrices of the blocks and AdamW for all else.

    Muon (Jordan et al. 2024) makes the update of a matrix nearly orthogonal. Its rate is
    AdamW's: an update is scaled to the root mean square that AdamW's has (Liu et al. 2025,
    "Muon is scalable for LLM training", eq. 4).
    """
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if (
            settings.optimizer == "muon"
            and parameter.ndim == 2
            and name.startswith("model.blocks.")
        ):
            hidden.append(parameter)
        else:
            others.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def step(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """One step of all at a rate, then no gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def moments(
    optimizers: Iterable[torch.optim.Optimizer], names: dict[nn.Parameter, str]
) -> Iterator[tuple[str, Tensor]]:
    """Every moment by name, such as ``exp_avg/model.head.weight``.

    Args:
        names: of the parameters.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for kind in MOMENTS[type(optimizer)]:
                    yield f"{kind}/{names[parameter]}", optimizer.state[parameter][kind]


def prepare(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> None:
    """Make the moments, which otherwise exist only after a first step, to be filled."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = {kind: torch.zeros_like(parameter) for kind in MOMENTS[type(optimizer)]}
                if isinstance(optimizer, torch.optim.AdamW):
                    state["step"] = torch.full((), float(steps), device=parameter.device)
                optimizer.state[parameter] = state
