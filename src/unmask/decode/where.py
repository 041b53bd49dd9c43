"""Positions and rows that need no parameters beyond the canvas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.decode.algebra import Rows, Where, ready, term
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.pick import counted


@dataclass(frozen=True, repr=False)
class Everything(Where):
    """All cells. As a query: no cache."""

    always = True

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid


@dataclass(frozen=True, repr=False)
class Masked(Where):
    """The undecided cells."""

    always = True

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.masked


@dataclass(frozen=True, repr=False)
class Dirty(Where):
    """Decided cells whose cached key and value are missing or of another token."""

    decided = True

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.dirty


@dataclass(frozen=True, repr=False)
class Prefix(Where):
    """The cells before the first undecided one. The query `dirty & prefix` is the exact causal cache: a given cell
    behind a hole is computed once the hole is filled."""

    decided = True

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid & (canvas.position < canvas.frontier[:, None])


@dataclass(frozen=True, repr=False)
class Frontier(Where):
    """The first undecided cell of each row."""

    always = True

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.position == canvas.frontier[:, None]


@dataclass(frozen=True, repr=False)
class Abandoned(Where):
    """Undecided and given cells never yet computed, in rows that have decided on an EOS: none is opened there (D2F)."""

    optional = "finished"

    def __call__(self, canvas: Canvas) -> Tensor:
        def cells() -> Tensor:
            unread = (canvas.masked | canvas.given) & (canvas.cached_at < 0)
            return unread & canvas.ended.any(1)[:, None]

        return canvas.derive("abandoned", cells)


@dataclass(frozen=True, repr=False)
class FirstStep(Rows):
    """Rows that no forward has been spent on yet."""

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.step == 0


@term("every")
@dataclass(frozen=True, repr=False)
class Every(Rows):
    """Rows at steps 0, n, 2n, ...: a periodic refresh."""

    n: int

    def __post_init__(self) -> None:
        counted(self.n, "a refresh comes every n >= 1 steps, a whole number")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.step % self.n == 0


@dataclass(frozen=True, repr=False)
class Filled(Rows):
    """As a stop: no cell is undecided."""

    always = True

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.frontier == len(canvas.position)


@dataclass(frozen=True, repr=False)
class Finished(Rows):
    """As a stop: no cell is undecided but abandoned ones."""

    always = True

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return ~(canvas.masked & ~abandoned(canvas)).any(1)


@dataclass(frozen=True, repr=False)
class Ended(Rows):
    """As a stop: an EOS is decided and so is everything before it. An EOS with holes before it stops nothing."""

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.end < canvas.frontier


@term("budget")
@dataclass(frozen=True, repr=False)
class Budget(Rows):
    """As a stop: n forwards are spent."""

    n: int

    def __post_init__(self) -> None:
        counted(self.n, "a budget is a whole number of forwards, at least 0", least=0)

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return canvas.step >= self.n


@term("decided")
@dataclass(frozen=True, repr=False)
class Decided(Rows):
    """Rows that have cells of `rule`, none of which is undecided."""

    rule: Where

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Where):
            raise ValueError(f"decided looks at cells such as region(2), not {self.rule!r:.80}")

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        cells = self.rule(canvas)
        return cells.any(1) & ~(cells & canvas.masked).any(1)


@term("region")
@dataclass(frozen=True, repr=False)
class Region(Where):
    """The cells of a numbered region of the template: 1 thinking, 2 answer."""

    number: int

    def __post_init__(self) -> None:
        counted(self.number, "a region has a whole number, at least -128", least=-128, most=127)

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid & (canvas.region == self.number)


@dataclass(frozen=True, repr=False)
class Response(Where):
    """The cells from the row's origin on; a hole may lie before it."""

    def __call__(self, canvas: Canvas) -> Tensor:
        return canvas.valid & (canvas.position >= canvas.origin[:, None])


@dataclass(frozen=True, repr=False)
class Phase(Where):
    """The undecided cells whose turn it is: those before the last answer cell, then the answer, then the rest.

    Once the answer is decided, thinking (region 1) comes after everything else: it is moot. Without an answer region,
    all undecided cells.
    """

    always = True

    def __call__(self, canvas: Canvas) -> Tensor:
        turn = canvas.derive(self, lambda: self._turns(canvas), fixed=True)
        moot = ((turn == 1).any(1) & ~((turn == 1) & canvas.masked).any(1))[:, None]
        turn = turn.masked_fill((canvas.region == 1) & moot, 3).masked_fill(~canvas.masked, 4)
        return canvas.masked & (turn == turn.amin(1, keepdim=True))

    def _turns(self, canvas: Canvas) -> Tensor:
        """[B, L] int64: 0 before the last answer cell, 1 in the answer, 2 behind it."""
        answers = canvas.valid & (canvas.region == 2)
        behind = answers.any(1, keepdim=True) & (answers.flip(1).cumsum(1).flip(1) == 0)
        return torch.where(answers, 1, torch.where(behind, 2, 0))


everything = ready("everything", Everything())
masked = ready("masked", Masked())
dirty = ready("dirty", Dirty())
prefix = ready("prefix", Prefix())
frontier = ready("frontier", Frontier())
abandoned = ready("abandoned", Abandoned())
response = ready("response", Response())
phase = ready("phase", Phase())
first_step = ready("first_step", FirstStep())
filled = ready("filled", Filled())
finished = ready("finished", Finished())
ended = ready("ended", Ended())
thinking, answer = Region(1), Region(2)


def none_like(cells: Tensor) -> Tensor:
    """An empty set of the shape of `cells`."""
    return torch.zeros_like(cells, dtype=torch.bool)
