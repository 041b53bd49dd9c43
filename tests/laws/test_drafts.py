"""What a draft says does not depend on who found it: the likeliest tokens handed along, or its own softmax."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.common import MODELLESS, Synthetic, dressed, ragged, results, run, small
from unmask.decode import Canvas, Draft


def topped(draft: Draft) -> Draft:
    """The same draft with its likeliest tokens and their probabilities beside the logits, as one kernel finds them."""
    p, tokens = draft.logits.softmax(-1).max(-1)
    return replace(draft, top=(tokens, p))


class Topped(Synthetic):
    def __call__(self, canvas: Canvas, query: torch.Tensor, need: torch.Tensor) -> Draft:
        return topped(super().__call__(canvas, query, need))


@pytest.mark.parametrize("name", [n for n in MODELLESS if n != "ar"])
def test_with_and_without_top_the_same_is_chosen(name: str) -> None:
    recipe, canvas = small(name), ragged()
    one, two = (run(dressed(d, recipe, canvas), recipe, canvas)[0] for d in (Synthetic(), Topped()))
    assert results(one) == results(two) and torch.equal(one.score, two.score)


def test_top_is_read_only_where_nothing_else_is_said() -> None:
    canvas = ragged()
    draft = topped(Synthetic()(canvas, canvas.valid, canvas.masked))
    wrong = (torch.full_like(draft.tokens, 3), torch.full_like(draft.logits[:, 0], 0.25))
    lying = replace(draft, top=wrong)
    assert (lying.tokens == 3).all() and (lying.score[lying.fresh] == 0.25).all() and lying.peak.amax() == 0.25
    drawn = replace(lying, chosen=draft.logits.argmin(-1))
    assert (
        torch.equal(drawn.tokens, draft.logits.argmin(-1))
        and (drawn.score[drawn.fresh] < draft.peak[draft.fresh]).all()
    )
    shaped = replace(lying, belief=draft.logits)
    assert torch.equal(shaped.tokens, draft.tokens) and torch.equal(shaped.peak, draft.peak)


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3], [2]])
def test_rows_of_a_draft_keep_their_top(rows: list[int]) -> None:
    canvas = ragged()
    draft = topped(Synthetic()(canvas, canvas.valid, canvas.masked))
    some, index = draft[torch.tensor(rows)], torch.tensor(rows)
    assert some.top is not None and len(some.top[0]) == len(some.logits)
    assert torch.equal(some.token, draft.token[index]) and torch.equal(some.score, draft.score[index])
