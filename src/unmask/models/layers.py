"""The layers of a transformer that know no positions: linear maps, embedding, norm, MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input, so that fp32 master weights can train bf16 activations."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Embedding(nn.Embedding):
    """A table of vectors that is not drawn on the meta device, where that alone would import a compiler (a second)."""

    def reset_parameters(self) -> None:
        """Draw the weights, if they are in memory."""
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """Root-mean-square norm with fp32 statistics (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], of the same dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU with gate and up projections fused (Shazeer 2020), from `width` through `ff` to `width`."""

    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * ff, bias=False)
        self.down = Linear(ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
