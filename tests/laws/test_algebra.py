"""Law 9: rules are frozen and print the expression that makes them; recipes survive TOML; nothing is evaluated."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laws.common import NAMES, small
from unmask import recipes
from unmask.decode import (
    Blocks,
    Budget,
    Cosine,
    Every,
    Exponential,
    Linear,
    Recipe,
    Region,
    Staged,
    Sure,
    abandoned,
    best,
    cached,
    closed,
    confident,
    dirty,
    dream_quota,
    ended,
    entropy_bounded,
    everything,
    factor,
    filled,
    finished,
    first_step,
    frontier,
    held,
    leads,
    leftmost,
    masked,
    pace,
    parse,
    prefix,
    response,
    scattered,
    storing,
)
from unmask.errors import UserError

number = st.floats(allow_nan=False)
count = st.integers(1, 99)
by = st.sampled_from(["score", "margin", "entropy", "gap", "random"])
blocks = st.builds(Blocks, count, st.sampled_from(["origin", "absolute"]))
quota = st.builds(lambda b, n, by: b.quota(n, by=by), blocks, count, by)
schedule = st.one_of(
    st.builds(Staged, number, number, number),
    st.builds(Linear, number, number),
    st.builds(Cosine, number, number),
    st.builds(Exponential, number, number, number),
)
places = st.one_of(
    st.sampled_from([everything, masked, dirty, frontier, prefix, abandoned, response]),
    st.builds(Region, st.integers(-3, 9)),
    blocks,
    blocks.map(lambda b: b.onward),
    blocks.map(lambda b: b.settled),
    st.builds(lambda b, p, e: b.after(p, every=e), blocks, number, st.booleans()),
)
calm_rows = st.one_of(
    st.sampled_from([filled, finished, ended, first_step]),
    st.builds(Budget, count),
    st.builds(Every, count),
    blocks.map(lambda b: b.entered),
    blocks.flatmap(lambda b: st.sampled_from([leads(b), storing(b), closed(b), cached(b)])),
)


def joined(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        inner.map(lambda a: ~a),
    )


calm = st.recursive(calm_rows, joined, max_leaves=4)
wheres = st.recursive(
    places, lambda inner: joined(inner) | st.builds(lambda a, r: a.when(r), inner, calm), max_leaves=6
)
sure = st.builds(Sure, schedule, wheres, st.sampled_from(["gap", "score", "margin"]), st.none() | quota)
rows = st.recursive(calm_rows | sure, joined, max_leaves=4)
choices = st.one_of(
    st.builds(confident, number, st.booleans()),
    st.builds(best, count, by, st.none() | blocks),
    st.builds(leftmost, count),
    st.builds(factor, number, st.booleans()),
    st.builds(entropy_bounded, number, by),
    st.builds(dream_quota, count, by, number),
    st.builds(scattered, count, number),
    st.builds(pace, blocks, count, by),
    st.builds(held, quota, st.builds(confident, number), places),
    quota,
)
picks = st.recursive(
    choices,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a | b, inner | wheres, inner),
        st.builds(lambda a, b: a | b, inner, wheres),
        st.builds(lambda a, b: a >> b, inner | wheres, inner | wheres),
        st.builds(lambda a, r: a.when(r), inner, rows),
    ),
    max_leaves=6,
)


@given(st.one_of(wheres, rows, picks))
def test_a_rule_reads_back_what_it_prints(rule) -> None:
    assert parse(repr(rule)) == rule
    assert repr(parse(repr(rule))) == repr(rule)


@given(wheres, calm)
def test_not_and_when_bind_as_printed(where, condition) -> None:
    inner, outer = (~where).when(condition), ~where.when(condition)
    assert inner != outer and repr(inner) != repr(outer)
    assert parse(repr(inner)) == inner and parse(repr(outer)) == outer


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_toml(name: str) -> None:
    recipe = small(name)
    again = Recipe.from_toml(recipe.to_toml())
    assert (again, again.hash, again.name, again.cite) == (recipe, recipe.hash, recipe.name, recipe.cite)
    assert repr(again) == repr(recipe)


def test_a_recipe_read_twice_is_read_as_it_was_asked_for() -> None:
    """What is remembered is told apart by type: 1 and 1.0 are equal, and print otherwise."""
    text = recipes.entry("threshold").text
    whole, part = (Recipe.from_toml(text, threshold=value) for value in (1, 1.0))
    assert "confident(1) " in repr(whole) and "confident(1.0) " in repr(part) and whole.hash != part.hash
    assert Recipe.from_toml(text, threshold=1) == whole == Recipe.from_toml(text, threshold=1.0)
    assert Recipe.from_toml(text, block=8) != Recipe.from_toml(text, block=4)
    for _ in range(2):
        with pytest.raises(UserError, match="whole number"):
            Recipe.from_toml(text, block=[8])
        with pytest.raises(UserError, match="whole number"):
            Recipe.from_toml(text, block=([8],))


def test_names_with_quotes_survive_toml() -> None:
    recipe = Recipe(everything, best(1), name='a "b" \\ c', cite="d")
    again = Recipe.from_toml(recipe.to_toml())
    assert (again.name, again.cite) == (recipe.name, recipe.cite)


def test_the_hash_names_what_a_recipe_does() -> None:
    one, two = Recipe(everything, best(1)), Recipe(everything, everything >> best(1))
    assert one.hash == Recipe(everything, best(1), name="else", cite="who").hash == "cf04329bea25"
    assert one.hash != two.hash
    assert len({recipes.get(name).hash for name in NAMES}) == len(NAMES)
    assert hash(one) == hash(Recipe(everything, best(1)))


@given(st.one_of(wheres, rows, picks))
def test_rules_are_frozen_and_hashable(rule) -> None:
    hash(rule)
    for part in rule.walk():
        for f in fields(part):
            with pytest.raises(FrozenInstanceError):
                setattr(part, f.name, None)


def test_recipes_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        small("llada").query = masked  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evrything", "did you mean 'everything'.* at column 1 of"),
        ("masked | mask", "did you mean 'masked'.* at column 10 of"),
        ("blocks(4).onwards", "did you mean 'onward'.* at column 1 of"),
        ("everything |", "column"),
        ("everything | 4", "only rules.* at column 1 of"),
        ("everything + masked", "only by"),
        ("best(0)", "k >= 1.* at column 1 of"),
        ("best(1, by='luck')", "luck.* at column 1 of"),
        ("best(1, colour=2)", "colour.* at column 1 of"),
        ("everything(4)", "takes no arguments"),
        ("best(1) & masked", "cannot be joined"),
        ("4", "not a rule"),
        ("blocks", "not a rule"),
        ("", "column"),
        ("masked\0", "cannot read"),
    ],
)
def test_errors_name_the_column_and_the_nearest_word(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "everything.__class__",
        "everything.always",
        "best(1).when.__self__",
        "blocks(4)._name",
        "'{0}'.format(masked)",
        "(lambda: masked)()",
        "[masked for _ in '1']",
        "[masked][0]",
        "masked if masked else dirty",
        "(x := masked)",
        "f'{masked}'",
        "best(*[1])",
        "best(1, **{'k': 2})",
        "masked and dirty",
        "not masked",
        "blocks(9**9)",
        "open('x')",
        "everything; masked",
        "~" * 20000 + "masked",
        "(" * 5000 + "masked" + ")" * 5000,
    ],
)
def test_nothing_but_the_algebra_is_read(text: str) -> None:
    with pytest.raises(UserError):
        parse(text)


@given(st.text(max_size=30) | st.text("masked|&~>(). bet1", max_size=30))
def test_any_text_is_a_rule_or_a_plain_error(text: str) -> None:
    with suppress(UserError):
        parse(text)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("lada", {}, "did you mean 'llada'"),
        ("llada", {"blok": 4}, "did you mean 'block'"),
        ("llada", {"block": "4"}, "is a int"),
        ("llada", {"by": "luck"}, "luck"),
        ("llada", {"steps": 0}, "at least one step"),
        ("dream", {"steps": 0}, "at least one step"),
        ("dream-origin", {"steps": 0}, "at least one step"),
        ("dkv", {"refresh": 0}, "n >= 1"),
    ],
)
def test_settings_are_checked(name: str, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipes.get(name, **settings)
