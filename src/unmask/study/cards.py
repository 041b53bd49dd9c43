"""`unmask evaluate`: decoded accuracy of a model on the embedded tasks, into `results/` and, if asked, its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from unmask import zoo
from unmask.decode import Recipe
from unmask.errors import UserError, suggest
from unmask.models.fast import accelerate, split
from unmask.models.joint import load_sampler
from unmask.models.load import Loaded, load_checkpoint
from unmask.models.transformer import Transformer
from unmask.settings import Settings as Asked
from unmask.settings import default_name
from unmask.study import tasks
from unmask.study.evaluate import Result, Seconds, evaluate, recipe_for
from unmask.study.results import Results

COLUMNS = {
    **{name: name for name in ("task", "recipe", "items", "right", "exact", "doubled")},
    **{"forwards": "NFE", "tokens_per_forward": "tok/NFE"},
}
"""What is printed, and under which heading."""

USUAL = ("llada", "threshold")
"""Recipes of a model with full attention; another is decoded as `generate` would."""


@dataclass(frozen=True)
class Settings:
    """What to evaluate.

    `block` is capped at the response length; without it full attention is written in blocks of 8, and a block-causal
    model in its own. `recipes` are ignored by a causal model, and where none are given the usual ones are taken.

    `guide`, and the joint sampler of the folder `sampler`, are loaded if a recipe asks for a second opinion.
    """

    model: str = "dllm"
    tasks: tuple[str, ...] = ("problems", "problems-numbers", "problems-templates", "worksheet-8")
    recipes: tuple[str, ...] = ()
    items: int = 500
    block: int | None = None
    batch: int = 32
    dtype: str = "float32"
    e2e: str = ""
    guide: str = "twin"
    sampler: str = ""
    seed: int = 0


def load(name: str, dtype: str) -> tuple[Loaded, Tokenizer]:
    """An embedded model by name, or any directory in the embedded format, and its raw tokenizer."""
    if name not in zoo.NAMES and "/" not in name and not Path(name).exists():
        raise UserError(f"{suggest(name, zoo.NAMES, 'model')}; or give a folder that `unmask export` made")
    dtype, weights = split(dtype)
    loaded = load_checkpoint(zoo.path(name) if name in zoo.NAMES else name, dtype=dtype)
    accelerate(loaded.model, weights=weights)
    file = loaded.directory / "tokenizer.json"
    if not file.is_file() or loaded.model.config.family != "unmask":
        raise UserError(f"{name} does not speak the embedded tasks; evaluate a model made by `unmask train`")
    return loaded, Tokenizer.from_file(str(file))


def main(settings: Settings, *, as_json: bool = False, card: bool = False, root: str | Path = "results") -> int:
    """Evaluate, print, and write a results folder; with `card`, also the model's card.json."""
    torch.set_num_threads(1)
    loaded, tokenizer = load(settings.model, settings.dtype)
    kind = loaded.model.config.layout.kind
    usual = USUAL if kind == "full" else (default_name(Asked(), loaded.model.config),)
    names = settings.recipes if settings.recipes and kind != "causal" else usual
    jobs = [
        (tasks.make(t, settings.items, Path(settings.e2e) if settings.e2e else None), r)
        for t in settings.tasks
        for r in names
    ]
    console = Console(stderr=as_json)
    found = []
    told = replace(
        settings, e2e=Path(settings.e2e).name, sampler=Path(settings.sampler).name
    )  # not where they are kept
    with (
        Results.create(f"evaluate-{Path(settings.model).name}", told, root, seeds=settings.seed) as out,
        Progress(console=console) as bar,
    ):
        doing = bar.add_task("evaluating", total=len(jobs))
        for task, name in jobs:
            bar.update(doing, description=f"{task.name}, {name}")
            recipe = recipe_for(
                loaded.model, name, task.length, block=settings.block or (8 if kind == "full" else None)
            )
            second = seconds(settings, recipe, loaded.model)
            result = evaluate(loaded.model, tokenizer, task, recipe, name=name, batch=settings.batch, second=second)
            for row in result.rows:
                out.row({"task": task.name, "recipe": name, **row})
            found.append(summary(result, repr(recipe)))
            bar.advance(doing)
        folder = out.finish({"rows": found})
    if card:
        fill_card(loaded.directory, found, folder.name)
    print(json.dumps({"rows": found, "results": str(folder)})) if as_json else show(console, found, folder)
    return 0


def seconds(settings: Settings, recipe: Recipe, model: Transformer) -> Seconds:
    """The guide and the joint sampler that a recipe asks for; an embedded dLLM has a sampler of its own."""
    guide = load(settings.guide, settings.dtype)[0].model if recipe.guided else None
    folder = settings.sampler or zoo.sampler(settings.model)
    drawn = recipe.joint is not None and recipe.joint.k > 1 and folder is not None
    return Seconds(guide, load_sampler(folder, model) if drawn and folder else None)


def summary(result: Result, expression: str) -> dict[str, Any]:
    """One line of the table: a result without its rows."""
    return {**result.as_dict(), "items": len(result.rows), "expression": expression}


def fill_card(directory: Path, found: Sequence[dict[str, Any]], source: str) -> None:
    """Put results into card.json, replacing earlier ones of the same task and recipe."""
    path = directory / "card.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = {(row["task"], row["recipe"]): {**row, "results": source} for row in found}
    kept = {(row["task"], row["recipe"]): row for row in card.get("accuracy", [])}
    path.write_text(json.dumps({**card, "accuracy": list({**kept, **new}.values())}, indent=2) + "\n", encoding="utf-8")


def show(console: Console, found: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print the table and where the rows are."""
    table = Table(*COLUMNS.values(), padding=(0, 0))
    for row in found:
        table.add_row(*(f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in COLUMNS))
    console.print(table)
    console.print(f"rows and provenance: {folder}")
