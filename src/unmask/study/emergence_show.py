"""The summary of `unmask bench emergence` as cells of tables, shared by the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
HEADS = (
    "model",
    "suffix",
    "remasking",
    "samples",
    "n",
    "right",
    "first by 25%",
    "50%",
    "75%",
    "stays by 25%",
    "50%",
    "75%",
    "stays, by tenths",
)
EXITS = (
    "model",
    "suffix",
    "exit",
    "threshold",
    "NFE",
    "of",
    "saved",
    "right",
    "full",
    "truncated",
    "over truncated, same steps",
    "over truncated, same share",
    "in words",
)
GAPS = ("model", "suffix", "gap", "n", "is the final answer", "is right")
WIDTH = 150
"""Columns of a terminal that the tables take at least."""
BARS = " ▁▂▃▄▅▆▇█"
ORDERS = {"score": "low-confidence", "random": "random"}
LEGEND = (
    "first: share of samples whose would-be answer (all undecided cells filled at once) was right at some step by "
    "25, 50, 75% of their steps. stays: right at that step and all later ones. suffix: a template whose words stand "
    "before the answer's cell, as many cells to think in as the right equations take. Published figures count finally "
    "correct samples only."
)
EXITS_LEGEND = (
    "NFE: forwards a problem until everything left is filled at once, of so many without an exit. truncated: static "
    "truncation, filled after the same number of steps in all problems, at equal mean NFE. In brackets: 95% bootstrap "
    "interval, paired by problem."
)
GAPS_LEGEND = (
    "Steps of low-confidence refinement by the mean gap between the two largest logits over the answer's cells (of the "
    "whole response without a suffix)."
)


def share(value: float | None) -> str:
    """In percent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def estimate(found: Line, form: str = "+.3f") -> str:
    """`value [low, high]`, or a dash."""
    if any(found[key] is None for key in ("value", "low", "high")):
        return "-"
    value, low, high = (format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def bars(counts: Sequence[int]) -> str:
    """A histogram in a line."""
    top = max([1, *counts])
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in counts)


def cells(line: Line) -> list[str]:
    """One way of refinement under HEADS."""
    who = [line["model"], "yes" if line["suffix"] else "no", ORDERS[line["order"]], line["samples"], str(line["n"])]
    marks = [share(value) for key in ("first", "stays") for value in line[key]["by"].values()]
    return [*who, share(line["accuracy"]), *marks, f"|{bars(line['stays']['histogram'])}|"]


def exit_cells(line: Line) -> list[str]:
    """One exit under EXITS."""
    cut = line["truncation"]
    return [
        line["model"],
        "yes" if line["suffix"] else "no",
        line["exit"],
        line["threshold"],
        f"{line['nfe']:.2f}",
        f"{line['steps']:.2f}",
        f"{line['saved']:.2f}x",
        f"{line['accuracy']['value']:.3f}",
        f"{line['full']:.3f}",
        f"{cut['steps']['accuracy']:.3f}",
        estimate(cut["steps"]["delta"]),
        estimate(cut["share"]["delta"]),
        line["words"],
    ]


def gap_cells(line: Line, one: Line) -> list[str]:
    """One bin under GAPS."""
    high = "up" if one["high"] is None else f"to {one['high']:g}"
    told = [line["model"], "yes" if line["suffix"] else "no", f"{one['low']:g} {high}", str(one["n"])]
    return [*told, share(one["same"]), share(one["right"])]


def settings(plan: Line) -> str:
    """What was fixed, in a line."""
    return (
        f"{plan['items']} problems (and {plan['validation']} others to choose thresholds), no examples in the prompt; "
        f"{plan['length']} cells without a suffix, in one block, a cell a step, ends of the text included; "
        f"{plan['dtype']}, one thread, seed {plan['seed']}"
    )


def verdict(summary: Line) -> str:
    """The verdict in words."""
    found = summary["verdict"]
    parts = [
        f"Prophet on {found['model']}, {where}: {'proven' if found['proven'][where] else 'not proven'} ({words})"
        for where, words in found["words"].items()
    ]
    saved = [
        f"{line['model']} {'with' if line['suffix'] else 'without'} suffix {line['saved']:.2f}x at accuracy "
        f"{line['over_full']['value']:+.3f}"
        for line in found["by_model"]
    ]
    return f"{'; '.join(parts)}. Forwards saved over full decoding: {'; '.join(saved)}. Rule: {found['rule']}"


def show(summary: Line, plan: Line, where: Line) -> None:
    """Print the tables, what they mean, and the verdict."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, WIDTH)
    bins = [gap_cells(line, one) for line in summary["calibration"] for one in line["bins"]]
    load = ", ".join(map(str, where["load"])) or "unknown"
    for title, heads, lines, legend in (
        ("When is the answer right?", HEADS, list(map(cells, summary["emergence"])), LEGEND),
        ("Early exits against static truncation", EXITS, list(map(exit_cells, summary["exits"])), EXITS_LEGEND),
        ("What a gap means", GAPS, bins, GAPS_LEGEND),
    ):
        console.print(_table(title, heads, lines))
        console.print(legend, style="dim", markup=False)
    console.print(f"{settings(plan)}; {where['cpu']}, load {load}", style="dim", markup=False)
    console.print(verdict(summary), markup=False, style="bold")


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, padding=(0, 0))
    for head in heads:
        table.add_column(head)
    for line in lines:
        table.add_row(*line)
    return table
