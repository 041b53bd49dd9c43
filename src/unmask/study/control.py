"""Control under speed: do faster decoders still write between given words, at an exact length, around given values?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.generate import Job, Model
from unmask.models.sight import Sight
from unmask.settings import Settings
from unmask.study import control_show
from unmask.study.bench import one_thread
from unmask.study.control_cases import CASES, DRAWN, Ask, Case, read
from unmask.study.control_summary import summarise
from unmask.study.gap import pair_of
from unmask.study.interleaved import check, interleaved, keep, left
from unmask.study.paired import DRAWS

Row = dict[str, Any]
Cells = list[int | None]
QUICK = 4
"""Restaurants of a quick run."""


@dataclass(frozen=True)
class Plan:
    """What is run: every case on every ask of every restaurant, one at a time."""

    models: Mapping[str, str]
    """The name of each role's model."""
    items: int = 150
    margin: float = 0.05
    """How much less often a case may succeed and still be said to keep control."""
    seed: int = 0
    dtype: str = "float32"
    draws: int = DRAWS
    quick: bool = False


@dataclass(frozen=True)
class Run:
    """One ask of one restaurant, answered by one case."""

    case: Case
    number: int
    part: int
    ask: Ask

    @property
    def key(self) -> tuple[Any, ...]:
        """By what its row is found again."""
        return self.case.name, self.number, self.part


@dataclass
class Written:
    """A response and what it cost."""

    ids: list[int]
    forwards: int = 0
    positions: int = 0
    seconds: float = 0.0


def prepare(case: Case, ask: Ask, model: Model) -> Job:
    """The call that asks a case for a text, no end of it before the last cell; UserError where the model refuses."""
    said, prompt, tail = Settings(recipe=case.recipe, eos="never"), ask.row.prompt, ""
    if case.way == "suffix" and ask.task == "infill":
        head, length, tail = ask.ends
        ids: Any = [*model.encode(prompt), *model.tokenizer.encode(head)]
        return model.prepare([ids], replace(said, length=length), suffix=tail)
    said = replace(said, template=ask.template)
    if case.recipe == "llada":  # a schedule of so many cells a forward, over all that is to be written
        form = ask.form(model.tokenizer.encode)
        said = replace(said, block=len(form), steps=-(-form.count(None) // case.share))
    return model.prepare([prompt], said)


def asked(run: Run, model: Model) -> Written:
    """The response of a case that is asked as a user would ask."""
    out = model.run(prepare(run.case, run.ask, model))[0]
    row, report = out.canvas, out.ledger
    tail = row.tokens[0][row.valid[0]].tolist()[-len(run.ask.form(model.tokenizer.encode)) :]
    return Written(tail, report.forwards, report.positions, report.seconds)


def blind(run: Run, model: Model, *, rows: int = 1, temperature: float = 0.0, seed: int = 0) -> list[Written]:
    """What a left-to-right model writes where the given words are put behind it when their turn comes."""
    prompt, form = model.encode(run.ask.row.prompt), run.ask.form(model.tokenizer.encode)
    texts: list[list[int]] = [[] for _ in range(rows)]
    cost, at = Written([]), 0
    while at < len(form):
        if (given := form[at]) is not None:
            texts, at = [[*text, given] for text in texts], at + 1
            continue
        length = next((n for n, cell in enumerate(form[at:]) if cell is not None), len(form) - at)
        said = Settings(recipe="ar", eos="never", length=length, temperature=temperature, seed=seed + 1000 * at)
        prompts: list[Any] = [[*prompt, *text] for text in texts]
        outputs = model.run(model.prepare(prompts, said))
        new = [out.canvas.tokens[0][out.canvas.valid[0]].tolist()[-length:] for out in outputs]
        texts, at = [[*text, *more] for text, more in zip(texts, new, strict=True)], at + length
        report = outputs[0].ledger
        cost = Written(
            [], cost.forwards + report.forwards, cost.positions + report.positions, cost.seconds + report.seconds
        )
    return [replace(cost, ids=text) for text in texts]


def best(run: Run, model: Model, seed: int) -> Written:
    """Of several texts drawn blindly from the model itself, one that passes the check, the likeliest of those."""
    texts = blind(run, model, rows=DRAWN, temperature=1.0, seed=seed)
    began = time.perf_counter()
    form = run.ask.form(model.tokenizer.encode)
    likely = likelihood(model, model.encode(run.ask.row.prompt), [text.ids for text in texts])
    good = [run.ask.check(form, text.ids, model.tokenizer.decode(text.ids))["right"] for text in texts]
    chosen = max(range(DRAWN), key=lambda n: (good[n], likely[n]))
    more = time.perf_counter() - began
    cost = texts[chosen]
    positions = cost.positions + DRAWN * (len(form) + len(model.encode(run.ask.row.prompt)))
    return Written(cost.ids, cost.forwards + DRAWN, positions, cost.seconds + more)


@torch.inference_mode()
def likelihood(judge: Model, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> list[float]:
    """Mean log-likelihood of a token (nats) of each of some equally long texts behind a prompt, by a causal model."""
    tokens = torch.tensor([[*prompt, *text] for text in texts])
    index = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    logits: Tensor = judge.network(tokens, index, visible=Sight(index.int(), index.int()))
    told = logits[:, len(prompt) - 1 : -1].double().log_softmax(2)
    return told.gather(2, tokens[:, len(prompt) :, None])[..., 0].mean(1).tolist()


def measure(run: Run, models: Mapping[str, Model], plan: Plan) -> Row:
    """One text: is it what was asked for, how likely it is, and what it cost; or that it was refused, and why."""
    case, ask, model = run.case, run.ask, models[run.case.role]
    told = {"case": case.name, "item": run.number, "part": run.part, "task": ask.task, "one": 1}
    try:
        if case.way == "best":
            found = best(run, model, plan.seed + 100_000 * run.number)
        else:
            found = blind(run, model)[0] if case.way == "blind" else asked(run, model)
    except UserError as error:
        return {**told, "right": 0, "refused": str(error)}
    text, judge = model.tokenizer.decode(found.ids), models["twin"]
    return {
        **told,
        **ask.check(ask.form(model.tokenizer.encode), found.ids, text),
        "refused": "",
        "loglik": likelihood(judge, judge.encode(ask.row.prompt), [found.ids])[0],
        "forwards": found.forwards,
        "positions": found.positions,
        "seconds": found.seconds,
        "prompt": ask.row.prompt,
        "template": ask.template,
        "text": text,
    }


def cases(models: Mapping[str, Model]) -> list[Case]:
    """Those whose model is there."""
    return [case for case in CASES if case.role in models]


def units(asks: Sequence[Sequence[Ask]], todo: Sequence[Case]) -> list[list[Run]]:
    """Restaurant by restaurant, all that every case is asked about it."""
    return [
        [Run(case, number, part, ask) for part, ask in enumerate(own) for case in todo]
        for number, own in enumerate(asks)
    ]


def rows(todo: Sequence[Sequence[Run]], models: Mapping[str, Model], plan: Plan, found: Sequence[Row]) -> Iterator[Row]:
    """A row a run, those left out that are found already."""
    rest = left(todo, found, ("case", "item", "part"))
    warm = todo[0] if any(rest) else ()
    return interleaved(rest, lambda run: measure(run, models, plan), warm=warm, seed=plan.seed)


def main(
    *,
    e2e: Path,
    names: Mapping[str, str] | None = None,
    items: int = 150,
    seed: int = 0,
    dtype: str = "float32",
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """Measure control, print tables (or JSON) and write `<out or results>/control-<UTC time>`; the exit code.

    `names`: the model of each role, as in the gap. An interrupted run goes on where it was when it is called again
    alike. UserError, before anything is written, for data that is not there and models that cannot be compared.
    """
    check(items, dtype)
    plan = Plan({}, min(items, QUICK) if quick else items, seed=seed, dtype=dtype, quick=quick)
    with one_thread():
        models = pair_of(names or {}, dtype)
        plan = replace(plan, models={role: one.name for role, one in models.items()})
        asks = read(e2e, plan.items, models["dllm"].tokenizer.encode)
        decoders = cases(models)
        for ask in asks[0]:
            prepare(decoders[0], ask, models["dllm"])
        todo = units(asks, decoders)
        kept = keep(
            "control",
            asdict(plan),
            out,
            rows=lambda found: rows(todo, models, plan, found),
            total=sum(map(len, todo)),
            summarise=lambda found: summarise(decoders, found, margin=plan.margin, draws=plan.draws, seed=plan.seed),
            show=not json,
            resume=True,
        )
    return kept.tell(control_show.show, asdict(plan), json=json)
