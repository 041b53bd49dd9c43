"""The gap, measured: what each lever and each stack is worth against vanilla decoding and an autoregressive twin."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unmask import zoo
from unmask.decode import filled
from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.models.vocabulary import same_vocabulary
from unmask.settings import Settings
from unmask.study import gap_show, tasks
from unmask.study.bench import one_thread
from unmask.study.gap_cases import LEVERS, VANILLA, Case, reference, sorted_out, stacks
from unmask.study.gap_summary import best_of, summarise
from unmask.study.interleaved import check, interleaved, keep, left
from unmask.study.paired import DRAWS

Row = dict[str, Any]
QUICK = 4
"""Problems of a quick run, in each of its two parts."""
FORWARDS = 64
"""From so many cells of a canvas on, cases that take a forward a cell run on fewer problems."""


@dataclass(frozen=True)
class Plan:
    """What is run: every case on every problem, in an order shuffled anew for each problem."""

    models: Mapping[str, str]
    """The name of each role's model."""
    items: int = 300
    """Problems that are reported on."""
    validation: int = 60
    """Other problems, on which the best stack is chosen."""
    slow: int = 30
    """Problems of cases that take a forward a cell, on a canvas of 64 cells or more."""
    length: int = 24
    block: int = 8
    batches: tuple[int, ...] = (1, 8)
    margin: float = 0.01
    """How much less often right a stack may be and still be called as good."""
    seed: int = 0
    dtype: str = "float32"
    draws: int = DRAWS
    quick: bool = False


@dataclass(frozen=True)
class Run:
    """Some problems that are decoded together by one case."""

    stage: str
    case: Case
    batch: int
    number: int
    items: tuple[tasks.Item, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """By what its row is found again."""
        return self.stage, self.batch, self.case.name, self.number


def prepare(case: Case, items: Sequence[tasks.Item], models: Mapping[str, Model], plan: Plan) -> tuple[Model, Job]:
    """The model of a case, and its call for some problems, checked (UserError)."""
    model = models[case.role]
    block = plan.block if case.recipe == "llada" else None
    said = Settings(recipe=case.recipe, length=plan.length, block=block)
    prompts = [item.prompt for item in items]
    recipe = model.recipe(prompts, said)
    guide = models["twin"] if recipe.guided else None
    if recipe.joint and recipe.joint.k > 1 and model.sampler(None) is None:
        raise UserError(f"recipe {case.recipe!r} needs a joint sampler, and {model.name} has none")
    job = model.prepare(prompts, replace(said, recipe=recipe, block=None, guide=guide))
    return model, job if case.ends else replace(job, recipe=replace(job.recipe, stop=filled))


def measure(run: Run, models: Mapping[str, Model], plan: Plan) -> Row:
    """Decode the problems of a run together: how many are right, and what it cost."""
    began = time.perf_counter()
    model, job = prepare(run.case, run.items, models, plan)
    ready = time.perf_counter() - began
    outputs = model.run(job)
    report = outputs[0].ledger
    scores = [item.score(out.text) for item, out in zip(run.items, outputs, strict=True)]
    counts = ("forwards", "positions", "tokens", "useful_tokens", "seconds", "helpers")
    return {
        "stage": run.stage,
        "batch": run.batch,
        "case": run.case.name,
        "item": run.number,
        "one": len(run.items),
        "right": sum(int(score["right"] == 1) for score in scores),
        "exact": sum(int(score["exact"]) for score in scores),
        **{name: getattr(report, name) for name in counts},
        "exit_steps": list(report.exit_steps),
        "setup_seconds": ready,
        "texts": [out.text for out in outputs],
    }


@dataclass(frozen=True)
class Work:
    """The cases by what they are for, and what was refused, with the reason."""

    references: tuple[Case, ...]
    single: tuple[Case, ...]
    pairs: tuple[Case, ...]
    more: tuple[Case, ...]
    refused: tuple[Row, ...]

    @property
    def candidates(self) -> tuple[Case, ...]:
        """What may be the best stack."""
        students = [case for case in self.references if case.role == "student"]
        return (*self.single, *self.pairs, *self.more, *students)

    @property
    def cases(self) -> dict[str, Case]:
        """All of them, by name."""
        return {case.name: case for case in (*self.references, *self.candidates)}


def work(models: Mapping[str, Model], plan: Plan, first: tasks.Item) -> Work:
    """Every reference, lever, pair and triple that this pair of models can decode `first` with; UserError for none."""

    def checked(case: Case) -> object:
        return prepare(case, [first], models, plan)

    levers = LEVERS[:8] if plan.quick else LEVERS
    found, refused = [reference(student="student" in models)], []
    for size in (1, 2) if plan.quick else (1, 2, 3):
        good, bad = sorted_out(list(stacks(size, plan.block, levers)), checked)
        found.append(good)
        refused += bad
    students, bad = sorted_out([c for c in found[0] if c.role == "student"], checked)
    references = [c for c in found[0] if c.role != "student"] + students
    for case in references:  # without the twin or vanilla decoding there is no gap
        checked(case)
    if not found[1]:
        raise UserError(f"no lever can be measured: {refused[0]['why']}")
    more = found[3] if len(found) > 3 else []
    return Work(tuple(references), tuple(found[1]), tuple(found[2]), tuple(more), (*refused, *bad))


def taken(case: Case, number: int, plan: Plan) -> bool:
    """Does a case run on this problem? Slow ones are spread evenly over all."""
    if not (case.slow and plan.length >= FORWARDS and plan.slow < plan.items):
        return True
    return number == 0 or (number - 1) * plan.slow // plan.items != number * plan.slow // plan.items


def groups(stage: str, cases: Sequence[Case], items: Sequence[tasks.Item], batch: int, plan: Plan) -> list[list[Run]]:
    """Problem by problem (or batch by batch), the runs of all cases on it."""
    count = len(items) // batch
    parts = [tuple(items[n * batch : (n + 1) * batch]) for n in range(count)]
    return [
        [Run(stage, case, batch, n, part) for case in cases if batch > 1 or taken(case, n, plan)]
        for n, part in enumerate(parts)
    ]


def tested(todo: Work, best: str) -> list[Case]:
    """What is reported on: references, levers alone, pairs, and the best stack."""
    return list({c.name: c for c in (*todo.references, *todo.single, *todo.pairs, todo.cases[best])}.values())


def batched(todo: Work, best: str, plan: Plan) -> list[Case]:
    """What is run in batches: the twin, vanilla where it is not slow, every lever alone, and the best stack."""
    cases = (*todo.references, *todo.single, todo.cases[best])
    return [c for c in {c.name: c for c in cases}.values() if not (c.slow and plan.length >= FORWARDS)]


def rows(
    todo: Work, models: Mapping[str, Model], splits: Mapping[str, Sequence[tasks.Item]], plan: Plan, found: list[Row]
) -> Iterator[Row]:
    """A row a run, those that are found already left out: validation, then what is reported."""
    told = list(found)

    def part(stage: str, cases: Sequence[Case], batch: int) -> Iterator[Row]:
        units = groups(stage, cases, splits[stage], batch, plan)
        rest = left(units, found, ("stage", "batch", "case", "item"))
        warm = [run for run in (units[0] if units else []) if any(run.case is r.case for unit in rest for r in unit)]
        for row in interleaved(rest, lambda run: measure(run, models, plan), warm=warm, seed=plan.seed):
            told.append(row)
            yield row

    vanilla = [case for case in todo.references if case.name == VANILLA]
    yield from part("validation", [*vanilla, *todo.candidates], 1)
    best = best_of(told, todo.candidates, plan.margin)
    for batch in plan.batches:
        cases = tested(todo, best) if batch == 1 else batched(todo, best, plan)
        yield from part("test", cases, batch)


def total(todo: Work, plan: Plan) -> int:
    """How many runs there are, if the best stack is one of three levers."""
    best = (todo.more or todo.pairs or todo.single)[0].name
    count = sum(taken(c, n, plan) for c in (todo.references[1], *todo.candidates) for n in range(plan.validation))
    for batch in plan.batches:
        cases = tested(todo, best) if batch == 1 else batched(todo, best, plan)
        count += sum(batch > 1 or taken(c, n, plan) for c in cases for n in range(plan.items // batch))
    return count


def pair_of(names: Mapping[str, str], dtype: str) -> dict[str, Model]:
    """The models by role; UserError for a pair that cannot be compared."""
    shipped = {"dllm": zoo.NAMES[0], "twin": "twin", **({"student": "d2f"} if "d2f" in zoo.NAMES else {})}
    found = {role: load(name, dtype=dtype) for role, name in (names or shipped).items()}
    if missing := {"dllm", "twin"} - set(found):
        raise UserError(f"a gap is between a masked model and an autoregressive one; give --{missing.pop()}, too")
    kinds = {"dllm": ("full",), "twin": ("causal",), "student": ("block",)}
    for role, one in found.items():
        kind = one.network.config.layout.kind
        if kind not in kinds[role]:
            wanted = {"dllm": "attends to all cells", "twin": "is autoregressive", "student": "attends in blocks"}[role]
            raise UserError(f"the {role} must be a model that {wanted}, and {one.name} has {kind} attention")
        same_vocabulary(found["dllm"].tokenizer, one.tokenizer)
    return found


def _plan(items: int, validation: int, *, quick: bool, dtype: str, length: int, **rest: Any) -> Plan:
    check(items, dtype)
    check(validation, dtype)
    if quick:
        items, validation, rest["batches"] = min(items, QUICK), min(validation, QUICK), (1,)
    if length < 1:
        raise UserError(f"length must be at least 1, not {length}")
    return Plan({}, items, validation, length=length, dtype=dtype, quick=quick, **rest)


def main(
    *,
    names: Mapping[str, str] | None = None,
    items: int = 300,
    validation: int = 60,
    length: int = 24,
    block: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    quick: bool = False,
    json: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
) -> int:
    """Measure the gap, print tables (or JSON) and write `<out or results>/gap-<UTC time>`; the exit code.

    `names`: the model of each role, "dllm", "twin" and "student"; those that ship where it is empty. An interrupted run
    goes on where it was when it is called again alike. UserError, before anything is written, for models that cannot be
    compared.
    """
    plan = _plan(items, validation, quick=quick, dtype=dtype, length=length, block=block, seed=seed)
    with one_thread():
        models = pair_of(names or {}, dtype)
        plan = replace(plan, models={role: one.name for role, one in models.items()})
        splits = {
            "validation": tasks.word_problems(plan.validation, seed=plan.seed + 1).items,
            "test": tasks.word_problems(plan.items, seed=plan.seed).items,
        }
        todo = work(models, plan, splits["test"][0])
        kept = keep(
            "gap" if length == Plan.length else f"gap-{length}",
            asdict(plan),
            out,
            rows=lambda found: rows(todo, models, splits, plan, found),
            total=total(todo, plan),
            summarise=lambda found: summarise(todo, found, plan),
            show=not json,
            resume=True,
        )
    if plot is not None:
        from unmask.study.gap_plot import draw

        draw(kept.summary, plot)
    return kept.tell(gap_show.show, asdict(plan), json=json)
