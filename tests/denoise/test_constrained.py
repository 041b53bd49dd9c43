"""Automata against enumeration, allowed tokens and the best path against brute force, formats against mistakes."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from unmask.denoise.automaton import Automaton, automaton
from unmask.denoise.constrained import best, between
from unmask.denoise.schema import fits, pattern
from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer

pytest.importorskip("outlines_core")


def vocabulary(words: list[str], decoder: Any) -> Tokenizer:
    names = {w: i for i, w in enumerate(["<eos>", "<mask>", *words])}
    inner = tokenizers.Tokenizer(models.WordLevel(names, unk_token="<mask>"))
    inner.decoder = decoder
    return Tokenizer(inner, {"eos_token": "<eos>", "mask_token": "<mask>"})


BYTES = vocabulary(["a", "b", "ab", "Ġ", "Ġa", "1", "Ã", "©"], decoders.ByteLevel())
SPACED = vocabulary(["a", "b", "ab", "1", "##b"], decoders.WordPiece("##", cleanup=False))
REGEXES = ["(ab|a)*", "a( ?b)+", "[a-b ]{2,4}|1", "é*a?", "a|b", "", "(a|b)*1", "[^1]+", "a b|ab", "a|ab", "a+?b?"]


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("tokenizer", [BYTES, SPACED], ids=["bytes", "spaced"])
def test_it_accepts_what_decodes_to_a_match(tokenizer: Tokenizer, regex: str) -> None:
    """All texts of up to four cells; a word that goes on without a space is left out, and no token is a mask."""
    made = automaton(tokenizer, regex, eos=[0], never=[1])
    spelt = [i for i in range(2, tokenizer.vocab_size) if not (tokenizer.inner.id_to_token(i) or "").startswith("##")]
    for length in range(5):
        for ids in itertools.product(spelt, repeat=length):
            said = tokenizer.decode(ids)
            match = "\ufffd" not in said and re.fullmatch(regex, said) is not None
            assert made.accepts(ids) == match, (ids, said)
            assert made.accepts([*ids, 0]) == match and made.accepts([*ids, 0, 0]) == match
    assert not made.accepts([0, 2]) and not made.accepts([1]) and not made.accepts([2, 0, 2])


@st.composite
def machines(draw: st.DrawFn) -> Automaton:
    states, count = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    cells = st.lists(st.integers(-1, states - 1), min_size=count, max_size=count)
    table = torch.tensor(draw(st.lists(cells, min_size=states, max_size=states)))
    table[:, 0] = -1
    final = torch.tensor(draw(st.lists(st.booleans(), min_size=states, max_size=states)))
    return Automaton(torch.arange(count), table, 0, final)


@settings(max_examples=80, deadline=None)
@given(machines(), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_allowed_and_best_are_those_of_all_texts(made: Automaton, length: int, seed: int, data: st.DataObject) -> None:
    count = made.next.shape[1]
    cell = st.integers(-1, count - 1)
    sure = torch.tensor(data.draw(st.lists(cell, min_size=length, max_size=length)))
    every = itertools.product(range(count), repeat=length)
    fitting = [p for p in every if made.accepts(p) and all(s in (-1, c) for s, c in zip(sure.tolist(), p, strict=True))]
    allowed = torch.zeros(length, count, dtype=torch.bool)
    for path in fitting:
        allowed[range(length), path] = True
    assert torch.equal(between(made, sure), allowed)
    place = torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))
    weight = torch.randn(len(place), count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = torch.where(sure[place][:, None] < 0, weight, 0)

    def value(path: Any) -> float:
        return float(sum(weight[n, path[i]] for n, i in enumerate(place.tolist())))

    row = [None if s < 0 else s for s in sure.tolist()]
    if not fitting:
        with pytest.raises(UserError):
            best(made, sure, place, weight)
        with pytest.raises(UserError):
            fits(made, row)
        return
    fits(made, row)
    found = tuple(best(made, sure, place, weight).tolist())
    assert found in fitting
    assert value(found) == pytest.approx(max(map(value, fitting)))


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
}


def test_formats() -> None:
    assert pattern(None) is None and pattern({"type": "text"}) is None
    assert pattern({"type": "regex", "regex": "a+"}) == "a+"
    made = pattern({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    assert made and re.fullmatch(made, '{"n": 3, "ok": true}') and not re.fullmatch(made, '{"n": "3"}')
    anything = pattern({"type": "json_object"})
    for value in ({}, {"a": 1}, {"a": [1, {"b": 2}], "c": "x\\n"}, {"a": None, "b": -1.5e3}):
        fit = re.fullmatch(anything or "", json.dumps(value))
        assert fit or value == {"a": [1, {"b": 2}], "c": "x\\n"}
    assert not re.fullmatch(anything or "", "[1]") and not re.fullmatch(anything or "", '{"a": 01}')


@pytest.mark.parametrize(
    "told",
    [
        "json",
        {},
        {"type": "xml"},
        {"type": "regex"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": 3},
    ],
)
def test_malformed_formats_are_mistakes(told: Any) -> None:
    with pytest.raises(UserError):
        pattern(told)


@pytest.mark.parametrize("regex", ["(", "a" * 9000, "(?=a)b", "[ab]*a[ab]{30}", "\ud800"])
def test_regexes_that_cannot_be_used_are_mistakes(regex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.denoise.automaton.SECONDS", 1)
    with pytest.raises(UserError):
        automaton(BYTES, regex, eos=[0])


def test_unknown_spelling_is_refused() -> None:
    with pytest.raises(UserError, match="spelt"):
        automaton(vocabulary(["a"], decoders.Metaspace()), "a", eos=[0])
