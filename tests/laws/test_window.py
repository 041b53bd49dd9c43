"""The window over the suffix: what lies far behind is left out, given words stay, and on block-causal models the text
is the same. Batch invariance, termination and given cells of every stack with it are kept by test_stacks.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import BLOCK, EOS, Scripted, Synthetic, line, plain, ragged, result, results, run, words
from laws.test_termination import canvases, check
from unmask.decode import Blocks, Canvas
from unmask.recipes import stack

CACHES = ("full", "dual", "prefix", "freecache", "freecache_lag", "dkv(3)")


def stacked(*levers: str):
    return stack.build(" + ".join([*levers, f"blocks({BLOCK})"]))


@given(canvas=canvases(), size=st.integers(1, 6), ahead=st.integers(0, 4))
def test_a_window_holds_what_is_decided_and_the_next_blocks(canvas: Canvas, size: int, ahead: int) -> None:
    """Cell by cell: left out are undecided cells of later blocks, counted from the first undecided cell's."""
    near = Blocks(size).near(ahead)(canvas)
    for row in range(len(canvas)):
        origin, first = int(canvas.origin[row]), int(canvas.frontier[row])
        block = [max(-1, (column - origin) // size) for column in range(canvas.tokens.shape[1])]
        for column, number in enumerate(block):
            far = bool(canvas.masked[row, column]) and number > block[first] + ahead
            assert bool(near[row, column]) == (bool(canvas.valid[row, column]) and not far)
    assert (Blocks(size).near(ahead + 1)(canvas) | ~near).all(), "a wider window holds less"


@given(canvas=canvases(), cache=st.sampled_from(CACHES), ahead=st.integers(0, 3), scale=st.sampled_from([0.0, 1e6]))
def test_every_run_over_a_window_ends(canvas: Canvas, cache: str, ahead: int, scale: float) -> None:
    recipe = stack.build(f"{cache} + window({ahead}) + threshold(0.6) + blocks(3)")
    check(Synthetic(scale=scale), recipe, canvas)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["full", "shifted"])
def test_a_row_does_not_depend_on_its_company(cache: str, kind: str) -> None:
    recipe, canvas = stacked(cache, "window(1)", "threshold(0.6)"), ragged()
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    before = canvas
    for after, event in seen:
        assert not (event.moved & (canvas.given | ~canvas.valid)).any()
        reach = Blocks(BLOCK).near(1)(before)
        reach = reach if kind == "full" else reach | reach.roll(-1, 1)  # and the cell before
        assert not (event.computed & ~reach).any(), "a cell far behind was computed"
        before = after
    assert torch.equal(end.tokens[canvas.given], canvas.tokens[canvas.given])
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w])
        assert result(run(plain(kind, recipe, one), recipe, one)[0], 0) == result(end, row)


@pytest.mark.parametrize("cache", CACHES)
def test_a_window_over_all_blocks_changes_nothing(cache: str) -> None:
    canvas = ragged()
    wide, none = stacked(cache, "window(9)", "one"), stacked(cache, "one")
    ends = [run(plain("full", recipe, canvas), recipe, canvas)[0] for recipe in (wide, none)]
    assert results(ends[0]) == results(ends[1])


@pytest.mark.parametrize("kind", ["block", "block-shifted"])
@pytest.mark.parametrize("commit", ["one", "threshold(0.6)", "quota(16)"])
def test_in_blocks_no_window_is_too_narrow(kind: str, commit: str) -> None:
    """Nothing of a later block is seen, so leaving it out is exact where attention is block-causal."""
    canvas = ragged(infill=False)
    narrow, none = stacked("freecache_lag", "window(0)", commit), stacked("freecache_lag", commit)
    (one, seen), (two, more) = (run(plain(kind, recipe, canvas), recipe, canvas) for recipe in (narrow, none))
    assert results(one) == results(two)
    assert sum(int(e.computed.sum()) for _, e in seen) < sum(int(e.computed.sum()) for _, e in more)


def test_on_full_attention_it_is_an_approximation() -> None:
    """The beliefs are others than with the suffix in sight: or else the law above would say nothing."""
    canvas = ragged(infill=False)
    ends = [
        run(plain("full", recipe, canvas), recipe, canvas)[0]
        for recipe in (stacked("window(0)", "one"), stacked("one"))
    ]
    assert results(ends[0]) != results(ends[1])


def test_an_end_is_found_within_the_window() -> None:
    """A row that stops at its end does so without having computed what lies behind."""
    canvas = line(2, 16, eos=[EOS])
    recipe = stacked("window(0)", "threshold(0.6)", "eos_stop")
    end, seen = run(Scripted((*words(5, 1), EOS, *[EOS] * 12)), recipe, canvas)
    assert end.done.all() and int(end.frontier) == 2 + BLOCK and end.masked.sum() == 16 - BLOCK
    assert not torch.stack([event.computed for _, event in seen])[..., 2 + BLOCK :].any()


def test_words_behind_the_window_are_seen_and_kept() -> None:
    rows: list[list[int | None]] = [[*words(3, 0), *[None] * 14, *words(2, 7)]]
    made = Canvas.of(rows, origin=[3], mask_id=60, seed=1, dtype=torch.float64)
    other = replace(made, tokens=torch.where(made.position >= 17, (made.tokens + 1) % 50, made.tokens))
    recipe = stacked("window(0)", "one")
    ends, firsts = [], []
    for canvas in (made, other):
        end, seen = run(plain("full", recipe, canvas), recipe, canvas)
        assert seen[0][1].computed[0].tolist() == [True] * (3 + BLOCK) + [False] * (14 - BLOCK) + [True] * 2
        assert torch.equal(end.tokens[canvas.given], canvas.tokens[canvas.given])
        ends.append(end)
        firsts.append(seen[0][1].draft.logits)
    assert not torch.equal(*firsts), "what the text is written towards is not seen"
