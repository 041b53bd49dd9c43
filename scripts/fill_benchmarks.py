"""Sections of the documentation that are read from the folders of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def speed(root: Path, folder: str, table: Table) -> str:
    """The summary of one folder: `<!-- begin speed results/bench-step-... -->`."""
    from unmask.bench import show

    if not folder:
        return "Not measured yet.\n"
    run, summary = (json.loads((root / folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("run", "summary"))
    plan, suite = run["config"], run["config"]["suite"]
    told = f"{plan['repeats']} interleaved runs (`{folder}`); {show.where(summary['machine'])}.\n\n"
    body = table([*show.HEADS, *show.MORE[suite]], [show.cells(suite, row) for row in summary["rows"]])
    peak = ", ".join(f"{name} {mb:.0f} MB" for name, mb in summary["peak_mb"].items())
    return told + body + (f"\nPeak memory of a process that loads the model and decodes: {peak}.\n" if peak else "")


HEADLINE = (
    *("llada", "threshold", "dual", "freecache-lag-quota", "freecache-lag-guided-1"),
    *("ice-template", "marginal-2", "joint-2", "ar"),
)
"""The cases that the README shows."""


def headline(root: Path, folder: str, table: Table) -> str:
    """A few cases of `unmask bench levers`: how often the answer and the whole response are right, and how fast."""
    summary = json.loads((root / folder / "summary.json").read_text(encoding="utf-8"))
    known = {one["case"]: one for one in summary["cases"]}
    rows = []
    for one in (known[name] for name in HEADLINE):
        right, speed = (one[k] for k in ("accuracy", "useful_tokens_per_second"))
        values = [f"{right['value']:.3f} [{right['low']:.3f}, {right['high']:.3f}]", f"{one['exact']['value']:.3f}"]
        model = "twin" if one["case"] == "ar" else "dLLM"
        rows.append([model, f"`{one['recipe']}`", *values, f"{one['forwards']['value']:.2f}", f"{speed['value']:.0f}"])
    return table(["model", "recipe", "right", "whole response", "forwards", "useful tokens/s"], rows)
