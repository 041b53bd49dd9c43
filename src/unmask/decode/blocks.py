"""Blocks of a row's response: the current one, those behind it, and those in flight. All derived, no state machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmask.decode.algebra import Pick, Rows, Where, term
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.pick import check, counted, rank

_NOWHERE = 1 << 30
GRIDS = ("origin", "absolute")


@term("blocks")
@dataclass(frozen=True, repr=False)
class Blocks(Where):
    """The first block of `size` cells that still has an undecided cell.

    `grid`: blocks are counted from the row's origin, or in "absolute" positions, where the prompt has blocks too and
    the response may begin inside of one (SDAR, LLaDA2, Fast-dLLM v2).
    """

    size: int
    grid: Literal["origin", "absolute"] = "origin"
    always = True

    def __post_init__(self) -> None:
        counted(self.size, "a block needs a whole number of cells, at least one cell")
        if self.grid not in GRIDS:
            raise ValueError(f"blocks are counted from {' or '.join(map(repr, GRIDS))}, not {self.grid!r:.80}")

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.derive((self, "here"), lambda: self.ids(canvas) == self.current(canvas)[:, None])

    def ids(self, canvas: Canvas) -> Tensor:
        """[B, L] int64: block number of each cell; -1 in the prompt, a huge number in the padding."""

        def compute() -> Tensor:
            number = (canvas.position - self._start(canvas)[:, None]).div(self.size, rounding_mode="floor")
            return number.clamp(min=-1).masked_fill(~canvas.valid, _NOWHERE)

        return canvas.derive((self, "ids"), compute, fixed=True)

    def current(self, canvas: Canvas) -> Tensor:
        """[B]: number of the first block with an undecided cell; a huge number where there is none."""
        return canvas.derive(
            (self, "current"), lambda: self.ids(canvas).masked_fill(~canvas.masked, _NOWHERE - 1).amin(1)
        )

    def count(self, canvas: Canvas) -> Tensor:
        """[B]: how many blocks the row has, those of the prompt included where it has any."""
        return canvas.derive(
            (self, "count"), lambda: -(-(canvas.valid.sum(1) - self._start(canvas)) // self.size), fixed=True
        )

    def first(self, canvas: Canvas) -> Tensor:
        """[B]: number of the block that the response begins in."""
        return (canvas.origin - self._start(canvas)) // self.size

    def _start(self, canvas: Canvas) -> Tensor:
        return canvas.origin if self.grid == "origin" else torch.zeros_like(canvas.origin)

    def share(self, canvas: Canvas, cells: Tensor) -> Tensor:
        """[B, N] float64: which part of each block's cells lies in `cells`; 1 for blocks a row does not have."""
        size = canvas.derive((self, "sizes"), lambda: self._sizes(canvas), fixed=True)
        return (self.total(canvas, cells) / size).masked_fill(size.isinf(), 1.0)

    def total(self, canvas: Canvas, value: Tensor) -> Tensor:
        """[B, N] float64: the sum of `value` [B, L] over each block's cells; 0 for blocks a row does not have."""
        index, inside, size = canvas.derive((self, "cells"), lambda: self._cells(canvas), fixed=True)
        return torch.zeros_like(size).scatter_add(1, index, value.double().masked_fill(~inside, 0))

    def _sizes(self, canvas: Canvas) -> Tensor:
        """[B, N] float64: cells of each block; endless for blocks a row does not have."""
        size = canvas.derive((self, "cells"), lambda: self._cells(canvas), fixed=True)[2]
        return size.masked_fill(size == 0, torch.inf)

    def reached(self, canvas: Canvas) -> Tensor:
        """[B, N] float64: which part of each block is decided; 1 for blocks a row does not have."""
        return canvas.derive((self, "reached"), lambda: self.share(canvas, ~canvas.masked))

    def _cells(self, canvas: Canvas) -> tuple[Tensor, Tensor, Tensor]:
        """(block of each cell, is it in one, both [B, L]; cells of each block [B, N])."""
        ids = self.ids(canvas)
        inside = (ids >= 0) & canvas.valid
        none = torch.zeros(len(canvas), max(1, int(self.count(canvas).max())), dtype=torch.float64, device=ids.device)
        index = ids.masked_fill(~inside, 0)
        return index, inside, none.scatter_add(1, index, inside.double())

    def spread(self, canvas: Canvas, blocks: Tensor, *, prompt: Tensor) -> Tensor:
        """Per-block values [B, N] as cells [B, L]; prompt cells take `prompt` [B]."""

        def places() -> tuple[Tensor, Tensor]:
            ids = self.ids(canvas)
            return ids.masked_fill(~canvas.valid, 0).clamp(min=0), ids < 0

        index, before = canvas.derive((self, "places"), places, fixed=True)
        return torch.where(before, prompt[:, None], blocks.gather(1, index)) & canvas.valid

    def near(self, ahead: int) -> Near:
        """All but the undecided cells of blocks more than `ahead` behind the current one."""
        return Near(self, ahead)

    @property
    def onward(self) -> Onward:
        """The current block and all later ones."""
        return Onward(self)

    @property
    def entered(self) -> Entered:
        """Rows in whose current block nothing has been decided yet."""
        return Entered(self)

    @property
    def ahead(self) -> Ahead:
        """Rows in which a cell behind the current block has been decided: by an early commit."""
        return Ahead(self)

    @property
    def settled(self) -> Settled:
        """Blocks that are decided and cleanly cached, and preceded only by such."""
        return Settled(self)

    @property
    def moot(self) -> Moot:
        """Blocks behind the one in which the text has ended."""
        return Moot(self)

    def after(self, progress: float, *, every: bool = False) -> After:
        """Blocks whose predecessor (with `every`: each predecessor) is decided to at least `progress`."""
        return After(self, progress, every)

    def quota(self, steps: int, *, by: str = "score") -> Quota:
        """A fixed number of cells a step, `steps` steps in all."""
        return Quota(self, steps, by)


@dataclass(frozen=True, repr=False)
class Onward(Where):
    """The current block and all later ones (Fast-dLLM's prefix-cache window)."""

    blocks: Blocks
    always = True

    def __repr__(self) -> str:
        return f"{self.blocks!r}.onward"

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid & (self.blocks.ids(canvas) >= self.blocks.current(canvas)[:, None])


@dataclass(frozen=True, repr=False)
class Near(Where):
    """All but the undecided cells of blocks more than `ahead` behind the current one (the window of DPad, Chen et al.
    2025): what is never computed is never attended to. Given words stay, wherever they stand."""

    blocks: Blocks
    ahead: int
    always = True

    def __post_init__(self) -> None:
        counted(self.ahead, "a window reaches over a whole number of blocks, at least 0", least=0)

    def __repr__(self) -> str:
        return f"{self.blocks!r}.near({self.ahead})"

    def __call__(self, canvas: Canvas) -> Tensor:
        close = self.blocks.ids(canvas) <= (self.blocks.current(canvas) + self.ahead)[:, None]
        return canvas.valid & (close | ~canvas.masked)


@dataclass(frozen=True, repr=False)
class Entered(Rows):
    """Rows in whose current block nothing has been decided yet: the moment to refresh a cache."""

    blocks: Blocks

    def __repr__(self) -> str:
        return f"{self.blocks!r}.entered"

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return ~((canvas.decided_at > 0) & self.blocks(canvas)).any(1)


@dataclass(frozen=True, repr=False)
class Ahead(Rows):
    """Rows that have decided on a cell of a later block than the current one.

    Where cells are committed block by block, or from the left, only an early commit does that: the answer was clear, so
    it was taken before what leads up to it.
    """

    blocks: Blocks

    def __repr__(self) -> str:
        return f"{self.blocks!r}.ahead"

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        later = self.blocks.ids(canvas) > self.blocks.current(canvas)[:, None]
        return (later & (canvas.decided_at > 0)).any(1)


@dataclass(frozen=True, repr=False)
class After(Where):
    """Blocks whose predecessor (with `every`: each before) is decided to `progress`; the prompt counts as decided."""

    blocks: Blocks
    progress: float
    every: bool = False
    always = True

    def __repr__(self) -> str:
        return f"{self.blocks!r}.after({self.progress!r}{', every=True' if self.every else ''})"

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.derive(self, lambda: self._cells(canvas))

    def _cells(self, canvas: Canvas) -> Tensor:
        enough = self.blocks.reached(canvas) >= self.progress
        first = torch.ones_like(enough[:, :1])
        before = torch.cat([first, enough[:, :-1]], 1)
        if self.every:
            before = before.cumprod(1).bool()
        return self.blocks.spread(canvas, before, prompt=first[:, 0])


@dataclass(frozen=True, repr=False)
class Settled(Where):
    """The prompt, then blocks, as long as everything is decided and its key and value are of the decided tokens."""

    blocks: Blocks
    decided = True

    def __repr__(self) -> str:
        return f"{self.blocks!r}.settled"

    def __call__(self, canvas: Canvas) -> Tensor:
        prompt = ~((self.blocks.ids(canvas) < 0) & (canvas.dirty | canvas.masked)).any(1)
        clean = self.blocks.share(canvas, ~canvas.masked & ~canvas.dirty) == 1
        return self.blocks.spread(canvas, clean.cumprod(1).bool() & prompt[:, None], prompt=prompt)


@dataclass(frozen=True, repr=False)
class Moot(Where):
    """Blocks behind the first in which an EOS of the response is decided: under block-causal attention nothing before
    them depends on them, and of what they would hold nothing is read."""

    blocks: Blocks
    optional = "ended"

    def __repr__(self) -> str:
        return f"{self.blocks!r}.moot"

    def __call__(self, canvas: Canvas) -> Tensor:
        ids = self.blocks.ids(canvas)
        return canvas.valid & (ids > ids.masked_fill(~canvas.ended, _NOWHERE).amin(1, keepdim=True))


@dataclass(frozen=True, repr=False)
class Quota(Pick):
    """LLaDA's linear schedule (Nie et al. 2025), always at least one cell.

    The steps are shared out over the blocks, then a block's undecided cells over its steps, the remainder going to the
    first ones.
    """

    blocks: Blocks
    steps: int
    by: str = "score"
    always = True

    def __post_init__(self) -> None:
        check(self.by, self.steps)

    def __repr__(self) -> str:
        return f"{self.blocks!r}.quota({self.steps}{'' if self.by == 'score' else f', by={self.by!r}'})"

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        base, rest, decided, _ = canvas.derive((self, "plan"), lambda: self._plan(canvas))
        k = (base + (decided < rest * (base + 1))).clamp(min=1)
        return among & (rank(canvas, draft, among, self.by) < k[:, None])

    def progress(self, canvas: Canvas) -> Tensor:
        """[B] float64: the published loop's step counter (from 1) over all steps, also those that commit nothing."""
        base, rest, decided, before = canvas.derive((self, "plan"), lambda: self._plan(canvas))
        early = decided.clamp(max=rest * (base + 1)) // (base + 1)
        late = (decided - rest * (base + 1)).clamp(min=0) // base.clamp(min=1)
        return (before + early + late + 1).double() / self.steps

    def _plan(self, canvas: Canvas) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B] each: cells a step, steps with one more, cells decided in the block, steps of earlier blocks."""
        tables = canvas.derive((self, "tables"), lambda: self._tables(canvas), fixed=True)
        place = (self.blocks.current(canvas) + 1).clamp(max=tables.shape[2] - 1).expand(3, 1, -1)
        base, rest, before = tables.gather(2, place.transpose(1, 2))[..., 0]
        decided = (self.blocks(canvas) & (canvas.decided_at > 0)).sum(1)
        return base, rest, decided, before

    def _tables(self, canvas: Canvas) -> Tensor:
        """[3, B, N + 2] int64 for blocks -1 to N: cells a step, steps with one more, steps before."""
        first = self.blocks.first(canvas)[:, None]
        count = (self.blocks.count(canvas)[:, None] - first).clamp(min=1)
        width = max(1, int(self.blocks.count(canvas).max())) + 2
        total = torch.zeros(len(canvas), width, dtype=torch.int64, device=first.device)
        place = (self.blocks.ids(canvas) + 1).clamp(max=width - 1)
        total = total.scatter_add(1, place, (canvas.valid & ~canvas.given).long())
        number = torch.arange(width, device=first.device) - 1 - first
        number = torch.minimum(number, count).clamp(min=0)  # holes may lie before the origin
        share, extra = self.steps // count, self.steps % count
        steps = (share + (number < extra)).clamp(min=1)
        return torch.stack([total // steps, total % steps, share * number + torch.minimum(number, extra)])
