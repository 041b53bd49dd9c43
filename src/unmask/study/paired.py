"""Bootstrap intervals over items, of one case and of two on the same items, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.study.lever_cases import Case, Comparison, Interaction

Row = dict[str, Any]
Numbers = NDArray[np.float64]
Estimate = dict[str, float | None]
"""`value`, and the `low` and `high` end of its interval; None for what cannot be told (nothing divided by nothing)."""
DRAWS = 2000
LEVEL = 95
SAVED = {"time": "seconds", "forwards": "forwards"}
"""What a lever saves, and the column that has it."""
COLUMNS = ("right", "exact", "forwards", "positions", "tokens", "useful_tokens", "seconds", "one")


class Bootstrap:
    """Resamples the items, with the same draws for every case: percentile intervals of means, ratios and differences.

    A statistic is a function of sums over items; it is computed for the items as they are and for each resample.
    """

    def __init__(self, items: int, *, draws: int = DRAWS, seed: int = 0) -> None:
        counts = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=draws)
        self.weights: Numbers = np.vstack([np.ones(items), counts]).astype(np.float64)
        """[1 + draws, items]: how often each item counts; the first row is the items themselves."""

    def sums(self, rows: Sequence[Row]) -> dict[str, Numbers]:
        """By column, [1 + draws]: its sum over the items as they are, then over each resample."""
        ordered = sorted(rows, key=lambda row: row["item"])
        return {k: self.weights @ np.array([float(row.get(k, 1)) for row in ordered]) for k in COLUMNS}

    @staticmethod
    def estimate(values: Numbers) -> Estimate:
        """The first value, and the interval of all others."""
        tail = (100 - LEVEL) / 2
        low, high = np.percentile(values[1:], [tail, 100 - tail])
        told = {"value": values[0], "low": low, "high": high}
        return {k: float(v) if math.isfinite(v) else None for k, v in told.items()}


def share(a: Numbers, b: Numbers) -> Numbers:
    """a / b, nan where b is nothing."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def log(a: Numbers) -> Numbers:
    """The natural logarithm, nan where there is none."""
    return np.log(a, out=np.full_like(a, np.nan), where=a > 0)


def speed(sums: dict[str, Numbers]) -> Numbers:
    """Useful tokens a second."""
    return share(sums["useful_tokens"], sums["seconds"])


def verdict(found: Estimate, null: float) -> str:
    """The rule: "above" or "below" if the whole interval is, else "no difference: interval holds NULL"."""
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return "cannot be told"
    return "above" if low > null else "below" if high < null else f"no difference: interval holds {null:g}"


def overlap(found: Estimate) -> str:
    """The same rule for an interaction, whose null of 0 is that two levers multiply."""
    words = {"above": "more than the product", "below": "less than the product", "cannot be told": "cannot be told"}
    return words.get(verdict(found, 0), "multiply: interval holds 0")


def line(case: Case, rows: Sequence[Row], boot: Bootstrap) -> Row:
    """One case by itself."""
    sums = boot.sums(rows)
    helpers = sorted({name for row in rows for name in row["helpers"]})
    mean = {
        name: {
            key: sum(row["helpers"].get(name, {}).get(key, 0) for row in rows) / len(rows)
            for key in ("forwards", "positions", "seconds")
        }
        for name in helpers
    }
    return {
        "case": case.name,
        "group": case.group,
        "recipe": case.recipe,
        "model": case.model,
        "template": case.template,
        "items": len(rows),
        "accuracy": boot.estimate(share(sums["right"], sums["one"])),
        "exact": boot.estimate(share(sums["exact"], sums["one"])),
        "forwards": boot.estimate(share(sums["forwards"], sums["one"])),
        "positions": boot.estimate(share(sums["positions"], sums["one"])),
        "tokens_per_forward": boot.estimate(share(sums["tokens"], sums["forwards"])),
        "useful_tokens_per_second": boot.estimate(speed(sums)),
        "milliseconds": boot.estimate(1e3 * share(sums["seconds"], sums["one"])),
        "helpers": mean,
    }


def against(one: dict[str, Numbers], other: dict[str, Numbers], boot: Bootstrap) -> Row:
    """Two cases on the same items, from their sums: a difference of accuracies, ratios of speed, time and forwards.

    `speed` is that of useful tokens, `time` that of problems, in which a case gains that leaves thinking unwritten.
    """
    found = {
        "accuracy": boot.estimate(share(one["right"] - other["right"], one["one"])),
        "speed": boot.estimate(share(speed(one), speed(other))),
        "time": boot.estimate(share(other["seconds"], one["seconds"])),
        "forwards": boot.estimate(share(one["forwards"], other["forwards"])),
    }
    return {key: {**one, "verdict": verdict(one, float(key != "accuracy"))} for key, one in found.items()}


def compared(asked: Comparison, one: dict[str, Numbers], other: dict[str, Numbers], boot: Bootstrap) -> Row:
    """One question with its answer; with a target, `reached` is the rule's verdict on the ratio of speeds."""
    found = {"title": asked.title, "case": asked.case, "over": asked.over, **against(one, other, boot)}
    if asked.target is not None:
        found |= {"target": asked.target, "reached": verdict(found["speed"], asked.target)}
    return found


def interaction(asked: Interaction, sums: dict[str, dict[str, Numbers]], boot: Bootstrap) -> Row:
    """I = ln S(both) - ln S(one) - ln S(other), with S a gain over the base in speed, time or forwards."""
    four = [sums[name] for name in (asked.stack, asked.one, asked.other, asked.base)]
    found: Row = {"stack": asked.stack, "one": asked.one, "other": asked.other, "base": asked.base}
    rates = {"speed": [log(speed(s)) for s in four], **{k: [-log(s[c]) for s in four] for k, c in SAVED.items()}}
    for key, (both, one, other, base) in rates.items():
        estimate = boot.estimate(both - one - other + base)
        found[key] = {**estimate, "verdict": overlap(estimate)}
    return found


def summarise(
    cases: Sequence[Case],
    rows: Sequence[Row],
    *,
    comparisons: Sequence[Comparison] = (),
    interactions: Sequence[Interaction] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Row:
    """Lines, comparisons and interactions of the cases measured, each on the same items."""
    by = {case.name: [row for row in rows if row["case"] == case.name] for case in cases}
    items = {tuple(sorted(row["item"] for row in own)) for own in by.values()}
    assert len(items) == 1, "every case has the same items"
    boot = Bootstrap(len(items.pop()), draws=draws, seed=seed)
    sums = {name: boot.sums(own) for name, own in by.items()}
    lines = []
    for case in cases:
        over = {"over": case.over, **against(sums[case.name], sums[case.over], boot)} if case.over in sums else None
        lines.append({**line(case, by[case.name], boot), "paired": over})
    asked = [c for c in comparisons if {c.case, c.over} <= sums.keys()]
    stacks = [i for i in interactions if {i.stack, i.one, i.other, i.base} <= sums.keys()]
    return {
        "cases": lines,
        "comparisons": [compared(c, sums[c.case], sums[c.over], boot) for c in asked],
        "interactions": [interaction(i, sums, boot) for i in stacks],
        "bootstrap": {"draws": draws, "level": LEVEL, "seed": seed},
    }
