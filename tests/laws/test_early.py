"""Early exit is one rule: what `sure` says, and Prophet, SchED and ICE as settings of it (METHODS: a, e)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from golden import toy
from laws.common import (
    EOS,
    Scripted,
    Synthetic,
    line,
    model,
    plain,
    ragged,
    result,
    results,
    run,
    sampler,
    small,
    words,
)
from laws.test_termination import canvases
from unmask.decode import (
    Blocks,
    Canvas,
    Cosine,
    Draft,
    Exponential,
    Ledger,
    Level,
    Linear,
    Recipe,
    Region,
    Staged,
    Sure,
    account,
    best,
    confident,
    ended,
    everything,
    filled,
    parse,
    phase,
    prefer,
    response,
    useful,
)
from unmask.decode.early import Clear
from unmask.denoise import dress
from unmask.errors import UserError
from unmask.recipes import stack
from unmask.template import Template, mark

NEVER = 2.0
"""A probability that no cell reaches."""
KINDS = ["full", "shifted"]
ICE = ["ice", "ice-quota"]
THINKING = ("a: {think:4} b: {think:3} so {answer:3}", "{think:2} so {answer:1} !", "a: {think:6} {answer:4}")
MIXED = ("{write:3} is {answer:2} as {think:4} {write:2}", "{answer:3}", "{write:4} so {answer:2}", *THINKING)


def encode(text: str) -> list[int]:
    return [1 + ord(letter) % 50 for letter in text if letter != " "]


def templated(texts: tuple[str, ...] = THINKING, *, seed: int = 0) -> Canvas:
    """One row a template, behind prompts of unequal lengths."""
    forms = [Template.parse(text).lay(encode, length=None, default=0) for text in texts]
    prompts = [words(2 + 3 * i % 5, seed + i) for i in range(len(forms))]
    rows = [[*prompt, *form.cells] for prompt, form in zip(prompts, forms, strict=True)]
    origin, seeds = [len(prompt) for prompt in prompts], [seed + i for i in range(len(rows))]
    made = Canvas.of(rows, origin=origin, mask_id=toy.MASK, eos=[EOS], seed=seeds, dtype=torch.float64)
    return mark(made, forms)


def ledger(denoise: Any, recipe: Recipe, canvas: Canvas) -> tuple[Canvas, Ledger]:
    told = Ledger()
    for after, event in run(denoise, recipe, canvas)[1]:
        told.update(after, event)
        canvas = after
    return canvas, told


# What a row is sure by


@given(
    canvas=canvases(),
    criterion=st.sampled_from(["gap", "peak", "score", "margin"]),
    level=st.floats(0, 1),
    number=st.integers(0, 2),
)
def test_sure_by_its_definition(canvas: Canvas, criterion: Any, level: float, number: int) -> None:
    cells = (canvas.region == number) & canvas.valid & ~canvas.given
    draft = Synthetic(scale=4.0)(canvas, everything(canvas), everything(canvas))
    drawn = Draft(draft.computed, draft.fresh, draft.logits, chosen=draft.at % draft.logits.shape[1])
    found = Sure(Level(level), Region(number), criterion)(canvas, drawn)
    logits = torch.zeros(*cells.shape, draft.logits.shape[1], dtype=torch.float64)
    logits[draft.fresh] = draft.logits
    p = logits.softmax(-1)
    top, raw = p.sort(-1, descending=True).values, logits.sort(-1, descending=True).values
    value = {
        "gap": raw[..., 0] - raw[..., 1],
        "peak": top[..., 0],
        "score": p.gather(-1, drawn.token[..., None])[..., 0],
        "margin": top[..., 0] - top[..., 1],
    }[criterion]
    for row in range(len(canvas)):
        own = value[row][cells[row]]
        expected = float(own.mean()) if len(own) else -1.0
        assert bool(found[row]) == (expected >= level) or abs(expected - level) < 1e-9


def test_given_cells_are_not_asked() -> None:
    """However doubtful a model is about the words of a template, they are not what it is unsure of."""
    canvas = templated(THINKING[:1])
    doubtful = Scripted((5,) * canvas.tokens.shape[1], gap=lambda c: 0.0 if canvas.given[0, c] else 9.0)
    every = everything(canvas)
    draft = doubtful(canvas, every, every)
    assert Sure(Level(9.0), response)(canvas, draft).item() and Sure(Level(9.0), everything)(canvas, draft).item()
    only = replace(canvas, region=canvas.given.to(torch.int8) * 3)
    assert not Sure(Level(-1.0), Region(3))(only, draft).item()
    assert not (Sure(Level(9.0), response).reads(canvas) & canvas.given).any()


falling = st.tuples(st.floats(-9, 9), st.floats(0, 9))


@given(falling, st.floats(0, 1), st.floats(0, 1), st.floats(0, 9))
def test_thresholds_fall_from_high_to_low(levels: tuple[float, float], a: float, b: float, rate: float) -> None:
    low, high = levels[0], levels[0] + levels[1]
    early, late = torch.tensor([min(a, b)], dtype=torch.float64), torch.tensor([max(a, b)], dtype=torch.float64)
    made = (Staged(high, (low + high) / 2, low), Linear(high, low), Cosine(high, low), Exponential(high, low, rate))
    for schedule in (*made, Level(low)):
        first, second = schedule(early).item(), schedule(late).item()
        assert high + 1e-9 >= first >= second - 1e-9 and second >= low - 1e-9


@pytest.mark.parametrize("name", ["prophet", "sched", *ICE])
def test_one_rule_with_other_settings(name: str) -> None:
    assert len([rule for rule in small(name).unmask.walk() if isinstance(rule, Sure)]) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("level(2 - 1)", "only rules"),
        ("everything.when(sure(level('high'), response))", "a threshold is a number"),
        ("everything.when(sure(staged(1, 2, everything), response))", "a threshold is a number"),
        ("everything.when(sure(0.9, response))", r"sure needs a threshold such as level\(0.9\)"),
        ("everything.when(sure(level(0.9), best(1)))", "sure looks at cells"),
        ("everything.when(sure(level(0.9), response, 'luck'))", "luck"),
        ("everything.when(sure(level(0.9), response, clock=8))", "the clock of sure is a schedule"),
        ("prefer(filled, best(1))", "prefer takes two choices"),
        ("prefer(best(1))", "second"),
    ],
)
def test_an_exit_that_means_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [Level, lambda x: Staged(1, x, 0), lambda x: Linear(x, 0), lambda x: Cosine(1, x)])
def test_a_threshold_that_is_no_number_is_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="a threshold is a number"):
        made(float("nan"))


# What is preferred, and whose turn it is


@given(canvas=canvases(), level=st.floats(0, 1), number=st.integers(0, 2))
def test_prefer_by_its_definition(canvas: Canvas, level: float, number: int) -> None:
    draft = Synthetic(scale=4.0)(canvas, everything(canvas), everything(canvas))
    first, second = Region(number) >> confident(level), best(2)
    rule = prefer(first, second)
    chosen, one, two = (pick(canvas, draft, canvas.masked) for pick in (rule, first, second))
    for row in range(len(canvas)):
        assert torch.equal(chosen[row], one[row] if one[row].any() else two[row])
    _, left, *_, last = account(rule, canvas, draft, canvas.masked)
    assert torch.equal(chosen, left.rule(canvas, draft, left.among) | last.rule(canvas, draft, last.among))
    assert rule.always and prefer(everything, first).always and not prefer(first, Region(1)).always


def test_prefer_reads_back_and_takes_cells() -> None:
    rule = prefer(Region(2), Blocks(4) >> best(1))
    assert parse(repr(rule)) == rule and repr(rule) == "prefer(region(2), blocks(4) >> best())"


@given(canvases())
def test_phases_by_their_definition(canvas: Canvas) -> None:
    found = phase(canvas)
    for row in range(len(canvas)):
        holes = canvas.masked[row].nonzero()[:, 0].tolist()
        region = canvas.region[row].tolist()
        answers = [c for c, number in enumerate(region) if number == 2 and canvas.valid[row, c]]
        moot = [c for c in holes if region[c] == 1] if answers and not set(answers) & set(holes) else []
        before = [c for c in holes if region[c] != 2 and (not answers or c < answers[-1]) and c not in moot]
        after = [c for c in holes if region[c] != 2 and c not in before and c not in moot]
        turns = [before, [c for c in answers if c in holes], after, moot]
        assert found[row].nonzero()[:, 0].tolist() == next((turn for turn in turns if turn), [])


# ICE


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_exit_all_thinking_is_done(kind: str) -> None:
    canvas, recipe = templated(), small("ice-quota", tau=NEVER)
    cells = (canvas.region == 1).sum(1)
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    assert torch.equal(end.step, cells + 1) and not end.masked.any()
    assert torch.equal(end.decided_at[canvas.region == 2], end.step[:, None].expand_as(end.tokens)[canvas.region == 2])
    for number, (_, event) in enumerate(seen):
        assert torch.equal((event.pick & (canvas.region == 1)).sum(1), (number < cells).long())


@pytest.mark.parametrize("name", ICE)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exit_at_once_is_one_forward(name: str, kind: str) -> None:
    canvas, recipe = templated(), small(name, tau=0.0)
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    assert len(seen) == 1 and torch.equal(seen[0][1].pick, canvas.region == 2)
    assert torch.equal(end.masked, canvas.region == 1) and end.done.all()


@pytest.mark.parametrize("name", ICE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.7, NEVER])
def test_the_answer_comes_whole_from_one_forward(name: str, kind: str, tau: float) -> None:
    """Until then nothing of it is committed, and with it nothing else; given words never change."""
    canvas, recipe, before = templated(), small(name, tau=tau), templated()
    denoise = plain(kind, recipe, canvas)
    for after, event in run(denoise, recipe, canvas)[1]:
        answer = event.pick & (canvas.region == 2)
        logits = denoise(before, everything(before), before.masked)
        for row in answer.any(1).nonzero()[:, 0].tolist():
            assert torch.equal(answer[row], canvas.region[row] == 2) and torch.equal(answer[row], event.pick[row])
            assert torch.equal(after.tokens[row][answer[row]], logits.token[row][answer[row]])
            assert after.done[row]
        assert (after.tokens == canvas.tokens)[canvas.given].all()
        before = after
    assert before.done.all() and not (before.masked & (canvas.region == 2)).any()


@given(seed=st.integers(0, 9999), tau=st.floats(0.2, 0.9), scale=st.sampled_from([2.0, 6.0]))
def test_ice_exits_at_the_first_sure_step(seed: int, tau: float, scale: float) -> None:
    canvas, believes = templated(seed=seed), Synthetic(scale=scale)
    end, _ = run(believes, small("ice-quota", tau=tau), canvas)
    for row in range(len(canvas)):
        cells = (canvas.region[row] == 2).sum()
        steps = int((canvas.region[row] == 1).sum()) + 1
        expected = steps
        for number in range(steps, 0, -1):
            then = replace(canvas[row : row + 1], step=torch.tensor([number - 1]))
            where = then.region == 2
            peak = believes(then, where, where).logits.softmax(-1).amax(-1).sum() / cells
            expected = number if peak >= tau else expected
        assert int(end.step[row]) == expected


@pytest.mark.parametrize("name", ICE)
def test_ice_reads_the_largest_probability_whatever_is_drawn(name: str) -> None:
    """At a temperature the drafted token need not be the likeliest; what a row is sure of does not change by that."""

    def drawn(canvas: Canvas, query: torch.Tensor, need: torch.Tensor) -> Draft:
        draft = Scripted((5,) * canvas.tokens.shape[1], gap=20.0)(canvas, query, need)
        return replace(draft, chosen=torch.full_like(draft.at, 6))

    end, _ = run(drawn, small(name, tau=0.99), templated())
    assert end.step.tolist() == [1] * len(end) and (end.tokens[end.region == 2] == 6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ICE)
def test_without_thinking_and_exit_it_is_the_vanilla_loop(name: str, kind: str) -> None:
    pick = confident(0.6) | best(1) if name == "ice" else best(1)
    for canvas in (
        templated(("{answer:9}", "a {answer:3} b {answer:6}")),
        replace(line(3, 12), region=line(3, 12).masked * 2),
    ):
        ice, vanilla = small(name, tau=NEVER), Recipe(everything, pick)
        ends = [run(plain(kind, recipe, canvas), recipe, canvas)[0] for recipe in (ice, vanilla)]
        assert results(ends[0]) == results(ends[1])


@pytest.mark.parametrize("name", ICE)
def test_what_is_to_be_written_is_written_whatever_is_thought(name: str) -> None:
    canvas, recipe = templated(MIXED), small(name, tau=0.0)
    end, _ = run(plain("full", recipe, canvas), recipe, canvas)
    assert torch.equal(end.masked, canvas.region == 1) and end.done.all()
    whole, _ = run(plain("full", recipe, canvas), replace(recipe, stop=filled), canvas)
    assert not whole.masked.any()


@pytest.mark.parametrize("name", ICE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_templates_row_does_not_depend_on_its_company(name: str, kind: str) -> None:
    canvas, recipe = templated(MIXED), small(name)
    whole, _ = run(plain(kind, recipe, canvas), recipe, canvas)
    assert whole.masked.any(), "nothing was left unthought"
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w])
        assert result(run(plain(kind, recipe, one), recipe, one)[0], 0) == result(whole, row)


# On one trajectory


def exits(name: str, denoise: Any, canvas: Canvas, **levels: float) -> torch.Tensor:
    return run(denoise, small(name, **levels), canvas)[0].step


@given(
    seed=st.integers(0, 9999),
    levels=st.tuples(*[st.floats(0, 4)] * 3),
    more=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 3),
)
def test_a_higher_threshold_never_exits_earlier(seed: int, levels: Any, more: Any) -> None:
    canvas, believes = templated(seed=seed), Synthetic(scale=6.0)
    higher = [level + extra for level, extra in zip(levels, more, strict=True)]
    for name, keys in (("prophet", ("high", "middle", "low")), ("sched", ("high", "low"))):
        low, high = (dict(zip(keys, given, strict=False)) for given in (levels, higher))
        assert (exits(name, believes, canvas, **low) <= exits(name, believes, canvas, **high)).all()
    for name in ICE:
        low, high = exits(name, believes, canvas, tau=levels[0] / 4), exits(name, believes, canvas, tau=higher[0] / 4)
        assert (low <= high).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "base"), [("prophet", "llada"), ("sched", "llada"), ("ice", None), ("ice-quota", None)]
)
def test_up_to_its_exit_a_row_follows_the_full_decoding(name: str, base: str | None, kind: str) -> None:
    canvas = templated() if base is None else ragged()
    levels = {"prophet": {"high": 2.5, "middle": 2.0, "low": 1.5}, "sched": {"high": 2.0, "low": 1.0}}
    recipe = small(name, **levels.get(name, {}))
    full = small(name, tau=NEVER) if base is None else small(base)
    _, early = run(plain(kind, recipe, canvas), recipe, canvas)
    _, whole = run(plain(kind, full, canvas), full, canvas)
    last = early[-1][0]
    for row in range(len(canvas)):
        for number in range(int(last.step[row]) - 1):
            for part in ("tokens", "decided_at"):
                assert torch.equal(getattr(early[number][0], part)[row], getattr(whole[number][0], part)[row])
    assert len(early) < len(whole) or bool((last.step < whole[-1][0].step).any()), "nothing was saved"


@pytest.mark.parametrize("name", ["prophet", "sched", *ICE])
def test_forwards_are_exit_steps(name: str) -> None:
    canvas, recipe = templated(MIXED), small(name)
    end, told = ledger(plain("full", recipe, canvas), recipe, canvas)
    report = told.report()
    assert report.exit_steps == tuple(end.step.tolist()) and report.forwards == sum(report.exit_steps)
    assert report.tokens == int((end.decided_at > 0).sum())


# The end of a slot is not the end of a response


@given(canvases(), st.integers(0, 9))
def test_each_stretch_has_its_own_end(canvas: Canvas, budget: int) -> None:
    last = [canvas, *(after for after, _ in run(Synthetic(), Recipe(everything, best(1)), canvas)[1][:budget])][-1]
    kept, ends = useful(last), last.ended
    for row in range(len(last)):
        own = [c for c in range(last.tokens.shape[1]) if last.valid[row, c] and not last.given[row, c]]
        runs: list[list[int]] = []
        for c in own:
            new = not runs or runs[-1][-1] != c - 1 or last.region[row, c] != last.region[row, c - 1]
            runs += [[c]] if new else []
            runs[-1] += [] if new else [c]
        ended_at = [[c for c in r if not last.masked[row, c] and int(last.tokens[row, c]) in last.eos] for r in runs]
        expected = [c for r, e in zip(runs, ended_at, strict=True) for c in r if not e or c < e[0]]
        assert kept[row].nonzero()[:, 0].tolist() == [c for c in expected if not last.masked[row, c]]
        assert ends[row].nonzero()[:, 0].tolist() == ended_at[-1]


def test_an_end_in_the_middle_stops_nothing() -> None:
    canvas = templated(("a {think:3} b {write:2} c {answer:2}",))
    holes = canvas.masked[0].nonzero()[:, 0].tolist()
    script = [EOS if c in (holes[0], holes[3]) else 5 for c in range(canvas.tokens.shape[1])]
    until = Recipe(everything, best(1, by="left"), stop=filled | ended)
    end, _ = run(Scripted(tuple(script)), until, canvas)
    assert not end.masked.any() and useful(end)[0].nonzero()[:, 0].tolist() == holes[5:]
    script[holes[5]] = EOS
    end, _ = run(Scripted(tuple(script)), until, canvas)
    assert end.masked[0].nonzero()[:, 0].tolist() == holes[6:]


# Whole blocks


@given(
    canvas=canvases(), level=st.floats(0, 3), size=st.integers(1, 6), grid=st.sampled_from(["origin", "absolute"]),
    criterion=st.sampled_from(["gap", "peak", "score", "margin"]), part=st.integers(1, 4),
)  # fmt: skip
def test_a_clear_block_by_its_definition(canvas, level, size, grid, criterion, part) -> None:
    """All its undecided cells must be candidates; the threshold is that of its own progress."""
    low = level / 2 if criterion == "gap" else level / 6
    rule = Clear(Linear(level if criterion == "gap" else level / 3, low), Blocks(size, grid), criterion)
    draft = Synthetic(scale=4.0)(canvas, everything(canvas), canvas.masked)
    among = canvas.masked & draft.fresh & ((canvas.position + part) % 4 > 0)
    found, value = rule(canvas, draft, among), draft.value(criterion)
    for row in range(len(canvas)):
        start = int(canvas.origin[row]) if grid == "origin" else 0
        cells = [c for c in range(start, canvas.tokens.shape[1]) if canvas.valid[row, c]]
        expected = []
        for at in range(0, len(cells), size):
            own = [c for c in cells[at : at + size] if not canvas.given[row, c]]
            left = [c for c in own if canvas.masked[row, c]]
            if not left or not all(among[row, c] for c in left):
                continue
            mean = sum(float(value[row, c]) for c in left) / len(left)
            limit = rule.schedule(torch.tensor([1 - len(left) / len(own)], dtype=torch.float64)).item()
            assume(abs(mean - limit) > 1e-9)
            expected += left if mean > limit else []
        assert found[row].nonzero()[:, 0].tolist() == expected


BLOCKWISE = ["d2f(0.6, 0.25, 0.75)", "threshold(0.6)", "dual + threshold(0.6)", "prefix + quota(16)", "dkv(3) + one"]


@pytest.mark.parametrize("text", [*BLOCKWISE, "d2f(0.6, 0.25, 0.75) + joint(3)", "d2f(0.6, 0.25, 0.75) + guided"])
def test_a_block_that_is_never_clear_changes_nothing(text: str) -> None:
    canvas, kind = ragged(), "block" if "d2f" in text else "full"
    made = [stack.build(f"{text} + blocks(4){more}") for more in ("", " + block_gap(inf, inf, inf)")]
    ends = [run(plain(kind, recipe, canvas), recipe, canvas)[0] for recipe in made]
    assert results(ends[0]) == results(ends[1])


@pytest.mark.parametrize("text", BLOCKWISE)
def test_a_block_that_is_always_clear_takes_one_forward(text: str) -> None:
    canvas, kind = ragged(infill=False, eos=False), "block" if "d2f" in text else "full"
    recipe = stack.build(f"{text} + blocks(4) + block_gap(-inf, -inf, -inf)")
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    assert torch.equal(end.step, -(-canvas.masked.sum(1) // 4)) and len(seen) == 4
    for number, (_, event) in enumerate(seen):
        here = (canvas.position >= canvas.origin[:, None] + 4 * number) & canvas.masked
        assert torch.equal(event.pick, here & (canvas.position < canvas.origin[:, None] + 4 * number + 4))


@given(seed=st.integers(0, 999), one=st.floats(0, 9), two=st.floats(0, 9), base=st.sampled_from(BLOCKWISE[:3]))
def test_blocks_that_are_sooner_clear_take_no_more_forwards(seed: int, one: float, two: float, base: str) -> None:
    """On beliefs that do not move."""
    low, high = (
        stack.build(f"{base} + blocks(4) + block_gap({level}, {level}, {level})") for level in sorted([one, two])
    )
    steps = [int(run(Synthetic(moving=False), r, line(2, 16, seed=seed))[0].step) for r in (low, high)]
    assert steps[0] <= steps[1]


def test_a_clear_block_is_drawn_by_the_joint_sampler_in_k_parts() -> None:
    canvas, recipe = line(3, 8), stack.build("d2f + blocks(8) + joint(4) + block_gap(-inf, -inf, -inf)")
    denoise = dress(model("block"), recipe, slots=1, length=11, sampler=sampler(model("block").config))
    end, seen = run(denoise, recipe, canvas)
    drawn = seen[0][1].draft.drawn
    assert len(seen) == 1 and end.done.item() and drawn is not None
    assert sorted(drawn[0, 3:].tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
