"""A trace played again is the run that was recorded; two traces part where their decisions do; bad files are told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laws.common import PAIRS, Scripted, Synthetic, line, plain, ragged, run, small
from unmask.decode import (
    Budget,
    Canvas,
    Ledger,
    Mixed,
    Recipe,
    Step,
    best,
    calm,
    confident,
    doubted,
    everything,
    leftmost,
)
from unmask.errors import UserError
from unmask.generate import Streaming
from unmask.study.page import page
from unmask.study.recorder import Recorder
from unmask.study.trace import Trace, end, ledger, replay
from unmask.study.trace_diff import diff, kendall
from unmask.study.trace_file import as_dict, from_dict, read, write

Run = list[tuple[Canvas, Step]]
BOTH = Recipe(everything, best(2), remask=doubted(0.4), edit=confident(0.5), stop=calm)


def recorded(denoise: Any, recipe: Any, canvas: Canvas, *, drafts: bool = False) -> tuple[Trace, Run]:
    """A run, and its trace."""
    recorder = Recorder(canvas, recipe, drafts=drafts)
    seen = run(denoise, recipe, canvas)[1]
    for pair in seen:
        recorder(*pair)
    return recorder.trace(), seen


def revisable(canvas: Canvas, times: int) -> Canvas:
    return replace(canvas, revisions=torch.where(canvas.given, 0, times) * canvas.valid)


def written(scale: float = 12.0, canvas: Canvas | None = None) -> tuple[Trace, Run]:
    """A run of four ragged rows that gives back and rewrites."""
    canvas = revisable(ragged(), 2) if canvas is None else canvas
    return recorded(Synthetic(scale=scale), BOTH, canvas, drafts=True)


@lru_cache
def sample() -> Trace:
    """The trace of such a run, the same every time."""
    trace, _ = written()
    return replace(trace, steps=tuple(replace(event, seconds=0.001) for event in trace.steps))


def held() -> Any:
    """What its file holds."""
    return json.loads(json.dumps(as_dict(sample())))


def check_same(seen: Run, again: Run) -> None:
    """The same canvases, field by field, and the same steps."""
    assert len(again) == len(seen)
    for (canvas, event), (other, step) in zip(seen, again, strict=True):
        for f in fields(canvas):
            mine, found = getattr(canvas, f.name), getattr(other, f.name)
            assert torch.equal(mine, found) if torch.is_tensor(mine) else mine == found, f.name
        for name in ("number", "computed", "pick", "back", "edit", "moved"):
            mine, found = getattr(event, name), getattr(step, name)
            assert (mine is found is None) or torch.equal(mine, found), name
        assert torch.equal(event.draft.computed, step.draft.computed)
        assert torch.equal(event.draft.fresh, step.draft.fresh)
        assert torch.equal(event.draft.token[event.pick], step.draft.token[step.pick])


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_replay_is_the_recorded_run(name: str, kind: str, tmp_path: Path) -> None:
    recipe = small(name)
    canvas = revisable(ragged(), recipe.allowance)
    trace, seen = recorded(plain(kind, recipe, canvas), recipe, canvas)
    write(trace, tmp_path / "a.json.gz")
    again = read(tmp_path / "a.json.gz")
    assert again == trace
    check_same(seen, list(replay(again)))
    assert len({int(step) for step in seen[-1][0].step}) > 1 or name == "ar", "all rows ended in the same step"
    assert Recipe.from_toml(trace.recipes[0].toml) == recipe and trace.recipes[0].hash == recipe.hash


@pytest.mark.parametrize("scale", [0.0, 2.0, 12.0])
def test_revisions_are_replayed(scale: float) -> None:
    trace, seen = written(scale)
    check_same(seen, list(replay(trace)))
    if scale == 12.0:
        assert any(bool(e.back.any()) for _, e in seen) and any(bool(e.edit.any()) for _, e in seen)


def test_several_recipes_in_one_batch() -> None:
    canvas = ragged()
    mixed = Mixed((small("llada"), small("dual"), small("prophet")), torch.tensor([2, 0, 1, 0, 0, 0, 0, 0]))
    trace, seen = recorded(plain("full", mixed, canvas), mixed, canvas)
    check_same(seen, list(replay(from_dict(json.loads(json.dumps(as_dict(trace)))))))
    assert [trace.recipes[row.recipe].name for row in trace.rows] == ["prophet", "llada", "dual", "llada"]


def test_a_run_taken_up_in_the_middle(tmp_path: Path) -> None:
    canvas, recipe = revisable(ragged(), 2), BOTH
    middle = run(Synthetic(), recipe, canvas)[1][2][0]
    trace, seen = recorded(Synthetic(), recipe, middle)
    write(trace, tmp_path / "a.json")
    check_same(seen, list(replay(read(tmp_path / "a.json"))))
    rows = middle[torch.tensor([2, 1])]  # their columns are fewer than the canvas has
    trace, seen = recorded(Synthetic(), recipe, rows)
    check_same(seen, list(replay(trace)))


@given(scale=st.floats(0, 40), seed=st.integers(0, 2**40))
def test_confidence_survives_in_few_digits(scale: float, seed: int) -> None:
    canvas = Canvas.new([[1, 2]], 6, mask_id=60, seed=seed)
    trace, seen = recorded(Synthetic(scale=scale), Recipe(everything, best(2)), canvas)
    text = json.dumps(as_dict(trace))
    check_same(seen, list(replay(from_dict(json.loads(text)))))
    scores = [s for event in trace.steps for s in event.moves[0].pick.scores]
    assert all(len(repr(s)) <= 15 for s in scores)


def test_the_ledger_counts_a_replay_as_it_counted_the_run() -> None:
    for name, kind in (("freecache-guided", "full"), ("edit", "shifted"), ("dual", "full")):
        canvas = revisable(ragged(), small(name).allowance)
        trace, seen = recorded(plain(kind, small(name), canvas), small(name), canvas)
        live = Ledger()
        for pair in seen:
            live.update(*pair)
        mine, found = live.report(), ledger(trace)
        assert replace(mine, seconds=0.0, helpers={}) == replace(found, seconds=0.0, helpers={})
        assert mine.helpers.keys() == found.helpers.keys()
        for helper, cost in mine.helpers.items():
            assert found.helpers[helper] == pytest.approx(cost, abs=1e-4)
        assert found.seconds == trace.seconds > 0


class Heard:
    """A streamer that keeps all it is given."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        self.told.append(("put", value.tolist()))

    def put_draft(self, value: torch.Tensor) -> None:
        self.told.append(("draft", value.tolist()))

    def end(self) -> None: ...


def test_a_streamer_hears_the_same_from_a_replay_with_drafts() -> None:
    canvas = ragged()[:1]
    trace, seen = recorded(Synthetic(), small("dual"), canvas, drafts=True)
    heard = []
    for events in (seen, replay(trace)):
        streamer = Heard()
        show = Streaming(streamer, canvas)
        for pair in events:
            show(*pair)
        heard.append(streamer.told)
    assert heard[0] == heard[1] and any(kind == "draft" for kind, _ in heard[0])


def test_a_replayed_draft_has_no_logits() -> None:
    trace, _ = recorded(Synthetic(), small("threshold"), ragged())
    canvas, event = next(replay(trace))
    open_ = canvas.masked & event.draft.fresh
    assert (event.draft.token[open_] == canvas.mask_id).all() and event.draft.score[open_].isnan().all()
    for name in ("entropy", "margin", "gap", "peak"):
        with pytest.raises(UserError, match="no logits"):
            getattr(event.draft, name)


def test_what_was_drafted() -> None:
    trace, seen = written()
    for (canvas, event), (_, step) in zip(seen, replay(trace), strict=True):
        open_ = canvas.masked & event.draft.fresh
        assert torch.equal(event.draft.token[open_], step.draft.token[open_])
        torch.testing.assert_close(event.draft.score[open_], step.draft.score[open_], atol=5e-5, rtol=0)


def test_a_trace_can_be_taken_before_the_end() -> None:
    recorder, seen = Recorder(ragged(), small("dual")), run(Synthetic(), small("dual"), ragged())[1]
    assert end(recorder.trace()).masked.equal(ragged().masked) and ledger(recorder.trace()).forwards == 0
    for pair in seen[:3]:
        recorder(*pair)
    check_same(seen[:3], list(replay(recorder.trace())))


# Files


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    trace = sample()
    for name in ("a.json", "a.json.gz"):
        assert write(trace, tmp_path / name) == (tmp_path / name).stat().st_size
        assert read(tmp_path / name) == trace
    assert 3 * (tmp_path / "a.json.gz").stat().st_size < (tmp_path / "a.json").stat().st_size
    before = (tmp_path / "a.json").read_bytes()
    for bad in (tmp_path / "no" / "a.json", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            write(trace, bad)
    with pytest.raises(ValueError, match="JSON"):
        write(replace(trace, settings={"temperature": float("nan")}), tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.gz"]
    assert (tmp_path / "a.json").read_bytes() == before


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_told(tmp_path: Path, data: st.DataObject) -> None:
    text = json.dumps(held()).encode()
    whole = data.draw(st.sampled_from([text, gzip.compress(text, mtime=0)]))
    (tmp_path / "a").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=r"a is .*trace|truncated"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a trace, or truncated"),
        ("[1, 2]", "not a trace; `unmask trace record` makes one"),
        ('{"format": "unmask-trace", "version": 2}', "of format 2, and this version of unmask reads 1"),
        ('{"format": "unmask-trace", "version": 1}', "damaged trace: 'model' is missing"),
        ("[" * 100_000, "not a trace"),
        ("\x1f\x8bgarbage", "truncated or damaged"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=message) as told:
        read(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(told.value) and "\n" not in str(told.value)


JUNK = [None, -1, 0, 1, 10**30, 1.5, "", "x", True, [], [0], [[]], {}, {"cells": [0]}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


@given(data=st.data(), junk=st.sampled_from(JUNK))
@settings(max_examples=60)
def test_a_damaged_trace_is_refused_or_still_one(data: st.DataObject, junk: Any) -> None:
    inside = whole = held()
    path = data.draw(st.sampled_from(list(places(whole))))
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = junk
    try:
        trace = from_dict(whole)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert page(trace) and ledger(trace)
        diff(trace, trace)


def test_an_impossible_step_is_told() -> None:
    whole = held()
    pick = whole["steps"][0]["moves"][0]["pick"]
    assert pick["cells"]
    pick["cells"][0] = 0  # a given cell
    with pytest.raises(UserError, match="step 1 of row 0 cannot have cell 0 in its 'pick'"):
        from_dict(whole)


# Where two traces part


def scripted(words: tuple[int, ...], recipe: Recipe, gap: Any = 20.0) -> Trace:
    return recorded(Scripted((0, *words), gap), recipe, line(1, len(words)))[0]


def test_a_trace_equals_itself_whatever_it_cost() -> None:
    assert diff(sample(), sample()).equal
    canvas, recipe = ragged(), small("ar")
    cached, whole = (
        recorded(plain("causal", r, canvas), r, canvas)[0] for r in (recipe, replace(recipe, query=everything))
    )
    found = diff(cached, whole)
    assert found.equal and all(row.score < 1e-9 and row.order in (1.0, None) for row in found.rows)
    assert all(a < b for a, b in (row.positions for row in found.rows))
    assert [sum(side) for side in zip(*(row.positions for row in found.rows), strict=True)] == [
        found.a.positions,
        found.b.positions,
    ]


def test_another_pace_by_hand() -> None:
    one, two = (scripted((5, 6, 7, 8), Recipe(everything, leftmost(k))) for k in (1, 2))
    found = diff(one, two)
    (row,) = found.rows
    assert not found.equal and row.parted == 1 and row.tokens == ()
    assert (row.both, row.moved, row.shift) == (4, 3, 1.0)
    assert row.order == pytest.approx(4 / 24**0.5)
    assert row.forwards == (4, 2) and row.positions == (20, 10)


def test_other_tokens_by_hand() -> None:
    recipe = Recipe(everything, leftmost(1))
    (row,) = diff(scripted((5, 6, 7, 8), recipe), scripted((5, 6, 9, 8), recipe)).rows
    assert row.parted == 3 and [(c.column, c.a, c.b) for c in row.tokens] == [(3, "7", "9")]
    assert row.order == 1.0 and row.moved == 0
    early = replace(recipe, stop=recipe.stop | Budget(2))
    (row,) = diff(scripted((5, 6, 7, 8), recipe), scripted((5, 6, 7, 8), early)).rows
    assert row.parted == 3 and [(c.a, c.b) for c in row.tokens] == [("7", None), ("8", None)] and row.both == 2


def test_the_opposite_order() -> None:
    words = (5, 6, 7, 8)
    (row,) = diff(
        scripted(words, Recipe(everything, leftmost(1))),
        scripted(words, Recipe(everything, best(1, "gap")), gap=lambda c: 1.0 + c),
    ).rows
    assert row.order == -1.0 and row.shift == 2.0 and row.tokens == ()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_kendall(pairs: list[tuple[int, int]]) -> None:
    def sign(x: int) -> int:
        return (x > 0) - (x < 0)

    a, b = (torch.tensor([p[i] for p in pairs], dtype=torch.float64) for i in (0, 1))
    both = [(sign(x - u), sign(y - v)) for i, (x, y) in enumerate(pairs) for u, v in pairs[:i]]
    free = sum(s != 0 for s, _ in both) * sum(t != 0 for _, t in both)
    found = kendall(a, b)
    assert found is None if not free else found == pytest.approx(sum(s * t for s, t in both) / free**0.5)


def test_traces_that_cannot_be_compared() -> None:
    recipe = Recipe(everything, best(1))

    def trace(canvas: Canvas) -> Trace:
        return recorded(Synthetic(), recipe, canvas)[0]

    one = trace(line(3, 4))
    for other, message in (
        (trace(line(3, 5)), "have 4 and 5 cells"),
        (trace(line(4, 4)), "the prompts of row 1 part at cell 3"),
        (trace(line(3, 4, seed=1)), "the prompts of row 1 part at cell"),
        (trace(ragged()), "have 1 and 4 rows"),
        (replace(one, pieces={t: f"{text}'" for t, text in one.pieces.items()}), "of different vocabularies"),
    ):
        with pytest.raises(UserError, match=message):
            diff(one, other)
