"""The command line: what it prints, what it writes, and how it tells a mistake (one line, exit code 2)."""

from __future__ import annotations

import json

import pytest

import embedded
from unmask import recipes, zoo
from unmask.cli import main

PROMPT = embedded.PROMPT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "dllm"))


@pytest.fixture
def run(capsys):
    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return command


def test_generate(run, model):
    code, out, err = run("generate", PROMPT, "--model", model, "--length", "8")
    assert (code, err) == (0, "")
    assert out.endswith("\n")


def test_generate_json(run, model):
    code, out, _ = run("generate", PROMPT, "--model", model, "--length", "8", "--recipe", "llada", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["prompt"] == PROMPT and told["recipe"]["name"] == "llada"
    assert told["ledger"]["forwards"] == told["forwards"] <= 8
    assert len(told["tokens"]) == told["ledger"]["useful_tokens"]


def test_prompt_from_stdin(run, model, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert json.loads(run("generate", "-", "--model", model, "--length", "8", "--json")[1])["prompt"] == PROMPT


def test_visual_without_a_terminal_shows_the_last_canvas(run, model):
    code, out, err = run("generate", PROMPT, "--model", model, "--length", "8", "--visual")
    assert code == 0
    assert err.strip() and "░" not in err
    assert "\x1b" not in err + out


MISTAKES = [
    ((), "give either a prompt or --batch FILE"),
    (("",), "the prompt is empty"),
    ((PROMPT, "--recipe", "duall"), "did you mean 'dual'"),
    ((PROMPT, "--length", "8", "--block", "9"), "does not fit into a response of 8"),
    ((PROMPT, "--length", "8", "--block", "0"), "block must be"),
    ((PROMPT, "--length", "16", "--recipe", "llada", "--block", "4", "--steps", "2"), "fewer than the 4 blocks"),
    ((PROMPT, "--length", "500"), "this model has 160"),
    ((PROMPT * 20,), "this model has 160"),
    ((PROMPT, "--length", "16", "--recipe", "d2f", "--block", "8"), "a block-causal model"),
    ((PROMPT, "--output", "/nowhere/at/all"), "cannot write /nowhere/at/all"),
    (("--batch", "/nowhere/at/all"), "cannot read /nowhere/at/all"),
    ((PROMPT, "--dtype", "float99"), "unknown dtype"),
    ((PROMPT, "--lenght", "3"), "No such option: --lenght"),
    ((PROMPT, "--length", "three"), "'--length'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(run, model, arguments, message):
    code, out, err = run("generate", *arguments, "--model", model)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_unknown_model_and_command(run):
    code, _, err = run("generate", PROMPT, "--model", "twni")
    assert code == 2 and "did you mean 'twin'" in err
    code, _, err = run("generat")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


GOOD = '{"prompt": "Tom has 5 eggs ."}\n\n{"prompt": "Tom has 6 eggs ."}\n'
BAD = '{"prompt": "Tom has 5 eggs ."}\n{"prompt": 5}\n{oops\n{"prompt": " "}\n{"prompt": "Tom has 6 eggs ."}\n'


def test_batch(run, model, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text(GOOD)
    options = ("--model", model, "--length", "8", "--json")
    code, printed, err = run("generate", "--batch", str(file), "--output", str(out), *options)
    assert (code, printed, err) == (0, "", "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 3]
    alone = json.loads(run("generate", "Tom has 6 eggs .", *options)[1])
    assert rows[1]["tokens"] == alone["tokens"]


def test_batch_of_plain_lines(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("Tom has 5 eggs .\n\nTom has 6 eggs .\n")
    code, out, _ = run("generate", "--batch", str(tmp_path / "prompts.txt"), "--model", model, "--length", "8")
    assert code == 0 and out.count("\n") == 2


def test_malformed_line_stops_everything(run, model, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text(BAD)
    out.write_text("as it was")
    code, printed, err = run("generate", "--batch", str(file), "--model", model, "--output", str(out))
    assert (code, printed) == (2, "")
    assert "line 2: expected an object" in err and err.count("\n") == 1
    assert out.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_keep_going(run, model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(BAD)
    code, out, err = run("generate", "--batch", str(file), "--keep-going", "--model", model, "--length", "8", "--json")
    assert code == 1
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 5]
    assert [line.split(":")[1].split()[-1] for line in err.splitlines()] == ["2", "3", "4"]


def test_empty_batch(run, model, tmp_path):
    (tmp_path / "none.txt").write_text("\n\n")
    code, _, err = run("generate", "--batch", str(tmp_path / "none.txt"), "--model", model)
    assert code == 2 and "holds no prompt" in err


def test_recipes(run):
    _, table, _ = run("recipes")
    told = json.loads(run("recipes", "--json")[1])
    assert {entry["name"] for entry in told} == set(recipes.entries())
    assert all(name in table for name in recipes.entries())


@pytest.mark.parametrize("name", sorted(recipes.entries()))
def test_explain(run, name):
    code, text, _ = run("explain", name)
    told = json.loads(run("explain", name, "--json")[1])
    assert code == 0
    assert all(part["does"] for parts in told["parts"].values() for part in parts)
    assert told["hash"] == recipes.get(name).hash and told["hash"] in text
    assert recipes.entry(name).title in text


def test_explain_other_settings_and_expressions(run):
    told = json.loads(run("explain", "threshold", "--set", "threshold=0.5", "--set", "block=4", "--json")[1])
    assert "blocks(4) >> (confident(0.5)" in told["expression"]
    assert run("explain", "blocks(4) >> best(2)")[0] == 0
    for wrong in (("dul",), ("dual", "--set", "blok=3"), ("dual", "--set", "block"), ("nowhere.toml",)):
        code, _, err = run("explain", *wrong)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    told = json.loads(out)
    assert code == bool(told["broken"])
    assert told["packages"]["torch"] and set(told["models"]) == {*zoo.NAMES, "dllm-joint"}
    assert "unmask" in run("doctor")[1]


def test_train(run, tmp_path):
    code, _, err = run("train", "--kind", "ra")
    assert code == 2 and "unknown kind 'ra'. Known: ar, dllm" in err
    code, _, err = run("train", "--e2e", str(tmp_path), "--out", str(tmp_path / "run"))
    assert code == 2 and "--e2e" in err
    assert not (tmp_path / "run").exists()


def test_export_of_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, message in (("missing.pt", "no checkpoint at"), ("text.pt", "is not a readable checkpoint")):
        code, out, err = run("export", str(tmp_path / name), str(tmp_path / "out"), "--e2e", str(tmp_path))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "out").exists()


def test_interrupt_is_told(run, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.cli.doctor.examine", stop)
    code, out, err = run("doctor")
    assert (code, out, err.strip()) == (130, "", "interrupted")


def test_demo_without_a_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.zoo.__file__", str(tmp_path / "zoo" / "__init__.py"))
    monkeypatch.setattr("unmask.cli.demo.TIMED", 1)
    monkeypatch.setenv("COLUMNS", "80")
    embedded.build(tmp_path / "zoo" / "dllm", positions=512)
    embedded.build(tmp_path / "zoo" / "twin", positions=512, layout=embedded.Layout("causal"))
    code, out, _ = run("demo", "--seed", "3")
    assert code == 0
    assert out.count("full refinement") == out.count("AR twin") == 4
    assert "useful tok/s" in out and "…" not in out and "\x1b" not in out


def test_help(run):
    for command in ("generate", "recipes", "explain", "train", "doctor", "demo", "bench", "evaluate"):
        code, out, _ = run(command, "--help")
        assert code == 0 and command in out
