"""Commit rules: which of the drafted candidates to keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.decode import noise
from unmask.decode.algebra import Pick, ready, term
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.decode.blocks import Blocks

CONFIDENCE = ("score", "margin", "entropy", "gap", "random", "left")
"""What candidates may be ranked by; entropy counts negatively; random is the row's own counter-based noise; left is the
order of reading."""
MOST = 2**31 - 1
"""The largest count that a rule takes."""
MOST_STEPS = 10**6
"""The most steps of a schedule whose steps are laid out one by one."""


def confidence(canvas: Canvas, draft: Draft, by: str) -> Tensor:
    """[B, L]: the statistic named `by`, larger = surer."""
    if by == "random":
        return noise.uniform(canvas.seed[:, None], canvas.step[:, None], canvas.position)
    if by == "left":
        return -canvas.position.expand_as(draft.fresh).to(canvas.score.dtype)
    return draft.value(by)


def rank(canvas: Canvas, draft: Draft, among: Tensor, by: str = "score") -> Tensor:
    """[B, L]: place of each candidate by confidence, 0 the surest; ties go to the left."""
    order = ordered(canvas, draft, among, by)
    return torch.empty_like(order).scatter_(1, order, canvas.position.expand_as(order))


def ordered(canvas: Canvas, draft: Draft, among: Tensor, by: str) -> Tensor:
    """[B, L]: the columns of each row, those of the surest candidates first; ties go to the left."""
    value = torch.where(among, confidence(canvas, draft, by), -torch.inf)
    return value.argsort(dim=1, descending=True, stable=True)


def group_rank(order: Tensor, group: Tensor) -> Tensor:
    """[B, L]: the place within the cell's own group, for columns in order and group numbers, both [B, L]."""
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    sorted_group = group.gather(1, order)
    first = torch.searchsorted(sorted_group, sorted_group)
    column = torch.arange(group.shape[1], device=group.device)
    return torch.empty_like(order).scatter_(1, order, column - first)


def counted(value: object, told: str, *, least: int = 1, most: int = MOST) -> None:
    """ValueError for a value that is no whole number from `least` to `most`; `told` begins the sentence."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{told} and at most {most}, not {value!r:.80}")


def check(by: str, steps: int = 1, *, most: int = MOST) -> None:
    """ValueError for a confidence that does not exist or a schedule without steps, or with more than `most`."""
    if by not in CONFIDENCE:
        raise ValueError(f"cannot rank by {by!r}; known: {', '.join(CONFIDENCE)}")
    counted(steps, "a schedule needs a whole number of steps, at least one step", most=most)


@term("confident")
@dataclass(frozen=True, repr=False)
class Confident(Pick):
    """Candidates whose drafted token has at least this probability; `strict`: more than it (D2F, SDAR)."""

    threshold: float
    strict: bool = False

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        enough = draft.score > self.threshold if self.strict else draft.score >= self.threshold
        return among & enough


@term("best")
@dataclass(frozen=True, repr=False)
class Best(Pick):
    """The k surest candidates of each row, or of each block of `per`."""

    k: int = 1
    by: str = "score"
    per: Blocks | None = None
    always = True

    def __post_init__(self) -> None:
        check(self.by)
        counted(self.k, "best needs a whole number k >= 1")
        if self.per is not None and not hasattr(self.per, "ids"):
            raise ValueError(f"per takes blocks such as blocks(8), not {self.per!r:.80}")

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        if self.per is not None:
            group = self.per.ids(canvas).masked_fill(~among, -2)
            return among & (group_rank(ordered(canvas, draft, among, self.by), group) < self.k)
        if self.k > 1:
            return among & (rank(canvas, draft, among, self.by) < self.k)
        value = torch.where(among, confidence(canvas, draft, self.by), -torch.inf)
        return among & (canvas.position == value.argmax(1, keepdim=True))


@term("leftmost")
@dataclass(frozen=True, repr=False)
class Leftmost(Pick):
    """The first k candidates from the left."""

    k: int = 1
    always = True

    def __post_init__(self) -> None:
        counted(self.k, "leftmost needs a whole number k >= 1")

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return among & (among.cumsum(1) <= self.k)


@term("factor")
@dataclass(frozen=True, repr=False)
class Factor(Pick):
    """The longest run of surest candidates whose n-th has probability of at least 1 - factor / (n + 1); always one.

    Fast-dLLM's factor rule (Wu et al. 2025, section 3.3). Its released code commits all candidates when only the last
    one fails; `lenient` does so too.
    """

    factor: float
    lenient: bool = False
    always = True

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        place = rank(canvas, draft, among)
        enough = draft.score >= 1 - self.factor / (place + 2).to(draft.score.dtype)
        fails = among & ~enough & (place > 0)
        width = among.shape[1]
        limit = torch.where(fails, place, width).amin(1, keepdim=True)
        if self.lenient:
            limit = limit + (limit == among.sum(1, keepdim=True) - 1).long()
        return among & (place < limit)


@term("entropy_bounded")
@dataclass(frozen=True, repr=False)
class EntropyBounded(Pick):
    """The largest set of surest candidates whose summed entropy minus its largest is at most gamma nats; always one.

    EB-Sampler (Ben-Hamu et al. 2025): that difference bounds the joint dependence ignored by sampling at once.
    """

    gamma: float
    by: str = "entropy"
    always = True

    def __post_init__(self) -> None:
        check(self.by)

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        order = ordered(canvas, draft, among, self.by)
        entropy = draft.entropy.masked_fill(~among, 0).gather(1, order)
        error = entropy.cumsum(1) - entropy.cummax(1).values
        enough = (error <= self.gamma).cumprod(1).bool() | (canvas.position == 0)
        return among & torch.empty_like(enough).scatter_(1, order, enough)


@lru_cache(maxsize=256)
def dream_counts(cells: int, steps: int, eps: float) -> tuple[int, ...]:
    """How many of `cells` cells Dream commits at each of its steps that commits any: int(n (1 - s / t)), at last all.

    t runs from 1 to eps in `steps` equal steps (Ye et al. 2025). A step that commits none changes nothing, so it costs
    us no forward.
    """
    time, left, counts = torch.linspace(1, eps, steps + 1).tolist(), cells, []
    for i in range(steps):
        k = int(left * (1 - time[i + 1] / time[i])) if i < steps - 1 else left
        left -= k
        counts += [k] if k else []
    return tuple(counts)


@term("dream_quota")
@dataclass(frozen=True, repr=False)
class DreamQuota(Pick):
    """Dream's schedule over the whole response (Ye et al. 2025): `steps` steps of shrinking noise down to eps."""

    steps: int
    by: str = "score"
    eps: float = 1e-3
    always = True

    def __post_init__(self) -> None:
        check(self.by, self.steps, most=MOST_STEPS)

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        total, before, counts = canvas.derive(self, lambda: self._plan(canvas), fixed=True)
        decided = total - canvas.masked.sum(1, keepdim=True)
        k = counts.gather(1, torch.searchsorted(before, decided))
        return among & (rank(canvas, draft, among, self.by) < k)

    def _plan(self, canvas: Canvas) -> tuple[Tensor, Tensor, Tensor]:
        """(cells that are not given [B, 1]; how many are decided before each step, and how many a step decides)."""
        total = canvas.own.sum(1, keepdim=True)
        rows = [dream_counts(n, self.steps, self.eps) for n in total[:, 0].tolist()]
        width = 1 + max(map(len, rows))
        counts = torch.tensor([[*row, *[1] * (width - len(row))] for row in rows], device=total.device)
        return total, counts.cumsum(1) - counts, counts


@term("scattered")
@dataclass(frozen=True, repr=False)
class Scattered(Pick):
    """Dream's `origin`: at each of `steps` steps every undecided cell is committed with probability 1 - s / t.

    The step at which a cell's turn comes depends on its noise alone, so it is known beforehand: the cells of the next
    step that has any are committed, and steps without any cost no forward.
    """

    steps: int
    eps: float = 1e-3
    always = True

    def __post_init__(self) -> None:
        check("random", self.steps, most=MOST_STEPS)

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        turn = canvas.derive(self, lambda: self._turns(canvas), fixed=True).masked_fill(~among, self.steps)
        return among & (turn == turn.amin(1, keepdim=True))

    def _turns(self, canvas: Canvas) -> Tensor:
        """[B, L] int64: the step at which each cell's turn comes."""
        time = torch.linspace(1, self.eps, self.steps + 1).to(canvas.seed.device)
        chance = 1 - time[1:] / time[:-1]
        chance[-1] = 1
        step = torch.arange(self.steps, device=time.device)[:, None, None]
        hit = noise.uniform(canvas.seed[:, None], step, canvas.position) < chance[:, None, None]
        return hit.int().argmax(0)


@dataclass(frozen=True, repr=False)
class Drawn(Pick):
    """The cells that a joint sampler drew, one after the other, among these candidates (needs the belief `joint`)."""

    always = True  # where it has candidates, at least one is drawn among them

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        if draft.drawn is None:
            raise UserError("drawn takes what a joint sampler drew; add the belief joint(k)")
        return among & (draft.drawn > 0)


leftmost, drawn = Leftmost, ready("drawn", Drawn())
confident, best, factor, entropy_bounded = Confident, Best, Factor, EntropyBounded
dream_quota, scattered = DreamQuota, Scattered
