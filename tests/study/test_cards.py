"""`unmask evaluate`: its table, its results folder, and the card it fills."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import embedded
from unmask import zoo
from unmask.errors import UserError
from unmask.models.config import Layout
from unmask.study.cards import Settings, main
from unmask.study.results import read


def test_accuracy_goes_into_results_and_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(zoo.path("twin"), model)
    settings = Settings(model=str(model), tasks=("problems",), items=4, e2e=str(tmp_path / "secret" / "e2e"))
    assert main(settings, as_json=True, card=True, root=tmp_path / "results") == 0
    told = json.loads(capsys.readouterr().out)
    run, rows, summary = read(told["results"])
    assert summary["rows"] == told["rows"]
    assert len(rows) == 4
    assert run["config"]["e2e"] == "e2e"
    line = next(r for r in json.loads((model / "card.json").read_text())["accuracy"] if r["task"] == "problems-draws")
    assert line["items"] == 4
    assert line["right"] == sum(r["right"] for r in rows) / 4
    assert line["results"] == Path(told["results"]).name


def test_a_block_causal_model_is_evaluated_as_generate_writes_it(tmp_path: Path, capsys) -> None:
    """Only what was trained on noisy earlier blocks is written at several at once."""
    model = embedded.build(tmp_path / "model", layout=Layout("block", 8))
    said = json.loads((model / "config.json").read_text())
    for in_flight, name in ((False, "fast-dllm-v2"), (True, "d2f")):
        (model / "config.json").write_text(json.dumps({**said, "in_flight": in_flight}))
        settings = Settings(model=str(model), tasks=("problems",), items=2)
        assert main(settings, as_json=True, root=tmp_path / "results") == 0
        told = json.loads(capsys.readouterr().out)
        assert [row["recipe"] for row in told["rows"]] == [name]


def test_blocks_are_those_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, block, shown in ((16, None, 16), (16, 8, 8), (12, None, 12)):
        model = embedded.build(tmp_path / f"{size}-{shown}", layout=Layout("block", size))
        settings = Settings(model=str(model), tasks=("problems",), items=2, block=block)
        assert main(settings, as_json=True, root=tmp_path / "results") == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert f"blocks({shown})" in row["expression"]


def test_mistakes_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'dllm'"):
        main(Settings(model="dlm"), root=tmp_path / "results")
    with pytest.raises(UserError, match="did you mean 'problems'"):
        main(Settings(tasks=("problem",)), root=tmp_path / "results")
    with pytest.raises(UserError, match="--e2e"):
        main(Settings(tasks=("restaurants",)), root=tmp_path / "results")
    assert not (tmp_path / "results").exists()
