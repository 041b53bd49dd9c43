"""Law 6: a stack of levers is either meaningful or refused at construction, with the reason and what to do instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import NAMES, Scripted, line, plain, ragged, run, small
from unmask.decode import (
    Blocks,
    Budget,
    Every,
    Recipe,
    Region,
    Staged,
    Sure,
    abandoned,
    answer,
    best,
    confident,
    dirty,
    ended,
    everything,
    filled,
    finished,
    first_step,
    frontier,
    gap,
    leftmost,
    masked,
    prefix,
    response,
)
from unmask.errors import UserError

b = Blocks(4)
fast = confident(0.9) | best(1)
early = everything.when(gap(7.5, 5.0, 2.5))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"unmask": confident(0.9)}, "add `| best"),
        ({"unmask": b >> confident(0.9)}, "add `| best"),
        ({"unmask": early}, "add `| best"),
        ({"unmask": answer >> best(1)}, "may commit nothing"),
        ({"unmask": response >> best(1)}, "may commit nothing"),
        ({"unmask": dirty >> best(1)}, "may commit nothing"),
        ({"unmask": ~b >> best(1)}, "may commit nothing"),
        ({"unmask": (b & Region(1)) >> best(1)}, "may commit nothing"),
        ({"unmask": fast.when(first_step)}, "may commit nothing"),
        ({"unmask": (b & ~abandoned) >> best(1)}, "stop must be `finished`"),
        ({"query": dirty, "unmask": early | best(1)}, "never computes"),
        ({"query": b, "unmask": early | b >> fast}, "never computes"),
        ({"query": everything.when(first_step)}, "may compute no undecided"),
        ({"query": b.settled}, "may compute no undecided"),
        ({"query": answer}, "may compute no undecided"),
        ({"query": ~b}, "may compute no undecided"),
        ({"stop": ended}, r"add `\| filled"),
        ({"stop": Budget(4)}, r"add `\| filled"),
        ({"stop": filled & ended}, r"add `\| filled"),
        ({"stop": ~filled}, r"add `\| filled"),
        ({"remask": confident(0.3), "revisions": 0}, "revisions"),
        ({"edit": filled}, "must choose cells"),
        ({"beliefs": [everything]}, "beliefs are wrappers"),
        ({"query": masked & b, "unmask": early | b >> fast}, "never computes"),
        ({"query": best(1)}, "query must be a Where"),
        ({"stop": masked}, "stop must be a Rows"),
        ({"unmask": filled}, "must choose cells"),
        ({"remask": 4, "stop": filled | Budget(3)}, "must choose cells"),
    ],
)
def test_refused_with_the_reason(parts: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Recipe(**{"query": everything, "unmask": fast, **parts})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Blocks(0),
        lambda: b.quota(0),
        lambda: b.quota(4, by="luck"),
        lambda: best(0),
        lambda: best(1, by="luck"),
        lambda: leftmost(0),
        lambda: Every(0),
        lambda: Sure(Staged(1, 1, 1), everything, "luck"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_that_means_nothing_is_refused(build) -> None:
    with pytest.raises(ValueError, match=r"not|cannot"):
        build()


@pytest.mark.parametrize(
    "parts",
    [
        {"unmask": everything},
        {"unmask": masked},
        {"query": dirty | frontier, "unmask": leftmost(1)},
        {"query": dirty & prefix, "unmask": leftmost(1), "stop": filled | ended},
        {"query": ~b.settled, "unmask": b >> fast},
        {"query": b | everything.when(b.entered), "unmask": early | b >> fast},
        {"query": b.onward, "unmask": early | b >> fast},
        {"unmask": (b & ~abandoned) >> best(1), "stop": finished},
        {"remask": confident(0.3), "stop": filled | Budget(9)},
        {"remask": confident(0.3)},
        {"query": masked | dirty, "unmask": early | b >> fast},
        {"query": b | answer, "unmask": answer.when(gap(7.5, 5.0, 2.5)) | b >> fast},
        {"unmask": b >> fast | Region(1) >> confident(0.5)},
    ],
)
def test_what_means_something_is_accepted(parts: dict) -> None:
    Recipe(**{"query": everything, "unmask": fast, **parts})


@pytest.mark.parametrize("name", NAMES)
def test_published_recipes_are_accepted(name: str) -> None:
    assert small(name).stop.always


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("criterion", ["gap", "score", "margin"])
@pytest.mark.parametrize("late", [False, True])
def test_early_commit_over_a_dual_cache_waits_for_fresh_logits(kind: str, criterion, late: bool) -> None:
    """However easily satisfied, it fills the rest only where every undecided cell has just been computed."""
    query = b | everything.when(b.entered)
    eager = Sure(Staged(-1.0, -1.0, -1.0), answer, criterion)
    hesitant = everything.when(eager & Every(3) & ~first_step)
    recipe, canvas, exits = Recipe(query, hesitant | b >> best(1)), ragged(), 0
    start = canvas.origin[:, None]
    early_cells = (
        canvas.valid & (canvas.position >= start) & (canvas.position < start + 2)
    )  # in a block always computed
    canvas = replace(
        canvas, region=torch.where(early_cells, 2, canvas.region) if late else early_cells.to(torch.int8) * 2
    )
    before = canvas
    for after, event in run(plain(kind, recipe, canvas), recipe, canvas)[1]:
        outside = (event.pick & ~b(before)).any(1)
        exits += int(outside.sum())
        assert not (event.pick & ~event.draft.fresh).any()
        assert (event.draft.fresh | ~before.masked)[outside].all()
        assert after.done[outside].all()
        before = after
    assert exits > 0


@given(st.lists(st.floats(0, 10), min_size=9, max_size=9))
def test_nobody_is_sure_of_what_was_not_read(gaps: list[float]) -> None:
    canvas = line(2, 9)
    denoise = Scripted(tuple(range(11)), gap=lambda c: gaps[c - 2])
    for query in (everything, b, b.onward, masked):
        cells = query(canvas)
        draft = denoise(canvas, cells, canvas.masked)
        sure = Sure(Staged(5.0, 5.0, 5.0), response)(canvas, draft)
        complete = not (canvas.masked & ~cells).any()
        part = replace(canvas, region=b(canvas).to(torch.int8))
        easy = Sure(Staged(-1.0, -1.0, -1.0), Region(1))
        assert bool(everything.when(easy)(part, draft, part.masked).any()) == complete
        assert torch.equal(Region(1).when(easy)(part, draft, part.masked), b(part))
        assert sure.item() == (complete and torch.tensor(gaps).double().mean().item() >= 5.0)
