"""What the bench of decoders says: roles, ends and shares of its cases, its answers, its folder, JSON and mistakes."""

import importlib.util
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedded
import fill_docs
from unmask import zoo
from unmask.cli import main
from unmask.generate import Model, load
from unmask.models.config import Layout
from unmask.study import decode_bench, decode_cases, decode_show, paired, results, tasks
from unmask.study.decode_bench import Plan, Run, measure, takes, work
from unmask.study.decode_cases import PROBLEMS, SLOW, WAYS, Case, Way, by_length, role
from unmask.study.decode_questions import FEW, Question, answer, answered

BLOCK = Layout("block", 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny random model of each role."""
    root, layouts = tmp_path_factory.mktemp("models"), {"full": Layout(), "student": BLOCK, "causal": Layout("causal")}
    return {name: str(embedded.build(root / name, layout=one, positions=700)) for name, one in layouts.items()}


@pytest.fixture(scope="module")
def loaded(tiny) -> dict[str, Model]:
    return {name: load(folder) for name, folder in tiny.items()}


@pytest.fixture(scope="module")
def ending() -> dict[str, Model]:
    """The embedded dLLM, which ends its answers, and the same weights attending block by block."""
    teacher, student = load("dllm"), load("dllm")
    student.network.config = replace(student.network.config, layout=BLOCK)
    return {"dllm": teacher, "student": student}


@pytest.fixture(scope="module")
def items() -> tuple[tasks.Item, ...]:
    return tasks.word_problems(4).items


def case(model: str, way: str, cells: int, loaded: dict[str, Model]) -> Case:
    return next(c for c in by_length(loaded, [cells], 8) if (c.model, c.way.name) == (model, way))


# The cases


def test_a_model_is_what_its_attention_says(loaded):
    assert {name: role(model) for name, model in loaded.items()} == {
        "full": "teacher",
        "student": "student",
        "causal": "twin",
    }


@pytest.mark.parametrize("kind", WAYS)
def test_every_way_can_be_decoded(kind, loaded, items):
    for one in by_length(loaded, [16], 8):
        if one.role == kind:
            row = measure(Run(one, 0, items[0]), loaded)
            assert row["case"] == one.name and 1 <= row["forwards"] <= 16 and 1 <= row["tokens"] <= 16


def test_names_are_unique(loaded):
    todo = work(loaded, Plan(tuple(loaded), (16, 32), items=3, sheets=1))
    names = [one.name for one in todo.cases]
    assert len(names) == len(set(names))
    assert {run.case.name for unit in todo.units for run in unit} == set(names)


def test_blocks_are_the_models_own(loaded):
    sizes = {(one.role, one.way.name): one.block for one in by_length(loaded, [16], 4)}
    assert sizes["teacher", "dual"] == 4 and sizes["twin", "ar"] == 0
    assert {n for (kind, way), n in sizes.items() if kind == "student" and "double" not in way} == {8}
    assert sizes["student", "double"] == 16


# When a response is done


def test_vanilla_fills_the_canvas_and_says_the_same(ending, items):
    """Ends of text cost forwards and change nothing that is read."""
    for item in items[:2]:
        whole, short = (
            measure(Run(case("dllm", way, 40, ending), 0, item), ending) for way in ("vanilla", "vanilla-eos")
        )
        assert whole["forwards"] == whole["tokens"] == 40 > short["forwards"]
        assert whole["text"] == short["text"] and whole["useful_tokens"] == short["useful_tokens"]


def test_a_student_ends_at_the_eos_too(ending, items):
    for item in items:
        rows = {
            way: measure(Run(case("student", way, 64, ending), 0, item), ending)
            for way in ("pipelined", "pipelined-published")
        }
        assert len({row["text"] for row in rows.values()}) == 1
        assert rows["pipelined"]["forwards"] <= rows["pipelined-published"]["forwards"]
        assert rows["pipelined"]["forwards"] < 20


def test_a_case_decodes_as_generate(ending, items):
    row = measure(Run(case("dllm", "threshold", 64, ending), 0, items[0]), ending)
    out = ending["dllm"].generate(items[0].prompt, recipe="threshold", block=8, length=64)
    assert (row["text"], row["forwards"], row["tokens"]) == (out.text, out.ledger.forwards, out.ledger.tokens)


# Which problems


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 2 * SLOW))
def test_a_slow_way_has_its_share_evenly(count, slow, cells):
    plan = Plan(("m",), items=count, slow=slow)
    one = Case("m", "teacher", Way("w", "llada"), cells, 8, limited=True)
    taken = [n for n in range(count) if takes(one, n, plan)]
    assert len(taken) == min(slow, count) and taken[0] == 0
    gaps = [b - a for a, b in zip(taken, [*taken[1:], count], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert all(takes(replace(one, limited=False), n, plan) for n in range(count))


def test_only_long_canvases_of_slow_ways_are_limited(loaded):
    for one in by_length(loaded, [SLOW - 1, SLOW], 8):
        assert one.limited == (one.way.name == "vanilla" and one.cells == SLOW)


def test_worksheets_of_all_sizes_have_the_same_problems(loaded):
    todo = work(loaded, Plan(tuple(loaded), (16,), items=1, sheets=2))
    groups = [unit for unit in todo.units if unit and unit[0].case.sheet]
    assert len(groups) == 2
    for group in groups:
        for model in loaded:
            answers = {
                k: [run.item.gold for run in group if (run.case.model, run.case.k) == (model, k)] for k in PROBLEMS
            }
            assert [len(answers[k]) for k in PROBLEMS] == [8, 4, 2, 1]
            ends = {k: [part.split()[0] for sheet in answers[k] for part in sheet.split("####")[1:]] for k in PROBLEMS}
            assert all(end == ends[1] and len(end) == 8 for end in ends.values())


def test_a_model_that_worksheets_do_not_fit_is_told(tmp_path):
    short = {"short": load(embedded.build(tmp_path / "short", positions=160))}
    todo = work(short, Plan(("short",), (16,), items=2, sheets=1))
    assert not any(one.sheet for one in todo.cases)
    assert [one["case"] for one in todo.skipped] == ["short x8"] and "positions too few" in todo.skipped[0]["why"]


# What is compared


def rows(name: str, right: dict[int, int], seconds: float = 1.0) -> list[dict]:
    fixed = {"exact": 0, "forwards": 1, "positions": 1, "tokens": 8, "useful_tokens": 8, "helpers": {}}
    return [{"case": name, "item": i, "right": r, "seconds": seconds, **fixed} for i, r in right.items()]


def table(*parts: list[dict]) -> paired.Table:
    models = [part[0]["case"].removesuffix(" w 8") for part in parts]
    cases = [Case(name, "student", Way("w", "d2f"), 8, 8) for name in models]
    return paired.Table(cases, [row for part in parts for row in part], draws=200)


def test_two_cases_are_compared_on_the_problems_of_both():
    found = table(rows("a w 8", {0: 1, 1: 0, 2: 0, 3: 0}), rows("b w 8", {1: 1, 3: 1}, seconds=0.5))
    assert found.line("a w 8")["accuracy"]["value"] == 0.25 and found.line("b w 8")["items"] == 2
    both = found.against("b w 8", "a w 8")
    assert both["items"] == 2 and both["accuracy"]["value"] == 1.0 and both["speed"]["value"] == 2.0


def test_rows_of_one_item_are_drawn_together():
    """Two rows an item that cancel out leave an interval without width."""
    twice = [*rows("a w 8", dict.fromkeys(range(6), 1)), *rows("a w 8", dict.fromkeys(range(6), 0))]
    found = table(twice).line("a w 8")
    assert found["items"] == 12 and found["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(
    ("kind", "low", "high", "said"),
    [
        ("within", -0.01, 0.01, "yes"),
        ("within", -0.05, -0.03, "no"),
        ("within", -0.03, 0.01, "not shown"),
        ("faster", 2.1, 3.0, "yes"),
        ("faster", 1.0, 1.9, "no"),
        ("faster", 1.9, 2.1, "not shown"),
        ("flat", 0.9, 1.2, "yes"),
        ("flat", 2.1, 3.0, "no: it grows"),
        ("flat", 0.1, 0.4, "no: it falls"),
        ("flat", 0.9, 2.1, "not shown"),
        ("faster", None, 3.0, "cannot be told"),
    ],
)
def test_answers(kind, low, high, said):
    bound = {"within": 0.02, "faster": 2.0, "flat": 2.0}[kind]
    assert answer(kind, {"value": 1.0, "low": low, "high": high}, bound, FEW) == said
    assert answer(kind, {"value": 1.0, "low": low, "high": high}, bound, FEW - 1).startswith("too few")


def test_the_cost_of_a_longer_canvas_is_told_as_a_cost():
    """Twice the seconds for the same tokens is twice the cost."""
    right = dict.fromkeys(range(FEW), 1)
    found = table(rows("short w 8", right), rows("long w 8", right, seconds=2.0))
    said = answered(Question("?", "flat", "long w 8", "short w 8", 1.25), found)
    assert said["found"]["value"] == 2.0 and said["answer"] == "no: it grows"


# The command


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["bench", "decode", *arguments]), *capsys.readouterr()

    return call


def test_folder_json_tables_and_page(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(decode_bench, "QUICK", 2)
    monkeypatch.setattr(decode_bench, "PROBLEMS", (1, 2))
    monkeypatch.setattr(decode_cases, "SLOW", 16)
    asked = ("--models", ",".join(tiny.values()), "--lengths", "16,8", "--quick", "--seed", "3")
    code, out, _ = run(*asked, "--json", "--out", str(tmp_path))
    told = json.loads(out)
    assert code == 0 and told["folder"].startswith(str(tmp_path / "decode-"))
    head, found, kept = results.read(told["folder"])
    assert {k: told[k] for k in kept} == kept and head["config"]["lengths"] == [8, 16] and head["seeds"] == 3
    assert head["config"]["roles"] == {"full": "teacher", "student": "student", "causal": "twin"}
    assert {one["case"] for one in told["skipped"]} == {"full vanilla 16", "the sweep of student"}
    lines = {one["case"]: one for one in told["cases"]}
    assert {
        "full vanilla 8",
        "full dual 8",
        "student serial 8",
        "student pipelined 16",
        "causal ar x2",
    } <= lines.keys()
    assert {row["case"] for row in found} == lines.keys()
    own = [row for row in found if row["case"] == "full threshold 8"]
    assert [row["item"] for row in own] == [0, 1]
    assert lines["full threshold 8"]["forwards"]["value"] == sum(row["forwards"] for row in own) / 2
    assert {"right", "positions", "useful_tokens", "seconds", "setup_seconds", "text", "k"} <= own[0].keys()
    assert told["machine"]["threads"] == 1 and all(one["answer"].startswith("too few") for one in told["questions"])
    assert {(one["way"], one["over"]) for one in told["pairs"]} >= {
        ("pipelined", "causal ar"),
        ("serial", "full vanilla"),
    }

    monkeypatch.setattr(fill_docs, "ROOT", tmp_path)
    page = fill_docs.decode(str(tmp_path / told["folder"]))
    for text in (
        "### Questions",
        "| full | threshold | 8 | 2 | 8 | eos |",
        "Left out: full vanilla 16",
        "| twin | ar |",
    ):
        assert text in page
    decode_show.show(kept, head["config"], head["machine"])


def test_without_models_what_is_not_embedded_is_left_out_and_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "NAMES", zoo.PAIR)
    monkeypatch.setattr(decode_bench, "QUICK", 1)
    monkeypatch.setattr(decode_bench, "work", small(decode_bench.work))
    code, out, _ = run("--quick", "--lengths", "24", "--out", str(tmp_path))
    assert code == 0 and "left out: d2f (no such embedded model)" in out
    code, out, err = run("--models", "dllm,d2f,twin", "--out", str(tmp_path / "no"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "unknown model 'd2f'" in err


def small(lay_out):
    """Work without its worksheets."""

    def found(*given):
        todo = lay_out(*given)
        units = tuple(u for u in todo.units if not u[0].case.sheet)
        return replace(todo, units=units, cases=tuple(c for c in todo.cases if not c.sheet))

    return found


MISTAKES = [
    (("--models", "dllmm"), "did you mean 'dllm'"),
    (("--models", "twin,twin"), "twin is named twice"),
    (("--models", " , "), "no model is named"),
    (("--models", ""), "no model is named"),
    (("--lengths", "64,x"), "--lengths is whole numbers joined by commas"),
    (("--lengths", "0"), "lengths are whole numbers of cells, at least 1, not 0"),
    (("--lengths", "1000", "--models", "dllm"), "positions too few for 1000 cells; use smaller --lengths"),
    (("--items", "0"), "items must be at least 1"),
    (("--slow-items", "0"), "slow items must be at least 1"),
    (("--block", "0"), "block must be at least 1"),
    (("--dtype", "int4", "--models", "dllm"), "dtype is float32"),
    (("--dtype", "int4"), "int4"),
    (("--preset", "31m", "--lengths", "8"), "--preset is about a preset, and --lengths about models"),
    (("--plot", "x.pdf"), "png or svg"),
    (("--plot", "/nowhere/at/all.png"), "cannot write"),
    (("--out", "a-file", "--lengths", "8", "--models", "twin"), "cannot write into a-file"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_write_nothing(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("a file")
    code, out, err = run("--quick", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["a-file"]


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib (the bench extra)")
def test_plot(tmp_path):
    from unmask.study.decode_plot import draw

    one = Case("a", "twin", Way("w", "ar"), 8, 0)
    cases = [one, replace(one, cells=16), replace(one, sheet=True, k=2)]
    found = paired.Table(cases, [row for c in cases for row in rows(c.name, {0: 1, 1: 0})], draws=50)
    draw([found.line(c.name) for c in cases], tmp_path / "a.svg", "a title")
    assert "a title" in (tmp_path / "a.svg").read_text()
