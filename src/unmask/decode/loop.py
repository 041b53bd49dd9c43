"""The loop. One step for every method; streaming, tracing, progress bars and batching are consumers of `decode`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.recipe import Mixed, Recipe

Denoiser = Callable[[Canvas, Tensor, Tensor], Draft]
"""(canvas, query [B, L], need [B, L]) -> Draft: compute the queried cells, return logits of those needed and in reach.

A denoiser may compute more than it was asked for (the cell before, where logits are shifted) and says so in the draft.
"""


@dataclass(frozen=True)
class Step:
    """What one step did, each [B, L] bool but `number` [B]: cells computed, committed, given back, rewritten."""

    number: Tensor
    computed: Tensor
    pick: Tensor
    back: Tensor | None
    draft: Draft
    edit: Tensor | None = None

    @property
    def moved(self) -> Tensor:
        """[B, L] bool: every cell whose state or token changed."""
        changed = self.pick
        for cells in (self.back, self.edit):
            changed = changed if cells is None else changed | cells
        return changed


def step(denoise: Denoiser, recipe: Recipe | Mixed, canvas: Canvas) -> tuple[Canvas, Step]:
    """One forward, and what the recipe makes of it."""
    query = recipe.query(canvas) & canvas.valid & ~canvas.done[:, None]
    draft = denoise(canvas, query, recipe.need(canvas))  # the only line that costs anything
    pick = recipe.unmask(canvas, draft, canvas.masked & draft.fresh)
    edit = back = None
    if recipe.edit is not None:
        edit = recipe.edit(canvas, draft, canvas.revocable & draft.fresh & (draft.token != canvas.tokens))
    if recipe.remask is not None:
        may = canvas.revocable & draft.fresh
        back = recipe.remask(canvas, draft, may if edit is None else may & ~edit)
    after = canvas.advance(pick, back, draft, edit=edit)
    after = after.finish(recipe.stop(after, draft))
    return after, Step(after.step, draft.computed, pick, back, draft, edit)


def decode(denoise: Denoiser, recipe: Recipe | Mixed, canvas: Canvas) -> Iterator[tuple[Canvas, Step]]:
    """Step until every row is done, yielding each new canvas with what happened."""
    done = bool(canvas.done.all())
    while not done:
        before, (canvas, event) = canvas, step(denoise, recipe, canvas)
        done, went_on = torch.stack([canvas.done, canvas.done | event.moved.any(1)]).all(1).tolist()  # one sync a step
        if not went_on:
            raise RuntimeError(f"a row stalled at step {int(before.step.max())}: {recipe!r} committed nothing")
        yield canvas, event
