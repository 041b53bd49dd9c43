"""When the answer emerges: the steps at which a would-be answer is first right, and from which it stays right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask import recipes, zoo
from unmask.decode import Blocks, Canvas, Draft, Recipe, everything, filled, response, useful
from unmask.decode.early import Level, Sure
from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.settings import Settings
from unmask.study import emergence_show, tasks
from unmask.study.bench import one_thread
from unmask.study.emergence_summary import summarise
from unmask.study.interleaved import check, interleaved, keep, left
from unmask.study.paired import DRAWS
from unmask.template import CHAINS, regions, shown
from unmask.train import problems

Row = dict[str, Any]
MODELS = (zoo.NAMES[0], *zoo.CHECKPOINTS)
"""The embedded model, and itself before its training was over."""
LENGTH = 24
"""Cells of a response without a template: those that the embedded model was trained with."""
QUICK = 6
"""Problems of a quick run, in each of its two parts."""


@dataclass(frozen=True)
class Way:
    """A way to refine: with words before the answer or without, and which cell is written next.

    `order`: "score" (low-confidence remasking), "random", or "ice" (thinking first, by score).
    """

    suffix: bool
    order: str


GRID = tuple(Way(suffix, order) for suffix in (False, True) for order in ("score", "random"))
ICE = Way(True, "ice")
EXITS = (Way(False, "score"), Way(True, "score"), ICE)
"""The ways whose early exits are judged."""


@dataclass(frozen=True)
class Plan:
    """What is run: every way of every model on every problem, one at a time."""

    models: tuple[str, ...] = MODELS
    items: int = 300
    """Problems that are reported on."""
    validation: int = 100
    """Other problems, on which the thresholds are chosen."""
    length: int = LENGTH
    margin: float = 0.01
    """How much accuracy a threshold may lose on the validation problems."""
    seed: int = 0
    dtype: str = "float32"
    draws: int = DRAWS
    quick: bool = False


@dataclass(frozen=True)
class Run:
    """One problem, refined by one model in one way."""

    stage: str
    model: str
    way: Way
    number: int
    item: tasks.Item

    @property
    def key(self) -> tuple[Any, ...]:
        """By what its row is found again."""
        return self.stage, self.model, self.way.suffix, self.way.order, self.number


def prepare(model: Model, item: tasks.Item, way: Way, length: int, *, seed: int = 0) -> Job:
    """A call that writes one cell a step until no cell is left (ICE: until the answer is written), all logits kept.

    With a suffix the response is a template by the number of equations, whose words stand before the answer's cell.
    """
    template = CHAINS[item.gold.count(" = ")] if way.suffix else None
    said = Settings(template=template, length=None if template else length, seed=seed)
    form = model.form(item.prompt, said)
    if way.order == "ice":  # a mean peak is at most 1, so no lower tau would have let it answer later
        return model.prepare([item.prompt], replace(said, recipe=recipes.get("ice-quota", tau=1.0)))
    cells = len(form.cells) if form else length
    b = Blocks(cells)
    quota = b.quota(form.cells.count(None) if form else cells, by=way.order)
    never = everything.when(Sure(Level(math.inf), response))  # a rule that reads all logits
    recipe = Recipe(query=everything, unmask=never | b >> quota, stop=filled)
    job = model.prepare([item.prompt], replace(said, recipe=recipe))
    return replace(job, recipe=replace(job.recipe, stop=filled))


@dataclass(frozen=True)
class Course:
    """What would have come out at each step, had everything left been filled at once."""

    right: list[int]
    answers: list[str]
    gap: list[float]
    whole: list[float]
    peak: list[float]
    text: str


def _mean(value: Tensor, cells: Tensor) -> float:
    return round(float(value[cells].double().mean()), 5)


def follow(model: Model, job: Job, item: tasks.Item) -> Course:
    """Refine a problem, and read at every step what the draft would answer, and how sure it is of it.

    Answer cells are those of the template's slot, or the whole response. The step's number is the forwards it took.
    """
    right, answers, text = list[int](), list[str](), ""
    sure: dict[str, list[float]] = {"gap": [], "whole": [], "peak": []}
    gold, canvas = item.gold.rpartition(" ")[2], job.canvas
    own = canvas.own
    region = own & (canvas.region == 2)
    watched = region if job.template else own
    for after, event in job:
        draft = event.draft
        text, answer = _would_be(model, canvas, draft, job.template)
        answers.append(answer)
        right.append(int(answer == gold if job.template else item.score(text)["right"] == 1))
        sure["gap"].append(_mean(draft.gap, watched & draft.fresh))
        sure["whole"].append(_mean(draft.gap, own & draft.fresh))
        sure["peak"].append(_mean(draft.peak, watched & draft.fresh))
        canvas = after
    return Course(right, answers, **sure, text=text)


def _would_be(model: Model, canvas: Canvas, draft: Draft, template: bool) -> tuple[str, str]:
    """The text if all undecided cells took their drafted tokens now, and the answer in it."""
    full = canvas.advance(canvas.masked & draft.fresh, None, draft)
    text = model.tokenizer.decode(full.tokens[shown(full) if template else useful(full)].tolist())
    if template:
        return text, regions(full, model.tokenizer.decode).get("answer", "").strip()
    return text, " ".join(map(str, problems.answers(text)))


def emerged(right: Sequence[int]) -> tuple[int | None, int | None]:
    """The step (from 1) that is first right, and that from which all are; None where there is none."""
    first = next((n for n, good in enumerate(right, 1) if good), None)
    last_wrong = max((n for n, good in enumerate(right, 1) if not good), default=0)
    return first, last_wrong + 1 if last_wrong < len(right) else None


def measure(run: Run, models: Mapping[str, Model], plan: Plan) -> Row:
    """One problem, one model, one way: what each step would have answered."""
    model = models[run.model]
    found = follow(model, prepare(model, run.item, run.way, plan.length, seed=run.number), run.item)
    first, stays = emerged(found.right)
    return {
        "stage": run.stage,
        "model": run.model,
        "suffix": run.way.suffix,
        "order": run.way.order,
        "item": run.number,
        "steps": len(found.right),
        "correct": found.right[-1],
        "first": first,
        "stays": stays,
        "right": found.right,
        "same": [int(answer == found.answers[-1]) for answer in found.answers],
        "answer": found.answers[-1],
        "text": found.text,
        "gap": found.gap,
        "whole": found.whole,
        "peak": found.peak,
    }


def units(plan: Plan, splits: Mapping[str, Sequence[tasks.Item]]) -> list[list[Run]]:
    """Problem by problem, all runs on it: those that thresholds are chosen by, then those that are reported."""
    ways = {"validation": EXITS, "test": (*GRID, ICE)}
    return [
        [Run(stage, model, way, number, item) for model in plan.models for way in ways[stage]]
        for stage, items in splits.items()
        for number, item in enumerate(items)
    ]


def rows(todo: Sequence[Sequence[Run]], models: Mapping[str, Model], plan: Plan, found: Sequence[Row]) -> Iterator[Row]:
    """A row a run, those left out that are found already."""
    rest = left(todo, found, ("stage", "model", "suffix", "order", "item"))
    return interleaved(rest, lambda run: measure(run, models, plan), warm=(), seed=plan.seed)


def masked(name: str, dtype: str) -> Model:
    """A model that attends to all cells; UserError for another."""
    found = load(name, dtype=dtype)
    if (kind := found.network.config.layout.kind) != "full":
        raise UserError(
            f"emergence is over the steps of a model that attends to all cells; {name} has {kind} attention"
        )
    return found


def _plan(models: Sequence[str] | None, items: int, validation: int, *, quick: bool, dtype: str, **rest: Any) -> Plan:
    check(items, dtype)
    if validation < 1:
        raise UserError(f"validation must be at least 1, not {validation}")
    names = tuple(dict.fromkeys(MODELS if models is None else models))
    if not names:
        raise UserError(f"there is no model; give --models {','.join(MODELS[:2])}, say")
    if quick:
        items, validation = min(items, QUICK), min(validation, QUICK)
    if rest["length"] < 1:
        raise UserError(f"length must be at least 1, not {rest['length']}")
    return Plan(names, items, validation, dtype=dtype, quick=quick, **rest)


def main(
    *,
    models: Sequence[str] | None = None,
    items: int = 300,
    validation: int = 100,
    length: int = LENGTH,
    seed: int = 0,
    dtype: str = "float32",
    quick: bool = False,
    json: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
    source: Callable[[str, str], Model] = masked,
) -> int:
    """Measure when answers emerge, print tables (or JSON) and write `<out or results>/emergence-<UTC time>`; the code.

    `source` gives another model by its name and dtype. An interrupted run goes on where it was when it is called again
    alike. UserError, before anything is written, for a model that cannot be measured.
    """
    plan = _plan(models, items, validation, quick=quick, dtype=dtype, length=length, seed=seed)
    with one_thread():
        loaded = {name: source(name, dtype) for name in plan.models}
        splits = {
            "validation": tasks.word_problems(plan.validation, seed=plan.seed + 1).items,
            "test": tasks.word_problems(plan.items, seed=plan.seed).items,
        }
        todo = units(plan, splits)
        for run in todo[-1]:
            prepare(loaded[run.model], run.item, run.way, plan.length)
        kept = keep(
            "emergence",
            asdict(plan),
            out,
            rows=lambda found: rows(todo, loaded, plan, found),
            total=sum(map(len, todo)),
            summarise=lambda found: summarise(found, plan.models, margin=plan.margin, draws=plan.draws, seed=plan.seed),
            show=not json,
            resume=True,
        )
    if plot is not None:
        from unmask.study.emergence_plot import draw

        draw(kept.summary, plot)
    return kept.tell(emergence_show.show, asdict(plan), json=json)
