"""Muon for the matrices of the blocks, AdamW for the rest, one linear-decay schedule."""

from __future__ import annotations

import torch
from torch import nn

from unmask.errors import UserError


def build(
    model: nn.Module, muon_lr: float, adam_lr: float, *, within: str = "blocks.", decay: float = 0.02
) -> list[torch.optim.Optimizer]:
    """[Muon (Jordan et al. 2024), AdamW], their groups carrying the peak rate as `peak`.

    Muon takes the matrices whose names begin with `within`, with weight decay.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"training needs torch >= 2.9 (torch.optim.Muon); this is {torch.__version__}")
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith(within)]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith(within))]
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=decay)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer, peak in ((muon, muon_lr), (adam, adam_lr)):
        for group in optimizer.param_groups:
            group["peak"] = peak
    return [muon, adam]


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
