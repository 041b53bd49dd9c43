"""What each lever is worth, alone and stacked: accuracy and cost of held-out problems, decoded one at a time."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.settings import Settings
from unmask.study import levers_show, paired, tasks
from unmask.study.bench import one_thread
from unmask.study.interleaved import check, decoded, interleaved, keep
from unmask.study.lever_cases import CASES, COMPARISONS, INTERACTIONS, Case, find
from unmask.template import CHAINS

LENGTH, BLOCK = 24, 8
"""Cells of a response without a template, and of a block: those that the embedded pair was trained with."""
QUICK = 4
"""Problems of a quick run."""
NO_SAMPLER = "no joint sampler in the zoo"

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The masked model and its autoregressive twin, which is also the guide."""

    dllm: Model
    twin: Model


@dataclass(frozen=True)
class Plan:
    """What is run: every case on every problem, in an order shuffled anew for each problem."""

    cases: tuple[str, ...]
    items: int = 500
    seed: int = 0
    dtype: str = "float32"
    length: int = LENGTH
    block: int = BLOCK
    draws: int = paired.DRAWS


def embedded(dtype: str) -> Pair:
    """The pair that ships with the package."""
    return Pair(load("dllm", dtype=dtype), load("twin", dtype=dtype))


def settings(case: Case, item: tasks.Item, pair: Pair, plan: Plan) -> Settings:
    """What a user would say to `generate`: a template by the number of equations, and blocks no longer than it."""
    template = CHAINS[item.gold.count(" = ")] if case.template else None
    cells = pair.dllm.length(item.prompt, Settings(template=template)) if template else plan.length
    block = min(plan.block, cells) if case.sized else None
    length = None if template else plan.length
    return Settings(recipe=case.recipe, length=length, block=block, template=template)


def prepare(case: Case, item: tasks.Item, pair: Pair, plan: Plan) -> tuple[Model, Job]:
    """The model of a case, and its call for one problem, checked."""
    model = pair.twin if case.model == "twin" else pair.dllm
    said = settings(case, item, pair, plan)
    recipe = model.recipe([item.prompt], said)
    guide = pair.twin if recipe.guided else None
    return model, model.prepare([item.prompt], replace(said, recipe=recipe, block=None, guide=guide))


def missing(case: Case, item: tasks.Item, pair: Pair, plan: Plan) -> str:
    """Why a case cannot be measured here, or "": the pair has no joint sampler, and the case draws several tokens."""
    if case.model == "twin":
        return ""
    joint = pair.dllm.recipe([item.prompt], settings(case, item, pair, plan)).joint
    return NO_SAMPLER if joint and joint.k > 1 and pair.dllm.sampler(None) is None else ""


def measure(case: Case, item: tasks.Item, pair: Pair, plan: Plan) -> Row:
    """Decode one problem with one case: is it right, and what did it cost."""
    out, row = decoded(lambda: prepare(case, item, pair, plan), item)
    if case.template:  # what stands in the answer's own cells, whatever the thinking says
        row["right"] = float(out.regions.get("answer", "").strip() == item.gold.rpartition(" ")[2])
    return {**row, "right": int(row["right"] == 1)}


def runs(cases: Sequence[Case], items: Sequence[tasks.Item], pair: Pair, plan: Plan) -> Iterator[Row]:
    """A row a run: problem by problem, all cases on each in a new order, after a warm-up of each case."""

    def run(job: tuple[Case, int]) -> Row:
        case, number = job
        return {"case": case.name, "item": number, **measure(case, items[number], pair, plan)}

    units = ([(case, number) for case in cases] for number in range(len(items)))
    return interleaved(units, run, warm=[(case, 0) for case in cases], seed=plan.seed)


def _plan(cases: Sequence[str] | None, items: int, quick: bool, **rest: Any) -> Plan:
    names = tuple(dict.fromkeys(find(name).name for name in cases or [case.name for case in CASES]))
    plan = Plan(names, items=min(items, QUICK) if quick else items, **rest)
    check(plan.items, plan.dtype)
    return plan


def _ready(plan: Plan, items: Sequence[tasks.Item], pair: Pair) -> tuple[list[Case], list[Row]]:
    """The cases that can be measured, each checked on the first problem, and those that cannot, with the reason."""
    cases, skipped = [], []
    for case in map(find, plan.cases):
        if why := missing(case, items[0], pair, plan):
            skipped.append({"case": case.name, "recipe": case.recipe, "why": why})
        else:
            prepare(case, items[0], pair, plan)
            cases.append(case)
    if not cases:
        raise UserError(f"nothing to measure: {skipped[0]['case']} needs a joint sampler ({NO_SAMPLER})")
    return cases, skipped


def _summary(cases: Sequence[Case], rows: Sequence[Row], plan: Plan) -> Row:
    asked = {"comparisons": COMPARISONS, "interactions": INTERACTIONS}
    return paired.summarise(cases, rows, **asked, draws=plan.draws, seed=plan.seed)


def main(
    *,
    cases: Sequence[str] | None = None,
    items: int = 500,
    seed: int = 0,
    dtype: str = "float32",
    quick: bool = False,
    json: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
    source: Callable[[str], Pair] = embedded,
) -> int:
    """Measure the levers, print tables (or JSON) and write `<out or results>/levers-<UTC time>`; the exit code.

    `source` gives another pair, of a dtype. UserError, before anything is written, for an unknown case or dtype.
    """
    plan = _plan(cases, items, quick, seed=seed, dtype=dtype)
    pair, texts = source(dtype), tasks.word_problems(plan.items, seed=seed).items
    recipes = {name: find(name).recipe for name in plan.cases}
    with one_thread():
        todo, skipped = _ready(plan, texts, pair)
        kept = keep(
            "levers",
            {**asdict(plan), "recipes": recipes},
            out,
            rows=lambda _: runs(todo, texts, pair, plan),
            total=len(todo) * len(texts),
            summarise=lambda rows: {**_summary(todo, rows, plan), "skipped": skipped},
            show=not json,
        )
    summary, where, folder = kept.summary, kept.machine, kept.folder
    if plot is not None:
        from unmask.study.levers_plot import draw

        draw(summary["cases"], plot, f"{plan.items} held-out problems, batch 1, {plan.dtype}")
    if json:
        print(jsonlib.dumps({**summary, "machine": where, "folder": str(folder)}, indent=2))
        return 0
    levers_show.show(summary, asdict(plan), where)
    print(f"rows and provenance: {folder}")
    return 0
