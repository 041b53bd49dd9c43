"""`unmask eval`: answers are read as GSM8K says, mistakes are one line, and an interrupted run loses nothing."""

import gzip
import json

import pytest

from unmask.cli import main as cli
from unmask.errors import UserError
from unmask.study import harness
from unmask.study.harness_tasks import cut, flexible, gsm8k, strict

ROWS = [
    {"question": f"Ann has {n} apples and buys {n} more . How many ?", "answer": f"<<{n}+{n}={2 * n}>> #### {2 * n}"}
    for n in (2, 3, 4)
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return folder


def test_answers_are_read_strictly_and_flexibly():
    assert strict("22 / 2 = 11 #### $1,100.") == "1100"
    assert strict("it is 11") is None
    assert flexible("it is 11 or 12.") == "12"
    assert flexible("none") is None
    assert cut("7 Question: next", ["Question:", ""]) == "7 "


def test_a_folder_is_read_whole_or_refused(data, tmp_path):
    task = gsm8k(data)
    assert [p.gold for p in task.problems] == ["4", "6", "8"]
    assert len(gsm8k(data, limit=2).problems) == 2
    with pytest.raises(UserError, match="no folder"):
        gsm8k(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train\.jsonl"):
        gsm8k(data, shots=1)
    (data / "test.jsonl").write_text('{"question": 1}')
    with pytest.raises(UserError, match="line 1"):
        gsm8k(data)


def test_without_lm_eval_its_tasks_are_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unmask\[eval\]'.*did you mean 'gsm8k'"):
        harness.divide(["gsm8"], None, None)
    with pytest.raises(UserError, match="--data"):
        harness.divide(["gsm8k"], None, None)
    with pytest.raises(UserError, match="no folder"):
        harness.divide(["mine"], None, tmp_path / "nowhere")


def test_data_for_a_misspelt_task_names_the_nearest(data):
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        harness.divide(["gsm8"], data, None)


def test_a_wrong_folder_is_exit_code_2_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli(["eval", "twin", "--tasks", "gsm8k", "--data", str(tmp_path / "no"), "--out", str(out)]) == 2
    assert "no folder" in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_a_run_is_kept_with_its_rows_and_goes_on_where_it_was(data, tmp_path, monkeypatch, capsys):
    out, plan = tmp_path / "out", harness.Plan("dllm", ("gsm8k",), batch=1)
    first, asked = harness.Writer.answers, []

    def answers(self, prompts, **how):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return first(self, prompts, **how)

    monkeypatch.setattr(harness.Writer, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        harness.main(plan, data=data, out=out, json=True)
    monkeypatch.setattr(harness.Writer, "answers", first)
    capsys.readouterr()
    assert harness.main(plan, data=data, out=out, json=True) == 0
    told = json.loads(capsys.readouterr().out)
    (folder,) = out.iterdir()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert told["resumed"] == 2
    assert [row["item"] for row in rows] == [0, 1, 2]
    assert all({"prompt_id", "output", "correct", "forwards", "positions", "seconds"} <= row.keys() for row in rows)
    assert told["tasks"][0]["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / 3)
