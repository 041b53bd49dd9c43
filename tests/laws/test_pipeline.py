"""Blocks in flight: what the pipeline promises under any beliefs, and what it equals on a network (METHODS: b)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from golden import toy
from laws.common import BLOCK, EOS, Synthetic, line, model, ragged, results, run, small, words
from unmask.decode import Blocks, Canvas, Ledger, Recipe, Step, best, confident, everything, useful
from unmask.denoise import Plain, dress
from unmask.models.config import Layout
from unmask.recipes import stack

NONE, SEMI, FULL, COMPLETE, CACHED = range(5)
"""States of a block: not opened, semi-active, fully active, complete, cached."""
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0])
LEVELS = st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])


@st.composite
def texts(draw) -> Canvas:
    """One to three rows of unequal prompts and responses, some with given words among the holes."""
    rows: list[list[int | None]] = []
    origins = []
    for n in range(draw(st.integers(1, 3))):
        prompt, length = draw(st.integers(1, 6)), draw(st.integers(1, 16))
        holes = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if draw(st.booleans()) else [True]
        holes = (holes * length)[:length]
        holes[draw(st.integers(0, length - 1))] = True
        rows.append([*words(prompt, n), *(None if hole else 5 for hole in holes)])
        origins.append(prompt)
    ends = draw(st.sampled_from([(), (3,), (1, 2)]))
    seed = draw(st.integers(0, 9999))
    return Canvas.of(rows, origin=origins, mask_id=toy.MASK, eos=ends, seed=seed, dtype=torch.float64)


def columns(canvas: Canvas, row: int, size: int, grid: str) -> list[list[int]]:
    """The cells of each block of a row, the prompt being a block of its own where blocks are counted from its end."""
    width, origin = int(canvas.valid[row].sum()), int(canvas.origin[row])
    start = origin if grid == "origin" else 0
    first = [list(range(origin))] if grid == "origin" else []
    return [*first, *([c for c in range(at, at + size) if c < width] for at in range(start, width, size))]


@dataclass
class Watch:
    """One row's blocks, followed by the rules of the published loop, in plain Python."""

    blocks: list[list[int]]
    add: float
    act: float
    states: list[int] = field(default_factory=list)
    done_at: list[int] = field(default_factory=list)
    """The step after which each block and all before it were complete."""
    stored: list[int] = field(default_factory=list)
    """The last step in which each block was computed."""

    def look(self, open_: list[bool], ended: bool) -> list[int]:
        """The state of each block, from the cells that are undecided."""
        ratio = [sum(not open_[c] for c in block) / len(block) for block in self.blocks]
        old = self.states or [NONE] * len(self.blocks)
        found = []
        for i in range(len(self.blocks)):
            opened = all(r >= self.add for r in ratio[:i]) and not (ended and old[i] == NONE)
            full = opened and (i == 0 or ratio[i - 1] >= self.act)
            state = COMPLETE if opened and ratio[i] == 1 else FULL if full else SEMI if opened else NONE
            found.append(CACHED if old[i] == CACHED else state)
        return found


def followed(recipe: Recipe, canvas: Canvas, size: int, grid: str, add: float, act: float, level: float, denoise: Any):
    """Every step of a run against the rules of the published loop; the end of it."""
    watch = [Watch(columns(canvas, row, size, grid), add, act) for row in range(len(canvas))]
    for w in watch:
        w.done_at, w.stored = [-1] * len(w.blocks), [-1] * len(w.blocks)
    before = canvas
    for after, event in run(denoise, recipe, canvas)[1]:
        for row in (~before.done).nonzero()[:, 0].tolist():
            one_step(watch[row], row, before, after, event, level)
        before = after
    return before, watch


def one_step(w: Watch, row: int, before: Canvas, after: Canvas, event: Step, level: float) -> None:
    old, number = w.states, int(after.step[row])
    open_, ended = before.masked[row].tolist(), bool(before.ended[row].any())
    w.states = w.look(open_, ended)
    assert all(a <= b for a, b in zip(old, w.states, strict=False)), "a block went back"
    live = [i for i, state in enumerate(w.states) if NONE < state < CACHED]
    expected = sorted(c for i in live for c in w.blocks[i])
    computed = event.computed[row].nonzero()[:, 0].tolist()
    assert computed == expected, "exactly the opened blocks that are not cached are computed"
    cached = [i for i, state in enumerate(w.states) if state == CACHED]
    assert cached == list(range(len(cached))), "the cached blocks are a prefix"
    assert expected == list(range(expected[0], expected[-1] + 1)), "and those in flight follow it"
    picked, score = event.pick[row], event.draft.score[row]
    assert picked.any() and not (picked & ~before.masked[row]).any(), "every step commits, and no token is rewritten"
    assert torch.equal(after.tokens[row][~picked], before.tokens[row][~picked])
    for i, block in enumerate(w.blocks):
        cells = [c for c in block if picked[c]]
        forced = [c for c in cells if not score[c] > level]
        holes = [c for c in block if open_[c]]
        if w.states[i] == NONE:
            assert not cells, "nothing is committed in a block that is not opened"
        if forced:
            assert w.states[i] == FULL and len(forced) == len(cells) == 1, "forced without need"
            assert score[forced[0]] == max(float(score[c]) for c in holes), "forced is the surest"
        if w.states[i] == FULL:
            assert cells, "a fully active block commits"
        assert all(picked[c] for c in holes if w.states[i] > NONE and score[c] > level), "a sure cell is committed"
    store(w, row, before, after, number, live)


def store(w: Watch, row: int, before: Canvas, after: Canvas, number: int, live: list[int]) -> None:
    """A block is cached by the forward after it and all before it became complete, from its final tokens."""
    for i in live:
        assert w.stored[i] < number
        w.stored[i] = number
        if all(state >= COMPLETE for state in w.states[: i + 1]):
            w.states[i] = CACHED
            tokens, cached = before.tokens[row, w.blocks[i]], after.cached_token[row, w.blocks[i]]
            assert torch.equal(tokens, cached) and torch.equal(tokens, after.tokens[row, w.blocks[i]])
    for i in range(len(w.blocks)):
        cells = [c for block in w.blocks[: i + 1] for c in block]
        if w.done_at[i] < 0 and not after.masked[row, cells].any():
            w.done_at[i] = number if before.masked[row, cells].any() else 0


# The state machine


@given(
    canvas=texts(), size=st.integers(1, 6), grid=st.sampled_from(["origin", "absolute"]), add=SHARES, act=SHARES,
    level=LEVELS, scale=st.sampled_from([0.0, 4.0, 12.0, 60.0]),
)  # fmt: skip
def test_a_block_goes_through_its_states(canvas, size, grid, add, act, level, scale) -> None:
    recipe = small("d2f", block=size, grid=grid, add=add, act=act, threshold=level)
    end, watch = followed(recipe, canvas, size, grid, add, act, level, Synthetic(scale=scale))
    holes = canvas.masked.sum(1)
    for row, w in enumerate(watch):
        assert int(end.step[row]) <= int(holes[row]) + len(w.blocks), "the progress bound"
        for done, stored, state in zip(w.done_at, w.stored, w.states, strict=True):
            if state == CACHED:
                assert stored == done + 1, "cached once, by the forward after its completion"
        left = end.masked[row]
        assert not left.any() or (end.ended[row].any() and (end.cached_at[row][left] < 0).all()), "only the unopened"


@given(canvas=texts(), size=st.integers(1, 6), level=LEVELS)
def test_opened_after_full_blocks_only_one_is_in_flight(canvas, size, level) -> None:
    recipe, block = small("d2f", block=size, add=1.0, threshold=level), Blocks(size)
    before = canvas
    for after, event in run(Synthetic(), recipe, canvas)[1]:
        ids = block.ids(before)
        for row in (~before.done).nonzero()[:, 0].tolist():
            open_ = event.computed[row] & before.masked[row]
            assert len(set(ids[row][open_].tolist())) == 1
        before = after


@given(canvas=texts(), size=st.integers(1, 6), add=SHARES, act=SHARES, level=LEVELS)
def test_an_end_opens_nothing_and_what_is_opened_is_finished(canvas, size, add, act, level) -> None:
    canvas = replace(canvas, eos=(1, 2, 3))
    recipe, seen = small("d2f", block=size, add=add, act=act, threshold=level), canvas.valid & False
    before = canvas
    for after, event in run(Synthetic(), recipe, canvas)[1]:
        fresh = event.computed & ~seen
        assert not fresh[before.ended.any(1)].any()
        seen, before = seen | event.computed, after
    assert not (before.masked & seen).any()


# Equal to what is written by hand, on one network


def layout(size: int, grid: str = "origin") -> Layout:
    return Layout("block", size, grid, "bidirectional" if grid == "origin" else "blocks")  # type: ignore[arg-type]


def network(size: int, grid: str = "origin", *, shift: bool = False):
    """The toy with blocks of this size, float64; `shift`: a cell is predicted at the one before it (Dream)."""
    net = model("block")
    made = toy.network("d2f", BLOCK)
    made.load_state_dict(net.state_dict())
    made.config = replace(net.config, layout=layout(size, grid), shift=shift)
    return made


def visible(size: int, prompt: int, width: int) -> Tensor:
    """[1, 1, L, L]: the prompt sees the prompt, a block all blocks up to itself; written by hand."""
    group = [-1 if c < prompt else (c - prompt) // size for c in range(width)]
    return torch.tensor([[other <= own for other in group] for own in group])[None, None]


@torch.inference_mode()
def beliefs(net, text: list[int], size: int, prompt: int) -> Tensor:
    """[L, V] probabilities of a whole forward without a cache."""
    logits = net(torch.tensor([text]), visible=visible(size, prompt, len(text)))[0]
    logits[:, toy.MASK] = -torch.inf
    return logits.softmax(-1)


def serial(net, prompt: list[int], length: int, size: int, level: float) -> tuple[list[int], int]:
    """Block after block, each until it is full: (tokens, forwards); nothing behind the block exists yet."""
    text, forwards = list(prompt), 0
    for at in range(0, length, size):
        text += [toy.MASK] * min(size, length - at)
        holes = set(range(len(prompt) + at, len(text)))
        while holes:
            score, token = beliefs(net, text, size, len(prompt)).max(-1)
            forwards += 1
            sure = [c for c in holes if score[c] > level] or [max(sorted(holes), key=lambda c: float(score[c]))]
            for c in sure:
                text[c] = int(token[c])
            holes -= set(sure)
    return text[len(prompt) :], forwards


def dressed(net, recipe: Recipe, canvas: Canvas) -> Any:
    return dress(net, recipe, slots=len(canvas), length=canvas.tokens.shape[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "level"), [(4, 0.6), (8, 0.9), (2, 1.0), (1, 1.0)])
def test_serial_is_the_loop_by_hand_in_as_many_forwards(size: int, level: float, seed: int) -> None:
    """Blocks of the trained size, a multiple and parts of it; in each, one cell at a time where nothing is sure enough.
    The forward that stores a block is the first of the next one, so storing costs none."""
    canvas, net = line(3 + seed, 13, seed=seed), model("block")
    recipe = small("d2f", block=size, add=1.0, act=0.75, threshold=level)
    end, seen = run(dressed(net, recipe, canvas), recipe, canvas)
    by_hand = serial(net, words(3 + seed, seed), 13, size, level)
    assert (end.tokens[0, 3 + seed :].tolist(), len(seen)) == by_hand
    if size == 1:
        assert end.decided_at[0, 3 + seed :].tolist() == list(range(1, 14)), "greedy, from left to right"


def test_one_block_of_the_whole_length_is_plain_threshold_decoding() -> None:
    canvas = ragged(infill=True, eos=False)
    for level in (0.3, 0.6, 0.9):
        recipe = small("d2f", block=16, threshold=level)
        plain = Recipe(everything, confident(level, strict=True) | best(1))
        net = network(16)
        ends = [run(dressed(net, r, canvas), r, canvas)[0] for r in (recipe, plain)]
        assert results(ends[0]) == results(ends[1])
        wide = run(dressed(model("full"), plain, canvas), plain, canvas)[0]
        assert results(wide) != results(ends[1]), "the prompt sees no response, so it is not the bidirectional one"


GRIDS = [("origin", 4, 4), ("origin", 4, 8), ("origin", 4, 2), ("absolute", 4, 4), ("absolute", 8, 4)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("grid", "trained", "size"), GRIDS)
@pytest.mark.parametrize(("add", "act", "level"), [(0.0, 0.5, 0.5), (0.25, 0.75, 0.6), (0.5, 0.95, 0.9), (1, 1, 1)])
def test_the_cache_changes_no_logit(
    grid: str, trained: int, size: int, add: float, act: float, level: float, shift: bool
) -> None:
    canvas, net = ragged(infill=True), network(trained, grid, shift=shift)
    recipe = small("d2f", block=size, grid=grid, add=add, act=act, threshold=level)
    exact = Plain(net, slots=4, length=canvas.tokens.shape[1], cached=False, layout=layout(size, grid))
    before, flown = canvas, 0
    for after, event in run(dressed(net, recipe, canvas), recipe, canvas)[1]:
        whole = exact(before, before.valid & ~before.done[:, None], before.masked)
        same = event.draft.fresh.flatten()[whole.at]
        torch.testing.assert_close(event.draft.logits, whole.logits[same], rtol=0, atol=1e-9)
        flown += int((event.computed.sum(1) < before.valid.sum(1))[~before.done].sum())
        before = after
    assert before.done.all() and flown > 0, "the cache was never of use"


def test_later_blocks_change_no_logit_earlier() -> None:
    canvas, b = ragged(infill=True, eos=False), Blocks(BLOCK)
    ids, made = b.ids(canvas), Plain(model("block"), slots=4, length=canvas.tokens.shape[1], cached=False)
    drafts = [made(canvas, canvas.valid & (ids <= last), canvas.masked) for last in range(4)]
    for short, long in pairwise(drafts):
        both = short.fresh.flatten()[long.at]
        torch.testing.assert_close(short.logits, long.logits[both], rtol=0, atol=1e-9)
        assert int(long.fresh.sum()) > int(short.fresh.sum())


@pytest.mark.parametrize("add", [0.25, 1.0])
def test_a_forward_costs_what_is_in_flight_and_not_the_length(add: float) -> None:
    """Serial: the block that is written, and the one that is stored; the prompt once."""
    told = []
    for length in (16, 64):
        canvas, ledger = line(9, length), Ledger()
        recipe = small("d2f", add=add, threshold=0.9)
        seen = run(dressed(model("block"), recipe, canvas), recipe, canvas)[1]
        for after, event in seen:
            ledger.update(after, event)
        widths = [int(event.computed.sum()) for _, event in seen]
        assert ledger.report().positions == sum(widths) and widths[0] == 9 + BLOCK
        if add == 1.0:
            assert max(widths[1:]) == 2 * BLOCK and min(widths[1:]) == BLOCK
        told.append(sum(widths[1:]) / len(widths[1:]))
    assert told[1] <= told[0] + BLOCK, "a forward grows with the text"


# An end ends the text


@given(canvas=texts(), size=st.integers(1, 6), add=SHARES, act=SHARES, level=LEVELS)
def test_a_stop_at_the_end_keeps_the_text(canvas, size, add, act, level) -> None:
    """The same cells are decided in the same steps up to the end, and no forward or position is added."""
    canvas = replace(canvas, eos=(1, 2, 3))
    names = [f"d2f({level}, {add}, {act}) + blocks({size})", "eos_stop"]
    same_text(canvas, names, Synthetic())


def same_text(canvas: Canvas, names: list[str], denoise: Any) -> int:
    ends, costs = [], []
    for text in (names[0], " + ".join(names)):
        recipe, ledger = stack.build(text), Ledger()
        made = denoise if isinstance(denoise, Synthetic) else dressed(denoise, recipe, canvas)
        end, seen = run(made, recipe, canvas)
        for after, event in seen:
            ledger.update(after, event)
        ends.append(end)
        costs.append((ledger.report().positions, ledger.report().forwards))
    whole, stopped = ends
    assert torch.equal(useful(whole), useful(stopped))
    text = whole.position < whole.first(whole.ended)[:, None]
    for part in ("tokens", "decided_at"):
        assert torch.equal(getattr(whole, part)[text], getattr(stopped, part)[text])
    assert (stopped.step <= whole.step).all() and costs[1][0] <= costs[0][0]
    for row in range(len(stopped)):
        if stopped.ended[row].any():
            end = int(stopped.first(stopped.ended)[row])
            assert int(stopped.step[row]) == int(stopped.decided_at[row, : end + 1].max()), "it ends in that step"
    return costs[0][0] - costs[1][0]


def test_a_stop_at_the_end_saves_what_is_in_flight_behind_it() -> None:
    canvas = line(3, 40, eos=tuple(range(0, EOS, 2)))
    assert same_text(canvas, ["d2f(0.6, 0.0, 0.5) + blocks(4)", "eos_stop"], model("block")) > 0
