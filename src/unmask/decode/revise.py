"""Revision: decided cells that the model would not decide so again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.decode.algebra import Pick, Rows, ready, term
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft


@term("doubted")
@dataclass(frozen=True, repr=False)
class Doubted(Pick):
    """Decided cells whose own token now has less than this probability: what narrow-out gives back (WINO, 2025).

    It reads the model's logits at the decided cell itself, which saw the token there; WINO's shadow block, which does
    not see it, is not part of this rule.
    """

    threshold: float

    def __post_init__(self) -> None:
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, int | float)
            or math.isnan(self.threshold)
        ):
            raise ValueError(f"doubted needs a probability, not {self.threshold!r}")

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return among & (draft.probability_of(canvas.tokens) < self.threshold)


@dataclass(frozen=True, repr=False)
class Calm(Rows):
    """As a stop: the text is complete, up to its end or the row's, and its last step decided and rewrote nothing of it,
    or no revision is left to spend on it."""

    always = True  # or else a revision was just spent, of which there are finitely many

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        text = canvas.position <= canvas.end[:, None]
        complete = ~(canvas.masked & text).any(1)
        quiet = canvas.decided_at.masked_fill(~text, 0).amax(1) < canvas.step
        return complete & (quiet | ~(canvas.revocable & text).any(1))


doubted = Doubted
calm = ready("calm", Calm())


def potential(canvas: Canvas) -> Tensor:
    """[B]: undecided cells plus twice the revisions left. Every step of a live row lowers it, so every run ends."""
    left = torch.where(canvas.valid & ~canvas.given, canvas.revisions, 0)
    return canvas.masked.sum(1) + 2 * left.sum(1)
