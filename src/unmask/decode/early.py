"""Early commit: models know the answer before they finish. One condition; Prophet, SchED and ICE are settings of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from unmask.decode.algebra import Pick, Rows, Rule, Where, as_pick, term
from unmask.decode.blocks import Blocks, Quota
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.where import Region

CRITERIA = ("gap", "peak", "score", "margin")
"""Statistics of the draft by which a row can be sure."""


class Schedule(Rule, ABC):
    """A threshold as a function of progress in [0, 1]."""

    def __post_init__(self) -> None:
        for value in (getattr(self, f.name) for f in fields(self)):
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"a threshold is a number, not {value!r}")

    @abstractmethod
    def __call__(self, progress: Tensor) -> Tensor: ...

    @staticmethod
    def between(high: float, low: float, weight: Tensor) -> Tensor:
        """`high` where weight is 1, `low` where it is 0; equal levels may be infinite."""
        return torch.full_like(weight, low) if high == low else low + (high - low) * weight


@term("staged")
@dataclass(frozen=True, repr=False)
class Staged(Schedule):
    """Three levels: before 0.33, before 0.67, after (Prophet, Li et al. 2025, algorithm 1)."""

    high: float
    middle: float
    low: float

    def __call__(self, progress: Tensor) -> Tensor:
        later = torch.where(progress < 0.67, torch.full_like(progress, self.middle), self.low)
        return torch.where(progress < 0.33, torch.full_like(progress, self.high), later)


@term("level")
@dataclass(frozen=True, repr=False)
class Level(Schedule):
    """The same threshold throughout (ICE, Jin et al. 2025)."""

    value: float

    def __call__(self, progress: Tensor) -> Tensor:
        return torch.full_like(progress, self.value)


@term("linear")
@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """From `high` at the start to `low` at the end."""

    high: float
    low: float

    def __call__(self, progress: Tensor) -> Tensor:
        return self.between(self.high, self.low, 1 - progress)


@term("cosine")
@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """From `high` to `low` along half a cosine: flat, steep, flat."""

    high: float
    low: float

    def __call__(self, progress: Tensor) -> Tensor:
        return self.between(self.high, self.low, 0.5 * (1 + torch.cos(torch.pi * progress)))


@term("exponential")
@dataclass(frozen=True, repr=False)
class Exponential(Schedule):
    """From `high` to about `low`, falling as exp(-rate * progress) (SchED's form, Mohamed et al. 2025)."""

    high: float
    low: float
    rate: float = 4.0

    def __call__(self, progress: Tensor) -> Tensor:
        return self.between(self.high, self.low, torch.exp(-self.rate * progress))


@term("sure")
@dataclass(frozen=True, repr=False)
class Sure(Rows):
    """Rows whose mean confidence over a region has reached the threshold of their progress.

    `criterion`: gap (raw logits), peak (largest probability), score (of the drafted token) or margin. The mean is over
    the region's cells that are not given, decided ones included; with `least` the least sure cell counts instead, for
    ends behind a short answer are sure of themselves and raise a mean. Progress is that of `clock`, a quota schedule,
    or else the decided share of the response. A row whose region is empty, or not wholly read in this draft, is never
    sure; `cells.when(sure(...))` commits all of `cells` or, where one of them was not read, none.
    """

    schedule: Schedule
    where: Where
    criterion: Literal["gap", "peak", "score", "margin"] = "gap"
    clock: Quota | None = None
    least: bool = False
    drafted = True

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"sure needs a threshold such as level(0.9), not {self.schedule!r}")
        if not isinstance(self.where, Where):
            raise ValueError(f"sure looks at cells such as region(2), not {self.where!r}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"cannot be sure by {self.criterion!r}; known: {', '.join(CRITERIA)}")
        if self.clock is not None and not isinstance(self.clock, Quota):
            raise ValueError(f"the clock of sure is a schedule such as blocks(32).quota(64), not {self.clock!r}")
        if type(self.least) is not bool:
            raise ValueError(f"least of sure is True or False, not {self.least!r:.80}")

    def reads(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: the cells the mean is taken over."""
        return self.where(canvas) & canvas.own

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        assert draft is not None
        cells = self.reads(canvas)
        value = draft.value(self.criterion).double()
        if self.least:
            reached = value.masked_fill(~cells, torch.inf).amin(1)
        else:
            reached = value.masked_fill(~cells, 0).sum(1) / cells.sum(1).clamp(min=1)
        complete = ~(cells & ~draft.fresh).any(1) & cells.any(1)
        return complete & (reached >= self.schedule(self.progress(canvas)))

    def progress(self, canvas: Canvas) -> Tensor:
        """[B] float64 in [0, 1]."""
        if self.clock is not None:
            return self.clock.progress(canvas)
        return (canvas.own & ~canvas.masked).sum(1).double() / canvas.own.sum(1).clamp(min=1)


@term("clear")
@dataclass(frozen=True, repr=False)
class Clear(Pick):
    """All of each block that is sure of itself: early commit for blocks.

    A block is sure when the mean confidence over its undecided cells, all of which must be candidates, has reached the
    threshold of its own progress, the decided share of its cells that are not given. `criterion` as in `sure`.
    """

    schedule: Schedule
    blocks: Blocks
    criterion: Literal["gap", "peak", "score", "margin"] = "gap"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"clear needs a threshold such as level(5.0), not {self.schedule!r:.80}")
        if not isinstance(self.blocks, Blocks):
            raise ValueError(f"clear commits blocks such as blocks(8), not {self.blocks!r:.80}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"cannot be sure by {self.criterion!r}; known: {', '.join(CRITERIA)}")

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        left, own = (self.blocks.total(canvas, cells) for cells in (canvas.masked, canvas.own))
        value = draft.value(self.criterion).double().masked_fill(~among, 0)
        mean = self.blocks.total(canvas, value) / left.clamp(min=1)
        sure = mean >= self.schedule((own - left) / own.clamp(min=1))
        whole = (left > 0) & (self.blocks.total(canvas, among) == left)
        return among & (self.blocks.ids(canvas) >= 0) & self.blocks.spread(canvas, whole & sure)


def gap(high: float, middle: float, low: float, *, clock: Quota | None = None, where: Where | None = None) -> Sure:
    """Prophet's condition: mean logit gap of the answer region against three stages."""
    return Sure(Staged(high, middle, low), where or Region(2), "gap", clock)


@term("prefer")
@dataclass(frozen=True, repr=False)
class Prefer(Pick):
    """What `first` chooses; in rows of which it chooses nothing, what `second` chooses."""

    first: Pick
    second: Pick

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            rule = getattr(self, name)
            if not isinstance(rule, Pick | Where):
                raise ValueError(f"prefer takes two choices of cells; {rule!r} is none")
            object.__setattr__(self, name, as_pick(rule))

    @property
    def always(self) -> bool:
        """One of the two is enough."""
        return self.first.always or self.second.always

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        chosen = self.first(canvas, draft, among)
        return chosen | self.second(canvas, draft, among & ~chosen.any(1, keepdim=True))


prefer = Prefer
