"""Muon for the matrices of the blocks, AdamW for the rest, one linear-decay schedule."""

from __future__ import annotations

import torch
from torch import nn

from unmask.errors import UserError


def build(
    model: nn.Module, muon_lr: float, adam_lr: float, *, within: str = "blocks.", decay: float = 0.02, rows: int = 1
) -> list[torch.optim.Optimizer]:
    """[Muon (Jordan et al. 2024), AdamW], their groups carrying the peak rate as `peak`.

    Muon takes the matrices of at least `rows` rows whose names begin with `within`, with weight decay. On shards it
    computes what it does on whole matrices, up to the rounding of its bf16 iterations, where each has a row.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"training needs torch >= 2.9 (torch.optim.Muon); this is {torch.__version__}")
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and len(p) >= rows and name.startswith(within) else others).append(p)
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=decay)
    for group in muon.param_groups:
        group["peak"] = muon_lr
    return [muon, adam(others, adam_lr)]


def adam(parameters: list[nn.Parameter], rate: float, *, decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW, its groups carrying the peak rate as `peak`."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    for group in optimizer.param_groups:
        group["peak"] = rate
    return optimizer


def schedule(step: int, steps: int, *, decay: float, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear decay to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def apply(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` times its peak, step, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
