"""Block after block: how many cells a step, when a block is stored, and what holds back the next one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import Synthetic, line, plain, ragged, revisable, run, small
from laws.test_termination import canvases
from unmask.decode import Blocks, Canvas, Recipe, Tally, best, confident, everything, held, masked, pace, parse
from unmask.decode.serial import Cached, Closed, Leads, Storing
from unmask.errors import UserError

grids = st.sampled_from(["origin", "absolute"])


@given(seed=st.integers(0, 999), size=st.integers(1, 9), steps=st.integers(1, 12), count=st.integers(1, 4))
def test_a_whole_block_takes_so_many_steps(seed: int, size: int, steps: int, count: int) -> None:
    """The remainder goes to the first steps; a block of fewer cells than steps takes as many as it has."""
    b, canvas = Blocks(size, "absolute"), line(size, count * size, seed=seed)
    _, seen = run(Synthetic(), Recipe(everything, b >> pace(b, steps)), canvas)
    each = [size // steps + (i < size % steps) for i in range(steps)] if steps < size else [1] * size
    assert [int(event.pick.sum()) for _, event in seen] == each * count


@given(seed=st.integers(0, 999), start=st.integers(1, 7), steps=st.integers(1, 9))
def test_a_partial_block_keeps_the_pace_of_a_whole_one(seed: int, start: int, steps: int) -> None:
    b, canvas = Blocks(8, "absolute"), line(start, 8 - start, seed=seed)
    _, seen = run(Synthetic(), Recipe(everything, b >> pace(b, steps)), canvas)
    left, widths = 8 - start, [int(event.pick.sum()) for _, event in seen]
    for width, k in zip(widths, [8 // steps + (i < 8 % steps) for i in range(8)], strict=False):
        assert width == min(left, max(k, 1))
        left -= width
    assert left == 0


@given(canvas=canvases(), size=st.integers(1, 6), grid=grids)
def test_conditions_by_their_words(canvas: Canvas, size: int, grid) -> None:
    """Over every canvas of a run: against one cell after the other."""
    b = Blocks(size, grid)
    before = canvas
    for after, _ in [(canvas, None), *run(Synthetic(), Recipe(b | masked, b >> best(2)), canvas)[1]]:
        ids, settled, here = b.ids(after), b.settled(after), b(after)
        for row in range(len(after)):
            cells = after.valid[row].nonzero()[:, 0].tolist()
            current = [c for c in cells if here[row, c]]
            if current:
                assert Leads(b)(after)[row] == bool(after.masked[row, current[0]])
                earlier = [c for c in cells if ids[row, c] < ids[row, current[0]]]
                assert Storing(b)(after)[row] == any(not settled[row, c] for c in earlier)
            assert Cached(b)(after)[row] == all(after.cached_at[row, c] >= 0 for c in current)
            end = min((c for c in cells if after.ended[row, c]), default=cells[-1])
            text = [c for c in cells if ids[row, c] <= ids[row, end]]
            full = not any(after.masked[row, c] for c in text)  # no cell of these canvases may be revised
            assert Closed(b)(after)[row] == full
        before = after
    assert before.done.all()


def test_a_row_is_closed_by_the_forward_that_leaves_its_text_as_it_is() -> None:
    """Unless there is nothing left to rewrite it with."""
    start, recipe = revisable(ragged(eos=False), 9), small("llada21", threshold=0.3, edit=0.2)
    _, seen = run(plain("absolute", recipe, start), recipe, start)
    before, calm = start, 0
    for after, event in seen:
        over = after.done & ~before.done
        assert not (event.moved.any(1) & over & after.revocable.any(1)).any()
        calm += int((over & ~event.moved.any(1)).sum())
        before = after
    assert calm > 0


def test_an_end_closes_its_block_whatever_follows() -> None:
    b = Blocks(4, "absolute")
    canvas = line(2, 14, eos=(5,))
    tokens = torch.where(canvas.position < 8, torch.where(canvas.position == 5, 5, 1), canvas.tokens)
    decided = torch.where(canvas.position < 8, 1, canvas.decided_at).masked_fill(canvas.given, 0)
    stored = torch.where(canvas.position < 8, tokens, -1)
    made = canvas._change((), tokens=tokens, decided_at=decided, revisions=(~canvas.given).long())
    assert not Closed(b)(made)[0]
    assert Closed(b)(made._change((), cached_token=stored, cached_at=torch.where(stored >= 0, 2, -1)))[0]


def test_the_tally_of_a_rule_held_back() -> None:
    start, recipe = revisable(ragged(eos=False), 3), small("llada21", threshold=0.3, edit=0.2)
    tally, before = Tally(recipe, start), start
    for after, event in run(plain("absolute", recipe, start), recipe, start)[1]:
        tally(after, event)
        told = [t for t in tally.steps[-1] if t.part == "unmask"]
        assert told[0].chosen == tuple(event.pick.sum(1).tolist()) and len(told) > 2
        before = after
    assert before.done.all()


def test_mistakes_of_the_rules() -> None:
    b = Blocks(4)
    with pytest.raises(UserError, match="held looks at what edit rewrites; give it the recipe's own"):
        Recipe(everything, held(best(1), confident(0.5), ~b.onward), edit=confident(0.6))
    for text, told in (
        ("pace(4, 2)", "pace takes blocks such as"),
        ("pace(blocks(4), 0)", "at least one step"),
        ("pace(blocks(4), 2, by='luck')", "cannot rank by"),
        ("leads(masked)", "leads takes blocks such as"),
        ("storing(3)", "storing takes blocks such as"),
        ("closed(filled)", "closed takes blocks such as"),
        ("cached(filled)", "cached looks at cells"),
        ("held(best(1), filled, masked)", "is no choice"),
        ("held(best(1), best(1), filled)", "are no cells"),
    ):
        with pytest.raises(UserError, match=told):
            parse(text)
