"""Sampling: draw tokens instead of taking the most likely ones. Randomness is counter-based (decode/noise.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unmask.decode import Canvas, Denoiser, Draft, noise
from unmask.errors import UserError


@dataclass(frozen=True)
class Sampled:
    """Temperature, then top-k, then top-p, then one draw per cell (Gumbel-max).

    Confidence is read from the raw logits (LLaDA) or from the shaped ones (`confidence="shaped"`: Dream, SDAR).
    Temperature 0 draws the most likely token and leaves everything as it is.
    """

    denoise: Denoiser
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    confidence: Literal["raw", "shaped"] = "raw"

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            given = f"{self.temperature}, {self.top_k}, {self.top_p}"
            raise UserError(f"temperature and top_k must be >= 0 and top_p in (0, 1]: {given}")

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        return self.settle(canvas, self.denoise(canvas, query, need))

    def settle(self, canvas: Canvas, draft: Draft) -> Draft:
        """The draft with its tokens drawn, and what confidence is read from."""
        if self.temperature == 0:
            return draft
        shaped = self.shape(draft.logits.float() / self.temperature)
        row, column = draft.at // draft.fresh.shape[1], draft.at % draft.fresh.shape[1]
        words = torch.arange(shaped.shape[1], device=shaped.device)
        shift = noise.gumbel(canvas.seed[row, None], canvas.step[row, None], column[:, None], words + 1)
        chosen = (shaped + shift).argmax(-1)
        return replace(draft, chosen=chosen, belief=shaped if self.confidence == "shaped" else None)

    def shape(self, logits: Tensor) -> Tensor:
        """Logits [N, V] with everything outside of top-k and the top-p nucleus at -inf; one token always stays."""
        if 0 < self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, -1).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            value, order = logits.sort(-1, descending=True)
            p = value.softmax(-1)
            outside = p.cumsum(-1) - p >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
        return logits
