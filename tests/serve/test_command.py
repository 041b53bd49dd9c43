"""`unmask serve`, `unmask chat` and `unmask bench serve` as a user runs them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.study.load import Plan, arrivals, line, percentile

pytest.importorskip("fastapi")
PROMPT = "Tom has 4 eggs . He buys 9 eggs . How many eggs has he ?"


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "unmask", "serve", "--port", "0", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        found = next(
            m for row in process.stderr if (m := re.search(r"unmask serves .* at http://127.0.0.1:(\d+)", row))
        )
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that asks for a key."""
    with served("dllm", "twin", "--api-key", "key") as (_, found):
        yield found


def post(port: int, body: dict[str, object]) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_it_finishes_what_it_has_begun_and_stops() -> None:
    long = {"prompt": PROMPT, "max_tokens": 250, "diffusion": {"recipe": "llada", "steps": 250}, "ignore_eos": True}
    with served("dllm") as (process, port):
        assert post(port, {"prompt": PROMPT})[0] == 200
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(post(port, {**long, "diffusion_max_steps": 90})[0]))
        thread.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers == [200], "what has begun is finished"
        assert process.wait(timeout=15) is not None
        with pytest.raises(OSError):
            post(port, {"prompt": PROMPT})


def test_a_second_signal_stops_at_once() -> None:
    with served("dllm") as (process, port):
        body = {"prompt": PROMPT, "max_tokens": 400, "diffusion": {"recipe": "llada", "steps": 400}, "ignore_eos": True}

        def ask() -> None:
            with pytest.raises((OSError, http.client.HTTPException, ValueError)):
                post(port, body)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        began = time.perf_counter()
        process.wait(timeout=15)
        assert time.perf_counter() - began < 5
        thread.join()


def test_mistakes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, word in (
            (["twin", "--port", port], "cannot listen"),
            (["nope"], "unknown model"),
            (["twin", "twin"], "two models"),
            (["twin", "--api-key", ""], "API key"),
            (["twin", "--port", "99999"], "65535"),
        ):
            assert main(["serve", *arguments]) == 2
            assert word in capsys.readouterr().err
    for arguments, word in (
        (["--rate", "x"], "commas"),
        (["--rate", "-1"], "above 0"),
        (["--requests", "0"], "requests"),
    ):
        assert main(["bench", "serve", *arguments]) == 2
        assert word in capsys.readouterr().err


def test_bench_serve_measures_a_server(
    port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--url", f"http://127.0.0.1:{port}", "--requests", "8", "--out", str(tmp_path), "--json"]
    monkeypatch.setenv("UNMASK_API_KEY", "key")
    assert main(["bench", "serve", "--concurrency", "1,4", "--rate", "40", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in found["rows"]] == [1, 4, 40]
    for row in found["rows"]:
        assert row["failed"] == 0 and 0 < row["ttft_p50"] <= row["seconds_p50"] <= row["seconds_p99"]
    rows = [json.loads(text) for text in (Path(found["folder"]) / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["status"] == 200 for row in rows)
    assert main(["bench", "serve", "--concurrency", "2", *options, "--model", "d2f"]) == 1, "it is not served"
    assert json.loads(capsys.readouterr().out)["rows"][0]["failed"] == 8


def test_percentiles_and_arrivals() -> None:
    assert percentile(list(range(101)), 95) == 95 and percentile([3.0], 99) == 3
    times = arrivals(50, 2000, 1)
    assert times == sorted(times) and times[-1] == pytest.approx(40, rel=0.1)
    rows = [
        {"status": 200, "seconds": s, "ttft": s, "waited": 0, "useful_tokens": 5, "forwards": 1, "tokens": 6}
        for s in (0.5, 2)
    ]
    told = line("rate", 1, [*rows, {**rows[0], "status": 429}], 10, 1.0)
    assert (told["failed"], told["good"], told["useful_tok_s"]) == (1, pytest.approx(1 / 3), 1.0)
    assert Plan(rates=(1,), concurrency=()).requests == 200


def test_chat_answers_lines_and_survives_mistakes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    import unmask

    text = f"{PROMPT}\n/recipe dul\n/recipe llada\n\n{PROMPT}\n/nothing\n/temperature x\n/quit\n{PROMPT}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["chat"]) == 0
    told = capsys.readouterr()
    model = unmask.load()
    assert told.out.split("\n")[:2] == [model.generate(PROMPT).text, model.generate(PROMPT, recipe="llada").text]
    assert len(told.err.strip().split("\n")) == 3 and "did you mean 'dual'" in told.err


def test_the_official_client(port: int) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key")
    said: list = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model="dllm", messages=said, seed=3, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    parts = client.chat.completions.create(model="dllm", messages=said, stream=True, extra_body={"diffusing": True})
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    infilled = client.completions.create(model="dllm", prompt="name[Aromi], food[French]", suffix=" .", max_tokens=9)
    assert infilled.choices[0].text
    stopped = client.completions.create(model="twin", prompt=PROMPT, stop="####", stream=True)
    assert "####" not in "".join(part.choices[0].text for part in stopped)
    assert [model.id for model in client.models.list()] == ["dllm", "twin"]
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="dllm", messages=said, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="other").models.list()
