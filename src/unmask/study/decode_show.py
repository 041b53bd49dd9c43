"""The summary of `unmask bench decode` as cells of tables, shared by the terminal and the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import Any

from unmask.study import levers_show
from unmask.study.decode_cases import ENDS, SLOW
from unmask.study.decode_questions import RULE
from unmask.study.levers_show import number, table

COST = ("NFE", "tok/NFE", "useful tok/s", "ms/token")
CASES = ("model", "way", "cells", "n", "block", "ends", "right", "whole", "positions", *COST)
SHEETS = ("model", "way", "problems", "cells", "n", "ends", "right", "useful tokens", *COST)
PAIRS = ("model", "way", "cells", "over", "n", "right, difference", "tok/s ratio", "NFE ratio")
WAYS = ("role", "way", "recipe", "a response ends when")
QUESTIONS = ("question", "n", "measured", "answer")
LEGEND = (
    "n: problems, or worksheets, decoded. right: the final answer is right (of a worksheet, the share of its answers); "
    "whole: so is every word before it. NFE: forwards a response; positions: cells that these computed; tok/NFE: cells "
    "decided a forward, ends of the text included; useful tok/s: tokens before the end a second, ms/token: "
    "milliseconds for each of these; the prompt is in the time and not in the tokens. In brackets: the 95% bootstrap "
    "interval over problems (over groups of worksheets that have the same problems); two are compared on the problems "
    "that both decoded. * : the interval of a difference holds 0, that of a ratio 1, so there is no difference. "
    f"A response ends when: {'; '.join(f'{name}: {told}' for name, told in ENDS.items())}. {RULE}"
)
FORMS = {"within": "+.3f", "faster": ".2f", "flat": ".2f"}


def _cost(line: Mapping[str, Any], *, brief: bool) -> list[str]:
    cells = [number(line["forwards"]), number(line["tokens_per_forward"])]
    cells = [cell.partition(" ")[0] for cell in cells] if brief else cells
    return [*cells, number(line["useful_tokens_per_second"], ".0f"), number(line["milliseconds_per_token"])]


def cases(summary: Mapping[str, Any], *, brief: bool = False) -> list[list[str]]:
    """One problem on a canvas: each case under CASES; if brief, forwards without their intervals."""
    rows = []
    for line in (line for line in summary["cases"] if not line["sheet"]):
        scores = [number(line["accuracy"], ".3f"), f"{line['exact']['value']:.3f}", f"{line['positions']['value']:.0f}"]
        where = [line["model"], line["way"], str(line["cells"]), str(line["items"]), str(line["block"] or "-")]
        rows.append([*where, line["ends"], *scores, *_cost(line, brief=brief)])
    return rows


def sheets(summary: Mapping[str, Any], *, brief: bool = False) -> list[list[str]]:
    """Worksheets: each case under SHEETS."""
    rows = []
    for line in (line for line in summary["cases"] if line["sheet"]):
        where = [line["model"], line["way"], str(line["k"]), str(line["cells"]), str(line["items"]), line["ends"]]
        scores = [number(line["accuracy"], ".3f"), f"{line['useful_tokens']['value']:.1f}"]
        rows.append([*where, *scores, *_cost(line, brief=brief)])
    return rows


def pairs(summary: Mapping[str, Any]) -> list[list[str]]:
    """Each student's case over a teacher's or a twin's, under PAIRS."""
    rows = []
    for found in summary["pairs"]:
        where = [found["model"], found["way"], str(found["cells"]), found["over"], str(found["items"])]
        rows.append([*where, number(found["accuracy"], "+.3f"), number(found["speed"]), number(found["forwards"])])
    return rows


def questions(summary: Mapping[str, Any]) -> list[list[str]]:
    """Each question with what was measured and the answer."""
    rows = []
    for asked in summary["questions"]:
        measured = f"{asked['measure']} {number(asked['found'], FORMS[asked['kind']])}"
        rows.append([asked["title"], str(asked["items"]), measured, asked["answer"]])
    return rows


def ways(config: Mapping[str, Any]) -> list[list[str]]:
    """Every way to decode of the roles that were measured: role, name, recipe, when it ends."""
    roles = dict.fromkeys(config["roles"].values())
    told = [(role, way if isinstance(way, Mapping) else vars(way)) for role in roles for way in config["ways"][role]]
    sized = {1: "", 2: ", blocks of twice the size"}
    return [[r, way["name"], f"`{way['recipe']}`{sized[way['times']]}", ENDS[way["ends"]]] for r, way in told]


def limits(config: Mapping[str, Any]) -> str:
    """Which ways have but a share of the problems."""
    share = min(config["slow"], config["items"])
    return f"vanilla to the end of a canvas of {SLOW} cells or more: {share} problems spread over the others"


def show(summary: Mapping[str, Any], config: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    """Print the tables; the students' pairs are in the JSON and in the documentation."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, levers_show.WIDTH)
    shown, rows = [head not in ("whole", "positions") for head in CASES], cases(summary, brief=True)
    tables = (
        (levers_show.headed(config, where), *([*compress(row, shown)] for row in (CASES, *rows))),
        ("worksheets: several problems in one response", SHEETS, *sheets(summary, brief=True)),
        ("questions", QUESTIONS, *questions(summary)),
    )
    for head, heads, *rows in tables:
        if rows:
            console.print(table(head, heads, rows, short=1), "", sep="\n")
    levers_show.close(console, summary, where, LEGEND if config["quick"] else f"{limits(config)}. {LEGEND}")
