"""What the rows of `unmask bench control` come to: success, fluency and cost by case and task, and verdicts by rule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from unmask.study.control_cases import BLIND, TASKS, VANILLA, Case
from unmask.study.paired import DRAWS, LEVEL, Bootstrap, Estimate, Numbers, share

Row = dict[str, Any]
KEEPS, LOSES, OPEN = "keeps control", "loses control", "not shown"
RULE = (
    "On a task a case keeps control if the whole interval of its success minus that of vanilla, paired by restaurant, "
    "is at or above minus the margin; it loses control if the whole interval is below; else it is not shown. A case "
    "loses control if it does so on any task, keeps it if it does so on all, else it is not shown. A refusal counts as "
    "a failure."
)


class _Task:
    """The rows of one task, by case, and statistics over them with the same draws of restaurants for each."""

    def __init__(self, rows: Sequence[Row], *, draws: int, seed: int) -> None:
        self.rows: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            self.rows[row["case"]].append(row)
        self.place = {item: at for at, item in enumerate(sorted({row["item"] for row in rows}))}
        self.boot = Bootstrap(len(self.place), draws=draws, seed=seed)

    def mean(self, case: str, value: Callable[[Row], float | None]) -> Numbers:
        """[1 + draws]: the mean over the rows that have such a value; nan where there are none."""
        total, count = np.zeros(len(self.place)), np.zeros(len(self.place))
        for row in self.rows[case]:
            if (one := value(row)) is not None:
                total[self.place[row["item"]]] += one
                count[self.place[row["item"]]] += 1
        return share(self.boot.weights @ total, self.boot.weights @ count)

    def estimate(self, values: Numbers) -> Estimate | None:
        """The value and its interval over the draws that have one; None where there is no value."""
        if not math.isfinite(values[0]):
            return None
        return self.boot.estimate(values[np.isfinite(values)])


def column(name: str) -> Callable[[Row], float | None]:
    """A column of rows; nothing for what was refused."""
    return lambda row: row.get(name)


def words(found: Estimate, margin: float) -> str:
    """The verdict of a paired difference of success, by RULE."""
    low, high = found["low"], found["high"]
    assert low is not None
    assert high is not None
    return KEEPS if low >= -margin else LOSES if high < -margin else OPEN


def whole(verdicts: Sequence[str]) -> str:
    """The verdict of a case from those of its tasks, by RULE."""
    if LOSES in verdicts:
        return LOSES
    return KEEPS if all(one == KEEPS for one in verdicts) else OPEN


def _line(case: Case, task: str, of: _Task, margin: float) -> Row:
    own, name = of.rows[case.name], case.name
    right, loglik, seconds = (of.mean(name, column(key)) for key in ("right", "loglik", "seconds"))
    written = [row for row in own if not row["refused"]]
    over = of.estimate(right - of.mean(VANILLA, column("right")))
    assert over
    return {
        **case.told,
        "task": task,
        "n": len(own),
        "success": of.estimate(right),
        "refused": 1 - len(written) / len(own),
        **{key: _part(written, key) for key in ("held", "said", "words", "doubled")},
        "perplexity": math.exp(-median(row["loglik"] for row in written)) if written else None,
        "loglik": of.estimate(loglik),
        "forwards": _part(written, "forwards"),
        "positions": _part(written, "positions"),
        "seconds": median(row["seconds"] for row in written) if written else None,
        "speedup": of.estimate(share(of.mean(VANILLA, column("seconds")), seconds)),
        "over_vanilla": over,
        "over_blind": of.estimate(right - of.mean(BLIND, column("right"))) if of.rows[BLIND] else None,
        "loglik_over_vanilla": of.estimate(loglik - of.mean(VANILLA, column("loglik"))),
        "verdict": words(over, margin),
    }


def _part(rows: Sequence[Row], key: str) -> float | None:
    return sum(row[key] for row in rows) / len(rows) if rows else None


def summarise(cases: Sequence[Case], rows: Sequence[Row], *, margin: float, draws: int = DRAWS, seed: int = 0) -> Row:
    """A line a case and task, a verdict a case, the reasons of what was refused, and the rule."""
    lines: list[Row] = []
    for task in TASKS:
        of = _Task([row for row in rows if row["task"] == task], draws=draws, seed=seed)
        lines += [_line(case, task, of, margin) for case in cases]
    verdicts = []
    for case in cases:
        told = {line["task"]: line["verdict"] for line in lines if line["case"] == case.name}
        verdicts.append({"case": case.name, "verdict": whole(list(told.values())), **told})
    reasons = {(row["case"], row["task"]): row["refused"] for row in rows if row["refused"]}
    return {
        "rows": lines,
        "verdicts": verdicts,
        "refused": [{"case": case, "task": task, "why": why} for (case, task), why in sorted(reasons.items())],
        "margin": margin,
        "rule": RULE,
        "bootstrap": {"draws": draws, "level": LEVEL, "seed": seed},
    }
