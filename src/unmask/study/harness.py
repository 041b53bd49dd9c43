"""`unmask eval`: benchmark tasks under any recipe, by lm-eval or, for tasks read from a folder, by itself."""

from __future__ import annotations

import hashlib
import json as jsonlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from unmask.decode import Canvas, Step, useful
from unmask.errors import UserError
from unmask.generate import Model, load
from unmask.models.tokenizer import Tokenizer
from unmask.settings import Settings
from unmask.study import harness_tasks as local
from unmask.study.interleaved import Kept, check, keep

Row = dict[str, Any]
LENGTH = 256
"""Cells of a response where neither the user nor the embedded pair's training says."""
INSTALL = "pip install 'unmask[eval]'"


@dataclass(frozen=True)
class Plan:
    """What is evaluated and how; it is kept with the results."""

    model: str
    tasks: tuple[str, ...]
    recipe: str | None = None
    length: int | None = None
    block: int | None = None
    batch: int = 8
    limit: int | None = None
    shots: int | None = None
    """Solved examples before each problem; None: none for a task from --data, as many as lm-eval's task says else."""
    samples: int = 32
    """Masks a likelihood of a masked model is estimated from."""
    seed: int = 0
    dtype: str = "auto"
    plain: bool = False
    """Are prompts plain text, without the model's chat template?"""

    def __post_init__(self) -> None:
        for name in ("batch", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}; leave it out for all problems")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"--shots must be at least 0, not {self.shots}")
        check(1, "float32" if self.dtype == "auto" else self.dtype)


@dataclass(frozen=True)
class Writer:
    """A model with settings that answers prompts and tells what each answer cost."""

    model: Model
    settings: Settings
    batch: int = 8

    @staticmethod
    def of(model: Model, plan: Plan) -> Writer:
        """As a plan says; UserError for settings that do not fit the model."""
        if plan.plain:
            inner, config = model.tokenizer.inner, model.network.config
            bare = Tokenizer(inner, model.tokenizer.config, reserved=(config.mask_id, config.bos_id, *config.eos_ids))
            model = replace(model, tokenizer=bare)
        length = plan.length or (None if model.embedded else LENGTH)
        settings = Settings(recipe=plan.recipe, length=length, block=plan.block, seed=plan.seed)
        return Writer(model, settings, plan.batch)

    def fault(self, prompt: str) -> str:
        """Why this prompt cannot be asked, or nothing: no words the model knows, or no room for it."""
        try:
            self.model.row(prompt, self.settings)
        except UserError as error:
            return str(error)
        return ""

    def check(self, prompts: Sequence[str]) -> None:
        """UserError for settings that cannot work, and if not one of the prompts can be asked."""
        faults = [self.fault(prompt) for prompt in prompts]
        if all(faults):
            raise UserError(faults[0])
        self.model.prepare([prompts[faults.index("")]], self.settings)

    @property
    def told(self) -> Row:
        """What decodes here, for the results' configuration."""
        recipe = self.model.recipe(["How many ?"], self.settings)
        template = self.model.tokenizer.has_chat_template
        used = {"recipe_used": recipe.name or repr(recipe), "expression": repr(recipe), "recipe_hash": recipe.hash}
        return {**used, "chat_template": template, "cells": self.model.length("How many ?", self.settings)}

    def answers(self, prompts: Sequence[str], *, until: Sequence[str] = (), offset: int = 0) -> list[Row]:
        """Decode some prompts together: the output of each, cut at the stop strings, and its share of the cost.

        A row's seconds are those of the call by its rows; forwards, positions and tokens are its own. A prompt that
        cannot be asked has an `error` and an empty output.
        """
        faults = [self.fault(prompt) for prompt in prompts]
        good = [prompt for prompt, fault in zip(prompts, faults, strict=True) if not fault]
        found = iter(self._decoded(good, until, offset) if good else ())
        return [{"output": "", **NOTHING, "error": fault} if fault else next(found) for fault in faults]

    def _decoded(self, prompts: list[str], until: Sequence[str], offset: int) -> list[Row]:
        job = self.model.prepare(prompts, self.settings, offset=offset)
        positions = torch.zeros(len(prompts), dtype=torch.int64, device=job.canvas.tokens.device)

        def count(_: Canvas, event: Step) -> None:
            positions.add_(event.computed.sum(1))

        outputs = self.model.run(job, on_step=count)
        report = outputs[0].ledger
        helpers = sum(cost["forwards"] for cost in report.helpers.values()) / len(prompts)
        return [
            {
                "output": local.cut(out.text, list(until)),
                "forwards": report.exit_steps[row],
                "positions": int(positions[row]),
                "tokens": int((out.canvas.valid & ~out.canvas.given & ~out.canvas.masked).sum()),
                "useful_tokens": int(useful(out.canvas).sum()),
                "seconds": report.seconds / len(prompts),
                "together": len(prompts),
                **({"helper_forwards": helpers} if report.helpers else {}),
            }
            for row, out in enumerate(outputs)
        ]


LABELS = ("elbo", "likelihood", "samples", "seed")
"""What a row with a likelihood says of how it was estimated."""
NOTHING: Row = {"forwards": 0, "positions": 0, "tokens": 0, "useful_tokens": 0, "seconds": 0.0, "together": 0}
"""What a prompt costs that was not asked."""


def named(prompt: str) -> str:
    """A short name of a prompt by its text."""
    return hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:12]


def solved(writer: Writer, task: local.Local, found: Sequence[Row]) -> Iterator[Row]:
    """A row for each problem of a task from a folder, but for those `found` already."""
    done = {row["item"] for row in found if row["task"] == task.name}
    todo = [problem for problem in task.problems if problem.number not in done]
    for at in range(0, len(todo), writer.batch):
        some = todo[at : at + writer.batch]
        rows = writer.answers([problem.prompt for problem in some], until=task.until, offset=some[0].number)
        for problem, row in zip(some, rows, strict=True):
            exact, loose = local.strict(row["output"]), local.flexible(row["output"])
            yield {
                "task": task.name,
                "item": problem.number,
                "prompt_id": named(problem.prompt),
                **row,
                "gold": problem.gold,
                "answer": exact,
                "correct": int(exact == problem.gold),
                "answer_flexible": loose,
                "correct_flexible": int(loose == problem.gold),
            }


def interval(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share, which is not empty at 0 or 1 (Wilson 1927)."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def line(task: str, rows: Sequence[Row], told: Row) -> Row:
    """One task's line of the summary: shares with intervals, and mean costs of a problem."""
    count = len(rows)
    total = {name: sum(row[name] for row in rows) for name in NOTHING if name != "together"}
    return {
        "task": task,
        "problems": count,
        "accuracy": None,
        "ci": None,
        **_shares(rows),
        **{name: total[name] / count for name in total},
        "tokens_per_forward": total["tokens"] / max(1, total["forwards"]),
        "useful_tok_s": total["useful_tokens"] / max(1e-9, total["seconds"]),
        "not_asked": sum("error" in row for row in rows),
        "truncated": sum("truncated" in row for row in rows),
        "cells_least": min((row["cells"] for row in rows if "cells" in row), default=None),
        "cells_most": max((row["cells"] for row in rows if "cells" in row), default=None),
        **told,
    }


def _shares(rows: Sequence[Row]) -> Row:
    """The share of right answers, and its interval where answers are right or wrong."""
    found: Row = {}
    for key, tail in (("correct", ""), ("correct_flexible", "_flexible")):
        values: list[Any] = [row.get(key) for row in rows]
        if all(value in (0, 1) for value in values):
            share = sum(values) / len(rows)
            found |= {f"accuracy{tail}": share, f"ci{tail}": interval(sum(values), len(rows))}
    return found


@dataclass
class Work:
    """What there is to do: the tasks this module runs, and those that lm-eval runs, made and checked."""

    plan: Plan
    writer: Writer
    own: list[local.Local]
    foreign: tuple[str, ...] = ()
    tasks: Any = None
    """lm-eval's list of tasks."""

    def rows(self, found: list[Row], *, show: bool) -> Iterator[Row]:
        """The rows not `found` yet; lm-eval's tasks come first, each as a whole: its last row `closes` it."""
        if self.foreign:
            from unmask.study import harness_lm

            plan = self.plan
            there = {(row["task"], row["item"]) for row in found}
            closed = {row["closes"] for row in found if "closes" in row}
            for name in (name for name in self.foreign if name not in closed):
                harness = harness_lm.Harness(
                    self.writer, samples=plan.samples, seed=plan.seed, sized=plan.length is None, show=show
                )
                done = harness_lm.evaluated(harness, [name], self.tasks, limit=plan.limit, shots=plan.shots)
                rows = list(harness_lm.rows(done, harness))
                rows[-1] |= {"closes": name, "metrics": harness_lm.finite(done["results"])}
                last = len(rows) - 1
                yield from (r for i, r in enumerate(rows) if i == last or (r["task"], r["item"]) not in there)
        for task in self.own:
            yield from solved(self.writer, task, found)

    def summary(self, rows: Sequence[Row]) -> Row:
        """What summary.json and --json hold."""
        lines, metrics = [], {}
        for row in rows:
            metrics |= row.get("metrics", {})
        for name in dict.fromkeys(row["task"] for row in rows):
            mine = [row for row in rows if row["task"] == name]
            told: Row = {"runner": "lm-eval", "metrics": metrics[name]} if name in metrics else {"runner": "unmask"}
            label = {key: mine[0][key] for key in LABELS if key in mine[0]}
            lines.append(line(name, mine, {**told, **label}))
        return {"tasks": lines, "groups": {k: v for k, v in metrics.items() if not _among(k, lines)}}


def _among(name: str, lines: Sequence[Row]) -> bool:
    return any(line["task"] == name for line in lines)


def divide(names: Sequence[str], data: Path | None, folder: Path | None) -> tuple[list[str], list[str]]:
    """(tasks read from `data`, tasks for lm-eval); UserError for a name that neither can run."""
    if not names:
        raise UserError("name a task: --tasks gsm8k")
    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --task-folder holds task files (YAML) of lm-eval")
    there = find_spec("lm_eval") is not None
    own = [name for name in names if name in local.BUILT_IN and (data is not None or not there)]
    foreign = [name for name in names if name not in own]
    if own and data is None:
        raise UserError(f"{own[0]} is read from a folder; give it with --data, or {INSTALL} for lm-eval's own")
    if data is not None and not own:
        near = get_close_matches(foreign[0], local.BUILT_IN, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--data is for {', '.join(local.BUILT_IN)}, not {foreign[0]!r}{guess}")
    if foreign and not there:
        near = get_close_matches(foreign[0], local.BUILT_IN, n=1)
        guess = f"; or did you mean {near[0]!r}?" if near else f"; without it there is {', '.join(local.BUILT_IN)}"
        raise UserError(f"task {foreign[0]!r} needs lm-eval: {INSTALL}{guess}")
    return own, foreign


def prepare(plan: Plan, data: Path | None, folder: Path | None) -> Work:
    """Check everything, the model last; UserError for what cannot be run."""
    own, foreign = divide(plan.tasks, data, folder)
    read = [local.gsm8k(data, shots=plan.shots or 0, limit=plan.limit) for _ in own] if data else []
    tasks = None
    if foreign:
        from unmask.study import harness_lm

        tasks = harness_lm.manager(folder, foreign, local.BUILT_IN)
    model = load(plan.model, dtype=plan.dtype)
    writer = Writer.of(model, replace(plan, model=model.name))
    writer.check([problem.prompt for task in read for problem in task.problems] or ["How many ?"])
    return Work(replace(plan, model=model.name), writer, read, tuple(foreign), tasks)


def main(
    plan: Plan, *, data: Path | None = None, folder: Path | None = None, json: bool = False, out: Path | None = None
) -> int:
    """Run the tasks, print a table (or JSON) and write `<out or results>/eval-<model>-<UTC time>`; the exit code.

    `data`: the folder of a task that is run without lm-eval. `folder`: task files of lm-eval's. An interrupted run goes
    on where it was when it is called again alike, within tasks from `data`. UserError, before anything is written.
    """
    work = prepare(plan, data, folder)
    config = {**asdict(work.plan), **work.writer.told, "data": {task.name: task.digest for task in work.own}}
    kept = keep(
        "eval-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(work.plan.model).name),
        config,
        out,
        rows=lambda found: work.rows(found, show=not json),
        total=sum(len(task.problems) for task in work.own),
        summarise=work.summary,
        show=not json,
        resume=True,
    )
    if json:
        print(jsonlib.dumps({**kept.summary, "config": config, "folder": str(kept.folder)}, indent=2, default=str))
        return 0
    _show(kept, config)
    return 0


def _show(kept: Kept, config: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config['model']}, {config['recipe_used']}", title_justify="left")
    heads = ("task", "problems", "right", "95%", "right, flexible", "forwards", "positions", "tok/s", "not asked")
    for head in heads:
        table.add_column(head, justify="left" if head == "task" else "right")
    for told in kept.summary["tasks"]:
        table.add_row(*_cells(told))
    Console().print(table)
    for told in kept.summary["tasks"]:
        for metric, value in told.get("metrics", {}).items():
            if isinstance(value, float):
                print(f"{told['task']}  {metric}  {value:.4f}")
        if told.get("elbo"):
            how = f"from {told['samples']} masks each, seed {told['seed']}"
            print(f"{told['task']}: likelihoods are estimates of a lower bound (ELBO) {how}")
        if told["cells_most"] is not None:
            print(f"{told['task']}: responses of {told['cells_least']} to {told['cells_most']} cells, as the task asks")
        if told["truncated"]:
            print(f"{told['task']}: {told['truncated']} problems lost the beginning of their context, for want of room")
    print(f"rows and provenance: {kept.folder}")


def _cells(told: Row) -> list[str]:
    right, loose, ends = told["accuracy"], told.get("accuracy_flexible"), told["ci"]
    return [
        told["task"],
        str(told["problems"]),
        "" if right is None else f"{right:.2%}",
        "" if ends is None else f"{ends[0]:.2%} to {ends[1]:.2%}",
        "" if loose is None else f"{loose:.2%}",
        f"{told['forwards']:.1f}",
        f"{told['positions']:.0f}",
        f"{told['useful_tok_s']:.0f}",
        str(told["not_asked"]),
    ]
