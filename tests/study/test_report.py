"""The page of evidence: built from folders alone, its answers follow their rules, and bad folders are refused."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import main
from unmask.errors import UserError
from unmask.study import gap, paired, report, report_folders
from unmask.study.gap_cases import TWIN, VANILLA, Case
from unmask.study.gap_summary import summarise
from unmask.study.lever_cases import Case as LeverCase
from unmask.study.lever_cases import Comparison, Interaction
from unmask.study.report_answers import answers
from unmask.study.results import Results

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = (Case(TWIN, "twin", "ar"), Case(VANILLA, "dllm", "llada"))
DUAL, PROPHET = (Case(name, "dllm", name, (name,)) for name in ("dual", "prophet"))
BOTH = Case("dual + prophet", "dllm", "dual + prophet", ("dual", "prophet"))
TODO = gap.Work(REFERENCES, (DUAL, PROPHET), (BOTH,), (), ())
PROBLEMS = 8


def rows(case: str, seconds: float, *, right: int = 1, **where: Any) -> list[dict]:
    fixed = {"positions": 9, "tokens": 8, "useful_tokens": 8, "forwards": 4, "helpers": {}, "one": 1}
    line = {**where, "case": case, "right": right, "exact": right, "seconds": seconds, **fixed}
    return [{**line, "item": i} for i in range(PROBLEMS)]


def written(root: Path, name: str, config: dict, own: list[dict], summary: dict) -> Path:
    with Results.create(name, config, root) as out:
        for row in own:
            out.row(row)
        return out.finish(summary)


def gap_folder(
    root: Path, *, both: float = 0.5, dual: float = 2.0, right: int = 1, quick: bool = False, prophet: float = 4.0
) -> Path:
    """The twin takes a second a problem, vanilla 8; what the others take and whether the stack is right is given."""
    plan = gap.Plan({"dllm": "dllm", "twin": "twin"}, items=PROBLEMS, batches=(1,), draws=50, quick=quick)
    took = {TWIN: 1.0, VANILLA: 8.0, "dual": dual, "prophet": prophet, BOTH.name: both}
    own = [row for name, s in took.items() for row in rows(name, s, stage="validation", batch=1)]
    for name, s in took.items():
        own += rows(name, s, right=right if name == BOTH.name else 1, stage="test", batch=1)
    return written(root, "gap", asdict(plan), own, summarise(TODO, own, plan))


def levers_folder(root: Path) -> Path:
    cases = [
        LeverCase(*said) for said in (("llada", "reference", "llada", ""), ("prophet", "exit", "prophet", "llada"))
    ]
    cases += [LeverCase("dual", "cache", "dual", "llada"), LeverCase("both", "exit", "dual + prophet", "llada")]
    own = [row for case, s in zip(cases, (8.0, 4.0, 2.0, 3.0), strict=True) for row in rows(case.name, s)]
    asked, stacks = (
        [Comparison("both over vanilla", "both", "llada")],
        [Interaction("both", "prophet", "dual", "llada")],
    )
    summary = paired.summarise(cases, own, draws=50, comparisons=asked, interactions=stacks)
    return written(root, "levers", {"seed": 0}, own, summary)


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["report", *arguments]), *capsys.readouterr()

    return call


def told(*folders: Path) -> str:
    return report.page(report_folders.gather(folders))


def edit(folder: Path, file: str, **changed: Any) -> None:
    found = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**found, **changed}), encoding="utf-8")


# The page


def test_the_page_is_built_and_says_where_each_table_is_from(run, tmp_path):
    results = tmp_path / "results"
    folders = [gap_folder(results), levers_folder(results)]
    code, out, err = run(str(results), "--out", str(tmp_path / "page.md"))
    assert (code, err) == (0, "") and all(folder.name in out for folder in folders)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    for folder in folders:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (line,) = [line for line in text.splitlines() if line.startswith(f"`results/{folder.name}`")]
        assert found["date"] in line and found["machine"]["cpu"] in line
        assert (found["git"]["hash"] or "unknown")[:12] in line
    assert "| dual + prophet | 1.000 [1.000, 1.000] |" in text and "16.00 [16.00, 16.00]" in text
    assert "no results folder `emergence-...` was given" in text, "what was not measured is said"
    assert len(re.findall("^- [*][*]", text, re.MULTILINE)) == 12, "the published claims have their footnotes"
    assert run(str(results), "--out", str(tmp_path / "page.md"))[0] == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text, "the same folders make the same page"


def test_every_figure_follows_the_rows(tmp_path):
    """Half of the time for the same tokens is twice the speed, and twice the speed-up over both references."""
    one, other = (told(gap_folder(tmp_path / name, both=s, dual=4 * s)) for name, s in (("a", 0.5), ("b", 0.25)))
    lines = [[line for line in text.splitlines() if line.startswith("| dual + prophet | 1.0")] for text in (one, other)]
    assert "| 16 [16, 16] | 500.0 | 500.0 | 16.00 [16.00, 16.00] | 2.00 [2.00, 2.00] |" in lines[0][0]
    assert "| 32 [32, 32] | 250.0 | 250.0 | 32.00 [32.00, 32.00] | 4.00 [4.00, 4.00] |" in lines[1][0]


def test_json_names_the_folders(run, tmp_path):
    folder = gap_folder(tmp_path / "results")
    code, out, _ = run(str(folder), "--out", str(tmp_path / "page.md"), "--json")
    assert code == 0
    assert json.loads(out) == {"page": str(tmp_path / "page.md"), "folders": [str(folder)]}


def test_the_newest_is_taken_and_a_quick_run_only_where_there_is_no_other(tmp_path):
    old, new, quick = gap_folder(tmp_path), gap_folder(tmp_path, both=0.25), gap_folder(tmp_path, quick=True)
    for day, folder in enumerate((old, new, quick), 1):
        edit(folder, "run.json", date=f"2026-01-0{day}T00:00:00+00:00")
    assert [one.name for one in report_folders.gather([tmp_path])] == [new.name]
    assert "quick run" not in told(tmp_path)
    (only,) = report_folders.gather([quick])
    assert only.name == quick.name and "quick run" in told(quick)


def test_a_summary_of_an_unknown_shape_is_told_as_tables(tmp_path):
    summary = {"curve": [{"step": 1, "right": {"value": 0.5, "low": 0.25, "high": 0.75}, "deep": {"a": [1, 2, 3]}}]}
    text = told(written(tmp_path, "peer", {"seed": 0}, [{"a": 1}], {**summary, "best": "prophet", "ok": True}))
    assert "| step | right |" in text and "| 1 | 0.5 [0.25, 0.75] |" in text
    assert "- best: prophet" in text and "- ok: yes" in text


def emergence_folder(root: Path) -> Path:
    """Four problems a way, the last of them never right; the others are right from the middle on and stay so."""
    from unmask.study.emergence import EXITS, GRID
    from unmask.study.emergence_summary import summarise as emerged

    own = []
    for stage in ("validation", "test"):
        for way in dict.fromkeys((*GRID, *EXITS)):
            for item in range(4):
                right = [0, 0, 0, 0, 0] if item == 3 else [0, 0, 1, 1, 1]
                moment = None if item == 3 else 3
                sure = {key: [0.1, 0.2, 0.9, 1.0, 1.0] for key in ("gap", "whole", "peak")}
                told = {"right": right, "same": right, "steps": 5, "correct": right[-1], "answer": "1", "text": "1"}
                where = {"stage": stage, "model": "dllm", "suffix": way.suffix, "order": way.order, "item": item}
                own.append({**where, "first": moment, "stays": moment, **told, **sure})
    plan = {"models": ["dllm"], "items": 4, "validation": 4, "length": 24, "seed": 0, "dtype": "float32"}
    return written(root, "emergence", plan, own, emerged(own, ["dllm"], margin=0.01, draws=50, seed=0))


def test_emergence_is_told_as_its_command_tells_it(tmp_path):
    folder = emergence_folder(tmp_path)
    text = told(folder)
    lines = [line for line in text.splitlines() if line.startswith("| dllm | no | low-confidence |")]
    assert [line.split(" | ")[3:6] for line in lines] == [["all", "4", "75.0%"], ["finally correct", "3", "100.0%"]]
    assert "### Early exits against static truncation" in text and "proven" in text
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="has 3 of 4 rows"):
        report_folders.read(folder)


# The answers


@pytest.mark.parametrize(
    ("took", "first", "second"),
    [
        ({"both": 0.5}, "yes", "batch 1: yes"),
        ({"both": 2.0, "dual": 4.0}, "no", "batch 1: no"),
        ({"both": 0.5, "right": 0}, "no", "batch 1: no"),
        ({"both": 0.75, "dual": 0.5}, "the gap is closed, but not shown to be by combining these two", "batch 1: yes"),
    ],
)
def test_the_answers_follow_their_rules(tmp_path, took, first, second):
    """By both; too slow; wrong; by the cache alone, to which the exit adds nothing."""
    combine, practice, control = answers(report_folders.gather([gap_folder(tmp_path, **took)]))
    assert (combine.word, practice.word, control.word) == (first, second, "not measured yet")


def test_an_interval_on_both_sides_shows_nothing(tmp_path):
    folder = gap_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for line in summary["rows"]:
        line["speedup_twin_ci"] = [0.5, 2.0]
    edit(folder, "summary.json", rows=summary["rows"], verdict={**summary["verdict"], "closed": False})
    assert [one.word for one in answers(report_folders.gather([folder]))][:2] == ["not shown", "batch 1: not shown"]


def test_without_measurements_nothing_is_claimed(tmp_path):
    found = answers(report_folders.gather([levers_folder(tmp_path)]))
    assert [one.word for one in found] == ["not measured yet"] * 3
    assert any("less than the product 1" in reason for reason in found[0].reasons)


def test_a_faster_engine_than_our_twin_is_told(tmp_path):
    """Twice the speed of a twin that takes four times as long as the other engine is half of that engine's."""
    where = {"preset": "embedded", "dtype": "float32", "what": "one token"}
    lines = [{**where, "engine": engine, "ms": ms} for engine, ms in (("kernels", 4.0), ("llama.cpp", 1.0))]
    bench = written(tmp_path, "bench-ar", {"seed": 0}, [{"ms": 1.0}], {"rows": lines})
    _, practice, _ = answers(report_folders.gather([gap_folder(tmp_path), bench]))
    (line,) = [reason for reason in practice.reasons if "llama.cpp" in reason]
    assert "4.00 times as long" in line and "0.50 times the speed of that engine" in line


# Folders that are refused


def lose_a_row(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")


def lose_half_a_row(folder: Path) -> None:
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(text[:-30], encoding="utf-8")


def type_a_number(folder: Path) -> None:
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found["rows"][2]["useful_tok_s"] *= 1.5
    (folder / "summary.json").write_text(json.dumps(found), encoding="utf-8")


REFUSED = {
    "another version": (lambda f: edit(f, "run.json", unmask="0.0.1"), "measured by unmask 0.0.1, and this is"),
    "a row is missing": (lose_a_row, f"has {PROBLEMS - 1} of {PROBLEMS} rows of 'dual + prophet, batch 1'"),
    "a row is cut off": (lose_half_a_row, "is cut off at line"),
    "a number was typed": (type_a_number, "and the rows come to"),
    "no rows": (lambda f: (f / "rows.jsonl").write_text(""), "has no rows"),
    "no file of rows": (lambda f: (f / "rows.jsonl").unlink(), "cannot read"),
    "no summary": (lambda f: (f / "summary.json").unlink(), "cannot read"),
    "no run": (lambda f: (f / "run.json").unlink(), "it was never finished"),
    "another shape": (lambda f: edit(f, "summary.json", rows=[{"a": 1}]), "is not what gap of this version writes"),
    "another kind": (lambda f: edit(f, "run.json", name="verify-dllm"), "is a run of 'verify-dllm'"),
    "half a summary": (lambda f: (f / "summary.json").write_text('{"rows": ['), "is not whole JSON"),
}


@pytest.mark.parametrize("broken", REFUSED)
def test_a_bad_folder_is_one_line_and_nothing_is_written(run, tmp_path, broken):
    folder = gap_folder(tmp_path / "results")
    spoil, message = REFUSED[broken]
    spoil(folder)
    code, out, err = run(str(folder), "--out", str(tmp_path / "page.md"))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err and str(folder) in err
    assert [one.name for one in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere is no folder"),
        ((), "results is no folder"),
        (("empty",), "empty holds no results"),
        (("good", "--out", "nowhere/page.md"), "cannot write nowhere/page.md"),
        (("good", "--out", "empty"), "cannot write empty: it is a directory"),
    ],
)
def test_mistakes_write_nothing(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs").mkdir()
    gap_folder(tmp_path / "good")
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not list((tmp_path / "docs").iterdir()) and not list((tmp_path / "empty").iterdir())


# The page that ships


PAGE = ROOT / "docs" / "evidence.md"


@pytest.mark.skipif(not PAGE.exists(), reason="no page was written yet")
def test_no_number_of_the_page_was_typed_by_hand():
    """The folders that it names make the same page again."""
    text = PAGE.read_text(encoding="utf-8")
    named = dict.fromkeys(re.findall("^`results/([^`]+)`: commit", text, re.MULTILINE))
    assert named, "the page names its folders"
    folders = report_folders.gather([ROOT / "results" / name for name in named])
    assert report.page(folders, report.pictures(folders, PAGE)) == text
