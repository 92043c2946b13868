"""The optimisers of a recipe, and what they keep between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lutdeploy.training.recipes import TrainSettings

Optimizers = list[torch.optim.Optimizer]


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
        optimizers.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **common))
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
