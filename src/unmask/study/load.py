"""`unmask bench serve`: a server under load, at fixed rates of arrival (open loop) and fixed concurrency (closed)."""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.study import machine
from unmask.study.results import Results
from unmask.train import problems

Row = dict[str, Any]
QUICK = 24
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Plan:
    """What is sent. `slo`: seconds within which a request must end to count as good."""

    model: str = "dllm"
    recipe: str = ""
    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    requests: int = 200
    rows: int = 16
    dtype: str = "auto"
    slo: float = 1.0
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("requests", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.rates and not self.concurrency:
            raise UserError("there is no load; give --rate 5,10 or --concurrency 1,8")
        if any(not 0 < rate < 1e6 for rate in self.rates) or any(not 0 < n < 1024 for n in self.concurrency):
            raise UserError("a rate is requests a second above 0, and concurrency a whole number from 1 to 1023")
        if not 0 < self.slo < 1e6:
            raise UserError(f"slo is seconds above 0, not {self.slo!r}")


@contextmanager
def server(plan: Plan) -> Iterator[str]:
    """A server of its own in another process with one thread, by its address; it ends with the block."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "unmask", "serve", plan.model, "--port", str(port), "--rows", str(plan.rows)]
    process = subprocess.Popen(
        [*command, "--dtype", plan.dtype, "--queue", "4096"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        told = ""
        while "unmask serves" not in (line := process.stderr.readline()):
            told = line.strip() or told
            if not line:
                raise UserError(f"the server did not start: {told.removeprefix('error: ') or 'it said nothing'}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def bodies(plan: Plan, count: int) -> list[Row]:
    """Word problems, each with its own seed."""
    more = {"diffusion": {"recipe": plan.recipe}} if plan.recipe else {}
    found = islice(problems.problems(plan.seed, "draws"), count)
    return [{"prompt": p.question, "model": plan.model, "seed": i, **more} for i, p in enumerate(found)]


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which requests arrive: a Poisson process."""
    draw, at, found = random.Random(f"unmask-load-{seed}-{rate}"), 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        found.append(at)
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of 100 do not exceed, between neighbours by their distance; nan of none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def line(kind: str, level: float, rows: Sequence[Row], wall: float, slo: float) -> Row:
    """One level of load: throughput, latencies in seconds, and what was good."""
    good = [row for row in rows if row["status"] == 200]
    met = [row for row in good if row["seconds"] <= slo]
    told: Row = {"kind": kind, "level": level, "requests": len(rows), "failed": len(rows) - len(good), "wall": wall}
    told |= {"requests_s": len(good) / wall, "useful_tok_s": sum(r["useful_tokens"] for r in good) / wall}
    told |= {"goodput_s": len(met) / wall, "good": len(met) / max(1, len(rows))}
    forwards = sum(row["forwards"] for row in good)
    told["tokens_per_forward"] = sum(row["tokens"] for row in good) / max(1, forwards)
    for name in ("ttft", "seconds", "waited"):
        values = [row[name] for row in good]
        told |= {f"{name}_p{p}": percentile(values, p) for p in PERCENTILES}
    return told


def measure(plan: Plan, url: str, results: Results, *, show: bool, key: str | None) -> list[Row]:
    """All levels, one after the other, each after a warm-up that is not counted."""
    import httpx
    from rich.console import Console
    from rich.progress import Progress

    from unmask.study import load_client

    async def level(kind: str, value: float, told: Any) -> tuple[list[Row], float]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as client:
            warm = bodies(plan, 2 * plan.rows)
            await load_client.closed(client, warm, plan.rows, lambda: None)
            sent, began = bodies(plan, plan.requests), time.perf_counter()
            if kind == "concurrency":
                rows = await load_client.closed(client, sent, int(value), told)
            else:
                rows = await load_client.opened(client, sent, arrivals(value, len(sent), plan.seed), told)
            return rows, time.perf_counter() - began

    levels = [("concurrency", n) for n in plan.concurrency] + [("rate", rate) for rate in plan.rates]
    found = []
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("requests", total=len(levels) * plan.requests)
        for kind, value in levels:
            rows, wall = asyncio.run(level(kind, value, lambda: bar.advance(task)))
            for row in sorted(rows, key=lambda row: row["request"]):
                results.row({"kind": kind, "level": value, **row})
            found.append(line(kind, value, rows, wall, plan.slo))
    return found


def main(
    plan: Plan,
    *,
    url: str | None = None,
    key: str | None = None,
    json: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
) -> int:
    """Put a server under load, print the table (or JSON), write `<out or results>/serve-<model>-<UTC time>`; the code.

    Without `url` a server is started for the run. 1 if any request failed. UserError for a server that is not there.
    """
    try:
        import httpx as _  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("bench serve needs httpx; pip install 'unmask[serve]'") from None
    if plan.quick:
        plan = Plan(**{**asdict(plan), "requests": min(plan.requests, QUICK)})
    parts = [plan.model, *([plan.recipe] if plan.recipe else []), *([plan.dtype] if plan.dtype != "auto" else [])]
    name = "serve-" + re.sub(r"[^A-Za-z0-9._-]+", "-", " ".join(parts))
    with Results.create(name, {**asdict(plan), "own": url is None}, out or "results", seeds=plan.seed) as results:
        if url is None:
            with server(plan) as own:
                rows = measure(plan, own, results, show=not json, key=None)
        else:
            _there(url)
            rows = measure(plan, url.rstrip("/"), results, show=not json, key=key)
        where = {**results.run["machine"], "load_after": machine.load()}
        summary = {"rows": rows, "machine": where, "plan": asdict(plan)}
        folder = results.finish(summary)
    from unmask.study import load_show

    if plot is not None:
        load_show.draw(summary, plot)
    if json:
        print(jsonlib.dumps({**summary, "folder": str(folder)}, indent=2))
    else:
        load_show.show(summary)
        print(f"rows and provenance: {folder}")
    return int(any(row["failed"] for row in rows))


def _there(url: str) -> None:
    """UserError where no server answers."""
    import httpx

    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no server answers at {url}: {told}; start one with `unmask serve`") from None
