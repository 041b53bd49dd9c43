"""Replicas on a Ray of this machine: the rows and answers of one engine, and an end that finishes what has begun."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import unmask
from unmask.train import problems

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (the ray extra)"),
]
STREAM = problems.problems(5, "templates")
PROMPTS = [problems.worksheet(STREAM, 1)[0] for _ in range(8)]
ROWS = [{"id": f"{i}", "prompt": PROMPTS[i % 8], "temperature": 0.5 * (i % 2)} for i in range(50)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(unmask.__file__).parents[1])}
ENVIRONMENT.pop("RAY_ADDRESS", None)


def batch(source: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unmask", "batch", str(source), str(target), "--json", *more]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


def texts(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len({result["id"] for result in found})
    return {r["id"]: r["response"] and [c["text"] for c in r["response"]["body"]["choices"]] for r in found}


def test_replicas_write_the_same_rows(tmp_path: Path) -> None:
    source, alone, spread = tmp_path / "in.jsonl", tmp_path / "alone.jsonl", tmp_path / "ray.jsonl"
    bad = {"id": "bad", "prompt": "2 + 2", "temperatur": 1}
    source.write_text("".join(f"{json.dumps(row)}\n" for row in [*ROWS[:25], bad, *ROWS[25:]]))
    assert batch(source, alone).returncode == 1
    done = batch(source, spread, "--ray", "--rows", "4")
    assert done.returncode == 1, done.stderr
    assert texts(spread) == texts(alone) and len(texts(alone)) == 51
    data = spread.read_bytes()
    spread.write_bytes(data[: len(data) // 2])
    done = batch(source, spread, "--ray")
    summary = json.loads(done.stdout)
    assert summary["kept"] > 10 and summary["written"] == 51 - summary["kept"] and summary["failed"] == 1
    assert texts(spread) == texts(alone)


def test_mistakes_of_replicas_are_told(tmp_path: Path) -> None:
    source, model = tmp_path / "in.jsonl", tmp_path / "model"
    source.write_text(f"{json.dumps(ROWS[0])}\n")
    model.mkdir()
    (model / "config.json").write_text("{}")
    for more, word in (("dlm", "did you mean 'dllm'"), (str(model), "architecture")):
        done = batch(source, tmp_path / "out.jsonl", more, "--ray")
        assert done.returncode == 2 and not (tmp_path / "out.jsonl").exists()
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and word in last


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "unmask", "serve", "dllm", "--ray", "--port", "0"]
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if found := re.search(r"unmask serves dllm at (http://\S+) on Ray", line):
                yield running, found[1]
                break
        else:
            pytest.fail(f"it ended by itself with {running.wait()}")
    finally:
        running.kill()
        running.communicate()


def complete(where: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"prompt": PROMPTS[0], **body}).encode()
    request = Request(f"{where}/v1/completions", data, {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_deployment_answers_and_drains(server: tuple[subprocess.Popen[str], str]) -> None:
    running, where = server
    expected = unmask.load().generate(PROMPTS[0])
    assert complete(where)["choices"][0]["text"] == expected.text
    with pytest.raises(HTTPError) as error:
        complete(where, temperatur=1)
    assert error.value.code == 400 and "temperature" in json.load(error.value)["error"]["message"]
    late: list[dict[str, Any]] = []
    slow = {"max_tokens": 96, "n": 8, "ignore_eos": True, "diffusion": {"recipe": "llada"}}
    client = threading.Thread(target=lambda: late.append(complete(where, **slow)))
    client.start()
    time.sleep(0.7)
    assert not late, "the request must be on its way when the signal comes"
    running.send_signal(signal.SIGTERM)
    client.join()
    assert len(late[0]["choices"]) == 8 and late[0]["unmask"]["forwards"] == 8 * 96
    assert running.wait(timeout=60) == 0
    with pytest.raises(OSError):
        urlopen(f"{where}/ready", timeout=2)
