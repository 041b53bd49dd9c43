"""Revision: what is given back or rewritten is bounded, so every run ends whatever the model believes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import Scripted, Synthetic, line, plain, ragged, result, results, revisable, run, small
from laws.test_termination import canvases
from unmask.decode import (
    Blocks,
    Canvas,
    Draft,
    Mixed,
    Pick,
    Recipe,
    best,
    calm,
    confident,
    doubted,
    everything,
    filled,
    leftmost,
)
from unmask.decode.loop import step
from unmask.decode.revise import potential

b = Blocks(4)
REVISING = {
    "wino": small("wino", wide=0.3, narrow=0.6),
    "edit": small("edit", threshold=0.3, edit=0.2),
    "llada21": small("llada21", threshold=0.3, edit=0.2),
    "remask-all": Recipe(everything, b >> leftmost(2), remask=doubted(2.0)),
    "edit-all": Recipe(everything, best(1), edit=confident(-1.0), stop=calm),
    "both": Recipe(everything, best(2), remask=doubted(0.4), edit=confident(0.5), stop=calm),
}


@pytest.mark.parametrize("name", REVISING)
@given(canvas=canvases(), times=st.integers(0, 3), scale=st.sampled_from([0.0, 2.0, 30.0]))
def test_the_potential_falls_with_every_step(name: str, canvas: Canvas, times: int, scale: float) -> None:
    canvas, recipe = revisable(canvas, times), REVISING[name]
    bound, start, steps = potential(canvas), canvas, 0
    while not canvas.done.all():
        before, (canvas, event) = canvas, step(Synthetic(scale=scale), recipe, canvas)
        live, idle = ~before.done, ~event.moved.any(1)
        assert (potential(canvas)[live & ~idle] < potential(before)[live & ~idle]).all()
        assert canvas.done[live & idle].all(), "a live row stood still"
        for cells in (event.pick, event.back, event.edit):
            assert cells is None or not (cells & (before.given | before.done[:, None])).any()
        assert (canvas.revisions >= 0).all()
        steps += 1
        assert steps <= int(bound.max()) + 1
    assert not canvas.masked[~canvas.ended.any(1)].any()
    assert torch.equal(canvas.tokens[canvas.given], start.tokens[start.given])


@pytest.mark.parametrize(
    ("name", "kind"), [*product(["wino", "edit", "both"], ["full", "shifted"]), ("llada21", "absolute")]
)
def test_a_revising_row_does_not_depend_on_its_company(name: str, kind: str) -> None:
    canvas, recipe = revisable(ragged(), 2), REVISING[name]
    whole, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    assert any(c is not None and bool(c.any()) for _, e in seen for c in (e.back, e.edit)), "nothing was revised"
    for row in range(len(canvas)):
        one = canvas[row : row + 1]
        assert result(run(plain(kind, recipe, one), recipe, one)[0], 0) == result(whole, row)
    mixed = Mixed((recipe, small("sdar" if kind == "absolute" else "threshold")), torch.zeros(8, dtype=torch.int64))
    assert results(run(plain(kind, mixed, canvas), mixed, canvas)[0]) == results(whole)


def test_a_block_is_written_once_nothing_before_it_is_rewritten() -> None:
    """Also: a block is left calm, and what is settled is never touched again (LLaDA2.1)."""
    start, recipe, rewritten = revisable(ragged(eos=False), 3), REVISING["llada21"], 0
    before, grid = start, Blocks(4, "absolute")
    for after, event in run(plain("absolute", recipe, start), recipe, start)[1]:
        assert event.edit is not None
        behind = event.edit & (grid.ids(before) < grid.current(before)[:, None])
        rewritten += int(behind.sum())
        assert not (behind.any(1) & event.pick.any(1)).any()
        assert not (event.edit & grid.settled(before)).any()
        before = after
    assert rewritten > 0 and (grid.settled(before) | ~before.valid | before.revocable.logical_not()).all()


class Fickle:
    """Believes in token 1 at first and in token 2 from its third step on."""

    def __call__(self, canvas: Canvas, query: torch.Tensor, need: torch.Tensor) -> Draft:
        word = 1 if int(canvas.step[0]) < 2 else 2
        return Scripted((word,) * canvas.tokens.shape[1])(canvas, query, need)


def test_an_edit_rewrites_what_the_model_no_longer_believes() -> None:
    canvas = revisable(line(1, 4), 1)
    end, seen = run(Fickle(), Recipe(everything, leftmost(1), edit=confident(0.9), stop=calm), canvas)
    assert end.tokens[0, 1:].tolist() == [2, 2, 2, 2]
    assert sum(int(e.edit.sum()) for _, e in seen if e.edit is not None) == 2
    end, _ = run(Fickle(), Recipe(everything, leftmost(1), edit=confident(0.9), stop=calm), revisable(line(1, 4), 0))
    assert end.tokens[0, 1:].tolist() == [1, 1, 2, 2]


def test_a_full_canvas_is_still_edited_until_it_is_calm() -> None:
    both = Recipe(everything, everything, edit=confident(0.9), stop=calm)
    end, _ = run(Fickle(), both, revisable(line(1, 4), 3))
    assert end.tokens[0, 1:].tolist() == [1, 1, 1, 1] and int(end.step) == 2  # calm before the model changed its mind
    slow = Recipe(everything, leftmost(2), edit=confident(0.9), stop=calm)
    assert run(Fickle(), slow, revisable(line(1, 6), 3))[0].tokens[0, 1:].tolist() == [2] * 6
    assert int(run(Fickle(), replace(slow, stop=filled), revisable(line(1, 6), 3))[0].step) == 3


def test_doubt_is_about_the_token_that_stands_there() -> None:
    canvas = revisable(line(1, 3), 1)
    draft = Scripted((0, 5, 6, 7), gap=4.0, count=8)(canvas, everything(canvas), everything(canvas))
    written = replace(canvas, tokens=torch.tensor([[0, 5, 6, 4]]), decided_at=torch.tensor([[0, 1, 1, 1]]))
    rule: Pick = doubted(0.5)
    assert rule(written, draft, written.revocable)[0].tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="probability"):
        doubted(float("nan"))
