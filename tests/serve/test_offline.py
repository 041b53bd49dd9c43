"""Offline inference: what the server would answer, each row once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.conftest import MODELS
from unmask.cli import main
from unmask.cli.offline import batch
from unmask.engine.lane import Lane
from unmask.errors import UserError
from unmask.serve.files import Sink, Source, key
from unmask.serve.offline import Decoder, Summary, seed_of, write
from unmask.train import problems

STREAM = problems.problems(4, "templates")
PROMPTS = [problems.worksheet(STREAM, 1)[0] for _ in range(8)]


def rows_of(number: int) -> list[dict[str, Any]]:
    """Rows in both forms, drawn and not, under several recipes."""
    found: list[dict[str, Any]] = []
    for i in range(number):
        prompt = PROMPTS[i % len(PROMPTS)]
        if i % 3 == 0:
            body = {"model": "dllm", "messages": [{"role": "user", "content": prompt}], "n": 2, "temperature": 1.0}
            found.append({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        elif i % 3 == 1:
            body = {"prompt": prompt, "diffusion": {"recipe": "wino"}, "stop": "####"}
            found.append({"custom_id": f"ü{i}", "url": "/v1/completions", "body": body})
        else:
            found.append({"id": i, "prompt": prompt, "temperature": 1.0, "logprobs": 1})
    return found


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def results(path: Path) -> dict[str, dict[str, Any]]:
    """By id, without what is of the hour; every id once."""
    found = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        assert str(result["id"]) not in found
        found[str(result["id"])] = timeless(result)
    return found


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    if result["response"]:
        body = result["response"]["body"]
        del body["created"], body["unmask"]["waited"], body["unmask"]["seconds"]
    return result


def run(source: Path, target: Path, rows: int = 4) -> Summary:
    found = Source(source)
    with Sink(target, found.lines.keys()) as sink:
        asked, kept = list[str](), set(sink.done)
        source_rows = (asked.append(key(row)) or row for row in found.rows(sink.done))
        decoder = Decoder(MODELS["dllm"], rows=rows, length=256)
        summary = write(decoder.run(source_rows), sink, rows=len(found), tell=lambda _: None)
    assert not kept & {*asked}, "what is there is not computed again"
    return summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Nine rows, and their results."""
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text(lines(rows_of(9)))
    assert run(source, target).failed == 0
    return source, target


def test_a_row_gets_what_the_server_answers(http, whole: tuple[Path, Path]) -> None:
    found = results(whole[1])
    for row in rows_of(9):
        url, body = row.get("url", "/v1/completions"), row.get("body", {k: v for k, v in row.items() if k != "id"})
        served = http.post(url, json={**body, "seed": seed_of(row)})
        result = found[str(row.get("custom_id", row.get("id")))]
        assert result["error"] is None and result["response"]["status_code"] == 200
        answer = timeless({"response": {"body": served.json()}})["response"]["body"]
        assert {**answer, "id": ""} == {**result["response"]["body"], "id": ""}


def test_results_depend_on_no_order_and_no_company(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(rows_of(9)[::-1]))
    run(source, target, rows=1)
    assert results(target) == results(whole[1])
    drawn = [r["response"]["body"]["choices"] for i, r in results(target).items() if i.startswith("c")]
    assert any(a != b for a, b in drawn), "the seeds of n choices differ"


@given(cut=st.floats(0, 1), torn=st.sampled_from([b"", b'{"id', b'{"id": 7, "resp', b"\0\0\0", b'{"id": "c0"\n']))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_goes_on_from_any_cut(whole: tuple[Path, Path], tmp_path: Path, cut: float, torn: bytes) -> None:
    source, full = whole
    data, target = full.read_bytes(), tmp_path / "cut.jsonl"
    head = data[: round(cut * len(data))]
    kept = head[: head.rfind(b"\n") + 1]
    target.write_bytes(kept + torn if torn else head)
    summary = run(source, target, rows=8)
    assert target.read_bytes().startswith(kept)
    assert summary.kept == kept.count(b"\n") and summary.written == 9 - summary.kept
    assert results(target) == results(full)


def test_killed_in_the_middle_and_held_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    slow = {"diffusion": {"recipe": "llada", "steps": 12}, "max_tokens": 24}
    source.write_text(lines([{"id": f"{i}", "prompt": PROMPTS[i % 8], **slow} for i in range(16)]))
    arguments = ["batch", str(source), str(target), "--rows", "1"]
    alone = "import sys; sys.modules.update(ray=None, fastapi=None, uvicorn=None)"  # importing them would fail
    command = [sys.executable, "-c", f"{alone}; from unmask.cli import main; sys.exit(main({arguments}))"]
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not (target.exists() and target.read_bytes().count(b"\n") >= 3):
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        running.send_signal(signal.SIGSTOP)
        before = target.read_bytes()
        assert main(["batch", str(source), str(target)]) == 2
        assert "another run" in capsys.readouterr().err and target.read_bytes() == before
    finally:
        running.kill()
        running.communicate()
    assert main(["batch", str(source), str(target), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 3 <= summary["kept"] < 16 and summary["written"] == 16 - summary["kept"] and not summary["failed"]
    assert summary["tokens_per_forward"] == pytest.approx(summary["decided"] / summary["forwards"], abs=1e-4)
    assert target.read_bytes().startswith(before) and set(results(target)) == {f"{i}" for i in range(16)}
    assert main(["batch", str(source), str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "2 + 2", "temperatur": 1}, "temperature"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "eggs " * 3000}, "cells"),
    ({"prompt": "2 + 2", "model": "gpt"}, "unknown model"),
    ({"prompt": "2 + 2", "stream": True}, "stream"),
    ({"url": "/v1/embeddings", "body": {"input": "x"}}, "url"),
    ({"url": "/v1/completions", "body": [1]}, "body"),
    ({"url": "/v1/completions", "body": {}}, "prompt"),
    ({"url": "/v1/completions", "method": "GET", "body": {"prompt": "2 + 2"}}, "POST"),
    ({}, "prompt"),
    ({"prompt": "\ud800"}, ""),
]


def test_bad_rows_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = rows_of(6)
    bad = [{"custom_id": f"bad {i}", **row} for i, (row, _) in enumerate(BAD)]
    source.write_text(lines([row for pair in zip(bad, [*good, *good], strict=False) for row in pair][:12] + bad[6:]))
    assert main(["batch", str(source), str(target)]) == 1
    found = results(target)
    for i, (_, word) in enumerate(BAD):
        result = found[f"bad {i}"]
        if word:
            assert result["response"] is None and {*result["error"]} == {"message", "type", "param", "code"}
            assert word in result["error"]["message"] and "\n" not in result["error"]["message"]
    assert found["bad 3"]["error"]["code"] == "model_not_found"
    assert sum(r["response"] is not None for i, r in found.items() if not i.startswith("bad")) == 6
    assert "failed" in capsys.readouterr().out and main(["batch", str(source), str(target)]) == 1


def test_a_fault_of_the_engine_is_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Lane.step
    monkeypatch.setattr(Lane, "step", lambda lane: honest(lane) if lane.mixes else 1 / 0)
    rows = [{"id": i, "prompt": PROMPTS[i], "diffusion": {"cfg_scale": 1.0 * (i == 1)}} for i in range(4)]
    found = {r["id"]: r for r in Decoder(MODELS["dllm"], rows=4, length=128).run(rows)}
    assert found[1]["error"]["type"] == "server_error" and "division" in found[1]["error"]["message"]
    assert all(found[i]["error"] is None for i in (0, 2, 3))


def test_rows_are_read_when_they_are_needed() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        for read in count(1):
            yield {"id": read, "prompt": PROMPTS[read % 8]}

    stream = Decoder(MODELS["dllm"], rows=3, length=128).run(endless())
    for number in range(1, 13):
        next(stream)
        assert read <= number + 2 * 3


ROW = '{"id": "a", "prompt": "2 + 2"}\n'
RESULT = '{"id": "a", "response": null, "error": {"message": ""}}\n'
MISTAKES = [
    (ROW + ROW, "", [], "line 1 and in line 2"),
    ('{"id": 1, "prompt": "a"}\n{"custom_id": "1"}\n', "", [], "unique"),
    (ROW + "{\n", "", [], "line 2: not JSON"),
    (ROW + "[" * 100_000 + "\n", "", [], "line 2: not JSON"),
    ("[1]\n", "", [], "expected an object"),
    ('{"prompt": "a"}\n', "", [], "id"),
    ('{"id": true, "prompt": "a"}\n', "", [], "id"),
    ("\n", "", [], "no row"),
    (ROW, RESULT.replace('"a"', '"b"'), [], "not in the input"),
    (ROW, RESULT * 2, [], "twice"),
    (ROW, ROW, [], "not a result"),
    (ROW, ROW.strip(), [], "not a result"),
    (ROW, "my notes", [], "not a result"),
    (ROW, '{"id": "a", "resp\n' + RESULT, [], "line 1: not a result"),
    (ROW, "", ["dlm"], "did you mean 'dllm'"),
    (ROW, "", ["--dtype", "float99"], "float99"),
    (ROW.replace("}", ', "model": "gpt"}'), "", [], "asks for dllm, but for gpt"),
]


@pytest.mark.parametrize(("rows", "there", "more", "word"), MISTAKES, ids=[m[-1] for m in MISTAKES])
def test_mistakes(
    rows: str, there: str, more: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(rows)
    if there:
        target.write_text(there)
    assert main(["batch", str(source), str(target), *more]) == 2
    told = capsys.readouterr().err
    assert word in told and told.count("\n") == 1 and told.startswith("error: ")
    assert (target.read_text() == there) if there else not target.exists()


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(ROW)
    for first, second in ((tmp_path / "no", source), (tmp_path, source), (source, tmp_path), (source, source),
                          (source, tmp_path / "no" / "out.jsonl")):  # fmt: skip
        assert main(["batch", str(first), str(second)]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and source.read_text() == ROW


def test_a_full_disk_is_told_and_taken_up(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, full = whole
    target, size = tmp_path / "out.jsonl", len(full.read_bytes())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(UserError, match="results are kept, run again"):
            run(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(target.read_bytes()) == size // 2
    assert run(source, target).kept > 2 and results(target) == results(full)


@pytest.mark.parametrize(("module", "extra"), [("pydantic", "serve"), ("ray", "ray")])
def test_what_is_missing_is_named(module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(ROW)
    for name in ("offline", "reading", "schema"):
        monkeypatch.delitem(sys.modules, f"unmask.serve.{name}")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{module}.*pip install 'unmask\\[{extra}\\]'"):
        batch(source, target, rows=1, length=None, dtype="auto", device="cpu", ray=module == "ray", replicas=1)
    assert not target.exists()


def test_one_machine_needs_no_ray(http) -> None:
    assert http.get("/ready").status_code == 200
    import_module("unmask.serve.run")
    assert "ray" not in sys.modules
