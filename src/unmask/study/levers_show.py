"""The summary of `unmask bench levers` as cells of a table, shared by the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALONE = ("right", "whole", "NFE", "helper", "tok/NFE", "useful tok/s", "ms")
"""Columns behind the name of a case."""
PAIRED = ("over", "right, difference", "tok/s ratio", "time ratio", "NFE ratio")
"""Columns of a case against another."""
QUESTIONS = ("question", "right, difference", "tok/s ratio", "time ratio", "NFE ratio", "verdict")
STACKS = ("stack", "of", "I of tok/s", "I of time", "I of NFE")
WIDTH = 140
"""Columns of a terminal that the tables take at least."""
RATIOS = ("speed", "time", "forwards")
TOLD = (
    "A case with a template is told the number of equations, as its template has cells for just so many; "
    "compare it with the other templates."
)
LEGEND = (
    "right: the final answer is right; whole: so is every word before it. NFE: the model's forwards a problem; helper: "
    "those of the guide or the joint sampler beside them. tok/NFE: cells decided a forward, ends of the text included; "
    "useful tok/s: tokens before the end, all helpers' time included; ms: milliseconds a problem. Ratios above 1 are "
    "gains, but for NFE. In brackets: the 95% bootstrap interval over problems. * : the interval of a difference holds "
    "0, that of a ratio 1, so there is no difference; that of an interaction 0, so the levers multiply. " + TOLD
)


def number(found: Mapping[str, Any], form: str = ".2f") -> str:
    """`value [low, high]`, with a star where the verdict is that there is no difference."""
    if found["value"] is None:
        return "-"
    low, high = ("?" if found[end] is None else format(found[end], form) for end in ("low", "high"))
    star = " *" if str(found.get("verdict", "")).startswith(("no difference", "multiply")) else ""
    return f"{found['value']:{form}} [{low}, {high}]{star}"


def alone(line: Mapping[str, Any], *, brief: bool = False) -> list[str]:
    """One case under ALONE; if brief, only accuracy and speed with their intervals."""
    helper = sum(part["forwards"] for part in line["helpers"].values())
    counts = {key: number(line[key]) for key in ("forwards", "tokens_per_forward")}
    if brief:
        counts = {key: cell.partition(" ")[0] for key, cell in counts.items()}
    return [
        number(line["accuracy"], ".3f"),
        f"{line['exact']['value']:.3f}",
        counts["forwards"],
        f"{helper:.2f}" if line["helpers"] else "",
        counts["tokens_per_forward"],
        number(line["useful_tokens_per_second"], ".0f"),
        f"{line['milliseconds']['value']:.1f}",
    ]


def paired(line: Mapping[str, Any]) -> list[str]:
    """One case under PAIRED, if it is paired."""
    over = line["paired"]
    return [over["over"], number(over["accuracy"], "+.3f"), *(number(over[key]) for key in RATIOS)]


def answers(summary: Mapping[str, Any]) -> list[list[str]]:
    """Each question of the summary: title, difference in accuracy, ratios, and the verdicts in words."""
    rows = []
    for asked in summary["comparisons"]:
        said = [f"accuracy: {asked['accuracy']['verdict']}", f"tok/s: {asked['speed']['verdict']}"]
        if "target" in asked:
            above = asked["reached"] == "above"
            said.append(f"{'above' if above else 'not shown to be above'} {asked['target']:g}x")
        parts = [number(asked["accuracy"], "+.3f"), *(number(asked[key]) for key in RATIOS)]
        rows.append([asked["title"], *(part.removesuffix(" *") for part in parts), "; ".join(said)])
    return rows


def stacks(summary: Mapping[str, Any]) -> list[list[str]]:
    """Each interaction: the stack, its two levers over their base, and I of speed, time and forwards."""
    rows = []
    for found in summary["interactions"]:
        pair = f"{found['one']} x {found['other']} over {found['base']}"
        rows.append([found["stack"], pair, *(number(found[key], "+.2f") for key in RATIOS)])
    return rows


def show(summary: Mapping[str, Any], plan: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDTH)
    lines = summary["cases"]
    whole = [[one["case"], *alone(one, brief=True)] for one in lines]
    console.print(table(headed(plan, where), ("case", *ALONE), whole, short=0))
    pairs = [[one["case"], *paired(one)] for one in lines if one["paired"]]
    told = "interactions: ln S(both) - ln S(one) - ln S(other); 0 if the two multiply"
    tables = (
        ("each case over another", ("case", *PAIRED), pairs, 0),
        ("comparisons", QUESTIONS, answers(summary), 1),
        (told, STACKS, stacks(summary), 2),
    )
    for head, heads, rows, short in tables:
        if rows:
            console.print("", table(head, heads, rows, short=short), sep="\n")
    close(console, summary, where, LEGEND)


def close(console: Any, summary: Mapping[str, Any], where: Mapping[str, Any], legend: str) -> None:
    """Print what stands below the tables: what was left out and why, how to read them, the machine."""
    for skipped in summary["skipped"]:
        console.print(f"left out: {skipped['case']} ({skipped['why']})")
    console.print(legend, f"{where['cpu']}, torch {where['torch']}", style="dim", sep="\n")


def headed(plan: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """What all tables of a run have in common."""
    load = ", ".join(map(str, where["load"])) or "unknown"
    return f"{plan['items']} held-out problems, batch 1, {plan['dtype']}, {where['threads']} thread; load {load}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, short: int) -> Any:
    """A rich table; the first `short` columns and a verdict may be folded."""
    from rich.table import Table

    shown = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="bold")
    for at, head in enumerate(heads):
        shown.add_column(head, overflow="fold", no_wrap=at >= short and head != "verdict")
    for row in rows:
        shown.add_row(*row)
    return shown
