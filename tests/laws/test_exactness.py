"""Law 3: what is called exact is exact: caches that change nothing, statistics, later blocks, early exits, limits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import (
    BLOCK,
    CAUSAL,
    EOS,
    OPEN,
    Scripted,
    Synthetic,
    line,
    model,
    plain,
    ragged,
    results,
    revisable,
    run,
    small,
    words,
)
from unmask import recipes
from unmask.decode import (
    Blocks,
    Canvas,
    Cosine,
    Draft,
    Every,
    Exponential,
    Linear,
    Recipe,
    Staged,
    best,
    cat,
    confident,
    dirty,
    everything,
    leftmost,
    masked,
    prefix,
    step,
)
from unmask.denoise import Plain

b = Blocks(BLOCK)
fast = confident(0.6) | best(1)
FULL = ["full", "shifted"]


def ends(kind: str, recipe: Recipe, canvas: Canvas, *, cached: bool | None = None) -> list:
    return results(run(plain(kind, recipe, canvas, cached=cached), recipe, canvas)[0])


# Caches


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("name", [n for n in OPEN if not small(n).cached])
def test_computing_everything_is_no_cache(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    assert ends(kind, recipe, canvas, cached=True) == ends(kind, recipe, canvas, cached=False)


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("query", [b, b.onward, masked | dirty, ~b.settled, masked], ids=repr)
def test_a_cache_refreshed_at_every_step_is_no_cache(query, kind: str) -> None:
    canvas = ragged()
    uncached = ends(kind, Recipe(everything, b >> fast), canvas)
    assert ends(kind, Recipe(query | everything.when(Every(1)), b >> fast), canvas, cached=True) == uncached


@pytest.mark.parametrize("kind", FULL)
def test_dkv_refreshed_at_every_step_is_no_cache(kind: str) -> None:
    assert ends(kind, small("dkv", refresh=1), ragged()) == ends(kind, small("threshold"), ragged())


@pytest.mark.parametrize("name", ["prefix", "dual", "dkv", "freecache", "freecache-lag"])
def test_approximate_caches_are_seen_to_differ(name: str) -> None:
    """Else the tests of exactness prove nothing."""
    assert ends("full", small(name), ragged()) != ends("full", small("threshold"), ragged())


@pytest.mark.parametrize(
    ("add", "act", "level"), [(0.25, 0.75, 0.6), (0.1, 0.95, 0.9), (0.0, 0.0, 0.3), (1.0, 1.0, 2.0)]
)
@pytest.mark.parametrize("infill", [False, True])
def test_the_block_causal_cache_is_exact(infill: bool, add: float, act: float, level: float) -> None:
    canvas = ragged(infill=infill, eos=False)
    cached = small("d2f", add=add, act=act, threshold=level)
    uncached = Recipe(everything, cached.unmask, stop=cached.stop)
    assert ends("block", cached, canvas) == ends("block", uncached, canvas, cached=False)


@pytest.mark.parametrize("infill", [False, True])
def test_a_freeze_one_forward_later_is_exact_under_block_causal_attention(infill: bool) -> None:
    canvas = ragged(infill=infill)
    exact = ends("block", small("threshold"), canvas, cached=False)
    assert ends("block", small("freecache-lag"), canvas) == exact
    assert ends("block", small("freecache"), canvas) != exact


SERIAL = [
    (name, kind)
    for name, kinds in CAUSAL.items()
    for kind in kinds
    if name != "fast-dllm-v2-cache" and "grid" in recipes.entry(name).defaults
]


@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.parametrize(("name", "kind"), [*SERIAL, ("d2f", "absolute"), ("d2f", "absolute-shifted")])
def test_block_after_block_the_cache_is_exact(name: str, kind: str, infill: bool) -> None:
    """Also where the prompt is no multiple of the block, and in a ragged batch."""
    canvas = revisable(ragged(infill=infill), 3)
    cached = small(name, **({"grid": "absolute"} if kind.startswith("absolute") else {}))
    uncached = replace(cached, query=everything)
    assert ends(kind, cached, canvas) == ends(kind, uncached, canvas, cached=False)


def test_a_cache_inside_of_the_block_is_seen_to_differ() -> None:
    kind, canvas = "absolute-shifted", cat([ragged(first=first) for first in (0, 4, 8)])
    canvas = replace(canvas, slot=torch.arange(12))
    one, other = (small(name, threshold=0.9) for name in ("fast-dllm-v2", "fast-dllm-v2-cache"))
    runs = [results(run(plain(kind, recipe, canvas, slots=12), recipe, canvas)[0]) for recipe in (one, other)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["absolute", "absolute-shifted"])
def test_logits_over_stored_blocks_are_those_of_the_whole_text(kind: str, dtype: torch.dtype, error: float) -> None:
    """At 1e-5 of the largest logit in float32, and exactly but for rounding in float64."""
    canvas, recipe = ragged(infill=False, eos=False), small("fast-dllm-v2" if kind.endswith("shifted") else "sdar")
    net, plainly = copy.deepcopy(model(kind)).to(dtype), {"slots": 4, "length": canvas.tokens.shape[1]}
    over, whole, seen = Plain(net, **plainly), Plain(net, cached=False, **plainly), 0
    while not canvas.done.all():
        before, (canvas, event) = canvas, step(over, recipe, canvas)
        full, at = whole(before, everything(before), before.masked), event.pick.flatten()
        ours, theirs = (d.logits[at[d.at]] for d in (event.draft, full))
        finite = theirs > -torch.inf
        assert (ours - theirs)[finite].abs().max() <= error * theirs[finite].abs().max()
        seen += int((before.cached_at >= 0).sum()) - int((event.computed & (before.cached_at >= 0)).sum())
    assert seen > 0


def test_a_block_is_stored_by_the_first_forward_of_the_next() -> None:
    """One forward a step that commits, none for storing; where the first cell of a block is predicted from the block
    before it, it is committed by the forward that stores that block, alone."""
    canvas = line(6, 14, eos=())
    for name, kind, alone in (("sdar-static", "absolute", False), ("fast-dllm-v2", "absolute-shifted", True)):
        recipe = small(name, **({"threshold": 2.0} if alone else {"denoising_steps": BLOCK}))
        end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
        assert len(seen) == 14 and end.decided_at[0, 6:].sort().values.tolist() == list(range(1, 15))
        widths = [int(event.computed.sum()) for _, event in seen]
        assert widths == [8, 4, *[BLOCK + 1 if alone else 2 * BLOCK, 4, 4, 4] * 3]
        assert not alone or all(end.decided_at[0, at] == at - 5 for at in (8, 12, 16))


@pytest.mark.parametrize("infill", [False, True])
def test_the_causal_cache_is_exact(infill: bool) -> None:
    """A decided cell sees decided cells only: nothing undecided lies before the frontier."""
    canvas, recipe = ragged(infill=infill), small("ar")
    uncached = Recipe(everything, leftmost(1), stop=recipe.stop)
    assert ends("causal", recipe, canvas) == ends("causal", uncached, canvas, cached=False)


def test_the_causal_cache_computes_each_decided_cell_once() -> None:
    canvas, recipe = ragged(eos=False), small("ar")
    end, seen = run(plain("causal", recipe, canvas), recipe, canvas)
    times = sum(event.computed.long() for _, event in seen)
    last = torch.where(canvas.masked, canvas.position, -1).amax(1, keepdim=True)
    assert torch.equal(times, (canvas.position < last).long()) and end.done.all()
    assert isinstance(recipe.query, type(dirty & prefix))


def test_later_blocks_change_nothing_earlier() -> None:
    short = ragged(infill=False, eos=False)
    recipe = small("d2f", add=1.0)
    rows = [
        [t if g else None for t, g, v in zip(*r, strict=True) if v]
        for r in zip(*(x.tolist() for x in (short.tokens, short.given, short.valid)), strict=True)
    ]
    whole = [row + [None] * (-(len(row) - o) % BLOCK) for row, o in zip(rows, short.origin.tolist(), strict=True)]
    made = [
        Canvas.of(r, origin=short.origin.tolist(), mask_id=60, dtype=torch.float64)
        for r in (whole, [row + [None] * 2 * BLOCK for row in whole])
    ]
    one, two = (run(plain("block", recipe, c), recipe, c)[0] for c in made)
    for row, cells in enumerate(whole):
        assert torch.equal(one.tokens[row, : len(cells)], two.tokens[row, : len(cells)])
        assert torch.equal(one.decided_at[row, : len(cells)], two.decided_at[row, : len(cells)])


@pytest.mark.parametrize("name", ["dual", "dkv", "freecache"])
def test_what_is_cached_is_what_was_computed(name: str) -> None:
    before = ragged()
    denoise = plain("full", small(name), before)
    cached = {}
    for after, event in run(denoise, small(name), before)[1]:
        for cell in event.computed.nonzero().tolist():
            cached[tuple(cell)] = before.tokens[tuple(cell)].item()
        stale = [[cached.get((r, c)) != t for c, t in enumerate(row)] for r, row in enumerate(after.tokens.tolist())]
        assert torch.equal(after.dirty, torch.tensor(stale) & after.valid & ~after.masked)
        before = after


# Statistics


@pytest.mark.parametrize("shape", [False, True])
def test_statistics_follow_their_formulas(shape: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 9, generator=draw, dtype=torch.float64) * 3
    logits[:, 4] = -torch.inf
    belief = logits / 0.5 if shape else None
    fresh = torch.tensor([[True, False, True, True], [False, True, False, True]])
    draft = Draft(fresh, fresh, logits, belief=belief)
    p = (logits if belief is None else belief).softmax(-1)
    first, second = p.sort(-1, descending=True).values[:, :2].T
    raw = logits.sort(-1, descending=True).values
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    expected = {"score": first, "margin": first - second, "gap": raw[:, 0] - raw[:, 1], "entropy": -entropy}
    for name, value in expected.items():
        found = draft.value(name)
        torch.testing.assert_close(found[fresh], value, rtol=1e-12, atol=1e-12)
        assert (found[~fresh] == -torch.inf).all()
    assert torch.equal(draft.token[fresh], p.argmax(-1)) and (draft.token[~fresh] == 0).all()
    part = draft[torch.tensor([1])]
    assert torch.equal(part.score, draft.score[1:]) and torch.equal(part.logits, logits[3:])


def test_the_score_of_a_drawn_token_is_its_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    fresh = torch.tensor([[True]])
    draft = Draft(fresh, fresh, logits, chosen=torch.tensor([2]))
    assert draft.token.item() == 2 and math.isclose(draft.score.item(), logits.softmax(-1)[0, 2].item())


@pytest.mark.parametrize("kind", ["full", "shifted", "causal"])
def test_logits_belong_to_their_cells(kind: str) -> None:
    canvas = ragged()
    draft = plain(kind, small("llada"), canvas, cached=False)(canvas, everything(canvas), canvas.masked)
    row = 3
    width = int(canvas.valid[row].sum())
    tokens = canvas.tokens[row : row + 1, :width]
    visible = torch.ones(width, width, dtype=torch.bool).tril()[None, None] if kind == "causal" else None
    with torch.inference_mode():
        whole = model(kind)(tokens, visible=visible)[0]
    wanted = canvas.masked[row, :width].nonzero()[:, 0] - int(model(kind).config.shift)
    torch.testing.assert_close(draft[torch.tensor([row])].logits[:, :EOS], whole[wanted, :EOS], rtol=1e-10, atol=1e-10)


# Thresholds on fixed beliefs


def forwards(recipe: Recipe, canvas: Canvas, denoise=None) -> int:
    return int(run(denoise or Synthetic(moving=False), recipe, canvas)[0].step.sum())


@pytest.mark.parametrize(
    ("name", "knob", "rising"),
    [("threshold", "threshold", True), ("factor", "factor", False), ("eb", "gamma", False)],
)
@given(seed=st.integers(0, 999), one=st.floats(0, 3), two=st.floats(0, 3))
def test_thresholds_are_monotone(name: str, knob: str, rising: bool, seed: int, one: float, two: float) -> None:
    low, high = sorted([one, two])
    more, fewer = (high, low) if rising else (low, high)
    canvas = line(2, 12, seed=seed)
    assert forwards(small(name, **{knob: more}), canvas) >= forwards(small(name, **{knob: fewer}), canvas)


@pytest.mark.parametrize("name", ["threshold", "dual", "prefix", "freecache", "dkv"])
@given(seed=st.integers(0, 999))
def test_limits_of_the_threshold(name: str, seed: int) -> None:
    canvas = line(2, 10, seed=seed)
    assert forwards(small(name, threshold=1.0 + 1e-9), canvas, Synthetic()) == 10
    assert forwards(small(name, threshold=0.0), canvas, Synthetic()) == 3  # blocks of 4, 4 and 2


def test_the_threshold_itself_is_enough_unless_strict() -> None:
    canvas = line(2, 3)
    draft = Scripted(tuple(range(5)), gap=float)(canvas, canvas.masked, canvas.masked)
    level = draft.score[0, 3].item()
    for rule, expected in (
        (confident(level), [3, 4]),
        (confident(level, strict=True), [4]),
        (confident(level - 1e-9, strict=True), [3, 4]),
        (confident(level + 1e-9), [4]),
    ):
        assert rule(canvas, draft, canvas.masked)[0].nonzero()[:, 0].tolist() == expected


@given(seed=st.integers(0, 999), by=st.sampled_from(["entropy", "score"]))
def test_limits_of_the_entropy_bound(seed: int, by: str) -> None:
    canvas = line(2, 10, seed=seed)
    assert forwards(small("eb", gamma=0.0, by=by), canvas, Synthetic()) == 10
    assert forwards(small("eb", gamma=math.inf, by=by), canvas, Synthetic()) == 3
    alone, _ = run(Synthetic(), small("eb", gamma=0.0, by=by), canvas)
    surest, _ = run(Synthetic(), Recipe(everything, b >> best(1, by=by)), canvas)
    assert results(alone) == results(surest)


def test_without_entropy_nothing_is_ignored() -> None:
    assert forwards(small("eb", gamma=0.0), line(2, 10), Scripted(tuple(range(12)), gap=2000.0)) == 3


def test_the_entropy_bound_by_hand() -> None:
    """Entropies 0.1 and so on: the bound is on the sum less the largest."""
    gaps = [8.0, 6.5, 5.5, 4.0]
    canvas, denoise = line(2, 4), Scripted(tuple(range(6)), gap=lambda c: gaps[c - 2])
    entropy = denoise(canvas, canvas.masked, canvas.masked).entropy[0, 2:].tolist()
    assert entropy == sorted(entropy)
    for count in range(1, 4):
        for slack, expected in ((1e-9, count + 1), (-1e-9, count)):
            _, seen = run(denoise, small("eb", gamma=sum(entropy[:count]) + slack), canvas)
            assert int(seen[0][1].pick.sum()) == expected


@given(seed=st.integers(0, 999))
def test_limits_of_the_factor(seed: int) -> None:
    canvas = line(2, 10, seed=seed)
    assert forwards(small("factor", factor=0.0), canvas, Synthetic()) == 10
    assert forwards(small("factor", factor=1e9), canvas, Synthetic()) == 3


def test_the_factor_by_hand() -> None:
    """The second surest needs 1 - f / 3, the third 1 - f / 4, ..."""
    probability = [0.99, 0.8, 0.75, 0.7]
    gaps = [math.log(p / (1 - p) * 63) for p in probability]
    canvas, denoise = line(2, 4), Scripted(tuple(range(6)), gap=lambda c: gaps[c - 2])
    for factor, expected in ((0.5, 1), (0.7, 2), (0.99, 2), (1.01, 3), (1.49, 3), (1.51, 4)):
        _, seen = run(denoise, small("factor", factor=factor), canvas)
        assert int(seen[0][1].pick.sum()) == expected, factor
    _, seen = run(denoise, small("factor", factor=1.49, lenient=True), canvas)
    assert int(seen[0][1].pick.sum()) == 4


# Early commit


EARLY = {"prophet": ("high", "middle", "low"), "sched": ("high", "low")}


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("name", EARLY)
def test_an_endless_threshold_is_full_decoding(name: str, kind: str) -> None:
    never = small(name, **dict.fromkeys(EARLY[name], math.inf))
    assert ends(kind, never, ragged(), cached=False) == ends(kind, small("llada"), ragged())


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("name", EARLY)
def test_no_threshold_is_one_forward(name: str, kind: str) -> None:
    canvas, recipe = ragged(), small(name, **dict.fromkeys(EARLY[name], -math.inf))
    denoise = plain(kind, recipe, canvas)
    draft = denoise(canvas, everything(canvas), canvas.masked)
    end, seen = run(denoise, recipe, canvas)
    assert len(seen) == 1 and end.step.tolist() == [1] * 4
    assert torch.equal(end.tokens, torch.where(canvas.masked, draft.token, canvas.tokens))


@pytest.mark.parametrize(
    ("gap", "expected"), [(8.0, 1), (7.5, 1), (7.4, 33), (5.0, 33), (4.9, 67), (2.5, 67), (2.4, 100)]
)
def test_exits_at_the_stages(gap: float, expected: int) -> None:
    """A hundred steps of one cell: the first whose share of steps is not below 0.33, or 0.67."""
    recipe = small("prophet", block=50, steps=100, high=7.5, middle=5.0, low=2.5)
    canvas = line(2, 100)
    canvas = replace(canvas, region=(canvas.position >= 92)[None].to(torch.int8) * 2)
    end, _ = run(Scripted(tuple(range(2, 62)) * 2, gap=gap), recipe, canvas)
    assert end.step.item() == expected
    assert int((end.decided_at == expected).sum()) == 100 - expected + 1


def gaps_of(canvas: Canvas) -> float:
    """The mean raw gap over the answer, straight from the logits."""
    cells = canvas.region == 2
    logits = Synthetic(scale=6.0)(canvas, cells, cells).logits.sort(-1, descending=True).values
    return (logits[:, 0] - logits[:, 1]).mean().item()


@given(seed=st.integers(0, 10_000), level=st.floats(0.5, 2.0))
def test_exits_exactly_at_the_first_sure_step(seed: int, level: float) -> None:
    levels = (level * 1.2, level, level * 0.8)
    recipe = small("prophet", block=6, steps=12, high=levels[0], middle=levels[1], low=levels[2])
    canvas = line(2, 12, seed=seed)
    canvas = replace(canvas, region=(canvas.position >= 10)[None].to(torch.int8) * 2)
    expected = 12
    for number in range(12, 0, -1):
        stage = levels[0] if number / 12 < 0.33 else levels[1] if number / 12 < 0.67 else levels[2]
        expected = number if gaps_of(replace(canvas, step=torch.tensor([number - 1]))) >= stage else expected
    assert run(Synthetic(scale=6.0), recipe, canvas)[0].step.item() == expected


def test_schedules() -> None:
    at = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert Linear(8.0, 4.0)(at).tolist() == [8.0, 7.0, 6.0, 4.0]
    torch.testing.assert_close(Cosine(8.0, 4.0)(at), 6 + 2 * torch.cos(torch.pi * at))
    torch.testing.assert_close(Exponential(8.0, 4.0, rate=2.0)(at), 4 + 4 * torch.exp(-2 * at))
    edge = torch.tensor([0.0, 0.33, 0.67, 1.0], dtype=torch.float64)
    below = torch.tensor([0.3299999, 0.6699999], dtype=torch.float64)
    assert Staged(3.0, 2.0, 1.0)(edge).tolist() == [3.0, 2.0, 1.0, 1.0]
    assert Staged(3.0, 2.0, 1.0)(below).tolist() == [3.0, 2.0]


# Blocks in flight


share = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0])


@given(
    seed=st.integers(0, 9999),
    block=st.integers(1, 6),
    length=st.integers(1, 20),
    add=share,
    act=share,
    level=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    cells=st.sampled_from([(), (3,), (1, 2, 3)]),
)
def test_blocks_in_flight_always_progress(seed, block, length, add, act, level, cells) -> None:
    canvas = line(3, length, seed=seed, eos=cells)
    recipe = small("d2f", block=block, add=add, act=act, threshold=level)
    before, (end, seen) = canvas, run(Synthetic(), recipe, canvas)
    for after, event in seen:
        assert event.pick.any() and not (event.pick & ~before.masked).any()
        assert (after.tokens == before.tokens)[~event.pick].all()
        before = after
    assert len(seen) <= length + -(-length // block)
    assert end.done.item() and (not end.masked.any() or end.ended.any())


@given(seed=st.integers(0, 9999), act=share)
def test_blocks_of_one_are_greedy_from_left_to_right(seed: int, act: float) -> None:
    recipe = small("d2f", block=1, add=1.0, act=max(act, 0.1), threshold=1.0)
    end, _ = run(Synthetic(), recipe, line(3, 9, seed=seed))
    assert end.decided_at[0, 3:].tolist() == list(range(1, 10))


@given(seed=st.integers(0, 9999), act=share, level=st.floats(0, 1))
def test_a_block_opened_after_a_full_one_is_serial(seed: int, act: float, level: float) -> None:
    canvas = line(3, 15, seed=seed)
    recipe = small("d2f", add=1.0, act=act, threshold=level)
    serial = Recipe(everything, b >> (confident(level, strict=True) | best(1)))
    assert results(run(Synthetic(), recipe, canvas)[0]) == results(run(Synthetic(), serial, canvas)[0])


def test_a_block_is_settled_one_forward_after_its_last_token() -> None:
    canvas = line(3, 8)
    recipe = Recipe(~b.settled, b >> best(BLOCK))
    denoise = Plain(model("block"), slots=1, length=11)
    widths = []
    while not canvas.done.all():
        canvas, event = step(denoise, recipe, canvas)
        widths.append(int(event.computed.sum()))
    assert widths == [11, 8] and b.settled(canvas)[0].tolist() == [True] * 7 + [False] * 4
    again = replace(canvas, cached_token=canvas.tokens)
    assert b.settled(again).all() and words(3, 0) == canvas.tokens[0, :3].tolist()
