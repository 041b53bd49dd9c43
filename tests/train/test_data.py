"""The generator, the restaurant reader and the vocabulary of the embedded pair."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.train import problems, restaurants, vocabulary


def test_equations_hold_and_stay_in_range() -> None:
    for problem in islice(problems.problems(3), 500):
        for step in problem.steps:
            left = {
                "+": step.a + step.b,
                "-": step.a - step.b,
                "*": step.a * step.b,
                "/": step.a / step.b if step.b else 0,
            }
            assert step.result == left[step.op]
            assert 0 <= step.result < problems.LIMIT
        assert problem.response.endswith(f"#### {problem.steps[-1].result}")
        assert problems.answers(problem.response) == [problem.answer]


def test_numbers_of_the_question_are_used() -> None:
    """The first equation of a chain takes numbers that the question or an earlier equation names."""
    for problem in islice(problems.problems(5), 300):
        known = {int(w) for w in problem.question.split() if w.isdigit()} | {2}
        for step in problem.steps:
            assert {step.a, step.b} <= known, problem
            known.add(step.result)


@pytest.mark.parametrize("split", ["train", "draws", "templates", "numbers"])
def test_splits_are_what_they_say(split: problems.Split) -> None:
    held = {group[-1] for group in problems.PHRASES.values()}
    for problem in islice(problems.problems(1, split), 200):
        reserved = any(step.reserved for step in problem.steps)
        assert reserved == (split == "numbers")
        assert problem.held_template == (split == "templates")
        assert problem.split == split
    assert len(held) == len(problems.PHRASES)


def test_training_never_meets_a_held_out_question() -> None:
    train = {p.question for p in islice(problems.problems(0), 5000)}
    assert not train & {p.question for p in islice(problems.problems(0, "draws"), 500)}


def test_streams_repeat() -> None:
    first = [p.question for p in islice(problems.problems(7), 20)]
    assert first == [p.question for p in islice(problems.problems(7), 20)]
    assert first != [p.question for p in islice(problems.problems(8), 20)]


@pytest.mark.parametrize("k", [1, 2, 8])
def test_worksheets_have_k_answers(k: int) -> None:
    prompt, response, answers = problems.worksheet(problems.problems(0), k)
    assert problems.answers(response) == answers
    assert len(answers) == k
    assert (f"Q{k}" in prompt.split()) == (k > 1)


def test_realisation_and_doubling() -> None:
    slots = restaurants.parse("name[Blue Spice], eatType[coffee shop], customerrating[low], area[city centre]")
    assert dict(slots)["customer rating"] == "low"
    said = restaurants.realised(slots, "Blue Spice is a coffee shop in the city center .")
    assert said == {"name": True, "eatType": True, "area": True}
    assert not restaurants.realised(slots, "Blue is a shop")["name"]
    assert restaurants.doubled("it is in in town")
    assert not restaurants.doubled("it is , , in town")
    with pytest.raises(UserError, match="not a meaning representation"):
        restaurants.parse("Blue Spice")


def test_cleaning_keeps_complete_sentences(tmp_path: Path) -> None:
    rows = [
        {"mr": "name[Cocum], food[Thai]", "ref": "Cocum serves Thai food"},
        {"mr": "name[Cocum], food[Thai]", "ref": "Cocum serves food ."},
        {"mr": "name[Cocum], food[Thai]", "ref": "Cocum Cocum serves Thai food ."},
    ]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)
    kept = restaurants.clean(restaurants.read(tmp_path, "train"), rare=1)
    assert [r.sentence for r in kept] == ["Cocum serves Thai food ."]
    with pytest.raises(UserError, match="--e2e"):
        restaurants.read(tmp_path, "test")


def test_vocabulary_spells_what_it_does_not_know() -> None:
    tokenizer = vocabulary.build([])
    tokenizer.encode_special_tokens = True
    for problem in islice(problems.problems(2), 200):
        for text in (problem.question, problem.response):
            encoded = tokenizer.encode(text)
            assert vocabulary.UNK not in encoded.ids
            assert tokenizer.decode(encoded.ids) == text
            assert len(encoded.ids) == len(text.split())
    odd = tokenizer.encode("zebra <mask> 123").ids
    assert vocabulary.MASK not in odd
    assert tokenizer.decode(odd) == "zebra < mask > 123"
    assert [tokenizer.token_to_id(t) for t in vocabulary.SPECIAL] == list(range(5))
