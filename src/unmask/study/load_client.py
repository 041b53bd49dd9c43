"""A client that measures: one streamed completion, when its first text came, and when it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

Row = dict[str, Any]


async def one(client: httpx.AsyncClient, body: Mapping[str, Any], began: float) -> Row:
    """Send a completion and read its stream: seconds to the first committed text and to the end, tokens, forwards."""
    sent, first, usage, cost, status, error = time.perf_counter(), None, {}, {}, 0, ""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=asked) as answer:
            status = answer.status_code
            if status != 200:
                error = (await answer.aread()).decode("utf-8", "replace")[:300]
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    status, error = 500, chunk["error"]["message"]
                elif chunk["choices"] and chunk["choices"][0]["text"] and first is None:
                    first = time.perf_counter() - sent
                usage, cost = chunk.get("usage") or usage, chunk.get("unmask") or cost
    except httpx.HTTPError as failure:
        status, error = 0, f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - sent
    return {
        **{"at": sent - began, "status": status, "error": error, "ttft": seconds if first is None else first},
        **{"seconds": seconds, "useful_tokens": usage.get("completion_tokens", 0), "waited": cost.get("waited", 0.0)},
        **{"forwards": cost.get("forwards", 0), "tokens": cost.get("tokens", 0)},
    }


async def closed(
    client: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], concurrency: int, told: Any
) -> list[Row]:
    """So many requests under way at any time, until all are done."""
    left, found, began = iter(enumerate(bodies)), list[Row](), time.perf_counter()

    async def worker() -> None:
        for number, body in left:
            found.append({"request": number, **await one(client, body, began)})
            told()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return found


async def opened(
    client: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], times: list[float], told: Any
) -> list[Row]:
    """Each request at its own time, whatever has become of those before it."""
    began = time.perf_counter()

    async def later(number: int, at: float) -> Row:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
        row = {"request": number, **await one(client, bodies[number], began)}
        told()
        return row

    return list(await asyncio.gather(*(later(number, at) for number, at in enumerate(times))))
