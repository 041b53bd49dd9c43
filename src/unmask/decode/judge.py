"""Acceptance by a second opinion: drafted tokens are kept from the left for as long as a guide agrees with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.decode import noise
from unmask.decode.algebra import Pick, term
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.errors import UserError

DRAW = -1
"""The draw number of the stochastic rule; 0 ranks cells, and 1, 2, ... draw tokens."""


@term("agrees")
@dataclass(frozen=True, repr=False)
class Agrees(Pick):
    """The longest run of drafts from the left that the guide accepts (guided diffusion, FlashDLM, arXiv 2505.21467).

    With q the guide's prediction of a cell given the drafts before it, a draft d is accepted if every condition that is
    set holds: fewer than `top` tokens are likelier than d; q(d) >= `relative` * max q; q(d) > `above`; a uniform number
    is below q(d) (`draw`). `top=1` is the deterministic rule. The run ends at the first undecided cell of the row that
    is no candidate, was not judged, or was rejected, so it may be empty: `agrees(top=5) | leftmost(1)`. A guide judges
    the first 32 drafts of a row in a step, so a run is at most that long.
    """

    top: int = 0
    relative: float = 0.0
    above: float = 0.0
    draw: bool = False
    guided = True

    def __post_init__(self) -> None:
        if type(self.top) is not int or self.top < 0:
            raise ValueError(f"top counts the guide's likeliest tokens, a whole number >= 0, not {self.top!r}")
        if isinstance(self.relative, bool) or not 0 <= self.relative <= 1:
            raise ValueError(f"relative is a share of the guide's largest probability in [0, 1], not {self.relative!r}")
        if isinstance(self.above, bool) or not 0 <= self.above < 1:
            raise ValueError(f"above is a probability in [0, 1), not {self.above!r}")
        if type(self.draw) is not bool:
            raise ValueError(f"draw is True or False, not {self.draw!r}")
        if not (self.top or self.relative or self.above or self.draw):
            raise ValueError("agrees needs a rule that is not met by all tokens: top, relative, above or draw")

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        """The accepted run, [B, L] bool; UserError where the draft has no second opinion."""
        if draft.second is None:
            raise UserError(f"{self!r} asks for a second opinion; give a guide: an autoregressive model")
        kept = among & self.accepted(canvas, draft, draft.second)
        refused = canvas.masked & ~kept
        return kept & (refused.cumsum(1) == 0)

    def accepted(self, canvas: Canvas, draft: Draft, second: Draft) -> Tensor:
        """[B, L] bool: the judged cells whose drafted token meets every condition, whatever stands before them."""
        at, logits = second.at, second._logits
        own = logits.gather(1, draft.token.flatten()[at][:, None])
        met = (own > -torch.inf)[:, 0]
        if self.top:
            met = met & ((logits > own).sum(1) < self.top)
        if self.relative:
            met = met & (own[:, 0] >= logits.amax(1) + torch.tensor(self.relative, dtype=own.dtype).log())
        if self.above or self.draw:
            p = logits.softmax(1).gather(1, draft.token.flatten()[at][:, None])[:, 0]
            met = met & (p > self.above)
            if self.draw:
                row, column = at // second.fresh.shape[1], at % second.fresh.shape[1]
                met = met & (noise.uniform(canvas.seed[row], canvas.step[row], column, DRAW) < p)
        return second.spread(met, False)


agrees = Agrees
