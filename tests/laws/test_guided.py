"""Guided diffusion: what the guide says is what it would say of the whole text, and the exactness cases on joints."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from laws.common import model, plain, ragged, results, run, small
from unmask.decode import Canvas, Draft, Ledger, Recipe, everything, leftmost
from unmask.decode.judge import Agrees, agrees
from unmask.denoise import Blended, Guided
from unmask.errors import UserError

WORDS, CELLS = 4, 6
JUDGED = Recipe(everything, agrees(top=1) | leftmost(1))
ONE = Recipe(everything, leftmost(1))


def joint(seed: int, *, product: bool = False) -> Tensor:
    """A random distribution over texts of `CELLS` words, [WORDS] * CELLS; `product`: of independent cells."""
    draw = torch.Generator().manual_seed(seed)
    if product:
        cells = torch.rand(CELLS, WORDS, generator=draw, dtype=torch.float64).softmax(1)
        return torch.einsum("a,b,c,d,e,f->abcdef", *cells)
    return (
        torch.randn((WORDS,) * CELLS, generator=draw, dtype=torch.float64)
        .mul(2)
        .flatten()
        .softmax(0)
        .view_as(torch.empty((WORDS,) * CELLS))
    )


def conditional(table: Tensor, known: dict[int, int], cell: int) -> Tensor:
    """Log-probabilities [WORDS] of a cell given other cells (columns of the response)."""
    part = table[tuple(known.get(i, slice(None)) for i in range(CELLS))]
    free = [i for i in range(CELLS) if i not in known]
    axes = [n for n, i in enumerate(free) if i != cell]
    found = part.sum(axes) if axes else part
    return found.log() - found.sum().log()


@dataclass(frozen=True)
class Table:
    """A dLLM with exact conditionals of a joint, judged by the same joint from the left, or by a fixed opinion."""

    table: Tensor
    opinion: str = "own"

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        fresh = query & need & canvas.masked
        known = {c - 1: int(canvas.tokens[0, c]) for c in range(1, CELLS + 1) if not canvas.masked[0, c]}
        open_ = [c - 1 for c in range(1, CELLS + 1) if canvas.masked[0, c]]
        logits = torch.stack([conditional(self.table, known, c) for c in open_])
        said, second = dict(known), []
        for c, own in zip(open_, logits, strict=True):
            left = {i: t for i, t in said.items() if i < c}
            best = int(own.argmax())
            other = torch.zeros(WORDS, dtype=torch.float64)
            other[best if self.opinion == "always" else (best + 1) % WORDS] = 9.0
            second.append(conditional(self.table, left, c) if self.opinion == "own" else other)
            said[c] = best
        draft = Draft(query, fresh, logits)
        return replace(draft, second=Draft(query, fresh, torch.stack(second)))


def solve(table: Tensor, recipe: Recipe = JUDGED, opinion: str = "own") -> tuple[list[int], int]:
    canvas = Canvas.new([[0]], CELLS, mask_id=9, dtype=torch.float64)
    end, _ = run(Table(table, opinion), recipe, canvas)
    return end.tokens[0, 1:].tolist(), int(end.step)


def greedy(table: Tensor) -> list[int]:
    """One token after the other from the left, by the joint's own conditionals."""
    said: dict[int, int] = {}
    for c in range(CELLS):
        said[c] = int(conditional(table, dict(said), c).argmax())
    return list(said.values())


def test_a_guide_of_the_same_joint_gives_the_greedy_text_in_fewer_steps() -> None:
    steps = []
    for seed in range(100):
        text, count = solve(joint(seed))
        assert text == greedy(joint(seed))
        steps.append(count)
    assert sum(steps) / len(steps) < 0.75 * CELLS


def test_a_guide_that_never_agrees_costs_all_steps_and_changes_nothing() -> None:
    for seed in range(100):
        assert solve(joint(seed), opinion="never") == (greedy(joint(seed)), CELLS)


def test_a_guide_that_always_agrees_takes_the_first_draft() -> None:
    for seed in range(100):
        once = [int(conditional(joint(seed), {}, c).argmax()) for c in range(CELLS)]
        assert solve(joint(seed), opinion="always") == (once, 1)


def test_a_product_is_accepted_whole_and_a_dependent_joint_up_to_where_drafts_part() -> None:
    for seed in range(50):
        assert solve(joint(seed, product=True)) == (greedy(joint(seed, product=True)), 1)
        table, first = joint(seed), JUDGED
        canvas = Canvas.new([[0]], CELLS, mask_id=9, dtype=torch.float64)
        _, seen = run(Table(table), first, canvas)
        drafts = [int(conditional(table, {}, c).argmax()) for c in range(CELLS)]
        same = next((i for i, (d, g) in enumerate(zip(drafts, greedy(table), strict=True)) if d != g), CELLS)
        assert int(seen[0][1].pick.sum()) == max(1, same)


RULES = [agrees(top=1), agrees(top=5), agrees(top=2, relative=0.5), agrees(above=0.01), agrees(draw=True)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_acceptance_by_its_definition(rule: Agrees) -> None:
    canvas = ragged()
    denoise = plain("full", Recipe(everything, rule | leftmost(1)), canvas)
    draft = denoise(canvas, everything(canvas), canvas.masked)
    assert draft.second is not None
    seen = rule.accepted(canvas, draft, draft.second)
    q = draft.second.logits.softmax(1)
    for n, flat in enumerate(draft.second.at.tolist()):
        row, column = divmod(flat, canvas.tokens.shape[1])
        p, rank = q[n, draft.token[row, column]], int((q[n] > q[n, draft.token[row, column]]).sum())
        wanted = (not rule.top or rank < rule.top) and p >= rule.relative * q[n].max() and p > rule.above
        if rule.draw:
            assert wanted or not seen[row, column]
        else:
            assert bool(seen[row, column]) == bool(wanted)
    picked = rule(canvas, draft, canvas.masked)
    for row in range(len(canvas)):
        holes = canvas.masked[row].nonzero()[:, 0]
        assert (picked[row, holes].long().diff() <= 0).all(), "not a run from the left"


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("rule", [agrees(top=1), agrees(above=0.02)], ids=repr)
@torch.inference_mode()
def test_the_guides_cache_is_exact(kind: str, rule: Agrees) -> None:
    canvas, guide = ragged(eos=False), model("causal")  # where ends have other ids, the guide's count for the model's
    recipe = Recipe(everything, rule | leftmost(1))
    before = canvas
    for after, event in run(plain(kind, recipe, canvas), recipe, canvas)[1]:
        draft, second = event.draft, event.draft.second
        assert second is not None
        text = torch.where(before.masked & draft.fresh, draft.token, before.tokens)
        causal = torch.ones(text.shape[1], text.shape[1]).tril().bool()[None, None].expand(len(text), -1, -1, -1)
        whole = guide(text.clamp(min=0), visible=causal).roll(1, 1)[second.fresh]
        seen = second.logits > -torch.inf
        assert len(whole) and torch.allclose(second.logits[seen], whole[seen], atol=1e-10, rtol=0)
        before = after


def test_the_cache_saves_positions_and_the_ledger_counts_them() -> None:
    canvas, recipe, ledger = ragged(), Recipe(everything, agrees(top=1) | leftmost(1)), Ledger()
    computed = 0
    for after, event in run(plain("full", recipe, canvas), recipe, canvas)[1]:
        ledger.update(after, event)
        computed += int(event.draft.costs[0].computed.sum())
    spent = ledger.report().helpers["guide"]
    assert spent["positions"] == computed and spent["seconds"] > 0
    assert spent["positions"] < 0.9 * int(after.valid.sum()) * spent["forwards"] / len(canvas)


def test_a_blend_goes_from_the_model_to_its_guide() -> None:
    canvas = ragged(eos=False)
    own = plain("full", ONE, canvas)
    guided = Guided(plain("full", ONE, canvas), model("causal"), slots=8, length=canvas.tokens.shape[1])
    assert results(run(Blended(guided, 0.0), ONE, canvas)[0]) == results(run(own, ONE, canvas)[0])
    end, _ = run(Blended(guided, 1.0), ONE, canvas)
    banned = own.banned
    for row in range(len(canvas)):
        for column in (~canvas.given[row] & canvas.valid[row]).nonzero()[:, 0].tolist():
            text = end.tokens[row : row + 1, :column]
            causal = torch.ones(column, column).tril().bool()[None, None]
            logits = model("causal")(text, visible=causal)[0, -1]
            for columns in banned:
                logits[columns] = -torch.inf
            assert int(logits.argmax()) == int(end.tokens[row, column])


def test_a_recipe_without_its_guide_says_so() -> None:
    canvas = ragged()
    with pytest.raises(UserError, match="give a guide"):
        run(plain("full", ONE, canvas), JUDGED, canvas)
    with pytest.raises(UserError, match="autoregressive"):
        Guided(plain("full", ONE, canvas), model("full"), slots=1, length=4)
    for wrong in ({}, {"top": -1}, {"relative": 1.5}, {"above": 1.0}, {"above": float("nan")}, {"draw": 1}):
        with pytest.raises(ValueError, match=r"agrees|top|relative|above|draw"):
            agrees(**wrong)


def test_guided_recipes_are_guided() -> None:
    assert all(small(name).guided for name in ("guided", "freecache-guided", "blend"))
    assert not small("threshold").guided
