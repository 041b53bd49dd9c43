"""Bootstrap intervals over items, of one case and of two on the same items, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

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


class Named(Protocol):
    """A case that can be told: by its name, and by facts for its line in a table, the name among them as `case`."""

    @property
    def name(self) -> str:
        """Of no other case."""
        ...

    @property
    def told(self) -> Row:
        """What it is."""
        ...


class Bootstrap:
    """Resamples the items, with the same draws for every case: percentile intervals of means, ratios and differences.

    A statistic is a function of sums over items; it is computed for the items as they are and for each resample.
    """

    def __init__(self, items: int, *, draws: int = DRAWS, seed: int = 0) -> None:
        counts = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=draws)
        self.weights: Numbers = np.vstack([np.ones(items), counts]).astype(np.float64)
        """[1 + draws, items]: how often each item counts; the first row is the items themselves."""

    def sums(self, rows: Sequence[Row]) -> dict[str, Numbers]:
        """By column, [1 + draws]: its sum over the items as they are, then over each resample.

        An item may have several rows, which are drawn together.
        """
        place = {item: at for at, item in enumerate(sorted({row["item"] for row in rows}))}
        totals = {k: np.zeros(len(place)) for k in COLUMNS}
        for row in rows:
            for k, total in totals.items():
                total[place[row["item"]]] += float(row.get(k, 1))
        return {k: self.weights @ total for k, total in totals.items()}

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


def line(case: Named, rows: Sequence[Row], sums: dict[str, Numbers], boot: Bootstrap) -> Row:
    """One case by itself."""
    helpers = sorted({name for row in rows for name in row["helpers"]})
    mean = {
        name: {
            key: sum(row["helpers"].get(name, {}).get(key, 0) for row in rows) / len(rows)
            for key in ("forwards", "positions", "seconds")
        }
        for name in helpers
    }
    return {
        **case.told,
        "items": len(rows),
        "accuracy": boot.estimate(share(sums["right"], sums["one"])),
        "exact": boot.estimate(share(sums["exact"], sums["one"])),
        "forwards": boot.estimate(share(sums["forwards"], sums["one"])),
        "positions": boot.estimate(share(sums["positions"], sums["one"])),
        "tokens_per_forward": boot.estimate(share(sums["tokens"], sums["forwards"])),
        "useful_tokens": boot.estimate(share(sums["useful_tokens"], sums["one"])),
        "useful_tokens_per_second": boot.estimate(speed(sums)),
        "milliseconds": boot.estimate(1e3 * share(sums["seconds"], sums["one"])),
        "milliseconds_per_token": boot.estimate(1e3 * share(sums["seconds"], sums["useful_tokens"])),
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


class Table:
    """What was measured, by case, each case over the items it has, and several over the items they share."""

    def __init__(self, cases: Sequence[Named], rows: Sequence[Row], *, draws: int = DRAWS, seed: int = 0) -> None:
        self.cases = {case.name: case for case in cases}
        self.rows: dict[str, list[Row]] = {name: [] for name in self.cases}
        for row in rows:
            self.rows[row["case"]].append(row)
        self.items = {name: frozenset(row["item"] for row in own) for name, own in self.rows.items()}
        self.told = {"draws": draws, "level": LEVEL, "seed": seed}
        self._boots: dict[int, Bootstrap] = {}
        self._sums: dict[tuple[str, frozenset[Any]], dict[str, Numbers]] = {}

    def over(self, *names: str) -> tuple[Bootstrap, list[dict[str, Numbers]]]:
        """The draws of the items that these cases share, and the sums of each over them."""
        common = frozenset.intersection(*(self.items[name] for name in names))
        assert common, f"{names} have no item in common"
        if len(common) not in self._boots:
            self._boots[len(common)] = Bootstrap(len(common), draws=self.told["draws"], seed=self.told["seed"])
        boot = self._boots[len(common)]
        for key in ((name, common) for name in names):
            if key not in self._sums:
                self._sums[key] = boot.sums([row for row in self.rows[key[0]] if row["item"] in common])
        return boot, [self._sums[name, common] for name in names]

    def line(self, name: str) -> Row:
        """One case by itself, over all its items."""
        boot, (sums,) = self.over(name)
        return line(self.cases[name], self.rows[name], sums, boot)

    def against(self, one: str, other: str) -> Row:
        """One case over another, and how many items they share."""
        boot, (own, others) = self.over(one, other)
        return {"items": len(self.items[one] & self.items[other]), **against(own, others, boot)}

    def compared(self, asked: Comparison) -> Row:
        """One question with its answer; with a target, `reached` is the rule's verdict on the ratio of speeds."""
        found = {"title": asked.title, "case": asked.case, "over": asked.over, **self.against(asked.case, asked.over)}
        if asked.target is not None:
            found |= {"target": asked.target, "reached": verdict(found["speed"], asked.target)}
        return found

    def interaction(self, asked: Interaction) -> Row:
        """I = ln S(both) - ln S(one) - ln S(other), with S a gain over the base in speed, time or forwards."""
        boot, four = self.over(asked.stack, asked.one, asked.other, asked.base)
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
    """Lines, comparisons and interactions of the cases measured, two or more on the items they share."""
    table, lines = Table(cases, rows, draws=draws, seed=seed), []
    for case in cases:
        over = {"over": case.over, **table.against(case.name, case.over)} if case.over in table.cases else None
        lines.append({**table.line(case.name), "paired": over})
    asked = [c for c in comparisons if {c.case, c.over} <= table.cases.keys()]
    stacks = [i for i in interactions if {i.stack, i.one, i.other, i.base} <= table.cases.keys()]
    return {
        "cases": lines,
        "comparisons": [table.compared(c) for c in asked],
        "interactions": [table.interaction(i) for i in stacks],
        "bootstrap": table.told,
    }
