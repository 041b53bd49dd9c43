"""Rows that share a forward: one batch whose rows come and go, each with its own recipe, settings and clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from unmask.decode import Canvas, Denoiser, Mixed, Recipe, Step, cat, step
from unmask.denoise import Draws, dress
from unmask.denoise.constrained import Constrained
from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Sampled
from unmask.engine.ask import Ask, Ticket
from unmask.generate import Model


class Lane:
    """A batch of at most `slots` rows of at most `length` cells over one denoiser; a free slot is used again."""

    def __init__(self, model: Model, kind: Ask, *, slots: int, length: int, beside: Lane | None = None) -> None:
        network = model.network
        self.tickets: list[Ticket] = []
        self.canvas: Canvas | None = None
        self.recipe: Recipe | Mixed = kind.recipe
        place: dict[str, Any] = {"slots": slots, "length": length}
        self.mixes, self.layout = kind.mixes, kind.layout
        self.free = list(range(slots))[::-1] if beside is None else beside.free
        """Slots that nobody uses; lanes over the same keys and values share them."""
        if beside is not None:
            self.base: Denoiser = beside.base
        elif self.mixes:
            self.base = Plain(network, layout=kind.layout, **place)
        else:
            self.base = dress(network, kind.recipe, draws=kind.draws, cfg=kind.cfg, **place, **kind.second)
        self.denoise = self.base
        self.asks: list[Ask | None] = [None] * slots
        """By slot: who uses it."""
        self.positions = self.hits = torch.zeros(0, dtype=torch.int64)
        """[B]: cells computed, and cells attended to from the cache, of each row so far."""

    def __len__(self) -> int:
        return len(self.tickets)

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Give each its slot and put it into the batch."""
        rows = [] if self.canvas is None else [self.canvas]
        for ticket in tickets:
            slot = self.free.pop()
            self.asks[slot] = ticket.ask
            rows.append(replace(ticket.ask.canvas, slot=torch.full_like(ticket.ask.canvas.slot, slot)))
        self.tickets += tickets
        self.canvas = cat(rows)
        more = torch.zeros(len(tickets), dtype=torch.int64, device=self.canvas.done.device)
        self.positions, self.hits = (torch.cat([t.to(more.device), more]) for t in (self.positions, self.hits))
        self._settle()

    def drop(self, gone: Sequence[bool]) -> None:
        """Take rows out of the batch and free their slots."""
        assert self.canvas is not None
        kept = [row for row, out in enumerate(gone) if not out]
        for slot, out in zip(self.canvas.slot.tolist(), gone, strict=True):
            if out:
                self.free.append(slot)
                self.asks[slot] = None
        self.tickets = [self.tickets[row] for row in kept]
        if not kept:
            self.canvas, self.positions, self.hits = None, self.positions[:0], self.hits[:0]
            return
        rows = torch.tensor(kept, device=self.canvas.slot.device)
        self.canvas = narrow(self.canvas[rows])
        self.positions, self.hits = self.positions[rows], self.hits[rows]
        self._settle()

    def close(self) -> list[Ticket]:
        """Free every slot, those of rows that were about to join as well; who was here."""
        gone, self.tickets, self.canvas = self.tickets, [], None
        self.positions, self.hits = self.positions[:0], self.hits[:0]
        self.free += [slot for slot, ask in enumerate(self.asks) if ask]
        self.asks = [None] * len(self.asks)
        return gone

    def step(self) -> tuple[Canvas, Step]:
        """One forward of all rows: the canvas after it, and what happened."""
        before = self.canvas
        assert before is not None
        canvas, event = step(self.denoise, self.recipe, before)
        self.positions = self.positions + event.computed.sum(1)
        known = (before.cached_at >= 0) & before.valid & ~event.computed
        self.hits = self.hits + known.sum(1)
        self.canvas = canvas
        return canvas, event

    def _settle(self) -> None:
        """The recipe and the denoiser of those that are here."""
        which, recipes = torch.zeros(len(self.asks), dtype=torch.int64), list[Recipe]()
        for slot, ask in enumerate(self.asks):
            if ask is None:
                continue
            if ask.recipe not in recipes:
                recipes.append(ask.recipe)
            which[slot] = recipes.index(ask.recipe)
        assert self.canvas is not None
        which = which.to(self.canvas.slot.device)
        self.recipe = recipes[0] if len(recipes) == 1 else Mixed(tuple(recipes), which)
        drawn = [ask.draws if ask else Draws() for ask in self.asks]
        if self.mixes and any(draws.active for draws in drawn):
            self.denoise = Sampled(self.base, **{f.name: [getattr(d, f.name) for d in drawn] for f in fields(Draws)})
        else:
            self.denoise = self.base
        if held := {slot: ask.language for slot, ask in enumerate(self.asks) if ask and ask.language}:
            self.denoise = Constrained(self.denoise, held)


def narrow(canvas: Canvas) -> Canvas:
    """The same rows without the columns that no row uses any more."""
    width = int(canvas.valid.any(0).sum())

    def cut(name: str, t: Tensor) -> Tensor:
        return t if t.dim() == 1 or name in canvas.memo else t[:, :width]

    return canvas if width == canvas.tokens.shape[1] else canvas._map(cut)
