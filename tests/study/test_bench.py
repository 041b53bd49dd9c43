"""The bench splits a step into forward and the rest; results folders appear whole or not at all."""

import json
from dataclasses import replace

import pytest
import torch

from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer
from unmask.study import bench, results

TINY = ModelConfig(vocab_size=96, d_model=32, layers=2, heads=2, ff=48, max_positions=128, shift=True, mask_id=2)


@pytest.fixture(scope="module")
def pair() -> bench.Pair:
    config = replace(TINY, eos_ids=(1,))
    twin = replace(config, layout=Layout("causal"), mask_id=-1)
    return bench.Pair(*(Transformer(c).initialise(0).eval() for c in (config, twin)))


@pytest.fixture
def source(pair):
    return lambda: (pair, lambda text: [5 + ord(c) % 90 for c in text[:12]])


def run(source, tmp_path, capsys, **settings):
    assert bench.main(quick=True, json=True, length=16, block=8, out=tmp_path, source=source, **settings) == 0
    return json.loads(capsys.readouterr().out)


def test_folder_and_json(source, tmp_path, capsys):
    shown = run(source, tmp_path, capsys)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("bench-") and {f.name for f in folder.iterdir()} == {
        "run.json",
        "rows.jsonl",
        "summary.json",
    }
    head, rows, summary = results.read(folder)
    assert [r["recipe"] for r in shown["rows"]] == list(bench.QUICK) == head["config"]["recipes"]
    assert summary["rows"] == shown["rows"] and len(rows) == 2 * 2 * len(bench.QUICK)
    assert shown["machine"]["threads"] == head["machine"]["threads"] == 1
    assert {"cpu", "cores", "load", "torch", "python"} <= shown["machine"].keys()
    assert head["dtype"] == "float32" and head["seeds"] == 0 and {"hash", "dirty"} == head["git"].keys()


def test_forward_and_the_rest_make_the_step(source, tmp_path, capsys):
    run(source, tmp_path, capsys, recipes=["prefix", "ar"])
    _, rows, _ = results.read(next(tmp_path.iterdir()))
    for row in rows:
        assert row["forward_ms"] + row["other_ms"] == pytest.approx(row["step_ms"])
        assert 0 < row["forward_ms"] < row["step_ms"] and 0 < row["share"] < 1
        assert row["steps"] == row["forwards"] and row["tokens"] <= 16
        assert row["step_ms"] * row["steps"] <= row["seconds"] * 1e3 + 1e-6


def test_counts_do_not_depend_on_the_clock(source, tmp_path, capsys):
    counts = ("recipe", "forwards", "positions", "tokens", "useful_tokens", "tokens_per_forward")
    seen = [[[r[k] for k in counts] for r in run(source, tmp_path, capsys)["rows"]] for _ in range(2)]
    assert seen[0] == seen[1]


def test_the_table_names_threads_and_load(source, tmp_path, capsys):
    assert bench.main(quick=True, length=16, block=8, out=tmp_path, source=source, recipes=["dual"]) == 0
    out = capsys.readouterr().out
    assert "1 thread" in out and "load" in out and "dual" in out and "%" in out


def test_the_model_and_the_threads_are_left_as_found(pair, source, tmp_path, capsys):
    before = torch.get_num_threads()
    run(source, tmp_path, capsys, recipes=["dual"])
    assert "forward" not in vars(pair.dllm) and torch.get_num_threads() == before


@pytest.mark.parametrize("settings", [{"recipes": ["thresold"]}, {"length": 0}, {"dtype": "int8"}, {"repeats": 0}])
def test_bad_settings_write_nothing(source, tmp_path, settings):
    with pytest.raises(UserError):
        bench.main(out=tmp_path, source=source, **settings)
    assert list(tmp_path.iterdir()) == []


def test_spread():
    assert bench.spread([3.0]) == {"median": 3.0, "iqr": 0.0}
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "iqr": 2.0}


def test_results_appear_whole(tmp_path):
    with results.Results.create("a", {"seed": 3, "dtype": "float32"}, tmp_path) as made:
        made.row({"x": 1})
        assert not made.folder.exists()
        folder = made.finish({"mean": 1.0})
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    head, rows, summary = results.read(folder)
    assert (head["seeds"], rows, summary) == ({"seed": 3}, [{"x": 1}], {"mean": 1.0})


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), results.Results.create("a", root=tmp_path) as made:
        made.row({"x": 1})
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_one_second_twice(tmp_path):
    first, second = (results.Results.create("a", root=tmp_path) for _ in range(2))
    second.folder = first.folder
    assert {first.finish(), second.finish()} == set(tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_a_name_is_a_name(tmp_path):
    with pytest.raises(ValueError, match="made of letters"):
        results.Results.create("../a", root=tmp_path)
