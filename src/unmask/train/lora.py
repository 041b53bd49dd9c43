"""Low-rank adapters (Hu et al. 2022) on the attention of a transformer: W + alpha / r B A, as a parametrization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unmask.models.transformer import Attention, Transformer


class LowRank(nn.Module):
    """A weight [sum of rows, in] with one pair A [r, in], B [rows, r] for each of its pieces (q, k and v, say)."""

    def __init__(self, rows: list[int], width: int, rank: int, alpha: float, draw: torch.Generator) -> None:
        super().__init__()
        self.scale = alpha / rank
        down = (torch.rand(rank, width, generator=draw) * 2 - 1 for _ in rows)  # uniform, as PEFT draws it
        self.a = nn.ParameterList([nn.Parameter(d * (3 / width) ** 0.5 / 3**0.5) for d in down])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(n, rank)) for n in rows])

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its pairs added."""
        return weight + self.scale * torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)])


def add(model: Transformer, rank: int, alpha: float, *, seed: int = 0) -> list[nn.Parameter]:
    """Freeze the model and add pairs to q, k, v and the output projection of every layer; returns their matrices."""
    c, draw = model.config, torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for attn in attentions(model):
        for linear, rows in ((attn.qkv, [q, kv, kv]), (attn.out, [c.d_model])):
            pair = LowRank(rows, linear.in_features, rank, alpha, draw).to(linear.weight.device)
            parametrize.register_parametrization(linear, "weight", pair)
    return [p for p in model.parameters() if p.requires_grad]


def pairs(model: Transformer) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(our parameter, its piece) -> (A [r, in], B [rows, r]) of every pair that was added."""
    found = {}
    for layer, attn in enumerate(attentions(model)):
        for name, pieces in (("qkv", "qkv"), ("out", ("",))):
            low: Any = getattr(attn, name).parametrizations.weight[0]
            for piece, a, b in zip(pieces, low.a, low.b, strict=True):
                found[f"blocks.{layer}.attn.{name}.weight", piece] = (a.detach(), b.detach())
    return found


def merge(model: Transformer) -> Transformer:
    """The same model with every pair added to its weight for good."""
    for attn in attentions(model):
        for linear in (attn.qkv, attn.out):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    return model


def attentions(model: Transformer) -> list[Attention]:
    """The attention of every layer."""
    return [module for module in model.modules() if isinstance(module, Attention)]
