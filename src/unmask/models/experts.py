"""A mixture of experts as an MLP: a router sends each token through a few of many small MLPs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.config import Experts, ModelConfig
from unmask.models.layers import MLP, Linear

WIDE = "router.bias"
"""How the name of the one parameter ends that stays in fp32 whatever the dtype of the model."""


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


class Router(nn.Module):
    """Which experts a token goes through, and with what weight; computed in fp32."""

    def __init__(self, width: int, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.zeros(experts.count, width))
        self.bias = nn.Parameter(torch.zeros(experts.count, dtype=torch.float32)) if experts.bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> (weights fp32, experts), both [N, top], the likeliest first."""
        e, logits = self.experts, F.linear(wide(x), wide(self.weight))
        score = logits.sigmoid() if e.router == "sigmoid" else logits.softmax(-1)
        ranked = score if self.bias is None else score + self.bias
        if e.groups > 1:
            groups = ranked.unflatten(-1, (e.groups, -1))
            best = groups.topk(2, -1).values.sum(-1).topk(e.top_groups, -1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranked = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        chosen = ranked.topk(e.top, -1).indices
        share = score.gather(-1, chosen)
        if e.normalise:
            share = share / (share.sum(-1, keepdim=True) + 1e-20)
        return share * e.scale, chosen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move or cast as every module does, but leave the bias in its dtype: rounded, it would choose otherwise."""
        kept = None if self.bias is None else self.bias.detach()
        super()._apply(fn, recurse)
        if kept is not None and self.bias is not None and self.bias.dtype != kept.dtype:
            self.bias = nn.Parameter(kept.to(self.bias.device), self.bias.requires_grad)
        return self


class Bank(nn.Module):
    """The experts' matrices, stacked: gate and up of all of them [E * 2 ff, D], down of all of them [E * D, ff]."""

    def __init__(self, width: int, experts: Experts) -> None:
        super().__init__()
        self.width, self.ff = width, experts.ff
        self.gate_up = Linear(width, experts.count * 2 * experts.ff, bias=False)
        self.down = Linear(experts.ff, experts.count * width, bias=False)

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """x [N, D] through one expert -> [N, D]."""
        first, row = expert * 2 * self.ff, expert * self.width
        gate, up = F.linear(x, self.gate_up.weight[first : first + 2 * self.ff].to(x.dtype)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down.weight[row : row + self.width].to(x.dtype))


class Mixture(nn.Module):
    """Routed experts and, where there is one, the expert that all tokens share (Shazeer et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        e = config.experts
        self.router = Router(config.d_model, e)
        self.experts = Bank(config.d_model, e)
        self.shared = MLP(config.d_model, e.shared) if e.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, D]; the experts that no token goes to are not computed."""
        flat = x.flatten(0, -2)
        share, chosen = self.router(flat)
        order = chosen.flatten().argsort(stable=True)  # places in [N, top], those of one expert together
        ends = chosen.flatten().bincount(minlength=self.router.experts.count).cumsum(0).tolist()
        row = order // chosen.shape[1]
        total = torch.zeros_like(wide(flat))
        for expert, (first, last) in enumerate(pairwise([0, *ends])):
            if first < last:
                out = self.experts(expert, flat[row[first:last]])
                total.index_add_(0, row[first:last], wide(out) * share.flatten()[order[first:last], None])
        y = total.to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)
