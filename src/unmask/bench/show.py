"""A suite's summary as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
HEADS = ("preset", "dtype", "what", "engine", "ms", "x reference", "/ roofline", "roofline ms")
MORE = {
    "step": ("around the denoiser",),
    "ar": ("around the denoiser",),
    "decode": ("equal tokens", "forwards"),
    "batch": ("throughput", "ceiling"),
}
LEGEND = (
    "ms: median and interquartile range of interleaved runs. x reference: how many times as fast as the plain "
    "reference in the same dtype (int8: as that in bfloat16). / roofline: how many times what its products and its "
    "attention take alone, each measured in this run by the best means there is. around the denoiser: what the loop "
    "and its rules add, as a share of what the denoiser takes."
)


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def cells(suite: str, row: Row) -> list[str]:
    """One row under HEADS and MORE."""
    told = [row["preset"], row["dtype"], row["what"], row["engine"], f"{row['ms']:.2f} ± {row['spread']:.2f}"]
    told += [_number(row["ratio_to_reference"], ".2f"), _number(row["ratio_to_roofline"], ".2f")]
    told.append(_number(row["roofline_ms"], ".2f"))
    if suite in ("step", "ar"):
        told.append(_number(row.get("around"), ".1%"))
    elif suite == "decode":
        told += [_number(row.get("equal_tokens"), ".1%"), str(row.get("forwards", ""))]
    else:
        told += [_number(row.get("throughput"), ".2f"), _number(row.get("throughput_ceiling"), ".2f")]
    return told


def where(machine: Row) -> str:
    """What it was measured on, in a line."""
    load = ", ".join(map(str, machine["load"])) or "unknown"
    return (
        f"{machine['cpu']}, {machine['threads']} thread(s), load {load} before and "
        f"{', '.join(map(str, machine['load_after'])) or 'unknown'} after; torch {machine['torch']}; reads "
        f"{machine['read_gb_s']:.0f} GB/s, copies {machine['copy_gb_s']:.0f} GB/s, a call into torch takes "
        f"{machine['dispatch_us']:.1f} µs"
    )


def show(suite: str, summary: Row) -> None:
    """Print the table, what it means, and where it was measured."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 130)
    table = Table(title=f"unmask bench {suite}", padding=(0, 0))
    for head in (*HEADS, *MORE[suite]):
        table.add_column(head, justify="left" if head in HEADS[:4] else "right")
    for row in summary["rows"]:
        table.add_row(*cells(suite, row))
    console.print(table)
    for text in (LEGEND, where(summary["machine"])):
        console.print(text, style="dim", markup=False)
    if summary["peak_mb"]:
        told = ", ".join(f"{name} {mb:.0f} MB" for name, mb in summary["peak_mb"].items())
        console.print(f"peak memory of a process that decodes: {told}", markup=False)


def draw(summary: Row, path: Path) -> None:
    """Write bars of milliseconds, the roofline as a line over each; UserError if the file cannot be written."""
    from unmask.study.verify_plot import _figure, _write

    rows: Sequence[Row] = summary["rows"]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure = _figure()(figsize=(12, 4.5 * len(presets)), layout="constrained")
    for axis, preset in zip(figure.subplots(len(presets), squeeze=False)[:, 0], presets, strict=True):
        own = [row for row in rows if row["preset"] == preset]
        names = [f"{row['what']}\n{row['engine']}, {row['dtype']}" for row in own]
        axis.bar(names, [row["ms"] for row in own], yerr=[row["spread"] / 2 for row in own], color="tab:blue")
        for i, row in enumerate(own):
            if row["roofline_ms"] is not None:
                axis.hlines(row["roofline_ms"], i - 0.4, i + 0.4, color="black")
        axis.tick_params(axis="x", labelrotation=75, labelsize=7)
        axis.set_ylabel("ms")
        axis.set_yscale("log")
        axis.set_title(preset)
    _write(figure, path)
