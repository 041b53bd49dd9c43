"""The summary of `unmask bench gap` as cells of a table, shared by the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADS = (
    "case",
    "right",
    "NFE",
    "positions",
    "tok/NFE",
    "useful tok/s",
    "p50 ms",
    "p95 ms",
    "over vanilla",
    "over twin",
)
PAIRS = ("a", "b", "I of tok/s", "I of NFE", "in words")
WIDTH = 140
"""Columns of a terminal that the tables take at least."""
LEGEND = (
    "right: share of problems with the right final answer. NFE: the model's forwards a problem. positions: cells run "
    "through it. tok/NFE: cells decided a forward, ends of the text included. useful tok/s: tokens before the end of "
    "the text, the prompt not counted, all helpers' time included. over: ratio of useful tok/s. In brackets: 95% "
    "bootstrap interval over problems, of ratios paired by problem."
)
PAIRS_LEGEND = (
    "I = ln S(a + b) - ln S(a) - ln S(b), S being the gain over vanilla: 0 is a product, below 0 the two save the same."
)


def interval(value: float | None, ends: Sequence[float | None] | None, form: str = ".2f") -> str:
    """`value [low, high]`, or a dash."""
    if value is None or ends is None:
        return "-"
    low, high = ("?" if end is None else format(end, form) for end in ends)
    return f"{value:{form}} [{low}, {high}]"


def cells(line: Mapping[str, Any]) -> list[str]:
    """One case under HEADS."""
    return [
        line["case"],
        interval(line["accuracy"], line["ci"], ".3f"),
        f"{line['nfe']:.2f}",
        f"{line['positions']:.0f}",
        f"{line['tokens_per_forward']:.2f}",
        interval(line["useful_tok_s"], line["useful_tok_s_ci"], ".0f"),
        f"{line['p50_ms']:.1f}",
        f"{line['p95_ms']:.1f}",
        interval(line["speedup_vanilla"], line["speedup_vanilla_ci"]),
        interval(line["speedup_twin"], line["speedup_twin_ci"]),
    ]


def pair_cells(line: Mapping[str, Any]) -> list[str]:
    """One pair under PAIRS."""
    told = interval(line["interaction"], line["ci"]), interval(line["interaction_nfe"], line["ci_nfe"])
    return [line["a"], line["b"], *told, line["verdict"]]


def settings(plan: Mapping[str, Any]) -> str:
    """What was fixed, in a line."""
    models = ", ".join(f"{role} {name}" for role, name in plan["models"].items())
    return (
        f"{models}; {plan['items']} problems (and {plan['validation']} others to choose the best stack), no examples "
        f"in the prompt; {plan['length']} cells, blocks of {plan['block']}, a row ends with its text; {plan['dtype']}, "
        f"one thread, seed {plan['seed']}"
    )


def verdict(summary: Mapping[str, Any]) -> str:
    """The verdict in words."""
    v = summary["verdict"]
    parts = [f"gap {'closed' if v['closed'] else 'not closed'}: best stack {v['best']} ({v['recipe']})"]
    for name in ("twin", "vanilla"):
        one = v[name]
        rate, right = interval(one["speedup"], one["speedup_ci"]), interval(one["accuracy_delta"], one["ci"], "+.3f")
        words = f"{'as good' if one['as_good'] else 'not shown to be as good'}"
        parts.append(f"over {name}: {rate} times its useful tok/s, accuracy {right}, {words}")
    return "; ".join(parts) + f". Rule: {v['rule']}"


def show(summary: Mapping[str, Any], plan: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    """Print the tables, what they mean, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, WIDTH)
    for batch in plan["batches"]:
        table = Table(title=f"batch {batch}", padding=(0, 0))
        for head in HEADS:
            table.add_column(head, justify="left" if head == "case" else "right")
        for line in summary["rows"]:
            if line["batch"] == batch:
                table.add_row(*cells(line))
        console.print(table)
    table = Table(title="Do two levers multiply?", padding=(0, 0))
    for head in PAIRS:
        table.add_column(head)
    for line in summary["pairs"]:
        table.add_row(*pair_cells(line))
    console.print(table)
    load = ", ".join(map(str, where["load"])) or "unknown"
    for text in (LEGEND, PAIRS_LEGEND, f"{settings(plan)}; {where['cpu']}, load {load}"):
        console.print(text, style="dim", markup=False)
    front = summary["frontier"]
    console.print(f"frontier: {', '.join(front['cases'])}; area under it (AUP) {front['aup']:.0f}", markup=False)
    console.print(verdict(summary), markup=False, style="bold")
