"""A constraint is never left: whatever a recipe commits, and in which order, the text stays in the language."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import unmask
from laws.common import Synthetic, result, run, small
from unmask.decode import Canvas, Draft
from unmask.denoise import Sampled
from unmask.denoise.constrained import constrain
from unmask.denoise.dress import dress
from unmask.errors import UserError

pytest.importorskip("outlines_core")

SUM = r"(\d+ [-+*/] \d+ = \d+ ; )*#### \d+"
REGEXES = (SUM, r"(a|b c|The )*", r"[a-z]{2,5}( [a-z]+)*", r"\d+ ( = \d+ )?;|x|\d+(\s\d+){1,9}")
RECIPES = ("llada", "threshold", "dual", "prefix", "prophet", "eb", "factor", "dream", "dkv", "sched")
EOS, MASK, WORDS = 1, 2, 802


@lru_cache
def tokenizer() -> Any:
    return unmask.load().tokenizer


def text(canvas: Canvas, row: int, length: int) -> str:
    """What the response says: its cells up to the first EOS."""
    first = int(canvas.origin[row])
    ids = canvas.tokens[row, first : first + length].tolist()
    assert MASK not in ids or EOS in ids[: ids.index(MASK)]
    return tokenizer().decode(ids[: ids.index(EOS)] if EOS in ids else ids)


def laid(rows: list[list[int | None]], origin: list[int], seeds: list[int]) -> Canvas:
    return Canvas.of(rows, origin=origin, mask_id=MASK, eos=[EOS], seed=seeds, dtype=torch.float64)


def drawn(temperature: float, **more: Any) -> Any:
    base = Synthetic(WORDS)
    return Sampled(base, temperature=temperature, **more) if temperature else base


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(RECIPES),
    st.sampled_from(REGEXES),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 999),
    st.integers(2, 14),
    st.data(),
)
def test_any_commits_stay_in_the_language(
    name: str, regex: str, heat: float, seed: int, length: int, data: st.DataObject
) -> None:
    """With tokens given in the middle and behind the response, and a free neighbour that must not notice."""
    recipe, denoise = small(name), drawn(heat, top_k=20)
    row: list[int | None] = [5, 6, *[None] * length, 40, 41]
    other: list[int | None] = [7, *[None] * 9]
    canvas, patterns, lengths = laid([row, other], [2, 1], [seed, seed + 1]), [regex, None], [length, 9]
    try:
        held = constrain(denoise, canvas, recipe, tokenizer(), patterns, lengths)
    except UserError as error:
        assert "cells" in str(error)
        return
    end, _ = run(held, recipe, canvas)
    assert re.fullmatch(regex, text(end, 0, length)), text(end, 0, length)
    assert result(end, 1) == result(run(denoise, recipe, canvas)[0], 1)
    alone, _ = run(held, recipe, canvas[:1])
    assert result(alone, 0)[0][: length + 2] == result(end, 0)[0][: length + 2]
    pins = data.draw(st.sets(st.integers(2, length + 1), max_size=length - 1))
    row = [int(end.tokens[0, c]) if c in pins else t for c, t in enumerate(row)]
    if any(t == MASK for t in row):
        return
    canvas = laid([row, other], [2, 1], [seed + 5, seed])
    again, _ = run(constrain(denoise, canvas, recipe, tokenizer(), patterns, lengths), recipe, canvas)
    assert re.fullmatch(regex, text(again, 0, length))
    assert all(int(again.tokens[0, c]) == row[c] for c in pins)


@pytest.mark.parametrize("name", ["llada", "threshold", "dual", "prophet"])
def test_the_embedded_model_writes_valid_text(name: str) -> None:
    recipe, canvas = small(name), Canvas.new([[5, 40, 41]], 24, mask_id=MASK, eos=[EOS])
    network: Any = unmask.load().network
    base = dress(network, recipe, slots=1, length=canvas.tokens.shape[1])
    end, _ = run(constrain(base, canvas, recipe, tokenizer(), [SUM], [24]), recipe, canvas)
    assert re.fullmatch(SUM, text(end, 0, 24))


@pytest.mark.parametrize("name", ["wino", "edit", "llada21"])
def test_recipes_that_revise_are_refused(name: str) -> None:
    canvas = laid([[5, None, None]], [1], [0])
    with pytest.raises(UserError, match="revises"):
        constrain(Synthetic(WORDS), canvas, small(name), tokenizer(), [SUM], [2])


def test_without_a_pattern_nothing_is_wrapped() -> None:
    canvas, base = laid([[5, None, None]], [1], [0]), Synthetic(WORDS)
    assert constrain(base, canvas, small("wino"), tokenizer(), [None], [2]) is base


def test_too_few_cells_are_refused_with_the_number_that_works() -> None:
    canvas, recipe = laid([[5, *[None] * 4]], [1], [0]), small("threshold")
    regex = r"#### 1 2 3 4 5 6"
    with pytest.raises(UserError, match="takes 7 cells, and there are 4"):
        constrain(Synthetic(WORDS), canvas, recipe, tokenizer(), [regex], [4])
    wide = laid([[5, *[None] * 7]], [1], [0])
    end, _ = run(constrain(Synthetic(WORDS), wide, recipe, tokenizer(), [regex], [7]), recipe, wide)
    assert text(end, 0, 7) == regex
    with pytest.raises(UserError, match="cells"):
        row = replace(wide, tokens=wide.tokens.index_fill(1, torch.tensor([3]), 40))
        row = replace(row, decided_at=row.decided_at.index_fill(1, torch.tensor([3]), 0))
        constrain(Synthetic(WORDS), row, recipe, tokenizer(), [regex], [7])


@pytest.mark.parametrize("told", [False, True])
def test_the_draft_of_a_free_row_is_the_same_bit_for_bit(told: bool) -> None:
    """Also where the likeliest tokens came with the draft, which no softmax is then asked for."""
    canvas = laid([[5, *[None] * 6], [7, *[None] * 6]], [1, 1], [3, 4])

    def base(canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = Synthetic(WORDS)(canvas, query, need)
        best = draft.logits.softmax(-1).max(-1)
        return replace(draft, top=(best.indices, best.values * 0.999)) if told else draft

    held = constrain(base, canvas, small("threshold"), tokenizer(), [SUM, None], [6, 6])
    plain, made = (d(canvas, canvas.masked, canvas.masked) for d in (base, held))
    for name in ("token", "score", "peak", "margin", "entropy", "gap"):
        assert torch.equal(getattr(plain, name)[1], getattr(made, name)[1]), name
    assert not torch.equal(plain.token[0], made.token[0])
