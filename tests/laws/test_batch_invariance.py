"""Law 1: a row decodes the same alone, in any batch, padded, beside other recipes, or joined mid-flight."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from laws.common import OPEN, PAIRS, plain, ragged, result, results, run, small
from unmask.decode import Mixed, cat, step


@lru_cache
def alone(name: str, kind: str, first: int = 0) -> list[tuple[list[int], list[int], int]]:
    recipe, canvas, found = small(name), ragged(first=first), []
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]
        one = one._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w])
        found += results(run(plain(kind, recipe, one), recipe, one)[0])
    return found


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_in_a_ragged_batch(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    assert results(run(plain(kind, recipe, canvas), recipe, canvas)[0]) == alone(name, kind)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_padded_and_shuffled(name: str, kind: str) -> None:
    recipe, order = small(name), [2, 0, 3, 1]
    canvas = ragged()[torch.tensor(order)].widen(33)
    end, _ = run(plain(kind, recipe, canvas), recipe, canvas)
    assert results(end) == [alone(name, kind)[row] for row in order]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_joined_mid_flight(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()[torch.tensor([1, 3])]
    late = ragged(first=20)
    late = replace(late, slot=torch.tensor([6, 0, 5, 2])).widen(30)
    denoise = plain(kind, recipe, late)
    for _ in range(2):
        canvas, _ = step(denoise, recipe, canvas)
    end, _ = run(denoise, recipe, cat([late, canvas]))
    old, new = alone(name, kind), alone(name, kind, 20)
    assert results(end) == [*new, old[1], old[3]]


@pytest.mark.parametrize("kind", ["full", "shifted"])
def test_beside_other_recipes(kind: str) -> None:
    start = ragged()
    canvas = cat([replace(start, slot=start.slot + 4 * i) for i in range(len(OPEN))])
    which = torch.arange(len(OPEN)).repeat_interleave(4)
    mixed = Mixed(tuple(small(name) for name in OPEN), which)
    order = (torch.arange(len(canvas)) * 7 + 3) % len(canvas)  # 7 divides no number of rows here: a permutation
    assert order.unique().numel() == len(canvas)
    end, _ = run(plain(kind, mixed, canvas, slots=len(canvas)), mixed, canvas[order])
    end = end[order.argsort()]
    for i, name in enumerate(OPEN):
        assert [result(end, 4 * i + row) for row in range(4)] == alone(name, kind), name


@pytest.mark.parametrize("by", ["random", "margin", "entropy", "gap"])
def test_by_any_confidence(by: str) -> None:
    recipe, canvas = small("dual-quota", by=by), ragged()
    whole, _ = run(plain("full", recipe, canvas), recipe, canvas)
    for row in range(len(canvas)):
        one = canvas[row : row + 1]
        assert result(run(plain("full", recipe, one), recipe, one)[0], 0) == result(whole, row)
    assert results(whole) != alone("dual-quota", "full")


def test_a_slot_is_used_again() -> None:
    recipe, first, second = small("dual"), ragged(first=40), ragged()
    denoise = plain("full", recipe, first)
    run(denoise, recipe, first)
    assert results(run(denoise, recipe, second)[0]) == alone("dual", "full")
