"""Stacks: what people type is read as levers, composed into the recipe that is published, and refused with a column."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import embedded
import unmask
from unmask import recipes
from unmask.cli import main
from unmask.decode import Canvas
from unmask.decode.blocks import Blocks
from unmask.decode.probe import Probing
from unmask.errors import UserError
from unmask.models.joint import JointSampler, digest, save_sampler
from unmask.recipes import stack
from unmask.recipes.levers import levers
from unmask.settings import Settings, from_expression, read
from unmask.study import evaluate
from unmask.study.tasks import Item, Task

TYPED = "dual + threshold(0.9) + prophet(7.5, 5, 2.5)"

PUBLISHED = {
    "quota": "llada",
    "threshold": "threshold",
    "factor": "factor",
    "eb": "eb",
    "prefix + threshold": "prefix",
    "prefix + quota": "prefix-quota",
    "prefix + factor": "prefix-factor",
    "dual + threshold(0.9)": "dual",
    "dual + quota(128)": "dual-quota",
    "dual + factor(factor=1)": "dual-factor",
    "freecache": "freecache",
    "freecache + quota": "freecache-quota",
    "freecache_lag": "freecache-lag",
    "dkv(refresh=8)": "dkv",
    "d2f": "d2f",
    "full + guided(1)": "guided",
    "freecache + guided": "freecache-guided",
    "prophet(7.5, 5, 2.5)": "prophet",
    "sched + quota": "sched",
    "threshold + ice": "ice",
    "one + ice(0.9)": "ice-quota",
    "wino(0.9)": "wino",
    "edit(0.9)": "edit",
    "blend(0.5)": "blend",
    "joint(4)": "adjust",
}


@pytest.mark.parametrize(("text", "name"), PUBLISHED.items())
def test_a_stack_is_the_published_recipe(text: str, name: str) -> None:
    made, published = stack.build(text), recipes.get(name)
    assert (made, made.hash) == (published, published.hash)
    if "block" in recipes.entry(name).defaults:
        assert stack.build(text, given={"block": 8}) == recipes.get(name, block=8)


def test_every_published_method_of_masked_models_is_a_stack_or_has_a_schedule_of_its_own() -> None:
    serial = {"sdar", "sdar-static", "llada2", "llada21", "fast-dllm-v2", "fast-dllm-v2-cache"}
    assert set(recipes.entries()) - set(PUBLISHED.values()) == {"ar", "dream", "dream-origin"} | serial


@pytest.mark.parametrize("name", ["dual", "prefix", "prophet", "wino", "factor", "blend", "guided"])
def test_a_published_name_stays_what_it_is(name: str) -> None:
    assert read(name, {}) == recipes.get(name)


def test_a_word_of_the_rules_alone_is_a_rule() -> None:
    for text in ("factor(1.0)", "blocks(4)", "leftmost(2)", "prefix | best(1)"):
        assert not stack.is_stack(text) and read(text, {}) == from_expression(text)
    for text in ("quota", "threshold(0.8)", "dual+one", "factor(1) + blocks(4)", "treshold(1)"):
        assert stack.is_stack(text)


def test_a_stack_prints_as_the_algebra_and_is_named_by_its_text() -> None:
    made = stack.build(TYPED)
    assert made.name == TYPED and stack.build("dual  +threshold( 0.9 )\n + prophet(7.5,5,2.5)") == made
    assert from_expression(repr(made)) == made
    assert "Fast-dLLM" in made.cite and "Know the Answer" in made.cite
    assert "stack" not in made.to_toml() and type(made).from_toml(made.to_toml()).name == TYPED


MISTAKES = [
    ("dual + treshold(0.9)", 8, "unknown lever 'treshold' at .*; did you mean 'threshold'"),
    ("dual + threshold(treshold=0.9)", 18, "unknown setting of threshold 'treshold' at .*; did you mean 'threshold'"),
    ("dual + threshold(0.9, 1)", 23, "has 1 setting, not so many"),
    ("one(3) + dual", 5, "one has no settings"),
    ("dual + freecache-lagg", 8, "did you mean 'freecache_lag'"),
    ("freecache-lag + one", 1, "the lever is written freecache_lag"),
    ("dual + dual-factor", 8, "dual-factor is a recipe"),
    ("dual + confident(0.9)", 8, "confident is a rule"),
    ("dual + dual", 8, "given twice"),
    ("dual + threshold(threshold=0.9, threshold=0.8)", 33, "given twice"),
    ("dual + threshold(1.5)", 18, r"number in \[0, 1\], not 1.5"),
    ("wino(-0.1) + dual", 6, r"number in \[0, 1\], not -0.1"),
    ("guided(above=1.0)", 14, r"number in \[0, 1\), not 1.0"),
    ("quota(0)", 7, "whole number of at least 1.*, not 0 at"),
    ("quota(2.5)", 7, "whole number of at least 1.*, not 2.5 at"),
    ("dkv(True)", 5, "whole number"),
    ("prophet('high', 5, 2)", 9, "a number, not 'high'"),
    ("prophet(nan, 5, 2)", 9, "a number, not nan"),
    ("factor(1, lenient=1)", 19, "True or False"),
    ("quota(by='luck')", 10, "one of score, margin"),
    ("dual + threshold(0.5 + 0.4)", 18, "not 0.5 \\+ 0.4"),
    ("dual + threshold(*[0.9])", 18, r"\* is not part"),
    ("dual + one(**{})", 12, r"\* is not part"),
    ("dual + threshold(0.9", 17, "never closed"),
    ("dual + threshold(0.9))", 22, "unmatched"),
    ("dual + one | best(1)", 8, r"one is a lever, and levers are joined by \+ alone"),
    ("dual | threshold", 1, r"dual is a lever, and levers are joined by \+ alone"),
    ("dual - threshold(0.9)", 1, r"levers are joined by \+ alone"),
    ("everything & one", 14, r"one is a lever, and levers are joined by \+ alone"),
    ("((dual + threshold(0.9)))", 3, r"levers are joined by \+ alone"),
    ("dual + threshold # fast", 18, "a stack has no comments"),
    ("dual # fast + one", 6, "a stack has no comments"),
    ("quota(by=-'score')", 10, "one of score"),
    ("dual ++ one", 7, "a lever is missing"),
    ("dual +", 7, "a lever is missing"),
    ("+", 1, "a lever is missing"),
    ("dual + 'one'", 8, "a lever is a name or a call"),
    ("blocks(8) + joint(9)", 19, "joint\\(9\\) draws more cells than a block of 8"),
    ("joint(k=40)", 9, "more cells than a block of 32"),
    ("guided(top=0)", 1, "agrees needs a rule"),
    ("guided + blocks(8)", 10, "blocks changes nothing"),
    ("guided + joint + d2f", 18, "guided, d2f and joint do not go together at .*; leave one out"),
    ("ü + dual", 1, "unknown lever 'ü'"),
    ("one + quota(ü=1, step=3)", 13, "unknown setting of quota 'ü'"),
    ("quota(by='ü')", 10, "one of score"),
    ("quota(steps='ü', step=3)", 13, "whole number"),
]


@pytest.mark.parametrize(("text", "column", "says"), MISTAKES)
def test_a_mistake_is_told_in_one_line_with_its_column(text: str, column: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        stack.build(text)
    told = str(caught.value)
    assert f" at column {column} of {text!r}" in told and "\n" not in told
    assert not ("did you mean" in told and "known: " in told.lower())


def test_a_typo_is_told_with_its_place_and_the_nearest_lever_alone() -> None:
    with pytest.raises(UserError) as caught:
        stack.build("dual + treshold(0.9)")
    place = "at column 8 of 'dual + treshold(0.9)'"
    assert str(caught.value) == f"unknown lever 'treshold' {place}; did you mean 'threshold'?"
    with pytest.raises(UserError, match=r"at column 8 of 'dual . xyzw'; known: blend, block_gap, blocks, "):
        stack.build("dual + xyzw")
    with pytest.raises(UserError, match=r"at column 17 of .*; leave quota out$"):
        stack.build("full + guided + quota")


def test_brackets_and_a_sign_change_nothing() -> None:
    for text in ("(dual) + threshold(0.9)", "dual + (threshold(0.9))", "((dual)) + threshold(+0.9)"):
        assert read(text, {}) == stack.build("dual + threshold(0.9)")
    assert read("(dual)", {}) == stack.build("dual")


@pytest.mark.parametrize("text", ["dual | threshold", "dual - threshold(0.9)", "((dual + threshold(0.9)))", "~one"])
def test_levers_joined_by_another_sign_are_told(text: str) -> None:
    with pytest.raises(UserError, match=r"is a lever, and levers are joined by \+ alone"):
        read(text, {}, 24)


@given(st.integers(0, 3), st.permutations(["dual", "threshold(0.9)", "prophet(7.5, 5, 2.5)", "wino(0.8)"]))
def test_the_column_of_a_typo_wherever_it_is(at: int, names: list[str]) -> None:
    typed = list(names)
    typed[at] = "x" + typed[at]
    text = " + ".join(typed)
    place = f"at column {text.index('x' + names[at]) + 1} of"
    with pytest.raises(UserError, match=f"unknown lever .* {place} .*; did you mean"):
        stack.build(text)


@given(st.permutations(["dual", "threshold(0.5)", "prophet(7.5, 5, 2.5)", "wino(0.8)", "edit(0.9)", "blocks(8)"]))
def test_the_order_of_levers_makes_no_difference(names: list[str]) -> None:
    order = " + ".join(["dual", "threshold(0.5)", "prophet(7.5, 5, 2.5)", "wino(0.8)", "edit(0.9)", "blocks(8)"])
    assert stack.build(" + ".join(names)) == stack.build(order)


@given(
    st.text(max_size=20)
    | st.text("dual+one(0.9,=)' k", max_size=20)
    | st.lists(
        st.sampled_from(
            [
                "dual",
                "+",
                "threshold",
                "(",
                "0.9",
                ")",
                "joint",
                ",",
                "k",
                "=",
                "-",
                "inf",
                " ",
                "prophet",
                "guided",
                "'",
            ]
        )
    ).map("".join)
)
def test_any_text_is_a_recipe_or_a_plain_error(text: str) -> None:
    with suppress(UserError):
        read(text, {}, 24)


def test_what_is_not_typed_follows_from_settings_and_length() -> None:
    assert stack.build("dual + quota", length=24) == stack.build("blocks(24) + dual + quota(24)")
    assert stack.build("quota", length=100) == stack.build("blocks(32) + quota(128)")
    assert stack.build("quota", given={"block": 10}, length=24) == stack.build("blocks(10) + quota(30)")
    assert stack.build("dual", given={"threshold": 0.4}) == stack.build("dual + threshold(0.4)")
    assert stack.build("threshold(0.4)", given={"threshold": 0.4}) == stack.build("threshold(0.4)")
    assert stack.build("wino", given={"threshold": 0.5}) == stack.build("wino(0.9) + threshold(0.5)")


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("threshold(0.4)", {"threshold": 0.5}, "is 0.5 elsewhere and 0.4 at column 11 of .*; give one"),
        ("blocks(8) + dual", {"block": 4}, "block of blocks is 4 elsewhere and 8 at column 8"),
        ("dual + one", {"threshold": 0.5}, "has a setting threshold; they have block"),
        ("full + guided", {"block": 4}, "goes by blocks; leave out block"),
        ("dual + quota", {"steps": 3, "by": "luck"}, "by of quota must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(text: str, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(text, Settings(**settings).rules, 24)


def test_a_stack_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'name = "mine"\nstack = """\n{TYPED}\n"""\n')
    made = read(str(file), {"block": 8}, 24)
    assert made == stack.build(f"{TYPED} + blocks(8)") and made.name == "mine" and "Fast-dLLM" in made.cite
    for text, says in (
        (f'stack = "{TYPED}x"', "invalid syntax at column 45 of"),
        (f'stack = "{TYPED}"\nquery = "b"', "not 'query'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            read(str(file), {}, 24)


def test_levers_are_no_recipes_and_say_what_they_are() -> None:
    assert not set(levers()) & {"levers", "stack"} and "levers" not in recipes.entries()
    for lever in levers().values():
        assert lever.title.endswith(".") and all(not s.fault(s.default) for s in lever.settings.values())
        assert set(lever.beside) | set(lever.refuses) <= {*levers(), *(other.kind for other in levers().values())}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "dllm"))


def test_generate_with_a_stack(capsys, model: str) -> None:
    arguments = ["generate", embedded.PROMPT, "--model", model, "--length", "12", "--json"]
    assert main([*arguments, "--recipe", TYPED, "--block", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"]["name"] == TYPED and told["recipe"]["expression"].startswith("Recipe(query=blocks(4) | ")
    assert main([*arguments, "--recipe", "dual + treshold(0.9)"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "did you mean 'threshold'" in err and "at column 8 of" in err and err.count("\n") == 1


def test_explain_counts_what_every_rule_did(capsys, model: str) -> None:
    arguments = ["explain", "prefix + threshold(0.05) + wino(0.04)", "--prompt", embedded.PROMPT, "--model", model]
    assert main([*arguments, "--length", "12", "--block", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    account = told["account"]
    assert all(len(f["chosen"]) == len(f["among"]) == len(account["rules"]) for f in account["forwards"])
    roots = {rule["part"]: i for i, rule in enumerate(account["rules"]) if rule["depth"] == 0}
    total = {part: sum(f["chosen"][i] for f in account["forwards"]) for part, i in roots.items()}
    ledger = account["ledger"]
    assert list(roots) == ["query", "unmask", "remask", "stop"] == [p for p in told["parts"] if p != "beliefs"]
    assert (total["unmask"] - total["remask"], total["remask"]) == (ledger["tokens"], ledger["revised"])
    assert total["query"] <= ledger["positions"] and total["stop"] == 1
    assert main([*arguments, "--length", "12", "--block", "4"]) == 0
    text = capsys.readouterr().out
    assert all(f" {rule['rule']}" in text for rule in account["rules"]) and "\x1b" not in text
    assert sum(line.split()[:1] == [str(n)] for n in range(1, ledger["forwards"] + 1) for line in text.splitlines())


def test_explain_tells_what_a_guide_and_a_sampler_cost_and_draws_with_a_seed(capsys, model: str, tmp_path) -> None:
    twin = str(embedded.build(tmp_path / "twin", layout=embedded.Layout("causal")))
    network = unmask.load(model).network
    save_sampler(JointSampler(network.config).initialise(1, gain=0.5), tmp_path / "joint", base=digest(network))
    common = ["--prompt", embedded.PROMPT, "--model", model, "--length", "8"]
    for recipe, name, option in (
        ("guided", "guide", ["--guide", twin]),
        ("joint(2)", "joint sampler", ["--sampler", str(tmp_path / "joint"), "--block", "8"]),
    ):
        texts = []
        for seed in ("3", "3", "4"):
            drawing = [*option, "--seed", seed, "--temperature", "2"]
            assert main(["explain", recipe, *common, *drawing, "--json"]) == 0
            texts.append(json.loads(capsys.readouterr().out)["account"]["text"])
        assert texts[0] == texts[1] != texts[2]
        assert main(["explain", recipe, *common, *drawing]) == 0
        assert re.search(rf" committed; {name} \d+ forwards, \d+ positions\n$", capsys.readouterr().out)


def test_the_list_of_levers(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes", "--levers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["lever", "kind", "needs"] and "from" not in lines[0] and len(lines) < 90
    assert max(map(len, lines)) <= 80 and any(line.startswith("blend") and "belief  guide" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes", "--levers"]) == 0
    assert "from" in capsys.readouterr().out.splitlines()[0]
    assert main(["recipes", "--levers", "--json"]) == 0
    told = {lever["name"]: lever for lever in json.loads(capsys.readouterr().out)}
    assert told["guided"]["needs"] == "guide" and told["threshold"]["needs"] == ""
    assert told["threshold"]["bounds"] == {"threshold": {"least": 0, "most": 1}}
    assert told["guided"]["bounds"]["above"] == {"least": 0, "below": 1} and told["quota"]["bounds"]["by"]["among"]


def test_explain_shows_every_part(capsys) -> None:
    for text, heads in (
        ("edit + wino(0.5)", ["rewrites (edit, each cell at most 2 x)", "gives back (remask"]),
        ("joint + dual", ["believes (beliefs)", "joint(4)"]),
        (TYPED, ["computes (query)", "blocks(32).ahead", TYPED, "Know the Answer"]),
        (repr(stack.build("edit")), ["rewrites (edit"]),
    ):
        assert main(["explain", text]) == 0
        out = capsys.readouterr().out
        assert all(head in out for head in heads)
    assert main(["recipes", "--levers", "--json"]) == 0
    assert [lever["name"] for lever in json.loads(capsys.readouterr().out)] == list(levers())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dual + treshold"], "did you mean 'threshold'"),
        (["thresold"], "unknown recipe or lever 'thresold'; did you mean 'threshold'"),
        (["dual", "--model", "dllm"], "--model: of use with --prompt only"),
        (["dual", "--sampler", "x", "--seed", "0"], "--sampler and --seed: of use with --prompt only"),
        (["dual", "--prompt", "Tom", "--sampler", "x"], "recipe 'dual' asks no sampler"),
        (["dual + one", "--prompt", " "], "the prompt is empty"),
        (["dual + one", "--prompt", "Tom", "--block", "0"], "whole number of at least 1"),
        (["dual", "--prompt", "Tom", "--model", "twni"], "did you mean 'twin'"),
        (["threshold(0.9)", "--prompt", "Tom", "--model", "twin"], "use recipe 'ar'"),
        (["blocks(99) + dual", "--prompt", "Tom"], "block of 99 cells does not fit"),
        (["Recipe(query=evrything, unmask=best(1))"], "did you mean 'everything'.* at column 14 of"),
    ],
)
def test_explain_tells_mistakes(capsys, arguments: list[str], says: str) -> None:
    assert main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(says, err)


@pytest.fixture(scope="module")
def blockwise(tmp_path_factory) -> str:
    layout = embedded.Layout("block", size=8)
    return str(embedded.build(tmp_path_factory.mktemp("blocks") / "dllm", layout=layout))


class Heard:
    """A streamer that keeps the ids it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value) -> None:
        self.ids += value.tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_a_probe_answers_ahead_of_the_text(capsys, blockwise: str) -> None:
    """By name of its anchor, from Python, streamed, on the command line, and in an evaluation: holes are left out."""
    loaded, heard = unmask.load(blockwise), Heard()
    text = "d2f + probe('####', 2, -inf)"
    out = loaded.generate(embedded.PROMPT, length=24, recipe=text, streamer=heard)
    (anchor,) = loaded.tokenizer.encode("####")
    prompt = loaded.encode(embedded.PROMPT)
    cells = out.canvas.tokens[0, len(prompt) + 8 : len(prompt) + 11].tolist()
    assert out.forwards == 1 and out.canvas.masked[0].sum() == 21 and out.tokens == cells[: len(out.tokens)]
    assert cells[0] == anchor and out.text.startswith("####") and len(out.tokens) >= 2
    assert heard.ids == [*prompt, *out.tokens, -1]
    assert out.ledger.helpers["probe"] == {"forwards": 1, "positions": 3, "seconds": 0}
    assert out.ledger.positions == len(prompt) + 8 and out.recipe.name == text

    arguments = ["--model", blockwise, "--length", "24", "--json"]
    assert main(["generate", embedded.PROMPT, *arguments, "--recipe", text]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == out.text
    assert main(["explain", text, "--prompt", embedded.PROMPT, *arguments]) == 0
    told = json.loads(capsys.readouterr().out)["account"]
    assert told["text"] == out.text and told["ledger"]["helpers"]["probe"]["positions"] == 3

    item = Item(embedded.PROMPT, lambda said: {"right": float(said == out.text)}, "")
    task = Task("one", (item, item), 24)
    tokenizer = Tokenizer.from_file(f"{blockwise}/tokenizer.json")
    rows = list(evaluate.run(loaded.network, tokenizer, task, evaluate.recipe_for(loaded.network, text, 24)))
    assert [(row["text"], row["right"], row["tokens"]) for row in rows] == [(out.text, 1.0, len(out.tokens))] * 2


def test_a_probe_that_is_never_sure_writes_the_same_text(blockwise: str) -> None:
    loaded, prompts = unmask.load(blockwise), [embedded.PROMPT, "Tom has 5 eggs ."]
    runs = [loaded.generate(prompts, length=40, recipe=f"d2f{more}") for more in ("", " + probe('####', 4, inf)")]
    assert [(o.text, o.forwards) for o in runs[0]] == [(o.text, o.forwards) for o in runs[1]]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("d2f + probe('Größe', 2)", "the anchor 'Größe' reads .* in this model's vocabulary; use words that it knows"),
        ("d2f + probe('####', 8)", r"at column 7 of .*; use fewer cells, or larger blocks"),
        ("d2f + probe('The answer is', 4)", r"a probe of 11 cells \(7 of them for the anchor\) does not fit"),
        ("d2f + probe([1], 2)", "holds token 1, which is a mask or an end in this model"),
        ("d2f + probe([99999], 2)", "none of its tokens 0 to"),
        ("d2f + prob('####')", "did you mean 'probe'"),
        ("d2f + probe(####)", "a stack has no comments at column 13"),
    ],
)
def test_a_probe_that_cannot_be_is_told_in_one_line(capsys, blockwise: str, recipe: str, says: str) -> None:
    assert main(["generate", embedded.PROMPT, "--model", blockwise, "--length", "24", "--recipe", recipe]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err), err


def test_quotes_hold_no_signs_of_a_stack() -> None:
    for anchor in ("a + b", "####", "(", "it's", 'say "so', "a  b", "[c] # d", "back\\slash + "):
        text = f"d2f  + probe({anchor!r}, 2)   + eos_stop"
        made = stack.build(text)
        probes = {rule.anchor for rule in made.walk() if isinstance(rule, Probing)}
        assert stack.is_stack(text) and probes == {anchor} and stack.build(made.name) == made
        with pytest.raises(UserError, match=f"at column {len(f'd2f + probe({anchor!r}, 2) + ') + 1} of"):
            stack.build(f"d2f + probe({anchor!r}, 2) + eosstop")


def test_a_window_leaves_out_what_is_far_behind_and_keeps_given_words():
    row = [5, 6, *[None] * 4, 7, *[None] * 9]
    canvas = Canvas.of([row], origin=[2], mask_id=60)
    near = Blocks(4).near(1)(canvas)[0].tolist()
    assert near == [True] * 10 + [False] * 6
    assert Blocks(4).near(0)(canvas)[0].tolist() == [True] * 7 + [False] * 9  # the given word at 6 lies behind it
    assert Blocks(4).near(9)(canvas).all()
