"""The probe: watched it changes nothing, sure it ends a row with its answer, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from golden import toy
from laws.common import BLOCK, EOS, Synthetic, dressed, line, model, ragged, result, results, run, sampler, words
from laws.test_pipeline import SHARES, network, texts
from unmask.decode import Canvas, Ledger, Recipe, decode, useful
from unmask.decode.probe import Probing, stated
from unmask.denoise import Draws, Plain, dress
from unmask.denoise.probe import spelled
from unmask.errors import UserError
from unmask.recipes import stack
from unmask.study.recorder import Recorder
from unmask.study.trace import replay

ANCHOR, CELLS = [9, 33], 2
BASE = f"d2f(0.7, 0.25, 0.75) + blocks({BLOCK})"
NEVER, AT_ONCE = f"probe({ANCHOR}, {CELLS}, inf)", f"probe({ANCHOR}, {CELLS}, -inf)"


def denoiser(recipe: Recipe, canvas: Canvas, *, shift: bool = False, **more: Any) -> Any:
    guide = model("causal") if recipe.guided else None
    head = sampler(model("block").config) if recipe.joint else None
    size = {"slots": 8, "length": canvas.tokens.shape[1]}
    net = network(BLOCK, shift=True) if shift else model("block")
    return dress(net, recipe, guide=guide, sampler=head, **size, **more)


def probe_of(recipe: Recipe) -> Probing:
    return next(rule for rule in recipe.walk() if isinstance(rule, Probing))


# Free of side effects


def same_but_for_the_probe(canvas: Canvas, text: str, **more: Any) -> int:
    """Token for token and step for step, with the same cache: the positions that the probe cost."""
    runs = []
    for recipe in (stack.build(text), stack.build(f"{text} + {NEVER}")):
        ledger, seen = Ledger(), []
        for after, event in decode(denoiser(recipe, canvas, **more), recipe, canvas):
            ledger.update(after, event)
            seen.append((after, event))
        runs.append((seen, ledger.report()))
    (plain, costs), (watched, other) = runs
    assert len(plain) == len(watched)
    for (one, first), (two, second) in zip(plain, watched, strict=True):
        for part in ("tokens", "decided_at", "cached_at", "cached_token", "step", "done"):
            assert torch.equal(getattr(one, part), getattr(two, part)), part
        assert torch.equal(first.computed, second.computed) and torch.equal(first.pick, second.pick)
        torch.testing.assert_close(one.score, two.score, rtol=0, atol=1e-9)
        assert second.draft.aside is not None and not (second.draft.aside & (one.cached_at > 0)).any()
        text_of = first.draft.fresh & second.draft.fresh & ~second.draft.aside
        own, other_own = (draft.logits[text_of.flatten()[draft.at]] for draft in (first.draft, second.draft))
        torch.testing.assert_close(own, other_own, rtol=0, atol=1e-9)
        assert torch.equal(text_of & two.valid, first.draft.fresh & ~second.draft.aside)
    assert (costs.positions, costs.cache_hits, costs.forwards) == (other.positions, other.cache_hits, other.forwards)
    asked = sum(int(event.draft.aside.sum()) for _, event in watched)
    assert other.helpers["probe"] == {"forwards": asked / 4, "positions": asked, "seconds": 0}
    return asked


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(("add", "level"), [(0.1, 0.4), (0.25, 0.7), (1.0, 0.9)])
def test_watched_and_never_sure_it_changes_nothing(
    infill: bool, eos: bool, add: float, level: float, shift: bool
) -> None:
    canvas = ragged(infill=infill, eos=eos)
    assert same_but_for_the_probe(canvas, f"d2f({level}, {add}, 0.75) + blocks({BLOCK})", shift=shift) > 0


@pytest.mark.parametrize(
    "more", ["joint(3)", "guided", "eos_stop", "block_gap(3, 2, 1)", "guided + block_gap(3, 2, 1)"]
)
def test_nor_does_it_beside_another_lever(more: str) -> None:
    assert same_but_for_the_probe(ragged(), f"{BASE} + {more}") > 0


@pytest.mark.parametrize(
    "more",
    [
        {"draws": Draws(temperature=1.2, top_k=9)},
        {"draws": Draws(repetition_penalty=1.4, presence_penalty=0.3)},
        {"draws": Draws(temperature=0.8, confidence="shaped", logit_bias={5: 2.0})},
    ],
    ids=repr,
)
def test_nor_does_it_where_tokens_are_drawn(more: dict[str, Any]) -> None:
    assert same_but_for_the_probe(ragged(), BASE, **more) > 0


def test_nor_does_it_under_guidance() -> None:
    """Both networks have the probe, and the ledger knows of both."""
    canvas, texts_ = ragged(), (BASE, f"{BASE} + {NEVER}")
    made = [stack.build(text) for text in texts_]
    ends = [run(denoiser(recipe, canvas, cfg=0.5), recipe, canvas) for recipe in made]
    assert results(ends[0][0]) == results(ends[1][0])
    for _, event in ends[1][1]:
        costs = [cost for cost in event.draft.costs if cost.name == "probe"]
        assert len(costs) in (0, 2) and all(torch.equal(cost.computed, event.draft.aside) for cost in costs)


@given(canvas=texts(), add=SHARES, act=SHARES, size=st.integers(3, 6))
def test_under_any_beliefs_it_changes_nothing(canvas: Canvas, add: float, act: float, size: int) -> None:
    base = f"d2f(0.6, {add}, {act}) + blocks({size})"
    ends = []
    for text in (base, f"{base} + probe([5], 2, inf)"):
        recipe = stack.build(text)
        ends.append(run(dressed(Synthetic(), recipe, canvas), recipe, canvas)[0])
    assert results(ends[0]) == results(ends[1])


# Where it stands


@given(canvas=texts(), add=SHARES, size=st.integers(3, 6), anchor=st.lists(st.integers(0, 7), min_size=1, max_size=2))
def test_it_stands_behind_what_is_opened_or_nowhere(canvas: Canvas, add: float, size: int, anchor: list[int]) -> None:
    cells = size - len(anchor)
    recipe = stack.build(f"d2f(0.5, {add}, 0.5) + blocks({size}) + probe({anchor}, {cells}, inf)")
    probe, before = probe_of(recipe), canvas
    for after, event in run(dressed(Synthetic(), recipe, canvas), recipe, canvas)[1]:
        aside = event.draft.aside if event.draft.aside is not None else canvas.given & False
        opened = probe.after(before)
        for row in range(len(canvas)):
            start = int(opened[row].nonzero()[-1]) + 1
            own = list(range(start, start + len(anchor) + cells))
            written = before.decided_at[row] > 0
            text = [t if w else -1 for t, w in zip(before.tokens[row].tolist(), written.tolist(), strict=True)]
            there = any(text[i : i + len(anchor)] == anchor for i in range(len(text)))
            free = own[-1] < int(canvas.valid[row].sum()) and bool(before.masked[row, own].all())
            asked = free and not there and not before.ended[row].any() and not before.done[row]
            assert aside[row].nonzero()[:, 0].tolist() == (own if asked else [])
            assert bool(stated(before, torch.tensor(anchor))[row]) == there
        before = after


def test_one_block_holds_it() -> None:
    """So that it sees all of itself, under any grid."""
    for grid in ("origin", "absolute"):
        canvas = ragged(infill=False)
        probe = Probing(_after(grid), tuple(ANCHOR), CELLS)
        ids = probe.after.blocks.ids(canvas).masked_fill(~probe(canvas), -5)
        assert all(len(set(row.tolist()) - {-5}) == 1 for row in ids if (row > -5).any())
        assert int(probe(canvas).any(1).sum()) >= 2


def _after(grid: str) -> Any:
    from unmask.decode import Blocks

    return Blocks(BLOCK, grid).after(0.25, every=True)  # type: ignore[arg-type]


# What it reads, and what is committed


@torch.inference_mode()
def by_hand(text: list[int], prompt: int, groups: list[int]) -> Tensor:
    """[L, V] logits of a text whose cells see those of no later group, without a cache."""
    visible = torch.tensor([[other <= own for other in groups] for own in groups])[None, None]
    logits = model("block")(torch.tensor([text]), visible=visible)[0]
    logits[:, toy.MASK] = -torch.inf
    return logits


def test_its_answer_is_that_of_a_text_with_the_anchor_behind() -> None:
    """At every step: the text as it stands, its holes masked, then anchor and answer in one block of their own."""
    canvas = line(3, 24, eos=(EOS,))
    recipe = stack.build(f"{BASE} + {NEVER}")
    before, asked = canvas, 0
    for after, event in run(denoiser(recipe, canvas), recipe, canvas)[1]:
        aside = event.draft.aside[0]
        if aside.any():
            start = int(aside.nonzero()[0])
            text = [*before.tokens[0, :start].tolist(), *ANCHOR, *[toy.MASK] * CELLS]
            groups = [-1 if c < 3 else (c - 3) // BLOCK for c in range(len(text))]
            logits = by_hand(text, 3, groups)[-CELLS:].clone()
            logits[0, [EOS, *ANCHOR]] = -torch.inf  # an answer is not empty, and not the anchor again
            at = aside.clone()
            at[: start + len(ANCHOR)] = False
            own = event.draft.logits[at.flatten()[event.draft.at]]
            torch.testing.assert_close(own, logits, rtol=0, atol=1e-9)
            gap = logits.topk(2).values
            torch.testing.assert_close(event.draft.gap[0][at], gap[:, 0] - gap[:, 1], rtol=0, atol=1e-9)
            assert event.draft.token[0][aside].tolist() == [*ANCHOR, *logits.argmax(-1).tolist()]
            asked += 1
        before = after
    assert asked > 3


def test_a_sure_probe_ends_the_row_with_its_answer_and_nothing_else() -> None:
    canvas = ragged(infill=False)
    recipe, never = stack.build(f"{BASE} + {AT_ONCE}"), stack.build(f"{BASE} + {NEVER}")
    (end, seen), (_, other) = (run(denoiser(r, canvas), r, canvas) for r in (recipe, never))
    fits = probe_of(recipe)(canvas)
    assert fits.any(1).tolist() == [True, False, True, True]
    first = seen[0][1]
    assert torch.equal(first.pick[fits.any(1)], fits[fits.any(1)]) and seen[0][0].done.tolist() == fits.any(1).tolist()
    told = other[0][1].draft
    assert torch.equal(end.tokens[fits], told.token[fits]) and (end.cached_at[fits] < 0).all()
    for row in fits.any(1).nonzero()[:, 0].tolist():
        start = int(canvas.origin[row]) + BLOCK
        assert torch.equal(end.masked[row], canvas.masked[row] & ~fits[row]) and end.step[row] == 1
        assert end.tokens[row, start : start + 2].tolist() == ANCHOR
        assert end.tokens[row][useful(end)[row]].tolist() == end.tokens[row, start : start + 4].tolist()
    assert end.done.all()


@pytest.mark.parametrize("more", ["", " + joint(3)", " + guided", " + eos_stop + block_gap(3, 2, 1)"])
@pytest.mark.parametrize("gap", [1.5, 2.0, 2.5])
def test_a_row_ends_at_the_first_sure_step(gap: float, more: str) -> None:
    """Up to then it is the run that is never sure; then anchor and answer are taken, and holes are left."""
    canvas = ragged(infill=False)
    recipe, never = (stack.build(f"{BASE}{more} + probe({ANCHOR}, {CELLS}, {g})") for g in (gap, "inf"))
    (end, seen), (whole, other) = (run(denoiser(r, canvas), r, canvas) for r in (recipe, never))
    probe, saved = probe_of(recipe), 0
    for row in range(len(canvas)):
        steps, before = int(end.step[row]), canvas
        for number, (after, event) in enumerate(other[: int(whole.step[row])], 1):
            answer = probe.answer(before)[row]
            sure = bool(answer.any()) and float(event.draft.gap[row][answer].min()) >= gap
            assert sure == (number == steps and probe.taken(end)[row].item()) or number > steps
            if number < steps:
                assert torch.equal(seen[number - 1][0].tokens[row], after.tokens[row])
            elif number == steps and sure:
                cells = probe(before)[row]
                assert torch.equal(seen[number - 1][1].pick[row], cells)
                assert end.tokens[row][cells].tolist()[: len(ANCHOR)] == ANCHOR
                written = before.tokens[row][~before.given[row] & ~before.masked[row]].tolist()
                answered = end.tokens[row][answer].tolist()
                stop = next((i for i, token in enumerate(answered) if token in end.eos), len(answered))
                assert end.tokens[row][useful(end)[row]].tolist() == [*written, *ANCHOR, *answered[:stop]]
                saved += int(whole.step[row]) - steps
            before = after
    assert saved > 0 and end.done.all()


def test_a_row_with_a_probe_decodes_the_same_alone() -> None:
    canvas, recipe = ragged(infill=False), stack.build(f"{BASE} + probe({ANCHOR}, {CELLS}, 2)")
    whole = run(denoiser(recipe, canvas), recipe, canvas)[0]
    assert probe_of(recipe).taken(whole).any() and not probe_of(recipe).taken(whole).all()
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w])
        assert result(run(denoiser(recipe, one), recipe, one)[0], 0) == result(whole, row)


def test_an_answer_is_not_empty_and_may_end_the_text() -> None:
    """A model that would end at once: the first cell of the answer is another token, and what follows it is no text."""

    def ending(canvas: Canvas, query: Tensor, need: Tensor) -> Any:
        draft = Synthetic(scale=1.0)(canvas, query, need)
        return replace(draft, logits=draft.logits + 50 * (torch.arange(8) == 7))

    canvas, recipe = line(3, 16, eos=(7,)), stack.build("d2f + blocks(4) + probe([5], 3, -inf)")
    end, seen = run(dressed(ending, recipe, canvas), recipe, canvas)
    answer = end.tokens[0, 8:11].tolist()
    assert len(seen) == 1 and answer[0] != 7 and answer[1:] == [7, 7]
    assert useful(end)[0].nonzero()[:, 0].tolist() == [7, 8]


# Refused, with what to do instead


@pytest.mark.parametrize(
    ("anchor", "says"),
    [
        ([toy.MASK], "which is a mask or an end"),
        ([5, 99], "none of its tokens 0 to 60"),
        ([-1, 5], "a mask or an end|none of its tokens"),
    ],
)
def test_an_anchor_that_the_model_cannot_read_is_refused(anchor: list[int], says: str) -> None:
    recipe = stack.build("d2f + blocks(4)")
    probe = Probing(_after("origin"), tuple(anchor), 1)
    made = stack.build(f"d2f(0.7, 0.25) + blocks(4) + probe([1]{', 1' * 1})").rebuilt(
        lambda rule: probe if isinstance(rule, Probing) else rule
    )
    assert made != recipe
    with pytest.raises(UserError, match=says):
        denoiser(made, line(2, 8))


def test_a_probe_over_other_attention_is_refused() -> None:
    recipe = stack.build(f"{BASE} + {NEVER}")
    with pytest.raises(UserError, match="the text would see it; use prophet or ice"):
        dress(model("full"), recipe, slots=1, length=20)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beliefs": ()}, r"add pinned\(...\) to its beliefs"),
        ({"remask": "doubted(0.3)"}, "leave remask and edit out"),
        ({"query": "everything", "unmask": "best(1)", "stop": "filled"}, "add it to its query"),
        ({"query": "everything | probing(blocks(4).after(0.5), [5], 1)"}, "are two probes; use one"),
        ({"stop": "filled"}, "its stop must be `finished`"),
    ],
)
def test_a_recipe_with_half_a_probe_is_refused(change: dict[str, Any], says: str) -> None:
    from unmask.decode import parse

    recipe = stack.build(f"{BASE} + {NEVER}")
    with pytest.raises(UserError, match=says):
        replace(recipe, **{part: parse(v) if isinstance(v, str) else v for part, v in change.items()})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("probing(blocks(4), [5], 1)", "stands behind blocks"),
        ("probing(blocks(4).after(0.5), '  ', 1)", "needs an anchor"),
        ("probing(blocks(4).after(0.5), [], 1)", "a text, or token ids"),
        ("probing(blocks(4).after(0.5), [5, 'a'], 1)", "a text, or token ids"),
        ("probing(blocks(4).after(0.5), [5], 0)", "a whole number of cells"),
        ("probing(blocks(4).after(0.5), [5, 6], 3)", "does not fit into a block of 4; use fewer cells"),
        ("pinned(blocks(4))", "pinned takes a probe"),
        ("clear(0.9, blocks(4))", "clear needs a threshold"),
        ("clear(level(0.9), everything)", "clear commits blocks"),
        ("clear(level(0.9), blocks(4), 'luck')", "luck"),
    ],
)
def test_a_probe_that_means_nothing_is_refused(text: str, says: str) -> None:
    from unmask.decode import parse

    with pytest.raises(UserError, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


# The anchor in words


class Letters:
    """A vocabulary of letters, the 26 of them alone."""

    @staticmethod
    def encode(text: str) -> list[int]:
        return [ord(sign) - 97 if sign.islower() else 26 for sign in text if sign != " "]

    @staticmethod
    def decode(ids: list[int]) -> str:
        return " ".join(chr(97 + i) if i < 26 else "?" for i in ids)


def test_an_anchor_in_words_is_spelled_where_the_vocabulary_is(tmp_path: Path) -> None:
    recipe = stack.build("d2f + blocks(8) + probe('so it is', 2, 4)")
    assert recipe.name in recipe.to_toml() and Recipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(UserError, match="use `spelled`"):
        recipe.query(line(2, 9))
    made = spelled(recipe, Letters.encode, Letters.decode)
    assert probe_of(made).anchor == (18, 14, 8, 19, 8, 18) and made.name == recipe.name
    assert len({r for r in made.walk() if isinstance(r, Probing)}) == 1
    assert Recipe.from_toml(made.to_toml()) == made and spelled(made, Letters.encode, Letters.decode) is made
    for text, says in (
        ("d2f + probe('Größe', 2)", "reads .* in this model's vocabulary"),
        ("d2f + blocks(8) + probe('so it is', 3)", "does not fit into a block of 8"),
    ):
        with pytest.raises(UserError, match=says):
            spelled(stack.build(text), Letters.encode, Letters.decode)
    plain = stack.build("d2f")
    assert spelled(plain, Letters.encode, Letters.decode) is plain


def test_a_denoiser_is_plain_below_its_probe() -> None:
    canvas, recipe = ragged(), stack.build(f"{BASE} + {NEVER}")
    made = denoiser(recipe, canvas)
    assert isinstance(made.plain, Plain) and made.layout == made.plain.layout and words(1, 0)


def test_a_trace_of_a_probe_is_played_as_it_was() -> None:
    canvas, recipe = ragged(infill=False), stack.build(f"{BASE} + probe({ANCHOR}, {CELLS}, 2)")
    recorder, ledger = Recorder(canvas, recipe), Ledger()
    for after, event in decode(denoiser(recipe, canvas), recipe, canvas):
        recorder(after, event)
        ledger.update(after, event)
    again = Ledger()
    for replayed, event in replay(recorder.trace()):
        again.update(replayed, event)
    for part in ("tokens", "decided_at", "cached_at", "step", "done"):
        assert torch.equal(getattr(after, part), getattr(replayed, part)), part
    one, two = (replace(told.report(), seconds=0) for told in (ledger, again))
    assert one == two and one.helpers["probe"]["positions"] > 0
