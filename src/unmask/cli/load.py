"""`unmask bench serve`: a server under load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.errors import UserError


def load(
    *,
    url: Annotated[str | None, typer.Option(help="A server that runs; without it one is started here.")] = None,
    model: Annotated[str, typer.Option(help="The model that is asked, and served where there is no --url.")] = "dllm",
    recipe: Annotated[str, typer.Option(help="Recipe of every request; default the model's own.")] = "",
    rate: Annotated[str, typer.Option(help="Open loop: requests a second, arriving at random; joined by commas.")] = "",
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests under way; default 1,2,4,8,16 without --rate.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of each level.")] = 200,
    rows: Annotated[int, typer.Option(help="Rows of the server that is started.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the server that is started.")] = "auto",
    slo: Annotated[float, typer.Option(help="Seconds within which a request is good.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few requests, within a minute.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw latency against throughput: .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Put a server under load: throughput, time to the first committed text, latency, goodput.

    The key of a server that asks for one is taken from UNMASK_API_KEY.
    """
    from unmask.cli.study import drawable

    drawable(plot)
    from unmask.study.load import Plan, main

    if concurrency is None:
        concurrency = "" if rate.strip() else "1,2,4,8,16"
    levels: dict[str, Any] = {
        "rates": numbers("--rate", rate, float),
        "concurrency": numbers("--concurrency", concurrency, int),
    }
    plan = Plan(model, recipe, requests=requests, rows=rows, dtype=dtype, slo=slo, seed=seed, quick=quick, **levels)
    key = os.environ.get("UNMASK_API_KEY")
    raise typer.Exit(main(plan, url=url, key=key, json=json, plot=plot, out=out))


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Numbers joined by commas; UserError for anything else."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} is numbers joined by commas, not {text[:40]!r}") from None
