"""With lm-eval: a local task folder runs without a network, requests set lengths, and what has no room is said."""

import json
import math
from types import SimpleNamespace

import pytest

import unmask
from unmask.errors import UserError
from unmask.study import harness

pytest.importorskip("lm_eval")
from unmask.study import harness_lm

ASKED = "Ann has 2 apples and buys 3 more . How many ?"


def made(name="dllm"):
    return harness_lm.Harness(harness.Writer.of(unmask.load(name), harness.Plan(name, ("t",))), samples=4)


def request(*args, number=0):
    return SimpleNamespace(args=args, task_name="t", doc_id=number)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "rows.json").write_text("\n".join(json.dumps({"q": ASKED, "a": f"{n}", "at": n - 5}) for n in (5, 6)))
    head = (
        f"doc_to_text: '{{{{q}}}}'\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {place}/rows.json\n"
    )
    head += "test_split: test\n"
    write = "doc_to_target: '{{a}}'\noutput_type: generate_until\n"
    write += "generation_kwargs:\n  until: ['Question:']\n  max_gen_toks: 16\n"
    metric = "metric_list:\n  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"
    (place / "a.yaml").write_text(f"task: mine_write\n{head}{write}{metric.format('exact_match')}")
    choice = "doc_to_target: at\noutput_type: multiple_choice\ndoc_to_choice: ['5', '6']\n"
    (place / "b.yaml").write_text(f"task: mine_choose\n{head}{choice}{metric.format('acc')}")
    return place


def test_a_folder_of_tasks_runs_and_says_what_its_likelihoods_are(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    plan = harness.Plan("dllm", ("mine_write", "mine_choose"), samples=4)
    assert harness.main(plan, folder=folder, json=True, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    write, choose = json.loads(said[said.index("{") :])["tasks"]
    assert (write["cells_least"], write["cells_most"]) == (16, 16)
    assert (choose["likelihood"], choose["samples"], choose["seed"]) == ("ELBO estimate", 4, 0)
    (place,) = (tmp_path / "out").iterdir()
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert [row.get("closes") for row in rows] == [None, "mine_write", None, "mine_choose"]


def test_an_unknown_task_has_its_nearest_name(folder):
    with pytest.raises(UserError, match="mine_write"):
        harness_lm.manager(folder, ["mine_writ"])


def test_a_response_is_as_long_as_the_request_says_within_the_models_positions():
    one = made()
    most = one.network.config.max_positions
    assert one.cells(ASKED, 8) == 8
    assert one.cells(ASKED, 10 * most) == most - len(one.writer.model.encode(ASKED))
    one.sized = False
    assert one.cells(ASKED, 8) is None


def test_likelihoods_lose_what_has_no_room_and_say_so():
    one = made("twin")
    most = one.network.config.max_positions
    assert one.pair(ASKED, " 5")[0] == list(one.tokenizer.encode(ASKED))
    assert len(one.tokenizer.encode(f"{ASKED} " * most)) > most
    asked = [request(f"{ASKED} " * most, " 5"), request(ASKED, f" {ASKED}" * most, number=1)]
    (kept, _), (refused, _) = one.loglikelihood(asked)
    assert math.isfinite(kept)
    assert refused == -math.inf
    assert one.costs["t", 0]["truncated"] > 0
    assert "not scored" in one.costs["t", 1]["error"]
