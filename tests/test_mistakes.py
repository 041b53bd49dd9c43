"""Mistakes in recipes, wherever they are typed: one plain line that says what to do, and nothing computed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import embedded
from unmask import recipes
from unmask.cli import main
from unmask.decode import Blocks, Budget, Recipe, best, confident, everything, leftmost, parse
from unmask.decode.belief import Joint
from unmask.decode.blocks import Quota
from unmask.decode.early import Level, Sure
from unmask.decode.revise import calm
from unmask.decode.where import Every, Region, first_step
from unmask.denoise import Draws
from unmask.errors import UserError
from unmask.models.load import load_checkpoint
from unmask.recipes.levers import levers
from unmask.settings import Settings, check, read
from unmask.template import Template

HUGE = 999999999999999999999
SOUND = '[recipe]\nquery = "everything"\nunmask = "best(1)"\n'

FILES = [
    (SOUND.replace('"best(1)"', "5"), "unmask must be an expression in quotes, not 5"),
    (SOUND + "[let]\nb = 5\n", "b must be an expression in quotes, not 5"),
    ("recipe = 5\n", r"recipe must be a table, \[recipe\], not 5"),
    ("defaults = 5\n" + SOUND, r"defaults must be a table, \[defaults\], not 5"),
    ("let = 5\n" + SOUND, r"let must be a table, \[let\], not 5"),
    (SOUND + "[defaults]\nn = [1]\n", r"n in \[defaults\] must be a number or a word"),
    ("name = 5\n" + SOUND, "name must be a text, not 5"),
    ('stack = "dual"\nname = 5\n', "name must be a text, not 5"),
    ('stack = "dual"\ncite = 5\n', "cite must be a text, not 5"),
    ("stack = 5\n", "stack must be a text, not 5"),
    ('stak = "dual"\n', "did you mean 'stack'"),
    ('query = "everything"\nunmask = "best(1)"\n', r"query stands outside of its table; write \[recipe\] before it"),
    (SOUND + "beliefs = 5\n", "beliefs must be an expression in quotes, or a list of such, not 5"),
    (SOUND + "beliefs = [5]\n", "belief 1 must be an expression in quotes, not 5"),
    (SOUND + f"revisions = {HUGE}\n", "revisions must be a whole number of at least 1 and at most 2147483647"),
    (SOUND.replace("best(1)", "best(k)") + f"[defaults]\nk = {HUGE}\n", "at most 2147483647"),
    (SOUND.replace("best(1)", "confident(90) | best(1)"), "must be a number in .0, 1., not 90"),
    ("recipe = [\n", "not a recipe file"),
]


def told(error: UserError) -> str:
    """What it says, which is one line of bearable length."""
    said = str(error)
    assert "\n" not in said and len(said) < 400
    return said


@pytest.mark.parametrize(("text", "says"), FILES)
def test_a_file_with_what_does_not_belong_there(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read(str(file), {}, 24)
    assert told(caught.value).startswith(f"{file}: ")


def test_one_belief_needs_no_list() -> None:
    one = Recipe(everything, best(1), beliefs=Joint(1))  # type: ignore[arg-type]
    assert one == Recipe(everything, best(1), beliefs=(Joint(1),))
    assert Recipe.from_toml(SOUND + 'beliefs = "joint(1)"\n') == one
    for wrong in (5, "joint(1)", best(1)):
        with pytest.raises(UserError, match="beliefs must be a list of wrappers"):
            Recipe(everything, best(1), beliefs=wrong)  # type: ignore[arg-type]


LARGE = [
    f"best({HUGE})",
    f"leftmost({HUGE})",
    f"blocks({HUGE}) >> best(1)",
    f"blocks(8).quota({HUGE})",
    f"scattered({HUGE})",
    "scattered(2000000)",
    f"dream_quota({HUGE})",
    "dream_quota(2000000)",
    f"best(1).when(every({HUGE})) | best(1)",
    f"best(1).when(budget({HUGE})) | best(1)",
    f"region({HUGE}) >> best(1) | best(1)",
    f"agrees(top={HUGE}) | leftmost(1)",
    f"Recipe(query=everything, unmask=best(1), beliefs=[joint({HUGE})])",
    f"Recipe(query=everything, unmask=best(1), revisions={HUGE})",
    f"quota({HUGE})",
    f"dkv({HUGE})",
    f"guided({HUGE})",
    f"joint({HUGE}) + dual",
    f"blocks({HUGE}) + dual",
]


@pytest.mark.parametrize("text", LARGE)
def test_a_count_beyond_all_bounds(text: str) -> None:
    with pytest.raises(UserError, match=r"at most (2147483647|1000000|127)|in \[\d, 2147483647\]") as caught:
        read(text, {}, 24)
    told(caught.value)


def test_a_count_beyond_all_bounds_in_python() -> None:
    for made in (best, leftmost, Blocks, Every, Budget, Region, lambda n: Quota(Blocks(8), n)):
        for wrong in (HUGE, -HUGE, 2.5, True, "4"):
            with pytest.raises(ValueError, match="at most"):
                made(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["length", "block", "steps"])
def test_a_setting_beyond_all_bounds(name: str) -> None:
    for wrong in (HUGE, 4 * 10**18, 0, True, 2.5):
        with pytest.raises(UserError, match=f"{name} must be a whole number of at least 1 and at most 2147483647"):
            Settings(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"top_k must be a whole number of at least 0 and at most \d+"):
        Draws(top_k=HUGE)
    with pytest.raises(UserError, match="at least 1 and at most 999999999"):
        Template.parse(f"{{think:{HUGE}}}")


OUTSIDE = [
    ("confident(90) | best(1)", {}, "threshold of confident.90. must be a number in .0, 1., not 90"),
    ("confident(inf) | best(1)", {}, "in .0, 1., not inf"),
    ("confident('a') | best(1)", {}, "in .0, 1."),
    ("best(1, per=5)", {}, "per takes blocks such as blocks.8., not 5"),
    ("best(1).when(decided(5)) | best(1)", {}, "decided looks at cells such as region.2., not 5"),
    ("factor(-5)", {}, "factor of factor.-5. must be a number of at least 0, not -5"),
    ("entropy_bounded(-5)", {}, "gamma of .* must be a number of at least 0"),
    ("blocks(4).after(7) >> best(1) | best(1)", {}, "progress of .* must be a number in .0, 1."),
    ("dream_quota(4, eps=3)", {}, "eps of .* must be a number in .0, 1."),
    ("Recipe(query=everything, unmask=best(1), remask=doubted(7))", {}, "threshold of doubted.7. must be"),
    (
        "prefer(everything.when(sure(level(7), response, criterion='peak')), best(1))",
        {},
        "above 0 and at most 1, not 7",
    ),
    ("ice", {"tau": 7}, "above 0 and at most 1, not 7"),
    ("ice", {"tau": 0}, "above 0 and at most 1, not 0"),
    ("threshold", {"threshold": 2}, "in .0, 1., not 2"),
    ("wino", {"narrow": 2.0}, "threshold of doubted.2.0. must be"),
    ("ice(0)", {}, "tau of ice must be a number above 0 and at most 1, not 0"),
    ("ice(7)", {}, "tau of ice must be a number above 0 and at most 1, not 7"),
]


@pytest.mark.parametrize(("text", "given", "says"), OUTSIDE)
def test_a_setting_of_a_rule_out_of_its_range(text: str, given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(text, given)
    told(caught.value)


def test_bounds_are_open_where_they_must_be() -> None:
    for text in ("confident(0) | best(1)", "confident(1) | best(1)", "factor(0)", "entropy_bounded(inf)"):
        assert read(text, {}).unmask == parse(text)
    assert recipes.get("ice", tau=0.0).unmask.always  # a law may go where nobody's text does
    assert read("prophet(-3, -inf, inf)", {}).stop.always and levers()["ice"].settings["tau"].fault(1.0) == ""
    assert Sure(Level(2.0), everything, "peak").criterion == "peak"


def test_every_part_of_a_recipe_is_checked(tmp_path: Path) -> None:
    """A block larger than the response, in whichever part it is."""
    large = Blocks(99)
    fine, model = Recipe(everything, best(1)), load_checkpoint(embedded.build(tmp_path / "dllm")).model.config
    parts = {
        "query": everything | large,
        "unmask": large >> best(1) | best(1),
        "remask": large >> confident(0.2),
        "edit": large >> confident(0.9),
        "stop": fine.stop | large.entered & first_step,
    }
    for part, rule in parts.items():
        recipe = dataclasses.replace(fine, **({part: rule} | ({"stop": calm} if part == "edit" else {})))
        with pytest.raises(UserError, match="a block of 99 cells does not fit into a response of 24"):
            check(recipe, model, 24)


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_no_recipe_at_all(text: str) -> None:
    with pytest.raises(UserError, match="the recipe is empty; give a name"):
        read(text, {})
    with pytest.raises(UserError, match="the expression is empty"):
        parse(text)


@pytest.mark.parametrize("count", [90, 150, 400, 900, 3000, 20000])
@pytest.mark.parametrize(
    "form",
    ["not", "bracket", "chain", "when", "stack", "minus", "lever"],
)
def test_what_is_nested_deeply_is_read_or_refused_in_a_short_line(form: str, count: int) -> None:
    text = {
        "not": "~" * count + "masked >> best(1) | best(1)",
        "bracket": "(" * count + "best(1)" + ")" * count,
        "chain": "masked | " * count + "best(1)",
        "when": "best(1)" + ".when(first_step)" * count + " | best(1)",
        "stack": "dual + " * count + "one",
        "minus": "dual + threshold(" + "-" * count + "0.9)",
        "lever": "dual + " + "x" * count,
    }[form]
    try:
        made = read(text, {})
    except UserError as error:
        told(error)
    else:
        assert hash(made) and made.hash


def test_a_rule_is_a_text() -> None:
    with pytest.raises(UserError, match="a rule is written as a text"):
        parse(5)  # type: ignore[arg-type]


EXPLAIN = [
    (["threshold", "--length", "0"], "length must be a whole number of at least 1"),
    (["threshold", "--length", "-4", "--block", "8"], "length must be a whole number of at least 1"),
    (["threshold", "--block", "64", "--length", "24"], "a block of 64 cells does not fit into a response of 24"),
    (["blocks(64) >> best(1)", "--length", "24"], "a block of 64 cells does not fit into a response of 24"),
    (["dual", "--block", "8", "--set", "block=16"], "block is said twice; give one"),
    (["llada", "--set", "steps=64", "--set", "steps=64"], "steps is said twice; give one"),
    (["threshold", "--block", "0"], "block must be a whole number of at least 1 and at most 2147483647, not 0$"),
    (["threshold", "--set", "threshold=2"], "threshold is a probability in .0, 1., not 2"),
    (["ice", "--set", "tau=7"], "tau is a probability above 0 and at most 1, not 7"),
    (["wino", "--set", "narrow=7.0"], "threshold of doubted.7.0. must be a number in .0, 1."),
    (["confident(90) | best(1)"], "must be a number in .0, 1., not 90"),
    (["llada", "--set", "steps=4000000000000000000"], "at most 2147483647"),
    (["dream", "--set", "steps=2000000"], "at most 1000000"),
    ([""], "the recipe is empty"),
]


@pytest.mark.parametrize(("arguments", "says"), EXPLAIN)
def test_explain_refuses_what_no_generation_could_have(capsys, arguments: list[str], says: str) -> None:
    assert main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(says, err)


def test_explain_takes_what_fits(capsys) -> None:
    assert main(["explain", "threshold", "--block", "8", "--length", "24", "--set", "threshold=1", "--json"]) == 0
    assert "confident(1)" in capsys.readouterr().out
