"""Laws of stacks: every pair of levers keeps all of them, or is refused with its reason."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.common import BLOCK, Synthetic, dressed, model, plain, ragged, result, run, words
from laws.test_termination import canvases
from unmask.decode import Blocks, Canvas, Ledger, Recipe, Step, Tally, decode, step
from unmask.decode.revise import potential
from unmask.denoise import Plain
from unmask.errors import UserError
from unmask.recipes import stack
from unmask.recipes.levers import levers

SMALL = {
    "blocks": f"blocks({BLOCK})",
    "dkv": "dkv(3)",
    "quota": "quota(8)",
    "threshold": "threshold(0.6)",
    "factor": "factor(1.5)",
    "eb": "eb(0.5)",
    "d2f": "d2f(0.6, 0.25, 0.75)",
    "joint": "joint(3)",
    "prophet": "prophet(4, 3, 2)",
    "sched": "sched(4, 2)",
    "ice": "ice(0.5)",
    "wino": "wino(0.6)",
    "edit": "edit(0.3)",
    "block_gap": "block_gap(4, 3, 2)",
    "probe": "probe([5, 3], 2, 4)",
}
"""Levers at toy sizes, at which all of them do something."""
CACHES = ("full", "prefix", "dual", "freecache", "freecache_lag", "dkv")
COUNTS = ("quota", "threshold", "factor", "eb", "one")
EXITS = ("prophet", "sched", "ice")
PAIRS = list(combinations(levers(), 2))


def refusals() -> dict[frozenset[str], str]:
    """Every pair that is refused, and what the refusal says: a change of status must be made here too."""
    found = {
        ("threshold", "d2f"): "by a rule of its own",
        ("quota", "ice"): "not by blocks.*; use one or threshold",
        ("dual", "ice"): "dual computes one block; use prefix or freecache",
        ("d2f", "edit"): "edit waits for a full row; use edit over freecache_lag",
        ("ice", "edit"): "edit waits for a full row; use edit with prophet or sched",
        ("joint", "blend"): r"drawn is lost; .*guided\(1\) \+ joint\(4\)",
        ("edit", "eos_stop"): "edit ends a text by itself.*; leave eos_stop out",
        ("window", "d2f"): "a window of its own; leave window out",
        ("window", "sched"): "nothing is left out; leave window out",
        ("window", "ice"): "also behind a window; leave window out",
        ("blocks", "guided"): "blocks changes nothing; leave it out",
    }
    found |= dict.fromkeys(combinations(CACHES, 2), "both say what is computed; keep one")
    found |= dict.fromkeys(product(CACHES, ["d2f"]), "is exact and supersedes .*; leave .* out")
    found |= dict.fromkeys(combinations(COUNTS, 2), "both say how many cells a forward commits; keep one")
    found |= dict.fromkeys(product(COUNTS, ["guided"]), "guided replaces .*; leave .* out")
    found |= dict.fromkeys(product(COUNTS, ["d2f"]), r"leave .* out and write d2f\(threshold, add, act\)")
    found |= dict.fromkeys(product(set(COUNTS) - {"threshold"}, ["joint"]), r"leave .* out, and say .*threshold\(0.9\)")
    found |= dict.fromkeys(combinations(EXITS, 2), "both end a row early; keep one")
    found |= dict.fromkeys(product(EXITS, ["d2f"]), "no answer to watch.*; use .* over prefix or freecache")
    others = set(levers()) - {"d2f", "probe", *CACHES, *COUNTS, "wino", "edit"}
    found |= dict.fromkeys(product(others, ["probe"]), r"probe needs d2f.*; write d2f \+ probe")
    found |= dict.fromkeys(product(CACHES, ["probe"]), r"would be seen by the text.*; use d2f \+ probe")
    found |= dict.fromkeys(product(COUNTS, ["probe"]), r"opens no blocks for a probe.*; use d2f \+ probe")
    found |= dict.fromkeys(product(["wino", "edit"], ["probe"]), "stay as they are.*; leave .* out")
    return {frozenset(pair): says for pair, says in found.items()}


REFUSED = refusals()


def write(*names: str) -> str:
    return " + ".join(SMALL.get(name, name) for name in names)


def start(recipe: Recipe) -> Canvas:
    """Two ragged rows, one with given words in it, with thinking and an answer; revisions as the recipe allows."""
    canvas = ragged()[torch.tensor([0, 1])]._map(lambda _, t: t if t.dim() == 1 else t[:, :15])
    own = canvas.valid & (canvas.position >= canvas.origin[:, None]) & (canvas.region == 0)
    region = canvas.region.masked_fill(own & (canvas.seed == canvas.seed[0])[:, None], 1)
    return replace(canvas, region=region, revisions=recipe.allowance * (canvas.valid & ~canvas.given).long())


def follow(denoise, recipe: Recipe, canvas: Canvas) -> Canvas:
    """The end of a run, every step of which keeps the laws of given cells and of termination."""
    first, bound = canvas, int(potential(canvas).max())
    for _ in range(bound + 1):
        if canvas.done.all():
            return canvas
        before, (canvas, event) = canvas, step(denoise, recipe, canvas)
        live = ~before.done
        assert (event.moved.any(1) | canvas.done)[live].all(), "a live row stood still"
        assert ((potential(canvas) < potential(before)) | canvas.done)[live].all(), "nothing was spent"
        assert not (event.moved & (first.given | ~first.valid | before.done[:, None])).any()
        assert torch.equal(canvas.tokens[first.given], first.tokens[first.given])
    raise AssertionError("no end in sight")


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{a}+{b}" for a, b in PAIRS])
def test_every_pair_keeps_the_laws_or_is_refused(one: str, two: str) -> None:
    text = write(one, two)
    if says := REFUSED.get(frozenset((one, two))):
        with pytest.raises(UserError) as caught:
            stack.build(text, length=BLOCK)
        told, places = re.subn(rf" at column \d+ of {re.escape(repr(text))}", "", str(caught.value))
        assert re.search(says, told) and places == 1 and "\n" not in told
        assert re.search(says, stack.refusal(one, two))
        return
    recipe = stack.build(text, length=BLOCK)
    assert stack.refusal(one, two) == ""
    again = Recipe.from_toml(recipe.to_toml())
    assert (again, again.hash, again.name) == (recipe, recipe.hash, text)
    assert stack.build(write(two, one), length=BLOCK) == recipe, "the order of levers makes a difference"
    kind = "block" if "d2f" in (one, two) else ("full", "shifted")[PAIRS.index((one, two)) % 2]
    canvas = start(recipe)
    end = follow(plain(kind, recipe, canvas), recipe, canvas)
    row = PAIRS.index((one, two)) // 2 % 2
    width = int(canvas.valid[row].sum())
    alone = canvas[row : row + 1]._map(lambda _, t: t if t.dim() == 1 else t[:, :width])
    assert result(follow(plain(kind, recipe, alone), recipe, alone), 0) == result(end, row), "its company matters"


def test_every_lever_is_in_some_pair_that_works() -> None:
    valid = [pair for pair in PAIRS if frozenset(pair) not in REFUSED]
    assert {name for pair in valid for name in pair} == set(levers())
    assert all(set(pair) <= set(levers()) for pair in REFUSED)


def test_three_levers_go_together_where_every_two_do() -> None:
    for three in combinations(levers(), 3):
        if any(frozenset(pair) in REFUSED for pair in combinations(three, 2)):
            continue
        refused = set(three) == {"guided", "d2f", "joint"}
        with pytest.raises(UserError, match="do not go together") if refused else nullcontext():
            stack.build(" + ".join(three))


@given(
    canvas=canvases(),
    names=st.lists(st.sampled_from([n for n in levers() if n != "joint"]), min_size=1, max_size=5, unique=True),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e6]),
    length=st.integers(1, 9),
)
def test_whatever_can_be_stacked_ends(canvas: Canvas, names: list[str], scale: float, length: int) -> None:
    try:
        recipe = stack.build(" + ".join("probe([5], 2)" if n == "probe" else n for n in names), length=length)
    except UserError:
        return
    revisions = recipe.allowance * (canvas.valid & ~canvas.given).long()
    follow(dressed(Synthetic(scale=scale), recipe, canvas), recipe, replace(canvas, revisions=revisions))


def answering(length: int, answer: int) -> Canvas:
    """One row whose last cells are the answer."""
    canvas = Canvas.new([words(3, 0)], length, mask_id=60, seed=4, dtype=torch.float64)
    last = canvas.position >= canvas.tokens.shape[1] - answer
    return replace(canvas, region=(last * 2).to(canvas.region.dtype)[None])


def trail(kind: str, recipe: Recipe, canvas: Canvas) -> list[tuple[Canvas, Canvas, Step]]:
    """(canvas before, canvas after, what happened) for every step."""
    seen = run(plain(kind, recipe, canvas), recipe, canvas)[1]
    return [(before, *pair) for before, pair in zip([canvas, *(c for c, _ in seen)], seen, strict=False)]


EARLY = [("one", "full"), ("one", "shifted"), ("quota(18)", "full"), ("joint(3)", "full"), ("joint(3)", "shifted")]


@pytest.mark.parametrize(("commit", "kind"), EARLY)
def test_an_answer_taken_over_a_dual_cache_is_followed_by_one_full_forward(commit: str, kind: str) -> None:
    """Sure in the second third only, which begins in the middle of a block: the rest is committed as the answer was."""
    text, canvas = f"dual + blocks(4) + {commit}", answering(18, 6)
    recipe, never = (stack.build(f"{text} + prophet(inf, {level}, inf)") for level in ("-inf", "inf"))
    told, usual = trail(kind, recipe, canvas), trail(kind, never, canvas)
    answer, block = canvas.region == 2, Blocks(4)
    taken = next(i for i, (_, after, _) in enumerate(told) if not after.masked[answer].any())
    assert len(told) == taken + 2 < len(usual), "one forward takes the answer, and one more the rest"
    assert all(torch.equal(one[1].tokens, two[1].tokens) for one, two in zip(told[:taken], usual, strict=False))
    before, after, event = told[taken]
    assert before.masked[answer].all() and not block.entered(before).any(), "at once, in the middle of a block"
    assert after.masked.any() and not event.computed.all()
    before, after, event = told[-1]
    assert event.computed.all() and torch.equal(event.pick, before.masked) and not after.masked.any()
    if recipe.joint is None:
        fresh = Plain(model(kind), slots=1, length=canvas.tokens.shape[1], cached=False)
        whole = fresh(before, before.valid, before.masked)
        assert torch.equal(after.tokens[before.masked], whole.token[before.masked]), "read from one uncached forward"


@pytest.mark.parametrize("cache", ["dual", "prefix", "freecache", "freecache_lag", "dkv"])
@pytest.mark.parametrize("exit_", ["prophet", "sched"])
def test_an_exit_over_a_cache_reads_what_it_watches_in_every_forward(cache: str, exit_: str) -> None:
    never = stack.build(f"{cache} + one + blocks(4) + {exit_}({', '.join(['inf'] * (3 if exit_ == 'prophet' else 2))})")
    canvas = answering(10, 2)
    watched = canvas.region == 2 if exit_ == "prophet" else ~canvas.given
    for before, _, event in trail("full", never, canvas):
        assert event.draft.fresh[watched].all(), "the answer was not read"
        assert int(event.pick.sum()) == 1 and (Blocks(4)(before) | ~event.pick).all(), "an ordinary step"
    always = never.to_toml().replace("inf", "-inf")
    steps = trail("full", Recipe.from_toml(always), canvas)
    assert len(steps) == 1 and not steps[0][1].masked.any(), (
        "the first forward computes everything, so it may commit everything"
    )


def test_an_answer_decided_in_the_ordinary_way_ends_nothing() -> None:
    """Where the answer stands first, decoding passes it, and what follows is not taken for an early commit."""
    canvas = answering(12, 3)
    canvas = replace(canvas, region=canvas.region.roll(-9, 1))  # the first three cells of the response
    steps = trail("full", stack.build("dual + one + blocks(4) + prophet(inf, inf, inf)"), canvas)
    assert [int(event.pick.sum()) for *_, event in steps] == [1] * 12
    assert sum(bool(event.computed.all()) for *_, event in steps) == 3, "a full forward a block"


TOLD = [
    "dual + blocks(4) + threshold(0.6) + prophet(4, 3, 2)",
    "prefix + blocks(4) + ice(0.5)",
    "freecache + guided",
    "full + wino(0.6)",
    "dkv(3) + edit(0.3)",
    "d2f(0.6, 0.25, 0.75) + blocks(4)",
    "joint(3) + blocks(4) + sched(4, 2)",
    "d2f(0.6, 0.25, 0.75) + blocks(4) + probe([5, 3], 2, 1) + block_gap(4, 3, 2) + eos_stop",
]


@pytest.mark.parametrize("text", TOLD)
def test_the_account_adds_up(text: str) -> None:
    recipe = stack.build(text, length=BLOCK)
    canvas, ledger = start(recipe), Ledger()
    kind = "block" if "d2f" in text else "full"
    tally, counted = Tally(recipe, canvas), torch.zeros(3, dtype=torch.int64)
    for before, after, event in trail(kind, recipe, canvas):
        tally(after, event)
        ledger.update(after, event)
        root = {told.part: told for told in tally.steps[-1] if told.depth == 0}
        computed = event.computed if event.draft.aside is None else event.computed | event.draft.aside
        parts = {"unmask": event.pick, "remask": event.back, "edit": event.edit, "query": computed}
        for part, cells in parts.items():
            assert (part in root) == (cells is not None)
            assert cells is None or root[part].chosen == tuple(cells.sum(1).tolist()), part
        assert root["stop"].chosen == tuple((after.done & ~before.done).long().tolist())
        counted += torch.tensor([sum(root[p].chosen) if p in root else 0 for p in ("unmask", "remask", "edit")])
        for told in tally.steps[-1]:
            assert all(0 <= n <= m for n, m in zip(told.chosen, told.among, strict=True)), told
    report = ledger.report()
    assert int(counted[0] - counted[1]) == report.tokens and int(counted[1:].sum()) == report.revised
    assert len({tuple((t.part, t.depth, t.rule) for t in told) for told in tally.steps}) == 1, "the rules change"


def test_operands_of_a_chain_stand_side_by_side() -> None:
    recipe = stack.build("dual + blocks(4) + threshold(0.6) + prophet(4, 3, 2)")
    canvas = start(recipe)
    tally = Tally(recipe, canvas)
    run_ = decode(plain("full", recipe, canvas), recipe, canvas)
    tally(*next(run_))
    below = [told.rule for told in tally.steps[0] if told.part == "query" and told.depth == 1]
    joined = below[0]
    for rule in below[1:]:
        joined = joined | rule
    assert len(below) == 4 and joined == recipe.query
