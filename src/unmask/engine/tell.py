"""What a forward means for each request: the committed beginning, stop texts, log-probabilities, and the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.decode import Canvas, Step
from unmask.engine.ask import Cell, Done, Reason, Ticket, Update
from unmask.generate import Model
from unmask.template import shown

if TYPE_CHECKING:
    from unmask.engine.lane import Lane

LEAST = -9999.0
"""A log-probability below this one is told as this one, as OpenAI does: JSON knows no infinity."""
UNFINISHED = "\ufffd"
"""What a tokenizer shows for a character whose last bytes are still to come."""


def look(model: Model, lane: Lane, canvas: Canvas, event: Step) -> list[Reason | None]:
    """Tell every request of one forward; for each row, why it is over, or None."""
    open_ = (canvas.masked | canvas.revocable) & canvas.own
    asked = torch.stack([canvas.done.long(), canvas.first(open_), canvas.step, event.computed.sum(1)])
    moved = event.moved.any(1).tolist()
    ended: list[Reason | None] = []
    for row, (done, first, steps, computed) in enumerate(asked.T.tolist()):
        ticket = lane.tickets[row]
        if not (done or moved[row]):
            ticket.error = RuntimeError(f"a row stalled at step {steps}: {ticket.ask.recipe!r} committed nothing")
            ended.append(None)
            continue
        told = Telling(model, ticket, canvas, event, row, ticket.ask.end if done else min(first, ticket.ask.end))
        try:
            ended.append(told.tell(done=bool(done), step=steps, computed=computed))
        except Exception as error:  # of this request alone
            ticket.error = error
            ended.append(None)
    return ended


class Telling:
    """One forward as one request sees it. `reach`: the first column that may still change."""

    def __init__(self, model: Model, ticket: Ticket, canvas: Canvas, event: Step, row: int, reach: int) -> None:
        self.model, self.ticket, self.ask = model, ticket, ticket.ask
        self.canvas, self.event, self.row, self.reach = canvas, event, row, reach

    def tell(self, *, done: bool, step: int, computed: int) -> Reason | None:
        """Follow the text, tell the listener, and say why the request is over, or None."""
        ticket, ask = self.ticket, self.ask
        if not ticket.first and self.reach > ask.origin:
            ticket.first = time.perf_counter()
        if ask.top is not None:
            self._likelihoods(ask.top)
        reason: Reason | None = None
        if ask.stop or ticket.follow or done:
            reason = self._follow(done)
        if done and reason is None:
            reason = "stop" if ask.language or self._ended() else "length"  # a whole text of a language is an end
        if reason is None and ask.max_steps is not None and step >= ask.max_steps:
            self._follow(True)
            reason = "length"
        if ticket.follow and ticket.listen:
            more = self._cells() if ask.detail else {}
            ticket.listen(ticket, Update(step, computed, ticket.text, self._told(), **more))
        return reason

    def _follow(self, done: bool) -> Reason | None:
        """Read on to the first cell that may still change; "stop" if a stop text stands there."""
        ticket = self.ticket
        ids, places = written(self.canvas, self.row, self.ask.origin, self.reach)
        if ids == ticket.ids and not done:
            return None
        text = self.model.tokenizer.decode(ids)
        found = min((at for stop in self.ask.stop if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            count = self._up_to(ids, found)
            ticket.text, ticket.written = text[:found], (ids[:count], places[:count])
            return "stop"
        ticket.written = ids, places
        if not done:  # a stop text, or a character, may be half written
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((overlap(text, stop) for stop in self.ask.stop), default=0)]
        if done or text.startswith(ticket.text):
            ticket.text = text
        return None

    def _told(self) -> int:
        """How many ids the text so far has: without those that are withheld, since a stop text may begin there."""
        ids = self.ticket.ids
        return self._up_to(ids, len(self.ticket.text)) if self.ask.stop else len(ids)

    def _up_to(self, ids: list[int], reach: int) -> int:
        """The fewest ids whose text reaches so far."""
        low, high, decode = 0, len(ids), self.model.tokenizer.decode
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(ids[:middle])) >= reach else (middle + 1, high)
        return low

    def _ended(self) -> bool:
        """Is there an end of its own in the response?"""
        return bool(self.canvas.ended[self.row, self.ask.origin : self.ask.end].any())

    def _columns(self, cells: Tensor) -> list[int]:
        """The set columns of this row."""
        return cells[self.row].nonzero()[:, 0].tolist()

    def _likelihoods(self, top: int) -> None:
        """Keep the log-probabilities of what was committed in this forward."""
        event, draft = self.event, self.event.draft
        changed = event.pick if event.edit is None else event.pick | event.edit
        columns = torch.tensor(self._columns(changed & draft.fresh), device=draft.at.device)
        if not len(columns):
            return
        place = torch.searchsorted(draft.at, columns + self.row * changed.shape[1])
        logp = draft.logits[place].float().log_softmax(-1)
        own = logp.gather(1, self.canvas.tokens[self.row, columns][:, None])[:, 0].tolist()
        best = logp.topk(min(max(top, 1), logp.shape[1]), -1)
        for column, mine, ids, values in zip(
            columns.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            likely = tuple((i, v) for i, v in zip(ids[:top], values[:top], strict=True) if v > LEAST)
            self.ticket.logprobs[column - self.ask.origin] = (max(mine, LEAST), likely)

    def _cells(self) -> dict[str, tuple]:
        """Every cell that was decided, given back or drafted."""
        canvas, event, origin = self.canvas, self.event, self.ask.origin
        changed = event.pick if event.edit is None else event.pick | event.edit
        back = () if event.back is None else tuple(c - origin for c in self._columns(event.back))
        guess = canvas.masked & event.draft.fresh
        return {
            "changed": self._read(changed, canvas.tokens, canvas.score),
            "remasked": back,
            "draft": self._read(guess, event.draft.token, event.draft.score) if bool(guess[self.row].any()) else (),
        }

    def _read(self, cells: Tensor, tokens: Tensor, scores: Tensor) -> tuple[Cell, ...]:
        columns = self._columns(cells)
        ids, values = tokens[self.row, columns].tolist(), scores[self.row, columns].tolist()
        return tuple(
            Cell(column - self.ask.origin, token, round(score, 4))
            for column, token, score in zip(columns, ids, values, strict=True)
        )


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def written(canvas: Canvas, row: int, origin: int, reach: int) -> tuple[list[int], list[int]]:
    """(ids, cells) of a response from its first column up to `reach`: given words, each stretch up to its own EOS."""
    keep = canvas.derive("shown", lambda: shown(canvas))[row, origin:reach]
    return canvas.tokens[row, origin:reach][keep].tolist(), keep.nonzero()[:, 0].tolist()


def finish(lane: Lane, canvas: Canvas, row: int, reason: Reason) -> Done:
    """What a request got, and what it cost."""
    ticket = lane.tickets[row]
    decided = int((canvas.written[row]).sum())
    return Done(
        text=ticket.text,
        tokens=tuple(ticket.ids),
        reason=reason,
        forwards=int(canvas.step[row]),
        positions=int(lane.positions[row]),
        cache_hits=int(lane.hits[row]),
        decided=decided,
        waited=ticket.started - ticket.submitted,
        seconds=time.perf_counter() - ticket.started,
    )
