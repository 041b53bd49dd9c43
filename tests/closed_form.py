"""Models whose conditionals are those of a known joint: what a joint sampler can be measured against exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unmask.models.config import ModelConfig
from unmask.models.transformer import rope_tables

SURE = 9.0
"""Logit of a certain token, the others being at -SURE; the mask is far below."""
MARK = 3.0
"""How loudly hidden states say what was worked out."""


class ClosedForm(nn.Module):
    """A masked model of n cells with V words: exact one-cell conditionals, as logits of a linear head.

    Hidden states hold the logits, a mark of decided cells, and what a network must have worked out to say them: the
    parity of the decided bits, or the word that was decided.
    """

    graphs = kernels = None

    def __init__(self, kind: str, words: int, *, width: int = 64) -> None:
        super().__init__()
        self.kind, self.words = kind, words
        self.config = ModelConfig(words + 1, width, 1, 2, 2 * width, mask_id=words, token_count=words, max_positions=32)
        self.embed = nn.Embedding(words + 1, width)
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(words + 1, width, generator=torch.Generator().manual_seed(0)))
        self.cos, self.sin = rope_tables(self.config)
        self.dtype = torch.float32

    def rope(self, width: int, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:width].view(1, 1, width, -1), self.sin[:width].view(1, 1, width, -1)

    def head_of(self, hidden: Tensor) -> Tensor:
        return SURE * nn.functional.pad(hidden[..., : self.words], (0, 1), value=-5.0)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, n, D] from tokens [B, n]."""
        masked = tokens == self.words
        if self.kind == "parity":
            bit = tokens.masked_fill(masked, 0).sum(1) % 2
            known, word = masked.sum(1) == 1, bit
        else:
            word = tokens.masked_fill(masked, -1).amax(1)
            known, bit = word >= 0, word.clamp(min=0)
        one = 2.0 * nn.functional.one_hot(word.clamp(min=0), self.words) - 1
        found = torch.zeros(*tokens.shape, self.config.d_model)
        found[..., : self.words] = (one * known[:, None])[:, None]
        found[..., self.words] = MARK * (~masked).float()
        found[..., self.words + 1] = MARK * (2.0 * bit - 1)[:, None] if self.kind == "parity" else 0.0
        return found

    def forward(
        self,
        tokens: Tensor,
        index: Tensor | None = None,
        *,
        kv: object = None,
        visible: Tensor | None = None,
        need: Tensor | None = None,
        tap: Callable[[Tensor], object] | None = None,
        ragged: None = None,
    ) -> Tensor:
        found = self.hidden(tokens)
        if tap is not None:
            tap(found)
        return self.head_of(found if need is None else found.flatten(0, 1)[need])


def outside(kind: str, tokens: Tensor) -> float:
    """The share of texts [N, n] that the joint never gives: the total variation from it, sampling noise aside.

    Both samplers give every text of the joint the same probability, so that nothing else is lost.
    """
    wrong = tokens.sum(1) % 2 != 0 if kind == "parity" else (tokens != tokens[:, :1]).any(1)
    return float(wrong.float().mean())
