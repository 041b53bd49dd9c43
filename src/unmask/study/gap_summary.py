"""What the rows of `unmask bench gap` come to: a line a case, the interaction of each pair, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unmask.study.gap_cases import FULL, TWIN, VANILLA, Case
from unmask.study.lever_cases import Interaction
from unmask.study.paired import Estimate, Table

if TYPE_CHECKING:
    from unmask.study.gap import Plan, Work

Row = dict[str, Any]
RULE = (
    "closed when the best stack writes at least as many useful tokens a second as the twin, and is right no more than "
    "{margin:.0%} less often than it: both by the whole 95% interval of the paired difference. The best stack is the "
    "fastest of those that were right on the validation problems at most {margin:.0%} less often than vanilla decoding."
)
PENALTY = 3.0
"""How hard the area under the frontier weighs a loss of accuracy (d3LLM's alpha)."""
WORST = 0.05
"""Points of accuracy below the first point of a frontier at which it ends."""


def at(rows: Sequence[Row], stage: str, batch: int) -> list[Row]:
    """The rows of one part."""
    return [row for row in rows if (row["stage"], row["batch"]) == (stage, batch)]


def best_of(rows: Sequence[Row], candidates: Sequence[Case], margin: float) -> str:
    """The fastest candidate of those that are about as often right as vanilla on the validation problems.

    All are compared on the problems that vanilla ran on, by what was measured and without intervals: it is a choice,
    not a claim. Where none is as good, the one that is right most often.
    """
    own = at(rows, "validation", 1)
    by_case = {case.name: [row for row in own if row["case"] == case.name] for case in candidates}
    vanilla = {row["item"]: row["right"] for row in own if row["case"] == VANILLA}
    found = []
    for name, told in by_case.items():
        shared = [row for row in told if row["item"] in vanilla]
        if shared:
            loss = sum(vanilla[row["item"]] - row["right"] for row in shared) / len(shared)
            rate = sum(row["useful_tokens"] for row in told) / sum(row["seconds"] for row in told)
            found.append((loss <= margin, rate if loss <= margin else -loss, name))
    return max(found)[2]


def summarise(todo: Work, rows: Sequence[Row], plan: Plan) -> Row:
    """Everything that is told of a run."""
    best = best_of(rows, todo.candidates, plan.margin)
    tables = {batch: _table(todo, at(rows, "test", batch), plan) for batch in plan.batches}
    lines = [line(table, name, batch) for batch, table in tables.items() for name in table.cases]
    singles = tables[plan.batches[0]]
    points = [row for row in lines if row["batch"] == plan.batches[0] and row["role"] != "twin"]
    return {
        "rows": lines,
        "pairs": [pair(singles, case) for case in todo.pairs if {case.name, *case.levers} <= singles.cases.keys()],
        "verdict": verdict(singles, best, plan.margin),
        "frontier": frontier(points),
        "refused": list(todo.refused),
        "bootstrap": singles.told,
    }


def _table(todo: Work, rows: Sequence[Row], plan: Plan) -> Table:
    names = {row["case"] for row in rows}
    return Table([case for name, case in todo.cases.items() if name in names], rows, draws=plan.draws, seed=plan.seed)


def ends(found: Estimate) -> list[float | None]:
    """[low, high]."""
    return [found["low"], found["high"]]


def line(table: Table, name: str, batch: int) -> Row:
    """One case: quality, cost, latency, and how fast it is over vanilla and over the twin."""
    found, own = table.line(name), table.rows[name]
    seconds = sorted(row["seconds"] for row in own)
    told = {
        **table.cases[name].told,
        "batch": batch,
        "problems": sum(row["one"] for row in own),
        "accuracy": found["accuracy"]["value"],
        "ci": ends(found["accuracy"]),
        "exact": found["exact"]["value"],
        "nfe": found["forwards"]["value"],
        "positions": found["positions"]["value"],
        "tokens_per_forward": found["tokens_per_forward"]["value"],
        "useful_tok_s": found["useful_tokens_per_second"]["value"],
        "useful_tok_s_ci": ends(found["useful_tokens_per_second"]),
        "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
        "p95_ms": 1e3 * float(np.percentile(seconds, 95)),
        "helpers": found["helpers"],
    }
    for key, other in (("vanilla", VANILLA), ("full", FULL), ("twin", TWIN)):
        over = table.against(name, other) if other in table.cases else None
        told |= {
            f"speedup_{key}": over and over["speed"]["value"],
            f"speedup_{key}_ci": over and ends(over["speed"]),
            f"accuracy_over_{key}": over and {k: over["accuracy"][k] for k in ("value", "low", "high")},
        }
    return told


def pair(table: Table, case: Case) -> Row:
    """I = ln S(both) - ln S(a) - ln S(b), S being the gain over vanilla in useful tokens a second, and in forwards."""
    a, b = case.levers
    found = table.interaction(Interaction(case.name, a, b, VANILLA))
    return {
        "a": a,
        "b": b,
        "interaction": found["speed"]["value"],
        "ci": ends(found["speed"]),
        "verdict": found["speed"]["verdict"],
        "interaction_nfe": found["forwards"]["value"],
        "ci_nfe": ends(found["forwards"]),
    }


def verdict(table: Table, best: str, margin: float) -> Row:
    """The rule of `RULE`, over the twin, and the same over vanilla decoding."""
    found = {name: _noninferior(table, best, other, margin) for name, other in (("twin", TWIN), ("vanilla", VANILLA))}
    twin = found["twin"]
    return {
        "closed": twin["faster"] and twin["as_good"],
        "best": best,
        "recipe": table.cases[best].told["recipe"],
        "speedup_twin": twin["speedup"],
        "accuracy_delta": twin["accuracy_delta"],
        "ci": twin["ci"],
        "rule": RULE.format(margin=margin),
        **found,
    }


def _noninferior(table: Table, best: str, other: str, margin: float) -> Row:
    over = table.against(best, other)
    rate, right = over["speed"], over["accuracy"]
    return {
        "speedup": rate["value"],
        "speedup_ci": ends(rate),
        "accuracy_delta": right["value"],
        "ci": ends(right),
        "faster": rate["low"] is not None and rate["low"] >= 1,
        "as_good": right["low"] is not None and right["low"] >= -margin,
    }


def frontier(lines: Sequence[Row]) -> Row:
    """The cases that none beats in both accuracy and tokens a forward, and the area under them (AUP).

    d3LLM's accuracy under parallelism (Qian et al. 2025): a trapezium between neighbours by tokens a forward, each
    accuracy (in percent) weighted by min(exp(-alpha (1 - y / y_max)), 1), and the first one's whole rectangle.
    """
    best: list[Row] = []
    for one in sorted(lines, key=lambda row: (-row["tokens_per_forward"], -row["accuracy"])):
        if not best or one["accuracy"] > best[-1]["accuracy"]:
            best.append(one)
    points = [(row["tokens_per_forward"], row["accuracy"], row["case"]) for row in reversed(best)]
    points = [p for p in points if p[1] >= points[0][1] - WORST]
    most = max(y for _, y, _ in points)
    heights = [100 * y * min(math.exp(-PENALTY * (1 - y / most)), 1.0) if most else 0.0 for _, y, _ in points]
    area = points[0][0] * 100 * points[0][1]
    for i in range(1, len(points)):
        area += (points[i][0] - points[i - 1][0]) * (heights[i] + heights[i - 1]) / 2
    return {"cases": [name for *_, name in points], "aup": area, "alpha": PENALTY}
