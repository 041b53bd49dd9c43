"""What the control bench says: asks that references satisfy, checks that notice faults, verdicts by their rule, CLI."""

import gzip
import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.cli import main
from unmask.errors import UserError
from unmask.study import control, report, report_folders
from unmask.study.control_cases import BLIND, CASES, LONGEST, SHORTEST, TASKS, VANILLA, Case, asks, cells, infill, read
from unmask.study.control_summary import KEEPS, LOSES, OPEN, summarise, whole, words
from unmask.study.report_answers import answers
from unmask.study.results import Results
from unmask.train.restaurants import Restaurant, parse

SENTENCES = [
    ("name[Blue Spice], eatType[pub], area[riverside]", "Blue Spice is a pub that is in the riverside area ."),
    ("name[The Mill], food[Indian], area[riverside]", "In the riverside area The Mill serves Indian food ."),
    ("name[The Punter], eatType[restaurant], near[Avalon]", "The Punter is a family restaurant that is near Avalon ."),
]
ROWS = [Restaurant(parse(meaning), sentence) for meaning, sentence in SENTENCES]


@pytest.fixture(scope="module")
def models():
    return {"dllm": unmask.load("dllm"), "twin": unmask.load("twin"), "student": unmask.load("d2f")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of E2E's shape: three restaurants, a second reference of one, one too short, one that lacks a slot."""
    root = tmp_path_factory.mktemp("e2e")
    more = [(SENTENCES[0][0], "A pub in the riverside area is called Blue Spice ."), ("name[Zizzi]", "Zizzi .")]
    more += [("name[Giraffe], area[riverside]", "Giraffe is a place that is in the middle of the city .")]
    with gzip.open(root / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr, ref in (*SENTENCES, *more))
    return root


def test_the_reference_passes_its_own_asks_and_faults_are_seen(models):
    coder = models["dllm"].tokenizer
    for row in ROWS:
        ids = coder.encode(row.sentence)
        between, _, same, _, around = asks(row)
        for ask in (between, same, around):
            form = ask.form(coder.encode)
            assert 0 < form.count(None) < len(form) == len(ids)
            assert ask.check(form, ids, row.sentence)["right"] == 1
            at = form.index(None)
            for wrong in (ids[:-1], [*ids, ids[-1]]):
                assert ask.check(form, wrong, coder.decode(wrong))["right"] == 0
            given = next(n for n, cell in enumerate(form) if cell is not None)
            moved = [*ids[:given], ids[at], *ids[given + 1 :]]
            assert ask.check(form, moved, coder.decode(moved))["held"] == 0
            blank = [ids[-1] if cell is None else cell for cell in form]
            assert ask.check(form, blank, coder.decode(blank))["right"] == 0  # a slot is not said


def test_doubling_fails_where_words_are_given_only(models):
    coder, row = models["dllm"].tokenizer, ROWS[0]
    between, _, same, _, _ = asks(row)
    twice = row.sentence.replace("that is", "is is")
    ids = coder.encode(twice)
    assert between.check(between.form(coder.encode), ids, twice) | {"doubled": 1, "right": 0, "held": 1, "said": 1} == (
        between.check(between.form(coder.encode), ids, twice)
    )
    assert same.check(same.form(coder.encode), ids, twice)["right"] == 1


@given(st.sampled_from(ROWS))
@settings(max_examples=3)
def test_lengths_are_exact_and_slots_stand_where_the_reference_has_them(row):
    flat = row.sentence.split()
    _, *lengths, around = asks(row)
    counts = [sum(len(p.split()) if isinstance(p, str) else cells(p) for p in ask.parts) for ask in lengths]
    assert counts == [len(flat) - 2, len(flat), len(flat) + 2]
    place = 0
    for part in around.parts:
        if isinstance(part, str):
            assert flat[place : place + len(part.split())] == part.split()
        place += len(part.split()) if isinstance(part, str) else cells(part)
    assert place == len(flat)


def test_nothing_is_asked_where_the_given_words_say_all():
    row = Restaurant(parse("name[Zizzi], area[riverside]"), "Zizzi is a very nice place for all in riverside .")
    assert infill(row) is None and asks(row) == ()


def test_data_is_one_sound_reference_a_meaning(models, data):
    encode = models["dllm"].tokenizer.encode
    found = read(data, 3, encode)
    assert [own[0].row.sentence for own in found] == [sentence for _, sentence in SENTENCES]
    assert all(SHORTEST <= len(own[0].row.sentence.split()) <= LONGEST for own in found)
    with pytest.raises(UserError, match="3 restaurants"):
        read(data, 4, encode)


def test_every_case_holds_what_is_given_or_refuses(models):
    own = asks(ROWS[0])
    plan = control.Plan({})
    for case in CASES:
        for part, ask in enumerate(own):
            row = control.measure(control.Run(case, 0, part, ask), models, plan)
            refuses = case.way == "suffix" and (case.role == "twin" or ask.task == "infill")
            assert bool(row["refused"]) == refuses
            if refuses:
                assert row["right"] == 0 and "loglik" not in row
                continue
            assert row["held"] == 1 and row["forwards"] > 0 and row["seconds"] > 0 and row["loglik"] < 0
            if case.name == VANILLA:
                assert row["forwards"] == ask.form(models["dllm"].tokenizer.encode).count(None)


def test_shares_take_so_many_cells_a_forward(models):
    ask, (case,) = asks(ROWS[0])[2], [case for case in CASES if case.share == 4]
    blank = ask.form(models["dllm"].tokenizer.encode).count(None)
    assert control.measure(control.Run(case, 0, 2, ask), models, control.Plan({}))["forwards"] == -(-blank // 4)


def test_likelihood_is_of_each_token_given_those_before(models):
    twin = models["twin"]
    prompt, text = twin.encode(ROWS[0].prompt), twin.tokenizer.encode(ROWS[0].sentence)
    total = 0.0
    for n, token in enumerate(text):  # one token at a time, each over its own prefix
        total += control.likelihood(twin, [*prompt, *text[:n]], [[token]])[0]
    (whole_text,) = control.likelihood(twin, prompt, [text])
    assert whole_text == pytest.approx(total / len(text), abs=1e-4)
    assert whole_text > control.likelihood(twin, prompt, [text[::-1]])[0]


def test_blind_twin_continues_as_it_would_without_given_words(models):
    twin = models["twin"]
    ask = asks(ROWS[0])[2]
    n = ask.form(twin.tokenizer.encode).count(None)
    run = control.Run(CASES[-2], 0, 2, ask)
    free = twin.generate(ROWS[0].prompt, recipe="ar", length=n, eos="never")
    assert control.blind(run, twin)[0].ids[:n] == free.tokens


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.05, 0.1, KEEPS), (-0.06, 0.1, OPEN), (-0.3, -0.06, LOSES), (-0.3, -0.05, OPEN), (0.0, 0.0, KEEPS)],
)
def test_verdicts_follow_the_rule(low, high, said):
    assert words({"value": 0.0, "low": low, "high": high}, 0.05) == said


def test_one_lost_task_loses_control():
    assert whole([KEEPS, OPEN, LOSES]) == LOSES
    assert whole([KEEPS, OPEN]) == OPEN and whole([KEEPS, KEEPS]) == KEEPS


def row(case, item, task, right, seconds=1.0, refused=""):
    told = {"case": case, "item": item, "part": 0, "task": task, "one": 1, "right": right, "refused": refused}
    cost = {"loglik": -1.0, "forwards": 4, "positions": 9, "seconds": seconds}
    return told | ({} if refused else {**cost, "held": 1, "said": right, "words": 1, "doubled": 0})


FAST, REFUSES = Case("fast", "dllm", "dual"), Case("refuses", "student", "d2f", "suffix")
TABLE = (Case(VANILLA, "dllm", "llada"), FAST, REFUSES, Case(BLIND, "twin", "ar", "blind"))


def measured(fast, blind, seconds=0.5):
    """Ten restaurants a task: vanilla always succeeds, the other two in so many; one refuses."""
    for task in TASKS:
        for item in range(10):
            yield row(VANILLA, item, task, 1)
            yield row("fast", item, task, int(item < fast), seconds)
            yield row("refuses", item, task, 0, refused="no")
            yield row(BLIND, item, task, int(item < blind), 0.1)


def test_a_summary_by_hand():
    found = summarise(TABLE, list(measured(5, 0)), margin=0.05, draws=200)
    line = next(line for line in found["rows"] if (line["case"], line["task"]) == ("fast", "slot"))
    assert line["success"]["value"] == 0.5 and line["over_vanilla"]["value"] == -0.5
    assert line["over_vanilla"]["high"] < -0.05 and line["verdict"] == LOSES
    assert line["speedup"] == {"value": 2, "low": 2, "high": 2}
    assert line["perplexity"] == pytest.approx(math.e)
    refused = next(line for line in found["rows"] if line["case"] == "refuses")
    assert refused["refused"] == 1 and refused["success"]["high"] == 0 and refused["verdict"] == LOSES
    assert refused["perplexity"] is None and refused["speedup"] is None
    assert {one["case"] for one in found["refused"]} == {"refuses"}


@pytest.mark.parametrize(
    ("fast", "blind", "seconds", "word"),
    [
        (10, 0, 0.5, "yes"),
        (2, 0, 0.5, "no"),
        (9, 0, 0.5, "not shown"),
        (10, 10, 0.5, "no advantage shown"),
        (10, 0, 2.0, "not shown"),
    ],
)
def test_the_third_question_is_answered_by_its_rule(tmp_path, fast, blind, seconds, word):
    own = list(measured(fast, blind, seconds))
    folder = written(tmp_path, own)
    (told,) = report_folders.gather([folder])
    answer = answers([told])[2]
    assert answer.word == ", ".join(f"{task}: {word}" for task in TASKS)
    page = report.page([told])
    assert answer.word in page and "Is control kept?" in page and "refuses (infill)" in page


def test_a_folder_that_lacks_rows_is_refused(tmp_path):
    folder = written(tmp_path, list(measured(10, 0)))
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="9 of 10 rows"):
        report_folders.read(folder)


def written(root, own):
    plan = control.Plan({"dllm": "dllm", "twin": "twin"}, items=10)
    with Results.create("control", asdict(plan), root) as out:
        for one in own:
            out.row(one)
        return out.finish(summarise(TABLE, own, margin=0.05, draws=200))


def test_a_run_that_was_interrupted_goes_on(models, data):
    own = read(data, 2, models["dllm"].tokenizer.encode)
    todo = control.units([one[:1] for one in own], [CASES[4], CASES[6]])
    plan = control.Plan({}, items=2)
    first = list(control.rows(todo, models, plan, []))
    assert len(first) == 4
    rest = list(control.rows(todo, models, plan, first[:3]))
    key = ("case", "item", "part", "right", "refused")
    assert [{k: one[k] for k in key} for one in rest] == [{k: first[3][k] for k in key}]


def test_command_line(tmp_path, data, capsys):
    code = main(["bench", "control", "--e2e", str(data), "--items", "1", "--json", "--out", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and {(line["case"], line["task"]) for line in found["rows"]} == {
        (case.name, task) for case in CASES for task in TASKS
    }
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("control-") and found["folder"] == str(folder)
    assert report_folders.read(folder).kind == "control"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--e2e", "/nowhere"], "no E2E data at /nowhere"),
        (["--e2e", "DATA", "--items", "0"], "items must be at least 1"),
        (["--e2e", "DATA", "--items", "9"], "3 restaurants"),
        (["--e2e", "BROKEN"], "cannot read the E2E data"),
        ([], "--e2e"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, data, capsys, given, said):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "test.jsonl.gz").write_bytes(b"no gzip")
    given = [{"DATA": str(data), "BROKEN": str(broken)}.get(word, word) for word in given]
    assert main(["bench", "control", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
