"""What each part of a choice did: the same recursion as the choice itself, told part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from unmask.decode.algebra import (
    Pick,
    PickOr,
    PickWhen,
    Rows,
    RowsAnd,
    RowsNot,
    RowsOr,
    Rule,
    Then,
    Where,
    WhereAnd,
    WhereNot,
    WhereOr,
    WhereWhen,
    Whole,
)
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.early import Prefer
from unmask.decode.serial import Held

if TYPE_CHECKING:
    from unmask.decode.loop import Step
    from unmask.decode.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Account:
    """A rule inside a choice, how deep it stands, and the candidates [B, L] that reach it."""

    depth: int
    rule: Pick
    among: Tensor


def account(rule: Pick, canvas: Canvas, draft: Draft, among: Tensor, depth: int = 0) -> Iterator[Account]:
    """`rule` and every choice inside it, each with its candidates; `rule(canvas, draft, among)` is what it chose."""
    yield Account(depth, rule, among)
    if isinstance(rule, PickOr):
        yield from account(rule.left, canvas, draft, among, depth + 1)
        yield from account(rule.right, canvas, draft, among, depth + 1)
    elif isinstance(rule, Then):
        yield from account(rule.left, canvas, draft, among, depth + 1)
        yield from account(rule.right, canvas, draft, rule.left(canvas, draft, among), depth + 1)
    elif isinstance(rule, PickWhen):
        yield from account(rule.rule, canvas, draft, among, depth + 1)
    elif isinstance(rule, Prefer):
        yield from account(rule.first, canvas, draft, among, depth + 1)
        rest = among & ~rule.first(canvas, draft, among).any(1, keepdim=True)
        yield from account(rule.second, canvas, draft, rest, depth + 1)
    elif isinstance(rule, Held):
        yield from account(rule.rule, canvas, draft, among, depth + 1)


@dataclass(frozen=True)
class Told:
    """What one rule did in one step: of what it was shown, how much it took, for each row of the batch.

    `part` is the part of the recipe it stands in and `depth` how deep. Sets and choices count cells; a condition counts
    the row itself, 1 where it holds.
    """

    part: str
    depth: int
    rule: Rule
    unit: Literal["cells", "rows"]
    among: tuple[int, ...]
    chosen: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; numbers are a list with one a row."""
        told = {"part": self.part, "depth": self.depth, "rule": repr(self.rule), "unit": self.unit}
        return {**told, "among": list(self.among), "chosen": list(self.chosen)}


def tell(recipe: Recipe, before: Canvas, after: Canvas, event: Step) -> list[Told]:
    """What every rule of the recipe did in one step, part by part: the loop's own recursion, counted.

    The operands of `a | b | c` (and of `&`) stand side by side, without the unions in between.
    """
    draft, live = event.draft, ~before.done
    may = before.revocable & draft.fresh
    found = _places("query", recipe.query, before, before.valid & live[:, None], 0)
    found += _picks("unmask", recipe.unmask, before, draft, before.masked & draft.fresh)
    if recipe.edit is not None:
        found += _picks("edit", recipe.edit, before, draft, may & (draft.token != before.tokens))
    if recipe.remask is not None:
        found += _picks("remask", recipe.remask, before, draft, may if event.edit is None else may & ~event.edit)
    return _flat(found + _conditions("stop", recipe.stop, after, draft, live, 0))


def _flat(told: list[Told]) -> list[Told]:
    """Without what repeats the sign of the rule around it, whose operands it only brackets."""
    found: list[Told] = []
    around: list[tuple[int, int, Rule]] = []  # (depth, depth as shown, rule), outermost first
    for one in told:
        while around and around[-1][0] >= one.depth:
            around.pop()
        shown = around[-1][1] + 1 if around else 0
        same = around and type(one.rule) is type(around[-1][2]) and getattr(one.rule, "_sign", "") in ("|", "&")
        if not same:
            found.append(replace(one, depth=shown))
        around.append((one.depth, shown - 1 if same else shown, one.rule))
    return found


def _count(cells: Tensor) -> tuple[int, ...]:
    return tuple((cells.sum(1) if cells.dim() == 2 else cells.long()).tolist())


def _places(part: str, rule: Where, canvas: Canvas, within: Tensor, depth: int) -> list[Told]:
    found = [Told(part, depth, rule, "cells", _count(within), _count(rule(canvas) & within))]
    if isinstance(rule, WhereOr | WhereAnd | WhereNot | WhereWhen):
        for inner in rule.parts:
            if isinstance(inner, Where):
                found += _places(part, inner, canvas, within, depth + 1)
            elif isinstance(inner, Rows):
                found += _conditions(part, inner, canvas, None, within.any(1), depth + 1)
    return found


def _picks(part: str, rule: Pick, canvas: Canvas, draft: Draft, among: Tensor) -> list[Told]:
    found = []
    for one in account(rule, canvas, draft, among):
        chosen = one.rule(canvas, draft, one.among)
        found.append(Told(part, one.depth, one.rule, "cells", _count(one.among), _count(chosen)))
        if isinstance(one.rule, PickWhen | Whole):
            found += _conditions(part, one.rule.rows, canvas, draft, ~canvas.done, one.depth + 1)
    return found


def _conditions(part: str, rule: Rows, canvas: Canvas, draft: Draft | None, live: Tensor, depth: int) -> list[Told]:
    found = [Told(part, depth, rule, "rows", _count(live), _count(rule(canvas, draft) & live))]
    for inner in rule.parts if isinstance(rule, RowsOr | RowsAnd | RowsNot) else ():
        if isinstance(inner, Rows):
            found += _conditions(part, inner, canvas, draft, live, depth + 1)
    return found


class Tally:
    """A consumer of the loop's events: `steps` says what each rule did in every step of a run that began at `start`."""

    def __init__(self, recipe: Recipe, start: Canvas) -> None:
        self.recipe, self.canvas = recipe, start
        self.steps: list[list[Told]] = []

    def __call__(self, canvas: Canvas, event: Step) -> None:
        """Count one step, which led from the canvas seen last to this one."""
        self.steps.append(tell(self.recipe, self.canvas, canvas, event))
        self.canvas = canvas
