"""What the levers' bench says: intervals and verdicts by hand, every case decodable, its folder, JSON and mistakes."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

import fill_docs
from unmask.cli import main
from unmask.models.joint import JointSampler
from unmask.study import levers, paired, results, tasks
from unmask.study.lever_cases import CASES, COMPARISONS, INTERACTIONS, Case, Comparison, Interaction, find

A, B, C, D = (Case(name, "g", name, over) for name, over in (("a", ""), ("b", "a"), ("c", "a"), ("d", "b")))


def rows(case: str, *, right: list[int], forwards: int = 1, seconds: float = 1.0, tokens: int = 8) -> list[dict]:
    fixed = {"forwards": forwards, "positions": 9, "tokens": tokens, "useful_tokens": tokens, "seconds": seconds}
    return [{"case": case, "item": i, "right": r, "exact": r, **fixed, "helpers": {}} for i, r in enumerate(right)]


def summary(*cases: tuple[Case, list[dict]], **asked) -> dict:
    return paired.summarise([c for c, _ in cases], [r for _, own in cases for r in own], draws=1000, **asked)


def test_constants_have_no_width():
    found = summary((A, rows("a", right=[1] * 6, forwards=8, seconds=2.0)), (B, rows("b", right=[1] * 6, forwards=2)))
    one, other = found["cases"]
    assert one["paired"] is None and other["paired"]["over"] == "a"
    assert other["paired"]["speed"] == {"value": 2.0, "low": 2.0, "high": 2.0, "verdict": "above"}
    assert other["paired"]["forwards"] == {"value": 0.25, "low": 0.25, "high": 0.25, "verdict": "below"}
    assert other["paired"]["time"]["value"] == 2.0 and other["milliseconds"]["value"] == 1000.0
    assert other["paired"]["accuracy"]["verdict"] == "no difference: interval holds 0"
    assert one["tokens_per_forward"]["value"] == 1.0 and other["tokens_per_forward"]["value"] == 4.0
    assert one["useful_tokens_per_second"]["value"] == 4.0


def test_accuracy_interval_is_that_of_a_binomial():
    right = [1] * 75 + [0] * 25
    (line,) = summary((A, rows("a", right=right)))["cases"]
    found, wide = line["accuracy"], 1.96 * math.sqrt(0.75 * 0.25 / 100)
    assert found["value"] == 0.75
    assert found["low"] == pytest.approx(0.75 - wide, abs=0.02) and found["high"] == pytest.approx(
        0.75 + wide, abs=0.02
    )


def test_pairs_are_compared_item_by_item():
    """Two cases that differ in one item of 100 differ by 0 to 3 items, however uncertain either is by itself."""
    right = [1, 0] * 50
    found = summary((A, rows("a", right=right)), (B, rows("b", right=[0, *right[1:]])))["cases"][1]["paired"][
        "accuracy"
    ]
    assert found["value"] == pytest.approx(-0.01)
    assert found["low"] == pytest.approx(-0.03, abs=0.011) and found["high"] == 0.0
    assert found["verdict"].startswith("no difference")


def test_rows_are_paired_by_item_and_not_by_order():
    own = rows("b", right=[1, 0, 0, 0])
    one, other = (summary((A, rows("a", right=[1, 0, 0, 0])), (B, r))["cases"][1]["paired"] for r in (own, own[::-1]))
    assert one == other and one["accuracy"]["low"] == one["accuracy"]["high"] == 0.0


def test_ratio_of_sums_not_mean_of_ratios():
    own = [*rows("a", right=[1], tokens=10, seconds=1.0), *rows("a", right=[1], tokens=10, seconds=9.0)]
    own[1]["item"] = 1
    assert summary((A, own))["cases"][0]["useful_tokens_per_second"]["value"] == 2.0


@pytest.mark.parametrize(
    ("low", "high", "null", "told"),
    [
        (0.1, 0.2, 0, "above"),
        (-0.2, -0.1, 0, "below"),
        (-0.1, 0.1, 0, "no difference: interval holds 0"),
        (0.0, 0.1, 0, "no difference: interval holds 0"),
        (2.9, 3.2, 3, "no difference: interval holds 3"),
        (3.1, 3.2, 3, "above"),
        (None, 1.0, 0, "cannot be told"),
    ],
)
def test_verdict(low, high, null, told):
    assert paired.verdict({"value": 1.0, "low": low, "high": high}, null) == told


def test_interaction_by_hand():
    """S = 2 and 3 alone and 4 together: ln 4 - ln 6; in forwards 12, 6, 4 and 2: ln 6 - ln 2 - ln 3 = 0."""
    parts = ((A, 12.0, 12), (B, 6.0, 6), (C, 4.0, 4), (D, 3.0, 2))
    own = [(case, rows(case.name, right=[1] * 5, seconds=s, forwards=n)) for case, s, n in parts]
    (found,) = summary(*own, interactions=[Interaction("d", "b", "c", "a")])["interactions"]
    assert (
        found["speed"]["value"] == pytest.approx(math.log(4 / 6))
        and found["speed"]["verdict"] == "less than the product"
    )
    assert found["forwards"]["value"] == pytest.approx(0.0)
    (found,) = summary(
        *own[:3], (D, rows("d", right=[1] * 5, seconds=2.0)), interactions=[Interaction("d", "b", "c", "a")]
    )["interactions"]
    assert found["speed"]["value"] == pytest.approx(0.0, abs=1e-12)


def test_comparison_with_a_target_and_what_was_not_measured():
    own = ((A, rows("a", right=[1] * 4, seconds=4.0)), (B, rows("b", right=[1] * 4, seconds=1.0)))
    asked = [Comparison("b over a", "b", "a", 3.0), Comparison("b over a", "b", "a", 5.0), Comparison("no", "b", "z")]
    found = summary(*own, comparisons=asked, interactions=[Interaction("b", "a", "a", "z")])
    assert [c["reached"] for c in found["comparisons"]] == ["above", "below"] and found["interactions"] == []


def test_nothing_decoded_is_no_number():
    found = summary((A, rows("a", right=[0, 0], tokens=0)), (B, rows("b", right=[0, 0])))["cases"][1]["paired"]["speed"]
    assert found == {"value": None, "low": None, "high": None, "verdict": "cannot be told"}


def test_the_same_seed_draws_the_same_items():
    one, same, other = (paired.Bootstrap(9, draws=50, seed=s).weights for s in (1, 1, 2))
    assert (one == same).all() and not (one == other).all()
    assert (one.sum(1) == 9).all() and (one[0] == 1).all() and one.dtype == np.float64


@pytest.fixture(scope="module")
def pair() -> levers.Pair:
    return levers.embedded("float32")


@pytest.fixture(scope="module")
def items() -> list[tasks.Item]:
    """A problem of one equation, one of two, one of three."""
    known = {item.gold.count(" = "): item for item in tasks.word_problems(12).items}
    return [known[n] for n in (1, 2, 3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_can_be_decoded(case, pair, items, monkeypatch):
    """With a joint sampler, be it untrained, every case is; without one, those that draw several tokens are not."""
    plan = levers.Plan(())
    monkeypatch.setattr(type(pair.dllm), "sampler", lambda self, source: None)
    lacking = levers.missing(case, items[0], pair, plan)
    assert lacking == (levers.NO_SAMPLER if "joint" in case.recipe else "")
    sampler = JointSampler(pair.dllm.network.config).initialise(1, gain=0.5).eval()
    monkeypatch.setattr(type(pair.dllm), "sampler", lambda self, source: sampler)
    for item in items:
        assert levers.missing(case, item, pair, plan) == ""
        _, job = levers.prepare(case, item, pair, plan)
        assert job.template == case.template
        holes = int(job.canvas.masked.sum())
        assert holes == (6 * item.gold.count(" = ") if case.template else levers.LENGTH)
    row = levers.measure(case, items[0], pair, plan)
    assert row["forwards"] >= 1 and row["tokens"] >= 1
    assert ("joint sampler" in row["helpers"]) == bool(lacking)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_joint_and_marginal_differ_in_the_sampler_alone(k, pair, items, monkeypatch):
    """A sampler of gain zero knows no more than the model: then both commit the same cells in the same forwards."""
    sampler = JointSampler(pair.dllm.network.config).initialise(0).eval()
    monkeypatch.setattr(type(pair.dllm), "sampler", lambda self, source: sampler)
    for item in items:
        both = [levers.prepare(find(f"{kind}-{k}"), item, pair, levers.Plan(()))[1] for kind in ("joint", "marginal")]
        joint, marginal = ([event.pick for _, event in job] for job in both)
        assert len(joint) == len(marginal) and all(torch.equal(*picks) for picks in zip(joint, marginal, strict=True))
        texts = [pair.dllm.run(job)[0].text for job in both]
        assert texts[0] == texts[1] and {int(pick.sum()) for pick in joint} == {k}


def test_a_case_decodes_as_generate(pair, items):
    item, plan = items[1], levers.Plan(())
    row = levers.measure(find("threshold"), item, pair, plan)
    out = pair.dllm.generate(item.prompt, recipe="threshold", block=8, length=24)
    assert (row["text"], row["forwards"], row["tokens"]) == (out.text, out.ledger.forwards, out.ledger.tokens)
    row = levers.measure(find("freecache-guided-1"), item, pair, plan)
    assert row["helpers"]["guide"]["forwards"] == row["forwards"]


def test_names_are_known_and_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and {case.over for case in CASES} - {""} <= set(names)
    for asked in COMPARISONS:
        assert {asked.case, asked.over} <= set(names)
    for asked in INTERACTIONS:
        assert {asked.stack, asked.one, asked.other, asked.base} <= set(names)
    assert all(find(case.over).template == case.template for case in CASES if case.over)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


def test_folder_and_json(tmp_path, capsys, pair, monkeypatch):
    monkeypatch.setattr("unmask.study.levers.QUICK", 2)
    monkeypatch.setattr(type(pair.dllm), "sampler", lambda self, source: None)
    cases = ("llada", "threshold", "joint-4")
    options = [part for name in cases for part in ("--case", name)]
    code, out, _ = run(capsys, "levers", "--quick", "--json", "--seed", "3", *options, "--out", str(tmp_path))
    told = json.loads(out)
    assert code == 0 and told["folder"].startswith(str(tmp_path / "levers-"))
    head, found, kept = results.read(told["folder"])
    assert {k: told[k] for k in kept} == kept and head["config"]["cases"] == list(cases) and head["seeds"] == 3
    assert head["config"]["recipes"]["joint-4"] == "blocks(8) + joint(4)"
    assert [one["case"] for one in told["cases"]] == ["llada", "threshold"]
    assert told["skipped"] == [{"case": "joint-4", "recipe": "blocks(8) + joint(4)", "why": levers.NO_SAMPLER}]
    assert {(row["case"], row["item"]) for row in found} == {(c, i) for c in cases[:2] for i in (0, 1)} and len(
        found
    ) == 4
    own = [row for row in found if row["case"] == "threshold"]
    assert told["cases"][1]["forwards"]["value"] == sum(row["forwards"] for row in own) / 2
    assert {"right", "exact", "positions", "useful_tokens", "seconds", "setup_seconds", "text"} <= own[0].keys()
    assert told["machine"]["threads"] == 1 and {"load", "load_after", "cpu"} <= told["machine"].keys()

    monkeypatch.setattr(fill_docs, "ROOT", tmp_path)
    section = fill_docs.levers(str(tmp_path / told["folder"]))
    assert "| threshold | `threshold` |" in section and "Left out: joint-4" in section


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "guidde-1"), "did you mean 'guided-1'"),
        (("--items", "0"), "items must be at least 1"),
        (("--dtype", "int4"), "dtype is float32"),
        (("--plot", "x.pdf"), "png or svg"),
        (("--plot", "/nowhere/at/all.png"), "cannot write"),
    ],
)
def test_mistakes_write_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "levers", "--quick", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_group_is_the_old_command(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("unmask.study.bench.main", lambda **settings: seen.append(settings) or 0)
    assert run(capsys, "--quick", "--recipe", "dual", "--prompts", "3")[0] == run(capsys)[0] == 0
    first, second = seen
    assert first["quick"] and first["recipes"] == ["dual"] and first["prompts"] == 3
    assert not second["quick"] and second["recipes"] is None and (second["length"], second["block"]) == (64, 32)
    code, _, err = run(capsys, "--quick", "levers")
    assert code == 2 and "--quick" in err and "behind levers" in err and len(seen) == 2
    assert "levers" in run(capsys, "--help")[1]


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib (the bench extra)")
def test_plot(tmp_path):
    from unmask.study.levers_plot import draw

    own = ((A, rows("a", right=[1, 0])), (B, rows("b", right=[1, 1])), (C, rows("c", right=[0, 0], seconds=0.0)))
    draw(summary(*own)["cases"], tmp_path / "a.svg", "a title")
    assert "a title" in (tmp_path / "a.svg").read_text()


def test_a_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "levers", "--plot", "a.png")
    assert code == 2 and "unmask[bench]" in err and list(tmp_path.iterdir()) == []
