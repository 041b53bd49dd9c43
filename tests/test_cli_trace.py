"""`unmask trace`: what it prints and writes, what its exit codes say, and how it tells a mistake."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import embedded
from unmask.cli import generate, main, trace
from unmask.study.page import page
from unmask.study.trace_file import read

PROMPT = embedded.PROMPT
PAGE = Path(__file__).resolve().parents[1] / "docs" / "trace.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "dllm"))


@pytest.fixture
def run(capsys):
    def command(*arguments: object) -> tuple[int, str, str]:
        code = main(["trace", *map(str, arguments)])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def record(run, model, tmp_path):
    def made(name: str, *arguments: object, prompts: tuple[str, ...] = (PROMPT,)) -> Path:
        code, _, err = run("record", *prompts, "--model", model, "--length", 8, "-o", tmp_path / name, *arguments)
        assert code == 0, err
        return tmp_path / name

    return made


def test_a_record_is_what_generate_writes(run, model, tmp_path, capsys) -> None:
    how = ("--model", model, "--length", "8", "--recipe", "dual", "--block", "4", "--temperature", "1", "--seed", "5")
    assert main(["generate", PROMPT, *how, "--json"]) == 0
    mine = json.loads(capsys.readouterr()[0])
    code, out, err = run("record", PROMPT, *how, "-o", tmp_path / "a.json", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["rows"] == [{"prompt": PROMPT, "text": mine["text"], "forwards": mine["forwards"]}]
    assert told["recipes"] == [mine["recipe"]] and told["settings"]["temperature"] == 1.0
    assert told["bytes"] == (tmp_path / "a.json").stat().st_size and told["model"] == mine["model"]
    found = json.loads(run("replay", tmp_path / "a.json", "--json")[1])
    assert found == {key: told[key] for key in told if key not in ("trace", "bytes")}
    timeless = ("forwards", "positions", "cache_hits", "tokens", "useful_tokens", "exit_steps")
    assert [found["ledger"][key] for key in timeless] == [mine["ledger"][key] for key in timeless]


def test_replay_needs_no_model(run, record, monkeypatch) -> None:
    file = record("a.json.gz", "--drafts", prompts=(PROMPT, "Tom has 6 eggs ."))
    assert file.read_bytes()[:2] == b"\x1f\x8b"
    monkeypatch.setattr("unmask.generate.load", None)
    monkeypatch.setattr("unmask.models.load.load_checkpoint", None)
    code, out, err = run("replay", file)
    trace = read(file)
    assert (code, err) == (0, "") and len(trace.rows) == 2
    assert out.splitlines()[:2] == [row.text for row in trace.rows] and "useful tok/s" in out
    assert any(move.drafts.cells for event in trace.steps for move in event.moves if move)
    code, _, err = run("replay", file, "--visual")
    last = [trace.pieces[t] for t in trace.steps[-1].moves[0].pick.tokens]
    assert (
        code == 0 and "░" not in err and "\x1b" not in err and all(word.strip() in err or "·" in err for word in last)
    )


def test_a_prompt_from_stdin(run, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    code, out, err = run("record", "-", "--model", model, "--length", 8, "-o", tmp_path / "a.json")
    assert code == 0 and read(tmp_path / "a.json").rows[0].prompt == PROMPT
    assert out.endswith("\n") and "steps" in err


def test_diff(run, record) -> None:
    slow, again, fast = (
        record("a.json", "--recipe", "llada"),
        record("b.json", "--recipe", "llada"),
        record("c.json", "--threshold", 0),
    )
    code, out, err = run("diff", slow, again)
    assert (code, err) == (0, "") and "row 1: equal in every step" in out
    code, out, _ = run("diff", slow, fast)
    assert code == 1 and "parts at step" in out and "cells computed" in out
    code, out, _ = run("diff", slow, fast, "--json")
    told = json.loads(out)
    assert code == 1 and told["equal"] is False and told["rows"][0]["parted"] >= 1
    assert [side["forwards"] for side in told["ledgers"]] == told["rows"][0]["forwards"]


def test_what_cannot_be_compared(run, record, tmp_path) -> None:
    one, html = record("a.json"), tmp_path / "page.html"
    for other in (record("b.json", "--length", 9), record("c.json", prompts=("Tom has 6 eggs .",))):
        for command in (("diff", one, other), ("html", one, "--against", other, "-o", html)):
            code, out, err = run(*command)
            assert (code, out, err.count("\n")) == (2, "", 1) and "to compare" in err and " row 1 " in err
    assert not html.exists()


def test_the_cost_of_a_guide_is_told(run, record, tmp_path) -> None:
    twin = embedded.build(tmp_path / "twin", layout=embedded.Layout("causal"))
    alone, guided = record("a.json"), record("b.json", "--recipe", "guided", "--guide", twin)
    spent = json.loads(run("replay", guided, "--json")[1])["ledger"]["helpers"]["guide"]
    told = f"{spent['forwards']} forwards, {spent['positions']} positions"
    assert f" · guide {told}\n" in run("replay", guided)[1] and "guide" not in run("replay", alone)[1]
    for pair, sides in (((alone, guided), ["-", told]), ((guided, alone), [told, "-"])):
        (line,) = (row for row in run("diff", *pair)[1].splitlines() if row.startswith("guide"))
        assert re.split(r"  +", line.strip())[1:] == sides
    assert "\nguide" not in run("diff", alone, alone)[1]


def test_an_option_that_nothing_is_done_with_is_an_error(monkeypatch, model, tmp_path) -> None:
    known = trace.settings_of
    monkeypatch.setattr(trace, "settings_of", lambda values: known({**values, "colour": "red"}))
    given = {name: p.default for name, p in inspect.signature(trace.record).parameters.items()}
    with pytest.raises(TypeError, match=r"^colour: options that nothing is done with$"):
        trace.record(**{**given, "prompts": [PROMPT], "model": model, "output": tmp_path / "a.json"})
    assert not list(tmp_path.iterdir())


def test_html(run, record, tmp_path) -> None:
    one, two = record("a.json", "--drafts"), record("b.json", "--recipe", "llada")
    assert run("html", one, "-o", tmp_path / "page.html")[:2] == (0, "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(read(one))
    assert run("html", one, "--against", two, "-o", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(read(one), read(two))


MISTAKES = [
    (("record", PROMPT), "Missing option '--output'"),
    (("record", "-o", "{out}"), "Missing argument 'PROMPT"),
    (("record", " ", "-o", "{out}"), "a prompt is empty"),
    (("record", PROMPT, "-o", "/nowhere/at/all"), "cannot write /nowhere/at/all"),
    (("record", PROMPT, "-o", "{out}", "--recipe", "duall"), "did you mean 'dual'"),
    (("record", PROMPT, "-o", "{out}", "--model", "twni"), "did you mean 'twin'"),
    (("record", PROMPT, "-o", "{out}", "--length", "0"), "length must be"),
    (("replay", "{no}"), "does not exist|cannot read"),
    (("replay", "{text}"), "not a trace"),
    (("replay", "{list}"), "is not a trace; `unmask trace record` makes one"),
    (("replay", "{old}"), "a trace of format 0, and this version of unmask reads 1"),
    (("replay", "{half}"), "truncated"),
    (("diff", "{good}"), "Missing argument 'B'"),
    (("diff", "{good}", "{half}"), "truncated"),
    (("html", "{good}"), "Missing option '--output'"),
    (("html", "{half}", "-o", "{out}"), "truncated"),
    (("html", "{good}", "--against", "{text}", "-o", "{out}"), "not a trace"),
    (("html", "{good}", "-o", "/nowhere/at/all"), "cannot write /nowhere/at/all"),
    (("",), "No such command"),
    ((), "Missing command"),
]


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("traces")
    assert main(["trace", "record", PROMPT, "--model", model, "--length", "8", "-o", str(folder / "good")]) == 0
    good = (folder / "good").read_bytes()
    (folder / "half").write_bytes(gzip.compress(good)[:-20])
    (folder / "old").write_text(json.dumps({**json.loads(good), "version": 0}))
    (folder / "text").write_text("no trace")
    (folder / "list").write_text("[]")
    return {name: str(folder / name) for name in ("good", "half", "old", "text", "list", "no", "out")}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(run, files, arguments, message) -> None:
    before = set(Path(files["good"]).parent.iterdir())
    code, out, err = run(*(a.format(**files) for a in arguments))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert set(Path(files["good"]).parent.iterdir()) == before


def test_an_earlier_file_survives_a_mistake(run, files, tmp_path) -> None:
    (tmp_path / "out").write_text("as it was")
    for command in (("record", PROMPT, "--recipe", "duall"), ("html", files["half"])):
        assert run(*command, "-o", tmp_path / "out")[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "as it was"


def test_record_has_all_options_of_generate_that_say_how_to_decode(run) -> None:
    from unmask.settings import NAMES

    theirs, mine = (inspect.signature(f, eval_str=True).parameters for f in (generate.generate, trace.record))
    shared = theirs.keys() - set(trace.OWN)
    assert shared <= mine.keys() and shared - set(NAMES) == {"model", "suffix", *trace.LOADED}
    assert all(mine[name].default == theirs[name].default for name in shared)
    help_text = run("record", "--help")[1]
    assert all(f"--{name.replace('_', '-')}" in help_text for name in shared)


def test_every_shared_option_reaches_the_decoder(record) -> None:
    file = record("a.json", "--suffix", "Tom", "--top-k", 3, "--temperature", 0.5, "--dtype", "float32", "--seed", 7)
    found = read(file)
    assert found.settings == {"length": 8, "suffix": "Tom", "top_k": 3, "temperature": 0.5, "seed": 7}
    assert found.rows[0].seed == 7 and found.rows[0].tokens[-1] is not None
    assert read(record("b.json", "--factor", "inf")).settings["factor"] == "inf"  # JSON has no such number


def test_help(run) -> None:
    for command in ("record", "replay", "diff", "html"):
        code, out, _ = run(command, "--help")
        assert code == 0 and command in out
        assert command in run("--help")[1]


def test_what_the_page_of_the_documentation_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    commands = re.search(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert commands and code
    codes = [main(shlex.split(line, comments=True)[1:]) for line in commands[1].splitlines()]
    assert set(codes) <= {0, 1} and codes[:3] == [0, 0, 0] and (tmp_path / "page.html").is_file()
    exec(compile(code[1], PAGE.name, "exec"), {"__name__": __name__})
    assert "cells computed" in capsys.readouterr()[0]
