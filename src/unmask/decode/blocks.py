"""Blocks of a row's response: the current one, those behind it, and those in flight. All derived, no state machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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
        return canvas.derive((self, "here"), lambda: self.ids(canvas) == self._current(canvas))

    def ids(self, canvas: Canvas) -> Tensor:
        """[B, L] int64: block number of each cell; -1 in the prompt, a huge number in the padding."""

        def compute() -> Tensor:
            number = (canvas.position - self._start(canvas)[:, None]).div(self.size, rounding_mode="floor")
            return number.clamp(min=-1).masked_fill(~canvas.valid, _NOWHERE)

        return canvas.derive((self, "ids"), compute, fixed=True)

    def at(self, canvas: Canvas, column: Tensor) -> Tensor:
        """[B, 1]: number of the block that holds the row's `column` [B]; a huge number where that is L."""
        ids = canvas.derive((self, "padded"), lambda: F.pad(self.ids(canvas), (0, 1), value=_NOWHERE - 1), fixed=True)
        return ids.gather(1, column[:, None])

    def current(self, canvas: Canvas) -> Tensor:
        """[B]: number of the first block with an undecided cell; a huge number where there is none."""
        return self._current(canvas)[:, 0]

    def _current(self, canvas: Canvas) -> Tensor:
        return canvas.derive((self, "current"), lambda: self.at(canvas, canvas.frontier))

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

    def total(self, canvas: Canvas, value: Tensor) -> Tensor:
        """[B, 1 + N] float64: the sum of `value` [B, L] over the cells without a block, and over each of N blocks."""
        return torch.zeros_like(self._sizes(canvas)).scatter_add(1, self._place(canvas), value.double())

    def spread(self, canvas: Canvas, blocks: Tensor) -> Tensor:
        """Values [B, 1 + N], of the cells without a block and of each block, as [B, L]."""
        return blocks.gather(1, self._place(canvas))

    def reached(self, canvas: Canvas) -> Tensor:
        """[B, 1 + N] float64: which part of each block is decided, and inf for what stands before the first."""

        def before() -> Tensor:
            return F.pad(torch.zeros_like(self._sizes(canvas)[:, 1:]), (1, 0), value=torch.inf)

        def compute() -> Tensor:
            none = canvas.derive((self, "none"), before, fixed=True)
            return none.scatter_add(1, self._place(canvas), (~canvas.masked).double()) / self._sizes(canvas)

        return canvas.derive((self, "reached"), compute)

    def _place(self, canvas: Canvas) -> Tensor:
        """[B, L] int64: 0 for cells without a block, else 1 + the number of their block."""
        return canvas.derive((self, "place"), lambda: (self.ids(canvas) + 1).masked_fill(~canvas.valid, 0), fixed=True)

    def _sizes(self, canvas: Canvas) -> Tensor:
        """[B, 1 + N] float64: cells of each block, at least 1."""

        def compute() -> Tensor:
            width = 1 + max(1, int(self.count(canvas).max()))
            none = torch.zeros(len(canvas), width, dtype=torch.float64, device=canvas.tokens.device)
            return none.scatter_add(1, self._place(canvas), canvas.valid.double()).clamp(min=1)

        return canvas.derive((self, "sizes"), compute, fixed=True)

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
        return canvas.valid & (self.blocks.ids(canvas) >= self.blocks._current(canvas))


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
        close = self.blocks.ids(canvas) <= self.blocks._current(canvas) + self.ahead
        return canvas.valid & (close | ~canvas.masked)


@dataclass(frozen=True, repr=False)
class Entered(Rows):
    """Rows in whose current block nothing has been decided yet: the moment to refresh a cache."""

    blocks: Blocks

    def __repr__(self) -> str:
        return f"{self.blocks!r}.entered"

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return ~(canvas.written & self.blocks(canvas)).any(1)


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
        return (canvas.written & (self.blocks.ids(canvas) > self.blocks._current(canvas))).any(1)


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
        reached, blocks = self.blocks.reached(canvas), self.blocks
        before = canvas.derive((blocks, "before"), lambda: (blocks._place(canvas) - 1).clamp(min=0), fixed=True)
        enough = (reached.cummin(1).values if self.every else reached) >= self.progress
        return enough.gather(1, before) & canvas.valid


@dataclass(frozen=True, repr=False)
class Settled(Where):
    """The prompt, then blocks, as long as everything is decided and its key and value are of the decided tokens."""

    blocks: Blocks
    decided = True

    def __repr__(self) -> str:
        return f"{self.blocks!r}.settled"

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.derive(self, lambda: self._cells(canvas))

    def _cells(self, canvas: Canvas) -> Tensor:
        unsettled = canvas.valid & (canvas.masked | (canvas.cached_token != canvas.tokens))
        return self.blocks.ids(canvas) < self.blocks.at(canvas, canvas.first(unsettled))


@dataclass(frozen=True, repr=False)
class Moot(Where):
    """Blocks behind the first in which an EOS of the response is decided: under block-causal attention nothing before
    them depends on them, and of what they would hold nothing is read."""

    blocks: Blocks
    optional = "ended"

    def __repr__(self) -> str:
        return f"{self.blocks!r}.moot"

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid & (self.blocks.ids(canvas) > self.blocks.at(canvas, canvas.end))


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
        base, more, decided, _ = canvas.derive((self, "now"), lambda: self._now(canvas))
        k = (base + (decided < more)).clamp(min=1)
        return among & (rank(canvas, draft, among, self.by) < k[:, None])

    def progress(self, canvas: Canvas) -> Tensor:
        """[B] float64: the published loop's step counter (from 1) over all steps, also those that commit nothing."""
        base, more, decided, before = canvas.derive((self, "now"), lambda: self._now(canvas))
        early = decided.clamp(max=more) // (base + 1)
        late = (decided - more).clamp(min=0) // base.clamp(min=1)
        return (before + early + late + 1).double() / self.steps

    def _now(self, canvas: Canvas) -> tuple[Tensor, ...]:
        """[B] each, of the current block: cells a step, cells to be decided at one more a step, cells decided, steps
        of earlier blocks."""
        plan = canvas.derive((self, "plan"), lambda: self._plan(canvas), fixed=True)
        base, more, before = plan.gather(2, canvas.frontier[:, None].expand(3, -1, -1))[..., 0]
        return base, more, (self.blocks(canvas) & canvas.written).sum(1), before

    def _plan(self, canvas: Canvas) -> Tensor:
        """[3, B, L + 1] int64: for each column, should it be the first undecided one, what `_now` tells of it."""
        blocks, first = self.blocks, self.blocks.first(canvas)[:, None]
        count = (blocks.count(canvas)[:, None] - first).clamp(min=1)
        holes = F.pad(blocks.total(canvas, canvas.own).long(), (0, 1))  # and none behind the last block
        number = torch.arange(-1, holes.shape[1] - 1, device=holes.device) - first
        number = torch.minimum(number, count).clamp(min=0)  # holes may lie before the origin
        share, extra = self.steps // count, self.steps % count
        steps = (share + (number < extra)).clamp(min=1)
        base, rest = holes // steps, holes % steps
        table = torch.stack([base, rest * (base + 1), share * number + torch.minimum(number, extra)])
        place = F.pad(blocks._place(canvas), (0, 1), value=holes.shape[1] - 1)
        return table.gather(2, place.expand(3, -1, -1))
