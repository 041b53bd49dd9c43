"""Decoded accuracy of a model on the embedded tasks, by recipe, with the ledger beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer

from unmask import recipes
from unmask.decode import Canvas, Ledger, Recipe, decode, useful
from unmask.denoise import dress
from unmask.denoise.probe import spelled
from unmask.models.joint import JointSampler
from unmask.models.transformer import Transformer
from unmask.recipes import stack
from unmask.settings import Settings, choose
from unmask.study.tasks import Task
from unmask.train.vocabulary import SEP


@dataclass(frozen=True)
class Result:
    """One task under one recipe: mean scores, totals of the ledger, and a row for each item."""

    task: str
    recipe: str
    scores: dict[str, float]
    forwards: float
    """NFE a row, mean."""
    tokens_per_forward: float
    rows: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Without the rows."""
        return {
            "task": self.task,
            "recipe": self.recipe,
            **self.scores,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
        }


@dataclass(frozen=True)
class Seconds:
    """The networks of second opinions: a guide, a joint sampler; each only where a recipe asks for it."""

    guide: Transformer | None = None
    sampler: JointSampler | None = None


def recipe_for(model: Transformer, name: str, length: int, *, block: int | None = None, **rules: Any) -> Recipe:
    """The recipe that `generate` would use for `length` response cells; `ar` for a causal model whatever the name.

    `name` may also be a stack of levers, or an expression, which already holds its blocks.
    """
    c, known = model.config, recipes.entries().get(name)
    if c.autoregressive:
        return choose(Settings(recipe="ar"), c, length)
    sized = block is not None and (stack.is_stack(name) if known is None else "block" in known.defaults)
    return choose(Settings(recipe=name, block=min(block, length) if sized and block else None, **rules), c, length)


def respond(
    model: Transformer, recipe: Recipe, prompts: Sequence[Sequence[int]], length: int, *, second: Seconds = Seconds()
) -> tuple[Canvas, Ledger]:
    """Decode one batch of token prompts (each ending in the separator); the whole response is the answer region."""
    c = model.config
    canvas = Canvas.new(prompts, length, mask_id=c.mask_id, eos=c.eos_ids, revisions=recipe.allowance)
    canvas = replace(canvas, region=(~canvas.given & canvas.valid).to(torch.int8) * 2)
    slots, width = canvas.tokens.shape
    denoise = dress(model, recipe, slots=slots, length=width, guide=second.guide, sampler=second.sampler)
    ledger = Ledger()
    for canvas, event in decode(denoise, recipe, canvas):  # noqa: B020
        ledger.update(canvas, event)
    return canvas, ledger


def run(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    recipe: Recipe,
    *,
    batch: int = 32,
    second: Seconds = Seconds(),
) -> Iterator[dict[str, Any]]:
    """A row for each item of the task, in order of prompt length (close lengths share a batch)."""
    tokenizer.encode_special_tokens = True
    recipe = spelled(recipe, lambda text: tokenizer.encode(text).ids, tokenizer.decode)
    prompts = [[*e.ids, SEP] for e in tokenizer.encode_batch([i.prompt for i in task.items])]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        picked = order[at : at + batch]
        canvas, ledger = respond(model, recipe, [prompts[i] for i in picked], task.length, second=second)
        report, keep = ledger.report(), useful(canvas)
        for row, i in enumerate(picked):
            text = tokenizer.decode(canvas.tokens[row][keep[row]].tolist())
            item = task.items[i]
            yield {
                "item": i,
                "prompt": item.prompt,
                "text": text,
                "gold": item.gold,
                **item.score(text),
                "forwards": report.exit_steps[row],
                "tokens": int(keep[row].sum()),
            }


@torch.inference_mode()
def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    recipe: Recipe,
    *,
    name: str = "",
    batch: int = 32,
    second: Seconds = Seconds(),
) -> Result:
    """Decode a whole task and average."""
    rows = sorted(run(model, tokenizer, task, recipe, batch=batch, second=second), key=lambda r: r["item"])
    scores = {k: sum(r[k] for r in rows) / len(rows) for k in ("right", "exact", "doubled") if k in rows[0]}
    forwards = sum(r["forwards"] for r in rows)
    tokens = sum(r["tokens"] for r in rows)
    return Result(task.name, name or recipe.name, scores, forwards / len(rows), tokens / max(1, forwards), tuple(rows))
