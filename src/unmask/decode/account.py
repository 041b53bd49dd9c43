"""What each part of a choice did: the same recursion as the choice itself, told part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from unmask.decode.algebra import Pick, PickOr, PickWhen, Then
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft


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
