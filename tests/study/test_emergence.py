"""What the emergence bench says: exits told from a recorded course are those of real decodes; verdicts by hand; CLI."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import unmask
from unmask import recipes
from unmask.cli import main
from unmask.decode import Blocks, Cosine, Level, Recipe, Staged, Sure, everything, filled, response
from unmask.decode.where import Region
from unmask.settings import Settings
from unmask.study import emergence, tasks
from unmask.study import emergence_summary as summary
from unmask.study.paired import Bootstrap
from unmask.template import CHAINS

PROPHET, SCHED, ICE = summary.EXITS
SUFFIX, PLAIN = emergence.Way(True, "score"), emergence.Way(False, "score")


@pytest.fixture(scope="module")
def model():
    return unmask.load("dllm")


@pytest.fixture(scope="module")
def items():
    return tasks.word_problems(6, seed=5).items


def row(right, gap=None, **more):
    """A row of the bench by hand."""
    steps, (first, stays) = len(right), emergence.emerged(right)
    gap = gap or [0.0] * steps
    same = [int(one == right[-1]) for one in right]
    told = {"steps": steps, "right": right, "correct": right[-1], "first": first, "stays": stays, "same": same}
    return {**told, "gap": gap, "whole": gap, "peak": [min(1.0, g) for g in gap], "item": 0, **more}


def course(model, item, way):
    job = emergence.prepare(model, item, way, 24)
    found = emergence.follow(model, job, item)
    return row(found.right, found.gap, whole=found.whole, peak=found.peak), found


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12))
def test_first_and_from_then_on(right):
    first, stays = emergence.emerged(right)
    assert (first is None) == (not any(right)) and (stays is None) == (not right[-1])
    if first is not None:
        assert right[first - 1] and not any(right[: first - 1])
    if stays is not None:
        assert all(right[stays - 1 :]) and (stays == 1 or not right[stays - 2])


@pytest.mark.parametrize("order", ["score", "random"])
def test_last_step_is_full_decoding(model, items, order):
    found = emergence.follow(model, emergence.prepare(model, items[0], emergence.Way(False, order), 24), items[0])
    recipe = recipes.get("llada", block=24, steps=24, by=order)
    assert len(found.right) == 24 and found.text == model.generate(items[0].prompt, recipe=recipe, length=24).text


@pytest.mark.parametrize(
    ("rule", "watched", "levels"),
    [
        (PROPHET, Region(2), [Staged(3.0, 2.0, 1.0), Staged(7.5, 5.0, 2.5), Staged(99.0, 99.0, 4.0)]),
        (SCHED, response, [Cosine(12.0, 4.0), Cosine(9.0, 9.0), Cosine(1.0, 0.0)]),
    ],
)
def test_exits_are_those_of_real_decodes(model, items, rule, watched, levels):
    for item, level in zip(items, levels, strict=False):
        told, found = course(model, item, SUFFIX)
        at = rule.step(told, level)
        cells = told["steps"] + 1  # and the word before the answer
        b = Blocks(cells)
        quota = b.quota(told["steps"])
        unmask_ = everything.when(Sure(level, watched, clock=quota)) | b >> quota
        recipe = Recipe(query=everything, unmask=unmask_, stop=filled)
        job = model.prepare([item.prompt], Settings(recipe=recipe, template=CHAINS[item.gold.count(" = ")]))
        job = emergence.replace(job, recipe=emergence.replace(job.recipe, stop=filled))
        (out,) = model.run(job)
        assert (out.forwards, out.regions["answer"]) == (at, found.answers[at - 1])


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.95])
def test_ice_answers_when_the_recipe_does(model, items, tau):
    for item in items[:3]:
        told, found = course(model, item, emergence.ICE)
        at = ICE.step(told, Level(tau))
        recipe = recipes.get("ice-quota", tau=tau)
        out = model.generate(item.prompt, recipe=recipe, template=CHAINS[item.gold.count(" = ")])
        assert (out.forwards, out.regions["answer"]) == (at, found.answers[at - 1])


@given(st.lists(st.integers(2, 20), min_size=1, max_size=8), st.sampled_from(["steps", "share"]))
def test_truncations_go_from_one_step_to_all(lengths, kind):
    cuts = summary.ladder([row([0] * (n - 1) + [1]) for n in lengths], kind)
    assert (cuts[-1] == lengths).all() and (cuts >= 1).all() and (np.diff(cuts.mean(1)) > 0).all()
    assert kind == "share" or (cuts[0] == 1).all()


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 9))
def test_truncation_at_equal_cost_is_itself(n, step, seed):
    """An exit after the same number of steps everywhere is the truncation it is compared with."""
    rows = [row(np.random.default_rng([seed, k]).integers(0, 2, n).tolist()) for k in range(8)]
    steps, boot = np.full(8, float(min(n, step))), Bootstrap(8, draws=50, seed=seed)
    own = boot.weights @ summary.right_at(rows, steps) / 8
    for kind in ("steps", "share"):
        assert np.allclose(summary.truncated(rows, kind, steps, boot), own)


def test_a_cut_between_two_steps_is_a_mix_of_both():
    found = [row([0, 1, 0, 1])] * 4
    assert summary.right_at(found, np.array([1.0, 2.0, 1.5, 3.75])).tolist() == [0.0, 1.0, 0.5, 0.75]


def line(rows):
    boot = Bootstrap(len(rows), draws=300, seed=0)
    return summary.exit_line(PROPHET, rows, rows, Staged(5.0, 5.0, 5.0), boot)


def test_an_exit_that_sees_when_the_answer_is_there_beats_truncation():
    easy, hard = row([1] * 8, [9.0] * 8), row([0] * 7 + [1], [1.0] * 7 + [9.0])
    found = line([easy, hard] * 20)
    assert found["nfe"] == 4.5 and found["accuracy"]["value"] == 1.0 and found["beats"]
    assert found["truncation"]["steps"]["accuracy"] == 0.5 and found["words"] == "beats truncation"
    assert found["over_full"]["value"] == 0.0


def test_an_exit_that_sees_nothing_does_not():
    easy, hard = row([1] * 8, [1.0] * 8), row([0] * 7 + [1], [9.0] * 8)
    assert line([easy, hard] * 20)["words"] != "beats truncation"
    never = line([row([0, 1, 1], [0.0] * 3)] * 9)
    assert never["saved"] == 1.0 and never["truncation"]["share"]["delta"]["value"] == 0.0 and not never["beats"]


def test_thresholds_are_the_cheapest_that_keep_accuracy_or_else_the_best():
    rows = [row([0, 0, 1, 1], [1.0, 4.5, 9.5, 20.0])] * 3
    chosen = summary.choose(rows, 1.0, PROPHET, 0.01)
    assert PROPHET.step(rows[0], chosen) == 3
    hopeless = [row([1, 0, 0, 0], [3.0, 4.0, 5.0, 6.0])] * 3
    assert PROPHET.step(hopeless[0], summary.choose(hopeless, 2.0, PROPHET, 0.01)) == 1


def test_shares_by_hand():
    rows = [row([0, 1, 1, 1]), row([1, 0, 0, 1]), row([0, 0, 0, 0]), row([1, 1, 1, 0])]
    found = summary.emergence(rows)
    assert found["accuracy"] == 0.5
    assert found["first"]["by"] == {"25%": 0.5, "50%": 0.75, "75%": 0.75} and found["first"]["never"] == 1
    assert found["stays"]["by"] == {"25%": 0.0, "50%": 0.25, "75%": 0.25} and found["stays"]["never"] == 2
    assert found["stays"]["histogram"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert summary.emergence([])["n"] == 0


def test_a_bin_of_gaps_tells_how_often_it_was_right():
    found = summary.calibration([row([0, 0, 1, 1], [0.1, 2.5, 2.6, 99.0])])
    assert [(one["low"], one["n"], one["right"], one["same"]) for one in found] == [
        (0.0, 1, 0.0, 0.0),
        (2.0, 2, 0.5, 0.5),
        (13.0, 1, 1.0, 1.0),
    ]


def test_one_lucky_exit_in_many_proves_nothing():
    """The truncation of a resample that lacks it takes all steps, too, so that there is nothing to win by it."""
    rows = [row([1, 1, 1], [9.0] * 3), *[row([0, 0, 1], [0.0] * 3)] * 30]
    assert not line(rows)["beats"] and line(rows)["truncation"]["steps"]["delta"]["value"] > 0


def test_command(tmp_path, capsys):
    command = ["bench", "emergence", "--models", "dllm", "--items", "2", "--validation", "1", "--json"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"emergence", "exits", "curves", "calibration", "verdict"} <= found.keys()
    assert [(one["suffix"], one["exit"]) for one in found["exits"]] == [
        (False, "prophet"),
        (False, "sched"),
        (True, "prophet"),
        (True, "sched"),
        (True, "ice"),
    ]
    assert len(found["emergence"]) == 8 and all(len(one["bins"]) for one in found["calibration"])
    plan = emergence.asdict(emergence.Plan(("dllm",), 2, 1))
    emergence.emergence_show.show(found, plan, found["machine"])
    assert "Early exits against static truncation" in capsys.readouterr().out


def test_what_is_there_is_not_measured_again(model, items):
    plan = emergence.Plan(("dllm",), 1, 1)
    todo = emergence.units(plan, {"validation": items[:1], "test": items[1:2]})
    keys = [run.key for unit in todo for run in unit]
    names = ("stage", "model", "suffix", "order", "item")
    found: list[dict[str, object]] = [dict(zip(names, key, strict=True)) for key in keys[:-1]]
    (new,) = emergence.rows(todo, {"dllm": model}, plan, found)
    assert len(set(keys)) == len(keys) == 8 and tuple(new[name] for name in names) == keys[-1]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["--models", "twin"], "attends to all cells"),
        (["--models", "dlm"], "dllm"),
        (["--models", ","], "no model"),
        (["--items", "0"], "items must be at least 1"),
        (["--validation", "0"], "validation must be at least 1"),
        (["--length", "0"], "length must be at least 1"),
        (["--length", "99999", "--models", "dllm"], "cells"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, said, told):
    assert main(["bench", "emergence", *said, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
