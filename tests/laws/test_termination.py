"""Law 5: every step of a live row commits at least one cell (or spends a bounded revision), so every run ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import MODELLESS, PAIRS, Synthetic, dressed, plain, ragged, run, small
from unmask import recipes
from unmask.decode import Blocks, Budget, Canvas, Decided, Recipe, best, confident, decode, everything, filled, leftmost


@st.composite
def canvases(draw) -> Canvas:
    """Rows of random lengths with random holes, some of them before the origin, and tokens that end a text."""
    rows, origins = [], []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(2, 14))
        holes = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        holes[draw(st.integers(1, size - 1))] = True
        rows.append([None if hole and i else i % 8 for i, hole in enumerate(holes)])  # cell 0 is given: shift reads it
        origins.append(draw(st.integers(0, size)))
    made = Canvas.of(rows, origin=origins, mask_id=60, eos=[2], seed=draw(st.integers(0, 999)), dtype=torch.float64)
    return replace(made, region=((made.position + made.seed[:, None]) % 3).to(torch.int8))


def check(denoise, recipe, canvas: Canvas) -> None:
    holes, before = canvas.masked.sum(1), canvas
    end, seen = run(denoise, recipe, canvas)
    for after, event in seen:
        assert (event.pick.any(1) | before.done).all(), "a live row stood still"
        assert not (event.pick & ~before.masked).any(), "a cell was written twice"
        assert torch.equal(after.masked, before.masked & ~event.pick)
        before = after
    assert (end.step <= holes).all() and end.done.all()
    left = end.masked & ~end.ended.any(1)[:, None]
    if any(isinstance(rule, Decided) for rule in recipe.stop.walk()):
        left = left & (end.region != 1)  # thinking that its answer made moot
    assert not left.any()


@pytest.mark.parametrize("name", MODELLESS)
@given(
    canvas=canvases(),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e6]),
    level=st.sampled_from([-1.0, 0.0, 0.3, 0.9, 1.0, 2.0, 1e9]),
    block=st.integers(1, 9),
    steps=st.integers(1, 20),
)
def test_every_recipe_ends(name: str, canvas: Canvas, scale: float, level: float, block: int, steps: int) -> None:
    wild = {"block": block, "steps": steps, "threshold": level, "factor": level, "gamma": level, "refresh": steps}
    more = {"high": level, "middle": 1.0, "low": -1.0, "add": min(level, 1.0), "act": min(abs(level), 1.0)}
    more["tau"] = level
    known = recipes.entry(name).defaults
    recipe = recipes.get(name, **{k: v for k, v in {**wild, **more}.items() if k in known})
    if name == "ar":  # reads the cell before, as causal models do
        check(plain("causal", recipe, canvas), recipe, canvas)
    else:
        check(dressed(Synthetic(scale=scale), recipe, canvas), recipe, canvas)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_recipe_ends_on_a_network(name: str, kind: str) -> None:
    check(plain(kind, small(name), ragged()), small(name), ragged())


@given(canvas=canvases(), revisions=st.integers(0, 3), back=st.floats(0, 1), limit=st.integers(1, 60))
def test_revisions_are_bounded(canvas: Canvas, revisions: int, back: float, limit: int) -> None:
    start = replace(canvas, revisions=torch.where(canvas.masked, revisions, 0))
    recipe = Recipe(everything, best(1), remask=confident(back), stop=filled | Budget(limit))
    end, seen = run(Synthetic(), recipe, start)
    given_back = sum(event.back.sum(1) for _, event in seen)
    assert torch.equal(given_back, (start.revisions - end.revisions).sum(1)) and (end.revisions >= 0).all()
    assert (end.step <= (start.masked.sum(1) * (1 + revisions)).clamp(max=limit)).all()


def test_a_stalled_row_is_an_error_and_no_endless_loop() -> None:
    """A model that answers nothing it is asked about."""

    def mute(canvas, query, need):
        return Synthetic()(canvas, query & False, need)

    with pytest.raises(RuntimeError, match="stalled"):
        list(decode(mute, Recipe(everything, best(1)), ragged()))


def test_one_stalled_row_among_others_is_seen() -> None:
    def deaf(canvas, query, need):
        return Synthetic()(canvas, query, need & (canvas.seed != 101)[:, None])

    with pytest.raises(RuntimeError, match="stalled"):
        list(decode(deaf, Recipe(everything, Blocks(4) >> leftmost(1)), ragged()))
