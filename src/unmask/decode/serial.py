"""Block after block: what the loops of block-causal models need whose earlier blocks are always decided.

SDAR, LLaDA2 and Fast-dLLM v2 write one block until it is full and then run it once more, to store its keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.decode.algebra import Pick, Rows, Where, as_pick, term
from unmask.decode.blocks import Blocks
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.pick import check, rank


def _blocks(value: object, word: str) -> None:
    if not isinstance(value, Blocks):
        raise ValueError(f"{word} takes blocks such as blocks(8), not {value!r:.80}")


@term("pace")
@dataclass(frozen=True, repr=False)
class Pace(Pick):
    """The surest candidates, as many as fill a whole block in `steps` steps, the remainder in the first ones.

    Unlike a quota it counts the block's size, not its undecided cells (SDAR, LLaDA2); always at least one.
    """

    blocks: Blocks
    steps: int
    by: str = "score"
    always = True

    def __post_init__(self) -> None:
        _blocks(self.blocks, "pace")
        check(self.by, self.steps)

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        size, spent = self.blocks.size, self.spent(canvas)
        k = (size // self.steps + (spent < size % self.steps).long()).clamp(min=1)
        return among & (rank(canvas, draft, among, self.by) < k[:, None])

    def spent(self, canvas: Canvas) -> Tensor:
        """[B]: steps that have decided a cell of the current block."""
        clock = torch.where(self.blocks(canvas), canvas.decided_at, 0).clamp(min=0).sort(1).values
        return (clock[:, 1:] != clock[:, :-1]).sum(1) + (clock[:, 0] > 0)


@term("leads")
@dataclass(frozen=True, repr=False)
class Leads(Rows):
    """Rows in which the first cell of the current block is undecided."""

    blocks: Blocks

    def __post_init__(self) -> None:
        _blocks(self.blocks, "leads")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.first(self.blocks(canvas)) == canvas.frontier


@term("storing")
@dataclass(frozen=True, repr=False)
class Storing(Rows):
    """Rows in which a block before the current one is not settled: its keys and values are yet to be stored."""

    blocks: Blocks

    def __post_init__(self) -> None:
        _blocks(self.blocks, "storing")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        before = self.blocks.ids(canvas) < self.blocks.at(canvas, canvas.frontier)
        return (before & canvas.valid & ~self.blocks.settled(canvas)).any(1)


@term("cached")
@dataclass(frozen=True, repr=False)
class Cached(Rows):
    """Rows in which every cell of `rule` has a stored key and value, of whatever token."""

    rule: Where

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Where):
            raise ValueError(f"cached looks at cells such as blocks(8), not {self.rule!r:.80}")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return ~(self.rule(canvas) & canvas.valid & (canvas.cached_at < 0)).any(1)


@term("closed")
@dataclass(frozen=True, repr=False)
class Closed(Rows):
    """As a stop: the blocks up to the end of the text, or of the row, are settled, or full and none may be rewritten.

    A block is settled by the forward that found nothing to rewrite in it (LLaDA2.1).
    """

    blocks: Blocks
    always = True  # the next forward over a full block settles it, or spends one of its revisions

    def __post_init__(self) -> None:
        _blocks(self.blocks, "closed")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        text = canvas.valid & (self.blocks.ids(canvas) <= self.blocks.at(canvas, canvas.end))
        full, final = ~(text & canvas.masked).any(1), ~(text & canvas.revocable).any(1)
        return full & (final | ~(text & ~self.blocks.settled(canvas)).any(1))


@term("held")
@dataclass(frozen=True, repr=False)
class Held(Pick):
    """What `rule` chooses, but nothing in rows in which `edit` rewrites a cell of `where` with this draft.

    What a later block would be predicted from then changes in this very step. `edit` is the recipe's own.
    """

    rule: Pick
    edit: Pick
    where: Where

    def __post_init__(self) -> None:
        for name in ("rule", "edit"):
            if not isinstance(getattr(self, name), Pick | Where):
                raise ValueError(f"held takes two choices and cells; {getattr(self, name)!r:.80} is no choice")
            object.__setattr__(self, name, as_pick(getattr(self, name)))
        if not isinstance(self.where, Where):
            raise ValueError(f"held takes two choices and cells; {self.where!r:.80} are no cells")

    @property
    def always(self) -> bool:
        """As much as `rule` does: where it is held back, a revision is spent."""
        return self.rule.always

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        may = canvas.revocable & draft.fresh & (draft.token != canvas.tokens)
        edited = (self.edit(canvas, draft, may) & self.where(canvas)).any(1)
        return self.rule(canvas, draft, among) & ~edited[:, None]


pace, leads, storing, cached, closed, held = Pace, Leads, Storing, Cached, Closed, Held
