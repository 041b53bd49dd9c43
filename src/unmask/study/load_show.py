"""The table and the picture of a server under load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.study.verify_plot import _figure, _write

HEADS = (
    "load",
    "req/s",
    "useful tok/s",
    "over the first",
    "ttft p50",
    "p95",
    "p99",
    "latency p50",
    "p95",
    "p99",
    "good",
    "failed",
)


def cells(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """One level as a line of the table; milliseconds."""
    load = f"{row['level']:g} at once" if row["kind"] == "concurrency" else f"{row['level']:g} a second"
    ms = [f"{row[f'{name}_p{p}'] * 1000:.1f}" for name in ("ttft", "seconds") for p in (50, 95, 99)]
    gain = row["useful_tok_s"] / max(1e-9, first["useful_tok_s"])
    rates = [f"{row['requests_s']:.1f}", f"{row['useful_tok_s']:.0f}", f"{gain:.2f}x"]
    return [load, *rates, *ms, f"{row['good']:.0%}", str(row["failed"])]


def show(summary: Mapping[str, Any]) -> None:
    """Print it."""
    from rich.console import Console
    from rich.table import Table

    plan, console = summary["plan"], Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in HEADS:
        table.add_column(head, justify="left" if head == "load" else "right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(*cells(row, summary["rows"][0]))
    console.print(table)
    where = summary["machine"]
    told = (
        f"{plan['model']}{', ' + plan['recipe'] if plan['recipe'] else ''}, {plan['requests']} requests a level, "
        f"at most {plan['rows']} decoded at once, {plan['dtype']}; milliseconds, ttft: to the first committed text; "
        f"good: within {plan['slo']:g} s; server with one thread on {where['cpu']}, "
        f"load {', '.join(map(str, where['load']))}"
    )
    console.print(told, style="dim")


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Throughput against latency, one point a level."""
    figure = _figure()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in ("concurrency", "rate"):
        rows = [row for row in summary["rows"] if row["kind"] == kind]
        if not rows:
            continue
        x = [row["useful_tok_s"] for row in rows]
        for p, style in ((50, "o-"), (95, "s--")):
            axes.plot(x, [row[f"seconds_p{p}"] * 1000 for row in rows], style, label=f"{kind}, p{p}")
        for row, at in zip(rows, x, strict=True):
            point = (at, row["seconds_p50"] * 1000)
            axes.annotate(f"{row['level']:g}", point, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="useful tokens a second", ylabel="latency, ms", yscale="log", title="A server under load")
    axes.legend(frameon=False)
    _write(figure, path)
