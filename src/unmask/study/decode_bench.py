"""Which kind of model decodes how well and how fast: a masked teacher, its block-causal student, their causal twin."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unmask import zoo
from unmask.decode import filled, finished
from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.settings import Settings
from unmask.study import decode_show, tasks
from unmask.study.bench import one_thread
from unmask.study.decode_cases import PROBLEMS, WAYS, Case, by_length, by_problems, role
from unmask.study.decode_questions import Asked, answered, pairs
from unmask.study.interleaved import check, decoded, interleaved, keep
from unmask.study.paired import DRAWS, Table

MODELS = ("dllm", "d2f", "twin")
"""What is measured where nothing is said: of these, the ones that are embedded."""
LENGTHS = (64, 256, 512)
QUICK = 3
"""Problems of a quick run."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is run: every case on every problem, in an order shuffled anew for each problem."""

    models: tuple[str, ...]
    lengths: tuple[int, ...] = LENGTHS
    items: int = 500
    slow: int = 50
    """Problems of a slow way on a long canvas, spread evenly over all."""
    sheets: int = 50
    """Worksheets of the largest size; as many problems in smaller ones."""
    seed: int = 0
    dtype: str = "float32"
    block: int = 8
    """Cells of a block in a model that attends to all cells; a block-causal model has its own."""
    draws: int = DRAWS
    quick: bool = False
    """Are the slow ways on long canvases and the sweep left out?"""


@dataclass(frozen=True)
class Run:
    """One text: which case decodes it, and the item that it is drawn with in the bootstrap."""

    case: Case
    number: int
    item: tasks.Item


@dataclass(frozen=True)
class Work:
    """All that is to be run, unit by unit, what warms up, and what is left out, with the reason."""

    cases: tuple[Case, ...]
    units: tuple[tuple[Run, ...], ...]
    warm: tuple[Run, ...]
    skipped: tuple[Row, ...]

    @property
    def total(self) -> int:
        """How many texts are decoded and told."""
        return sum(map(len, self.units))


def models(names: Sequence[str] | None, dtype: str) -> tuple[dict[str, Model], list[Row]]:
    """The models by a short name, and those by default that are not embedded; UserError for one that is asked for."""
    asked = list(names) if names is not None else [name for name in MODELS if name in zoo.NAMES]
    if not asked:
        raise UserError("no model is named; use --models with names, folders or hub ids joined by commas")
    if twice := next((name for name in asked if asked.count(name) > 1), None):
        raise UserError(f"the model {twice} is named twice in --models")
    short = [Path(name).name for name in asked]
    found = {s if short.count(s) == 1 else name: load(name, dtype=dtype) for name, s in zip(asked, short, strict=True)}
    absent = [name for name in MODELS if names is None and name not in zoo.NAMES]
    return found, [{"case": name, "why": "no such embedded model"} for name in absent]


def ending(job: Job, ends: str) -> Job:
    """The call with the rule by which a case's response is done (`decode_cases.ENDS`); `generate` ends at the EOS."""
    stop = {"canvas": filled, "blocks": finished}.get(ends)
    return job if stop is None else replace(job, recipe=replace(job.recipe, stop=stop))


def prepare(case: Case, item: tasks.Item, model: Model) -> tuple[Model, Job]:
    """The model, and what a user would say to `generate`, checked, with the case's own end."""
    said = Settings(recipe=case.way.recipe, length=case.cells, block=case.block or None)
    job = model.prepare([item.prompt], said)
    return model, ending(job, case.way.ends)


def measure(run: Run, loaded: Mapping[str, Model]) -> Row:
    """A row: the case, the text's place, and what decoding it cost."""
    _, row = decoded(lambda: prepare(run.case, run.item, loaded[run.case.model]), run.item)
    place = {"case": run.case.name, "item": run.number}
    return {**place, "model": run.case.model, "way": run.case.way.name, "cells": run.case.cells, "k": run.case.k, **row}


def takes(case: Case, number: int, plan: Plan) -> bool:
    """Does a case decode this problem? A limited one decodes `plan.slow` of them, spread evenly."""
    share = min(plan.slow, plan.items)
    return not case.limited or number * share // plan.items != (number - 1) * share // plan.items


def work(loaded: Mapping[str, Model], plan: Plan) -> Work:
    """Lay out the runs and check every case on its first text, and every length on its longest prompt."""
    items = tasks.word_problems(plan.items, seed=plan.seed).items
    cases, skipped = by_length(loaded, plan.lengths, plan.block), []
    for name, model in loaded.items():
        if (room := _room(model, items, longest := max(plan.lengths))) < 0:
            raise UserError(f"{name} has {-room} positions too few for {longest} cells; use smaller --lengths")
    if plan.quick:
        skipped += [{"case": case.name, "why": "too slow for a quick run"} for case in cases if case.limited]
        swept = dict.fromkeys(case.model for case in cases if case.way.swept)
        skipped += [{"case": f"the sweep of {name}", "why": "too long for a quick run"} for name in swept]
        cases = [case for case in cases if not case.limited and not case.way.swept]
    units = [tuple(Run(c, n, item) for c in cases if takes(c, n, plan)) for n, item in enumerate(items)]
    warm = [Run(case, 0, items[0]) for case in cases if not case.limited]
    long, sheets, left = _long(loaded, plan)
    for run in [*(Run(case, 0, items[0]) for case in cases), *(run for run in sheets[0] if run.number == 0)]:
        prepare(run.case, run.item, loaded[run.case.model])
    return Work((*cases, *long), (*units, *sheets), tuple(warm), (*skipped, *left))


def _room(model: Model, items: Sequence[tasks.Item], cells: int) -> int:
    """Positions that are left behind the longest prompt and so many cells, or minus those that are missing."""
    return model.network.config.max_positions - cells - max(len(model.encode(item.prompt)) for item in items)


def _long(loaded: Mapping[str, Model], plan: Plan) -> tuple[list[Case], list[tuple[Run, ...]], list[Row]]:
    """The cases of worksheets, their runs by groups of the same problems, and the models that they do not fit."""
    most = PROBLEMS[-1]
    sheets = {k: tasks.word_problems(plan.sheets * most // k, k=k, seed=plan.seed) for k in PROBLEMS}
    room = {name: _room(model, sheets[most].items, sheets[most].length) for name, model in loaded.items()}
    fitting = {name: model for name, model in loaded.items() if room[name] >= 0}
    cases = by_problems(fitting, {k: task.length for k, task in sheets.items()}, plan.block)
    units = []
    for group in range(plan.sheets):
        own = [(case, sheets[case.k].items[group * most // case.k : (group + 1) * most // case.k]) for case in cases]
        units.append(tuple(Run(case, group, item) for case, items in own for item in items))
    left = [{"case": f"{name} x{most}", "why": f"{-n} positions too few"} for name, n in room.items() if n < 0]
    return cases, units, left


def summarise(todo: Work, rows: Sequence[Row], plan: Plan) -> Row:
    """Lines of all cases, the students' pairs, the questions with their answers, and what was left out."""
    table = Table(todo.cases, rows, draws=plan.draws, seed=plan.seed)
    asked = Asked(todo.cases, table)
    return {
        "cases": [table.line(case.name) for case in todo.cases],
        "pairs": pairs(asked),
        "questions": [answered(question, table) for question in asked.questions()],
        "bootstrap": table.told,
        "skipped": list(todo.skipped),
    }


def _plan(lengths: Sequence[int] | None, items: int, slow: int, *, quick: bool, **rest: Any) -> Plan:
    found = tuple(dict.fromkeys(lengths if lengths is not None else LENGTHS))
    if not found or any(type(n) is not int or n < 1 for n in found):
        raise UserError(f"lengths are whole numbers of cells, at least 1, not {', '.join(map(str, found)) or 'none'}")
    check(items, rest["dtype"])
    for name, value in (("slow items", slow), ("block", rest["block"])):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    items, sheets = (min(items, QUICK), 1) if quick else (items, max(1, items // 10))
    return Plan((), tuple(sorted(found)), items, slow, sheets, quick=quick, **rest)


def main(
    *,
    names: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    items: int = 500,
    slow: int = 50,
    seed: int = 0,
    dtype: str = "float32",
    block: int = 8,
    quick: bool = False,
    json: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
) -> int:
    """Measure the models, print tables (or JSON) and write `<out or results>/decode-<UTC time>`; the exit code.

    UserError, before anything is written, for an unknown model, a length that does not fit or an unknown dtype.
    """
    plan = _plan(lengths, items, slow, quick=quick, seed=seed, dtype=dtype, block=block)
    loaded, absent = models(names, dtype)
    plan = replace(plan, models=tuple(names or loaded))
    with one_thread():
        todo = work(loaded, plan)
        todo = replace(todo, skipped=(*absent, *todo.skipped))
        rows = interleaved(todo.units, lambda run: measure(run, loaded), warm=todo.warm, seed=plan.seed)
        config = {**asdict(plan), "roles": {name: role(model) for name, model in loaded.items()}, "ways": WAYS}
        whole = {"total": todo.total, "summarise": lambda rows: summarise(todo, rows, plan), "show": not json}
        kept = keep("decode", config, out, rows=lambda _: rows, **whole)
    if plot is not None:
        from unmask.study.decode_plot import draw

        draw(kept.summary["cases"], plot, f"{plan.items} held-out problems, batch 1, {plan.dtype}")
    if json:
        print(jsonlib.dumps({**kept.summary, "machine": kept.machine, "folder": str(kept.folder)}, indent=2))
        return 0
    decode_show.show(kept.summary, config, kept.machine)
    print(f"rows and provenance: {kept.folder}")
    return 0
