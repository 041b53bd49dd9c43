"""The summary of `unmask bench control` as cells of tables, shared by the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.study.control_cases import TASKS

Line = Mapping[str, Any]
HEADS = (
    "case",
    "n",
    "success",
    "refused",
    "held",
    "said",
    "doubled",
    "perplexity",
    "log-lik.",
    "NFE",
    "positions",
    "ms",
    "over vanilla, speed",
    "over vanilla, success",
    "over blind twin, success",
    "in words",
)
VERDICTS = ("case", "verdict", *TASKS)
WIDTH = 170
"""Columns of a terminal that the tables take at least."""
TITLES = {
    "infill": "Infilling: the first and last 30% of a reference are given",
    "length": "Exact length: as many words as a reference, and two more and fewer, the last a full stop",
    "slot": "Slots: the name and a second value stand where a reference has them",
}
LEGEND = (
    "success: infilling and slots: given words in place, every scored slot of the meaning said word for word, no word "
    "doubled; length: exactly so many words that end in a full stop, every slot said. held: given words in place, no "
    "early end. said: every slot. perplexity: median over texts of that of the tokens, given the meaning, under the "
    "autoregressive twin, which judges its own texts, too; log-lik.: mean over texts of the mean nats a token. Shares "
    "and costs but success are of the texts that were written. ms: median. In brackets: 95% bootstrap interval over "
    "restaurants, paired where two cases are compared. '2 a forward': the vanilla schedule with that many cells a "
    "forward. student: block-causal, asked for infilling as a continuation towards a suffix, and by template, where it "
    "does not see the words of later blocks. twin: asked as the others are. twin, blind: writes left to right, the "
    "given words put behind it when their turn comes. best of 8: drawn like that at temperature 1, the check itself "
    "choosing, then the likelihood."
)


def estimate(found: Line | None, form: str = ".3f") -> str:
    """`value [low, high]`, or a dash."""
    if found is None or any(found[key] is None for key in ("value", "low", "high")):
        return "-"
    value, low, high = (format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _plain(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(line: Line) -> list[str]:
    """One case on one task under HEADS."""
    return [
        line["case"],
        str(line["n"]),
        estimate(line["success"]),
        *(_plain(line[key], ".0%") for key in ("refused", "held", "said", "doubled")),
        _plain(line["perplexity"], ".2f"),
        estimate(line["loglik"], ".2f"),
        _plain(line["forwards"], ".1f"),
        _plain(line["positions"], ".0f"),
        _plain(None if line["seconds"] is None else 1e3 * line["seconds"], ".1f"),
        estimate(line["speedup"], ".2f"),
        estimate(line["over_vanilla"], "+.3f"),
        estimate(line["over_blind"], "+.3f"),
        line["verdict"],
    ]


def verdict_cells(line: Line) -> list[str]:
    """One case under VERDICTS."""
    return [line[key] for key in VERDICTS]


def settings(plan: Line) -> str:
    """What was fixed, in a line."""
    return (
        f"{plan['items']} restaurants of the E2E test split, one reference each; {', '.join(plan['models'].values())}; "
        f"recipes with their defaults; ends of the text excluded; {plan['dtype']}, one thread, batch 1, "
        f"margin {plan['margin']:g}, seed {plan['seed']}"
    )


def tables(summary: Line) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, heads, rows) of each task, of the verdicts, and of what was refused."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = [
        (TITLES[task], HEADS, [cells(line) for line in summary["rows"] if line["task"] == task]) for task in TASKS
    ]
    found.append(("Is control kept?", VERDICTS, list(map(verdict_cells, summary["verdicts"]))))
    refused = [[line["case"], line["task"], line["why"]] for line in summary["refused"]]
    return [*found, *([("Refused", ("case", "task", "why"), refused)] if refused else [])]


def show(summary: Line, plan: Line, where: Line) -> None:
    """Print the tables, what they mean, and the rule."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, WIDTH)
    for title, heads, rows in tables(summary):
        table = Table(title=title, padding=(0, 0))
        for head in heads:
            table.add_column(head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    load = ", ".join(map(str, where["load"])) or "unknown"
    console.print(LEGEND, style="dim", markup=False)
    console.print(f"{settings(plan)}; {where['cpu']}, load {load}", style="dim", markup=False)
    console.print(f"Rule: {summary['rule']} Margin {summary['margin']:g}.", markup=False, style="bold")
