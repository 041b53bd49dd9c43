"""Joint sampling: one draw is one-token sampling, and no gain is the marginal sampler, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from laws.common import model, ragged, result, results, run, sampler, small
from unmask.decode import Blocks, Canvas, Ledger, Recipe, best, drawn, everything, parse
from unmask.decode.belief import Joint
from unmask.decode.early import Level, Sure
from unmask.denoise import Draws, dress
from unmask.errors import UserError
from unmask.models.joint import JointSampler, digest, load_sampler, save_sampler

b = Blocks(4)
DRAWS = [Draws(), Draws(temperature=1.3), Draws(temperature=0.7, top_k=5, confidence="shaped")]
QUERIES = {"full": everything, "prefix": small("prefix").query, "dual": small("dual").query}


def silent(kind: str) -> JointSampler:
    return JointSampler(model(kind).config).initialise(3).double()


def decoded(kind: str, recipe: Recipe, canvas: Canvas, head: JointSampler | None, draws: Draws | None = None) -> Canvas:
    slots, width = canvas.tokens.shape
    denoise = dress(model(kind), recipe, slots=slots, length=width, sampler=head, draws=draws)
    return run(denoise, recipe, canvas)[0]


def jointly(k: int, query: Any = everything, **more: Any) -> Recipe:
    return Recipe(query, b >> drawn, beliefs=(Joint(k, **more),))


@pytest.mark.parametrize("draws", DRAWS, ids=repr)
@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("by", ["entropy", "score", "margin", "random"])
def test_one_draw_is_one_token_sampling(kind: str, draws: Draws, by: str) -> None:
    canvas = ragged()
    single = decoded(kind, Recipe(everything, b >> best(1, by=by)), canvas, None, draws)
    assert results(decoded(kind, jointly(1, by=by), canvas, None, draws)) == results(single)
    assert results(decoded(kind, jointly(1, by=by), canvas, sampler(model(kind).config), draws)) == results(single)


@pytest.mark.parametrize("draws", DRAWS, ids=repr)
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("k", [2, 4])
def test_without_gain_it_is_the_marginal_sampler_bit_for_bit(kind: str, k: int, query: str, draws: Draws) -> None:
    canvas, recipe = ragged(), jointly(k, QUERIES[query])
    marginal = decoded(kind, Recipe(QUERIES[query], b >> best(k, by="entropy")), canvas, None, draws)
    assert results(decoded(kind, recipe, canvas, silent(kind), draws)) == results(marginal)
    loud = decoded(kind, recipe, canvas, sampler(model(kind).config), draws)
    assert results(loud) != results(marginal), "the sampler changes nothing, so the comparison says nothing"


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_a_row_draws_the_same_alone(kind: str, least: float) -> None:
    canvas, head, recipe = ragged(), sampler(model(kind).config), jointly(3, QUERIES["dual"], least=least)
    whole = decoded(kind, recipe, canvas, head, DRAWS[1])
    for row in range(len(canvas)):
        one = canvas[row : row + 1]
        denoise = dress(model(kind), recipe, slots=4, length=one.tokens.shape[1], sampler=head, draws=DRAWS[1])
        assert result(run(denoise, recipe, one)[0], 0) == result(whole, row)


def test_over_an_exact_cache_the_sampler_reads_kept_states() -> None:
    """The block-causal cache is exact, so hidden states kept from earlier forwards are those of a full one."""
    canvas, head, net = ragged(eos=False), sampler(model("block").config), model("block")
    width = canvas.tokens.shape[1]
    kept = jointly(3, parse("~blocks(4).settled"))
    whole = jointly(3)
    ends = []
    for recipe in (kept, whole):
        ends.append(run(dress(net, recipe, slots=4, length=width, sampler=head), recipe, canvas)[0])
    assert results(ends[0]) == results(ends[1])


def test_an_early_commit_is_drawn_in_k_parts() -> None:
    canvas, net, head = ragged(infill=False), model("full"), sampler(model("full").config)
    at_once = everything.when(Sure(Level(-1.0), everything))
    recipe = Recipe(everything, at_once | b >> drawn, beliefs=(Joint(4),))
    denoise, ledger = dress(net, recipe, slots=4, length=canvas.tokens.shape[1], sampler=head), Ledger()
    end, seen = run(denoise, recipe, canvas)
    for after, event in seen:
        ledger.update(after, event)
    assert len(seen) == 1 and not end.masked.any()
    order, cells = seen[0][1].draft.drawn, canvas.masked
    assert order is not None and (order[cells] > 0).all() and int(order.max()) == 4
    for row in range(len(canvas)):
        own, counts = order[row, cells[row]], -(-int(cells[row].sum()) // 4)
        assert [int((own == turn).sum()) for turn in (1, 2)] == [counts, counts]
    guess = decoded("full", Recipe(everything, at_once | b >> best(1)), canvas, None)
    assert results(decoded("full", recipe, canvas, silent("full"))) == results(guess)
    assert results(end) != results(guess)
    assert ledger.report().helpers["joint sampler"]["forwards"] == int((order.amax(1) - 1).sum())


def test_drawing_stops_where_the_surest_is_not_sure_enough() -> None:
    canvas, head = ragged(), sampler(model("full").config)
    never = decoded("full", jointly(4, least=1.0), canvas, head)
    assert results(never) == results(decoded("full", jointly(1), canvas, None))
    assert int(decoded("full", jointly(4), canvas, head).step.sum()) < int(never.step.sum())


def test_the_guess_of_a_cell_that_was_not_drawn_knows_what_was() -> None:
    """Without `drawn`, the sampler drafts for the other rules, such as a guide's."""
    canvas, head, net = ragged(eos=False), sampler(model("full").config), model("full")
    recipe = Recipe(everything, everything, beliefs=(Joint(3, by="left"),))
    denoise = dress(net, recipe, slots=4, length=canvas.tokens.shape[1], sampler=head)
    draft = denoise(canvas, everything(canvas), canvas.masked)
    alone = dress(net, small("threshold"), slots=4, length=canvas.tokens.shape[1])(canvas, canvas.valid, canvas.masked)
    assert draft.drawn is not None
    others = canvas.masked & (draft.drawn == 0)
    assert (draft.token != alone.token)[others].any()
    assert torch.equal(draft.token[draft.drawn == 1], alone.token[draft.drawn == 1])
    assert torch.equal(draft.logits, alone.logits)
    for row in range(len(canvas)):
        assert sorted((draft.drawn[row] > 0).nonzero()[:, 0].tolist()) == canvas.masked[row].nonzero()[:3, 0].tolist()


def test_a_sampler_is_of_one_model(tmp_path: Path) -> None:
    net, head = model("full"), sampler(model("full").config)
    other = copy.deepcopy(net)
    other.embed.weight[0, 0] += 1
    save_sampler(head, tmp_path, base=digest(net))
    back = load_sampler(tmp_path, net)
    assert back.mix.weight.dtype == torch.float64
    assert torch.equal(back.mix.weight, head.mix.weight.bfloat16().double())
    with pytest.raises(UserError, match="other weights"):
        load_sampler(tmp_path, other)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model"):
        load_sampler(tmp_path, net)
    with pytest.raises(UserError):
        load_sampler(tmp_path / "nowhere", net)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="no joint sampler"):
        dress(model("full"), jointly(2), slots=1, length=8)
    with pytest.raises(UserError, match="more tokens than a block of 4"):
        jointly(5)
    with pytest.raises(UserError, match="add joint"):
        Recipe(everything, b >> drawn)
    with pytest.raises(UserError, match="both draw"):
        Recipe(everything, b >> drawn, beliefs=(Joint(2), Joint(3)))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k >= 1"):
            Joint(wrong)  # type: ignore[arg-type]
