"""The joint sampler's network: one layer over what was drawn and what the model thought (ADJUST, arXiv 2509.22738)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmask.models.config import ModelConfig
from unmask.models.transformer import Block, Linear, RMSNorm


class JointSampler(nn.Module):
    """Hidden states of cells, given tokens drawn since they were computed. The model's embedding and head stay its own.

    z = layer(mix([norm(embedding); norm(hidden)])), hidden' = hidden + norm(z); the layer is the model's kind of block.
    A gain of zero in the last norm gives the hidden states back unchanged.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_norm = RMSNorm(c.d_model, c.norm_eps)
        self.hidden_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mix = Linear(2 * c.d_model, c.d_model, bias=False)
        self.layer = Block(c, 0)
        self.out_norm = RMSNorm(c.d_model, c.norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None = None
    ) -> Tensor:
        """embedded, hidden [B, L, D] of the same cells, visible [B, 1, L, L] bool (None = all) -> hidden [B, L, D]."""
        z = self.mix(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        return hidden + self.out_norm(self.layer(z, rope, None, visible))

    def initialise(self, seed: int) -> JointSampler:
        """Draw the matrices from `seed`; the output gain starts at zero, as the marginal sampler."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.6 / p.shape[1] ** 0.5)
            self.out_norm.weight.zero_()
        return self
