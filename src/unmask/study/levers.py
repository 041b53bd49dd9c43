"""What each lever is worth, alone and stacked: accuracy and cost of held-out problems, decoded one at a time."""

from __future__ import annotations

import gc
import json as jsonlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.settings import Settings
from unmask.study import levers_show, machine, paired, tasks
from unmask.study.bench import one_thread
from unmask.study.lever_cases import CASES, COMPARISONS, INTERACTIONS, Case, find
from unmask.study.results import Results
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
    """Decode one problem: is it right, and what did it cost. Seconds are the ledger's; setting up is told apart."""
    began = time.perf_counter()
    model, job = prepare(case, item, pair, plan)
    ready = time.perf_counter() - began
    (out,) = model.run(job)
    report, score = out.ledger, item.score(out.text)
    right = score["right"]
    if case.template:  # what stands in the answer's own cells, whatever the thinking says
        right = float(out.regions.get("answer", "").strip() == item.gold.rpartition(" ")[2])
    return {
        "right": int(right == 1),
        "exact": int(score["exact"]),
        "forwards": report.forwards,
        "positions": report.positions,
        "tokens": report.tokens,
        "useful_tokens": report.useful_tokens,
        "seconds": report.seconds,
        "setup_seconds": ready,
        "helpers": report.helpers,
        "text": out.text,
    }


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected until the block is left."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def runs(cases: Sequence[Case], items: Sequence[tasks.Item], pair: Pair, plan: Plan) -> Iterator[Row]:
    """A row a run: problem by problem, all cases on each in a new order, after a warm-up of each case."""
    for case in cases:
        measure(case, items[0], pair, plan)
    order, jobs = random.Random(plan.seed), list(cases)
    with _uncollected():
        for number, item in enumerate(items):
            order.shuffle(jobs)
            gc.collect()
            for case in jobs:
                yield {"case": case.name, "item": number, **measure(case, item, pair, plan)}


def _plan(cases: Sequence[str] | None, items: int, quick: bool, **rest: Any) -> Plan:
    names = tuple(dict.fromkeys(find(name).name for name in cases or [case.name for case in CASES]))
    plan = Plan(names, items=min(items, QUICK) if quick else items, **rest)
    if plan.items < 1:
        raise UserError(f"items must be at least 1, not {items}")
    if plan.dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"dtype is float32, bfloat16 or float64, not {plan.dtype!r}")
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


def _measured(cases: Sequence[Case], items: Sequence[tasks.Item], pair: Pair, plan: Plan, results: Results, show: bool):
    from rich.console import Console
    from rich.progress import track

    rows, total = [], len(cases) * len(items)
    todo, console = runs(cases, items, pair, plan), Console(stderr=True)
    for row in track(todo, "measuring", total=total, console=console, transient=True, disable=not show):
        results.row(row)
        rows.append(row)
    return paired.summarise(
        cases, rows, comparisons=COMPARISONS, interactions=INTERACTIONS, draws=plan.draws, seed=plan.seed
    )


def _results(plan: Plan, out: Path) -> Results:
    recipes = {name: find(name).recipe for name in plan.cases}
    try:
        return Results.create("levers", {**asdict(plan), "recipes": recipes}, out, seeds=plan.seed)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None


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
    with one_thread():
        todo, skipped = _ready(plan, texts, pair)
        with _results(plan, out or Path("results")) as results:
            summary = _measured(todo, texts, pair, plan, results, show=not json)
            where = {**results.run["machine"], "load_after": machine.load()}
            summary |= {"skipped": skipped, "load_after": where["load_after"]}
            folder = results.finish(summary)
    if plot is not None:
        from unmask.study.levers_plot import draw

        draw(summary["cases"], plot, f"{plan.items} held-out problems, batch 1, {plan.dtype}")
    if json:
        print(jsonlib.dumps({**summary, "machine": where, "folder": str(folder)}, indent=2))
        return 0
    levers_show.show(summary, asdict(plan), where)
    print(f"rows and provenance: {folder}")
    return 0
