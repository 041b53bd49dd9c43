"""What `unmask bench gap` says: the choice, the interactions and the verdict by hand; runs that go on; mistakes."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import embedded
from unmask import zoo
from unmask.cli import main
from unmask.errors import UserError
from unmask.models import Layout
from unmask.study import gap, results
from unmask.study.gap_cases import FULL, LEVERS, TWIN, VANILLA, Case, stack, stacks
from unmask.study.gap_summary import best_of, frontier, summarise, verdict
from unmask.study.gap_summary import pair as pair_of
from unmask.study.interleaved import keep
from unmask.study.paired import Table

A, B, BOTH = (Case(name, "dllm", name, levers) for name, levers in (("a", ("a",)), ("b", ("b",)), ("ab", ("a", "b"))))
REFERENCES = (Case(TWIN, "twin", "ar"), Case(VANILLA, "dllm", "llada"))
ROW = {
    *("recipe", "role", "levers", "batch", "accuracy", "ci", "nfe", "positions", "tokens_per_forward"),
    *("useful_tok_s", "speedup_twin", "speedup_vanilla", "p50_ms", "p95_ms"),
}


def rows(case: str, right: list[int], *, seconds: float = 1.0, forwards: int = 8, stage: str = "test") -> list[dict]:
    """A row a problem, each of 8 useful tokens."""
    fixed = {"positions": 9, "tokens": 8, "useful_tokens": 8, "forwards": forwards, "seconds": seconds, "helpers": {}}
    where = {"stage": stage, "batch": 1, "case": case, "one": 1}
    return [{**where, "item": i, "right": r, "exact": r, **fixed} for i, r in enumerate(right)]


def table(*own: list[dict]) -> Table:
    told = [row for part in own for row in part]
    names = {row["case"] for row in told}
    return Table([c for c in (*REFERENCES, A, B, BOTH) if c.name in names], told, draws=500)


# The choice on the validation problems


def chosen(vanilla: list[int], margin: float, **cases: tuple[list[int], float]) -> str:
    told = rows(VANILLA, vanilla, stage="validation", seconds=9.0)
    told += [row for name, (r, s) in cases.items() for row in rows(name, r, seconds=s, stage="validation")]
    return best_of(told, [Case(name, "dllm", name) for name in cases], margin)


def test_the_best_is_the_fastest_of_those_as_good_as_vanilla():
    good, worse = [1] * 10, [1] * 8 + [0] * 2
    assert chosen(good, 0.01, slow=(good, 4.0), quick=(good, 2.0), wrong=(worse, 0.1)) == "quick"
    assert chosen(good, 0.2, slow=(good, 4.0), quick=(good, 2.0), wrong=(worse, 0.1)) == "wrong"


def test_where_none_is_as_good_the_one_that_is_right_most_often_is_taken():
    assert chosen([1] * 10, 0.01, wrong=([1] + [0] * 9, 0.1), better=([1] * 9 + [0], 9.0)) == "better"


def test_candidates_are_compared_on_the_problems_that_vanilla_ran_on():
    """Vanilla ran on two problems; that a candidate fails on others says nothing against it."""
    assert chosen([1, 1], 0.01, a=([1, 1, 0, 0, 0, 0], 1.0), b=([1, 0, 1, 1, 1, 1], 0.5)) == "a"


def test_rows_of_the_test_problems_do_not_choose():
    told = rows(VANILLA, [1], stage="validation") + rows("a", [1], stage="validation", seconds=2.0)
    told += rows("b", [1], stage="validation", seconds=3.0) + rows("b", [1] * 9, seconds=0.01)
    assert best_of(told, [A, B], 0.01) == "a"


# Interactions, the verdict and the frontier by hand


@pytest.mark.parametrize(
    ("seconds", "value", "words"),
    [(2.0, -math.log(2), "less than the product"), (1.0, 0.0, ""), (0.5, math.log(2), "more than the product")],
)
def test_the_interaction_is_the_logarithm_of_what_is_missing_to_the_product(seconds, value, words):
    """Vanilla takes 8 s, a 4 s, b 2 s: a product takes 1 s."""
    right = [1] * 5
    own = zip((VANILLA, "a", "b", "ab"), (8.0, 4.0, 2.0, seconds), strict=True)
    found = pair_of(table(*(rows(name, right, seconds=s) for name, s in own)), BOTH)
    assert (found["a"], found["b"]) == ("a", "b") and found["verdict"].startswith(words)
    assert found["interaction"] == pytest.approx(value, abs=1e-12)
    assert found["ci"] == pytest.approx([value, value], abs=1e-12)
    assert found["interaction_nfe"] == pytest.approx(0, abs=1e-12)  # all four took 8 forwards


def test_two_levers_multiply_where_the_interval_holds_0():
    both = rows("ab", [1] * 6, seconds=0.5)
    for row in both[::2]:
        row["seconds"] = 1.5
    own = (rows(name, [1] * 6, seconds=s) for name, s in ((VANILLA, 8.0), ("a", 4.0), ("b", 2.0)))
    found = pair_of(table(*own, both), BOTH)
    assert found["ci"][0] < 0 < found["ci"][1] and found["verdict"] == "multiply: interval holds 0"


SAME = [1, 0, 1, 1] * 25


@pytest.mark.parametrize(
    ("right", "seconds", "faster", "good"),
    [
        (SAME, 0.5, True, True),
        (SAME, 1.0, True, True),  # at least as fast: exactly as fast is enough
        (SAME, 2.0, False, True),
        ([0] * 10 + SAME[10:], 0.5, True, False),
        ([1] * 100, 0.5, True, True),
        ([0, 1, *SAME[2:]], 0.5, True, False),  # no difference in sum, but not shown to be within a point
    ],
)
def test_the_gap_is_closed_by_both_whole_intervals(right, seconds, faster, good):
    own = rows(TWIN, SAME), rows(VANILLA, SAME, seconds=8.0), rows("a", right, seconds=seconds)
    found = verdict(table(*own), "a", 0.01)
    assert found["closed"] == (faster and good) and found["best"] == "a"
    assert (found["twin"]["faster"], found["twin"]["as_good"]) == (faster, good)
    assert found["speedup_twin"] == 1 / seconds
    assert found["accuracy_delta"] == pytest.approx((sum(right) - sum(SAME)) / 100)
    assert found["ci"][0] <= found["accuracy_delta"] <= found["ci"][1]


def point(case: str, rate: float, accuracy: float) -> dict[str, Any]:
    return {"case": case, "tokens_per_forward": rate, "accuracy": accuracy}


def test_the_frontier_has_what_none_beats_in_both():
    found = frontier([point("v", 1, 0.8), point("worse", 2, 0.7), point("t", 3, 0.8), point("far", 9, 0.5)])
    assert found["cases"] == ["t"], "nothing at 3 tokens is worse than vanilla, and 30 points less right is no frontier"
    assert found["aup"] == pytest.approx(3 * 80)


def test_the_area_by_hand():
    """A rectangle to the first point, then one trapezium, whose lower end weighs exp(-3 (1 - 0.76 / 0.8)) less."""
    found = frontier([point("t", 5, 0.76), point("v", 2, 0.8)])
    assert found["cases"] == ["v", "t"]
    assert found["aup"] == pytest.approx(2 * 80 + 3 * (80 + 76 * math.exp(-3 * 0.05)) / 2)


def test_nothing_right_has_no_area():
    assert frontier([point("v", 1, 0.0), point("t", 5, 0.0)])["aup"] == 0


# The cases


def test_stacks_are_of_different_kinds_and_name_what_they_join():
    for size in (1, 2, 3):
        for one in stacks(size, 8):
            kinds = [lever.kind for lever in LEVERS if lever.name in one.levers]
            assert len(kinds) == len(set(kinds)) == size and one.name == " + ".join(one.levers)


def test_a_stack_is_slow_where_nothing_in_it_commits_several_cells():
    for one in LEVERS:
        assert stack([one], 8).slow == (one.kind not in ("commit", "revise"))


def test_slow_cases_run_on_so_many_problems_spread_over_all():
    plan = gap.Plan({}, items=100, slow=7, length=256)
    own = [n for n in range(100) if gap.taken(Case("v", "dllm", "llada", slow=True), n, plan)]
    assert len(own) == 7 and own[0] == 0  # however few there are to choose on, vanilla decodes one of them
    assert max(b - a for a, b in zip(own, [*own[1:], 100], strict=True)) <= 15
    assert all(gap.taken(A, n, plan) for n in range(100))


# The command, on two tiny random models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    root, layouts = tmp_path_factory.mktemp("models"), {"full": Layout(), "causal": Layout("causal")}
    return {name: str(embedded.build(root / name, layout=one, positions=700)) for name, one in layouts.items()}


@pytest.fixture
def few(monkeypatch) -> None:
    """Three levers of different kinds."""
    names = ("dual", "threshold", "prophet")
    monkeypatch.setattr(gap, "LEVERS", tuple(lever for lever in LEVERS if lever.name in names))


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["bench", "gap", *arguments]), *capsys.readouterr()

    return call


def asked(tiny: dict[str, str], *more: str) -> tuple[str, ...]:
    sizes = ("--items", "3", "--validation", "2", "--length", "8", "--block", "4", "--json")
    return ("--model", tiny["full"], "--twin", tiny["causal"], *sizes, *more)


def measured(own: list[dict]) -> list[tuple]:
    """What was run, in no order, without what was timed."""
    return sorted((r["stage"], r["batch"], r["case"], r["item"], r["right"], r["forwards"], r["texts"]) for r in own)


def test_json_has_rows_pairs_and_a_verdict(run, tiny, few, tmp_path):
    code, out, err = run(*asked(tiny, "--quick", "--out", str(tmp_path)))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert all(row.keys() >= ROW for row in told["rows"])
    cases = [row["case"] for row in told["rows"]]
    assert len(cases) == len(set(cases)) and {TWIN, VANILLA, FULL, "dual", "threshold", "prophet"} <= {*cases}
    assert {(p["a"], p["b"]) for p in told["pairs"]} == {
        *(("dual", "threshold"), ("dual", "prophet"), ("threshold", "prophet"))
    }
    assert all(pair.keys() >= {"interaction", "ci"} and len(pair["ci"]) == 2 for pair in told["pairs"])
    assert told["verdict"].keys() >= {"closed", "best", "speedup_twin", "accuracy_delta", "ci"}
    assert told["verdict"]["best"] in cases and isinstance(told["verdict"]["closed"], bool)
    assert told["frontier"]["cases"] and told["frontier"]["aup"] >= 0
    _, own, summary = results.read(told["folder"])
    assert len({(r["stage"], r["batch"], r["case"], r["item"]) for r in own}) == len(own)
    assert summary["rows"] == told["rows"], "the folder says what was printed"


def test_an_interrupted_run_goes_on_and_loses_no_row(run, tiny, few, tmp_path, monkeypatch):
    whole, part, counted = tmp_path / "whole", tmp_path / "part", []
    assert run(*asked(tiny, "--out", str(whole)))[0] == 0
    real = gap.measure

    def measure(one: gap.Run, *rest: Any) -> dict:
        counted.append(one)
        if len(counted) == 40:
            raise KeyboardInterrupt
        return real(one, *rest)

    monkeypatch.setattr(gap, "measure", measure)
    code, out, err = run(*asked(tiny, "--out", str(part)))
    assert (code, out, err.strip()) == (130, "", "interrupted")
    (draft,) = part.iterdir()
    kept = (draft / "rows.jsonl").read_text(encoding="utf-8")
    assert draft.name.startswith(".") and kept.count("\n") > 10
    with (draft / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "test", "ba')  # the power went here
    code, out, _ = run(*asked(tiny, "--out", str(part)))
    assert code == 0 and json.loads(out)["resumed"] == kept.count("\n")
    (folder,) = part.iterdir()
    _, own, _ = results.read(folder)
    assert (folder / "rows.jsonl").read_text(encoding="utf-8").startswith(kept)
    again = results.read(next(whole.iterdir()))[1]
    references = {TWIN, VANILLA, FULL, "dual", "threshold", "prophet"}  # the best stack is a matter of time
    one, other = (measured([r for r in found if r["case"] in references]) for found in (own, again))
    assert one == other
    keys = [(r["stage"], r["batch"], r["case"], r["item"]) for r in own]
    assert len(keys) == len(set(keys)), "no run was measured twice"


def test_another_seed_does_not_go_on_with_these_rows(tmp_path):
    def stopped(_: list[dict]) -> Iterator[dict]:
        yield {"n": 1}
        raise KeyboardInterrupt

    def call(seed: int, one: Any) -> Any:
        fixed = {"total": 2, "summarise": lambda own: {"n": len(own)}, "show": False, "resume": True}
        return keep("gap", {"seed": seed}, tmp_path, rows=one, **fixed)

    with pytest.raises(KeyboardInterrupt):
        call(0, stopped)
    assert call(1, lambda found: iter([{"n": 2}])).summary["n"] == 1
    assert call(0, lambda found: iter([{"n": 2}])).summary["n"] == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system takes no more bytes into a file, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 350, 1200])
def test_a_full_disk_is_one_line_and_the_rows_are_kept(tmp_path, size):
    """Nothing fits; some rows fit; all rows fit and the summary does not."""

    def some(found: list[dict]) -> Iterator[dict]:
        yield from ({"n": n, "text": "x" * 80} for n in range(len(found), 10))

    def call() -> Any:
        fixed = {"total": 10, "show": False, "resume": True}
        return keep("gap", {"seed": 0}, tmp_path, rows=some, summarise=lambda own: {"text": "y" * 2000}, **fixed)

    with files_of_at_most(size), pytest.raises(UserError) as caught:
        call()
    assert "cannot write into" in str(caught.value) and "\n" not in str(caught.value)
    drafts = list(tmp_path.glob(".gap-*/rows.jsonl"))
    whole = [line for file in drafts for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert len(whole) == {0: 0, 350: 3, 1200: 10}[size]
    found = call()
    assert [row["n"] for row in results.read(found.folder)[1]] == list(range(10))


@pytest.fixture(scope="module")
def stranger(tiny, tmp_path_factory) -> str:
    """An autoregressive model that has the same size and other words."""
    folder = tmp_path_factory.mktemp("stranger") / "causal"
    folder.mkdir()
    for file in Path(tiny["causal"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = [word for word in known["model"]["vocab"] if word.isdigit() or word.isalpha()][:2]
    ids = known["model"]["vocab"]
    ids[words[0]], ids[words[1]] = ids[words[1]], ids[words[0]]
    (folder / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    return str(folder)


MISTAKES = [
    (("--model", "dllmm", "--twin", "twin"), "did you mean 'dllm'"),
    (("--model", "dllm"), "give both --model and --twin"),
    (("--twin", "twin"), "give both --model and --twin"),
    (("--model", "twin", "--twin", "twin"), "twin has causal attention"),
    (("--model", "dllm", "--twin", "dllm"), "dllm has full attention"),
    (("--items", "0"), "items must be at least 1"),
    (("--validation", "0"), "at least 1"),
    (("--length", "0"), "length must be at least 1"),
    (("--length", "100000"), "this model has 1024"),
    (("--block", "0"), "block"),
    (("--dtype", "int4"), "dtype is float32"),
    (("--plot", "x.pdf"), "png or svg"),
    (("--out", "a-file"), "cannot write into a-file"),
    (("--itmes", "3"), "--items"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_write_nothing(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("a file")
    code, out, err = run("--quick", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["a-file"]


def test_models_that_read_other_tokens_are_refused(run, tiny, stranger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--model", tiny["full"], "--twin", stranger, "--quick")
    assert (code, out, err.count("\n")) == (2, "", 1) and "vocabulary is another one" in err
    assert not list(tmp_path.iterdir())


def test_what_a_pair_cannot_decode_with_is_told_with_the_reason(tiny, monkeypatch):
    """Without a joint sampler, the joint lever is left out and said."""
    monkeypatch.setattr(gap, "LEVERS", tuple(lever for lever in LEVERS if lever.name in ("joint", "threshold")))
    models = gap.pair_of({"dllm": tiny["full"], "twin": tiny["causal"]}, "float32")
    plan = gap.Plan({}, items=1, length=8, block=4)
    todo = gap.work(models, plan, gap.tasks.word_problems(1).items[0])
    assert [case.name for case in todo.single] == ["threshold"]
    assert [(row["case"], "joint sampler" in row["why"]) for row in todo.refused] == [("joint", True)]


def test_the_shipped_pair_is_the_default():
    found = gap.pair_of({}, "float32")
    assert {"dllm", "twin"} <= found.keys() and found["dllm"].name == zoo.NAMES[0]


def test_a_summary_without_a_pair_has_none():
    todo = gap.Work(REFERENCES, (A, B), (BOTH,), (), ())
    right = [1, 1]
    own = [row for name in (VANILLA, "a", "b") for row in rows(name, right, stage="validation")]
    own += [row for name in (TWIN, VANILLA, "a", "b") for row in rows(name, right)]
    found = summarise(todo, own, gap.Plan({}, items=2, batches=(1,), draws=50))
    assert found["pairs"] == [] and len(found["rows"]) == 4
