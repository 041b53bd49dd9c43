"""A server for minutes under random requests, clients that go away, and nonsense: UNMASK_SOAK_SECONDS=600."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("UNMASK_SOAK_SECONDS", "20"))
WORDS = "Tom has 4 eggs . He buys 9 boxes of 3 eggs . How many eggs has he ? <mask> <eos> name[Aromi] é 😀 Why".split()
RECIPES = ("threshold", "dual", "prophet", "llada", "wino", "adjust", "guided", "nonsense", "confident(0.5) | best(2)")
NONSENSE = (
    b"{",
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": 1e999}',
    b"[" * 9999,
    b"null",
    b'{"prompt": "a", "n": -1}',
)


def request(draw: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))}
    body["model"] = draw.choice(["dllm", "d2f", "twin", "dllm", "none"])
    options = {
        "max_tokens": draw.choice([1, 8, 24, 40, 90, 5000]),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "n": draw.choice([1, 2, 3]),
        "stop": draw.choice(["####", [";", "="]]),
        "logprobs": draw.choice([0, 5, 50]),
        "suffix": " near the river .",
        "reasoning_effort": draw.choice(["low", "high"]),
        "presence_penalty": draw.uniform(-2.5, 2.5),
        "response_format": {"type": "regex", "regex": draw.choice([r"\d+ [+*] \d+", "(", r"(a|b)+"])},
        "diffusion": {"recipe": draw.choice(RECIPES), "pins": [[draw.randint(0, 30), draw.choice(["Tom", 7, 9999])]]},
        "diffusing": True,
    }
    return body | {name: options[name] for name in draw.sample([*options], draw.choice([0, 1, 1, 2, 3]))}


async def client(http: Any, draw: random.Random, until: float, seen: dict[int, int]) -> None:
    while time.perf_counter() < until:
        kind, status = draw.random(), 0
        if kind < 0.15:
            raw = draw.choice(NONSENSE)
            status = (
                await http.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
            ).status_code
        elif kind < 0.45:
            async with http.stream("POST", "/v1/completions", json={**request(draw), "stream": True}) as answer:
                status, lines = answer.status_code, draw.randint(0, 6)
                async for _ in answer.aiter_lines():
                    lines -= 1
                    if lines < 0:
                        break  # the client goes away
        else:
            try:
                timeout = draw.choice([0.01, 60, 60, 60])
                status = (await http.post("/v1/completions", json=request(draw), timeout=timeout)).status_code
            except httpx.TimeoutException:
                continue
        seen[status] = seen.get(status, 0) + 1


def resident(process: subprocess.Popen) -> float:
    """Megabytes of the server."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


async def storm(port: int, process: subprocess.Popen, sizes: list[float]) -> dict[int, int]:
    seen: dict[int, int] = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        until = time.perf_counter() + SECONDS
        tasks = [asyncio.create_task(client(http, random.Random(n), until, seen)) for n in range(8)]
        while any(not task.done() for task in tasks):
            await asyncio.sleep(SECONDS / 20)
            sizes.append(resident(process))
        await asyncio.gather(*tasks)
        for _ in range(50):
            text = (await http.get("/metrics")).text
            used = [
                float(v)
                for v in re.findall(r"^(?:unmask:slots_used|vllm:num_requests_waiting)\{.*\} (.*)$", text, re.M)
            ]
            if not any(used):
                break
            await asyncio.sleep(0.1)
        assert len(used) == 6 and not any(used), "slots leaked"
        assert (await http.post("/v1/completions", json={"prompt": "Tom has 4 eggs ."})).status_code == 200
    return seen


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_soak(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "unmask", "serve", "--port", "0", "--length", "256"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=out,
        )
        try:
            for _ in range(200):
                if found := re.search(r":(\d+)$", log.read_text().strip()):
                    break
                time.sleep(0.1)
            assert found
            sizes: list[float] = []
            seen = asyncio.run(storm(int(found[1]), process, sizes))
            assert process.poll() is None, "the server died"
        finally:
            process.terminate()
            process.wait(timeout=30)
    told = {"seconds": SECONDS, "statuses": seen, "mb": [round(s) for s in sizes]}
    print(json.dumps(told))
    assert {*seen} <= {200, 400, 404, 429}, told
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    quarter = len(sizes) // 4  # lanes come and go, each with its keys and values; what counts is whether it grows
    early, late = median(sizes[quarter : 2 * quarter]), median(sizes[-quarter:])
    assert SECONDS < 300 or late < 1.05 * early, told
