"""What `unmask bench decode` answers in words, and by which rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unmask.study.decode_cases import ENDED, LONG, PIPELINED, SERIAL, SLOW, THRESHOLD, VANILLA, Case
from unmask.study.paired import Estimate, Table

POINTS, TWIN, TEACHER, FLAT = 0.02, 2.5, 20.0, 1.25
"""The bounds: accuracy that may be lost, ratios of useful tokens a second, a ratio of costs that counts as none."""
FEW = 30
"""Below so many problems (or worksheets) nothing is answered."""
MEASURES = {"within": "right, difference", "faster": "tok/s ratio", "flat": "ms/token ratio"}
RULE = (
    f"An answer is yes if the whole interval is on the right side of the bound, no if all of it is on the other, else "
    f"not shown; none is given on fewer than {FEW}. Flat: the cost of a useful token is between 1/{FLAT:g} and "
    f"{FLAT:g} of the other; else it grows or falls."
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Is `case` within `bound` of the accuracy of `over`, faster than it `bound` times, or as cheap a token?"""

    title: str
    kind: Literal["within", "faster", "flat"]
    case: str
    over: str
    bound: float


def answer(kind: str, found: Estimate, bound: float, items: int) -> str:
    """The rule, in words."""
    low, high = found["low"], found["high"]
    if items < FEW:
        return f"too few ({items}) to tell"
    if low is None or high is None:
        return "cannot be told"
    if kind == "flat":
        if 1 / bound <= low and high <= bound:
            return "yes"
        return "no: it grows" if low > bound else "no: it falls" if high < 1 / bound else "not shown"
    least = -bound if kind == "within" else bound
    return "yes" if low > least else "no" if high < least else "not shown"


def answered(asked: Question, table: Table) -> Row:
    """One question with what was measured and the answer."""
    pair = (asked.over, asked.case) if asked.kind == "flat" else (asked.case, asked.over)  # cost is one over speed
    told, column = table.against(*pair), "accuracy" if asked.kind == "within" else "speed"
    found: Estimate = {end: told[column][end] for end in ("value", "low", "high")}
    said = answer(asked.kind, found, asked.bound, told["items"])
    return {**vars(asked), "measure": MEASURES[asked.kind], "found": found, "items": told["items"], "answer": said}


class Asked:
    """The questions that these cases can answer."""

    def __init__(self, cases: Sequence[Case], table: Table) -> None:
        self.table = table
        self.at = {(c.model, c.way.name, c.cells): c for c in cases if not c.sheet}
        self.sheets = {(c.model, c.k): c for c in cases if c.sheet}
        self.models = {c.model: c.role for c in cases}
        self.lengths = sorted({c.cells for c in cases if not c.sheet})

    def of(self, role: str) -> list[str]:
        """The models that play a role."""
        return [model for model, part in self.models.items() if part == role]

    def best(self, teacher: str, cells: int) -> Case:
        """The teacher's way that is most often right, of those measured on all problems; the fastest of several."""

        def worth(case: Case) -> tuple[float, float]:
            line = self.table.line(case.name)
            return line["accuracy"]["value"], line["useful_tokens_per_second"]["value"] or 0.0

        own = [c for (model, _, n), c in self.at.items() if (model, n) == (teacher, cells) and not c.limited]
        return max(own, key=worth)

    def questions(self) -> Iterator[Question]:
        """All of them, a student's first."""
        for student in self.of("student"):
            for cells in self.lengths:
                yield from self._at(student, cells)
        yield from self._flat()

    def _at(self, student: str, cells: int) -> Iterator[Question]:
        case, where = self.at[student, PIPELINED, cells], f"at {cells} cells"
        for teacher in self.of("teacher"):
            best, simple = self.best(teacher, cells), self.at[teacher, THRESHOLD, cells]
            for other, told in {simple.name: THRESHOLD, best.name: f"best ({best.way.name})"}.items():
                title = f"{student} {PIPELINED} within {100 * POINTS:g} points of {teacher}'s {told} {where}"
                yield Question(title, "within", case.name, other, POINTS)
        for twin in self.of("twin"):
            title = f"{student} {PIPELINED} above {TWIN:g}x the tok/s of {twin} {where}"
            yield Question(title, "faster", case.name, self.at[twin, LONG["twin"], cells].name, TWIN)
        for teacher in self.of("teacher") if cells >= SLOW else ():
            for way, told in ((VANILLA, "to the end of the canvas"), (ENDED, "to EOS")):
                if other := self.at.get((teacher, way, cells)):
                    title = f"{student} {PIPELINED} above {TEACHER:g}x the tok/s of {teacher} vanilla {told} {where}"
                    yield Question(title, "faster", case.name, other.name, TEACHER)
        title = f"{student} {PIPELINED} faster than {SERIAL} {where}"
        yield Question(title, "faster", case.name, self.at[student, SERIAL, cells].name, 1.0)

    def _flat(self) -> Iterator[Question]:
        for model, role in self.models.items():
            name, (short, *_, long) = LONG[role], [self.lengths[0], *self.lengths]
            if short != long:
                title = f"{model} {name}: a useful token costs as much on {long} cells as on {short}"
                yield Question(title, "flat", self.at[model, name, long].name, self.at[model, name, short].name, FLAT)
            sizes = sorted(k for other, k in self.sheets if other == model)
            if len(sizes) > 1:
                few, many = (self.sheets[model, k] for k in (sizes[0], sizes[-1]))
                title = f"{model} {name}: a useful token costs as much in a worksheet of {many.k} as of {few.k}"
                yield Question(title, "flat", many.name, few.name, FLAT)


def pairs(asked: Asked) -> list[Row]:
    """Each student's case over the threshold and vanilla of each teacher and over each twin, at its own length."""
    found = []
    overs = {"teacher": (THRESHOLD, ENDED, VANILLA), "twin": (LONG["twin"],)}
    for (model, _, cells), case in asked.at.items():
        if asked.models[model] != "student":
            continue
        for role, ways in overs.items():
            for other in (asked.at.get((name, way, cells)) for name in asked.of(role) for way in ways):
                if other is not None:
                    told = {"case": case.name, "model": model, "way": case.way.name, "cells": cells}
                    over = {"over": f"{other.model} {other.way.name}"}
                    found.append({**told, **over, **asked.table.against(case.name, other.name)})
    return found
