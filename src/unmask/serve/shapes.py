"""Answers in OpenAI's shapes: whole ones, chunks of a stream, usage, log-probabilities, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

from unmask.engine import Cell, Ticket, Update
from unmask.engine.tell import UNFINISHED
from unmask.generate import Model


@dataclass
class Answer:
    """One answer in the making: its id, its kind, and how far each choice has been sent."""

    model: Model
    chat: bool
    tickets: Sequence[Ticket]
    seed: int
    logprobs: int | None = None
    """How many likeliest tokens stand beside each token's log-probability; None: no log-probabilities."""
    each: int = 1
    """Choices of each prompt, which is counted once."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    sent: dict[int, tuple[str, int]] = field(default_factory=dict)

    def _head(self, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model.name}

    def whole(self) -> dict[str, Any]:
        """The answer to a request without a stream."""
        choices = []
        for index, ticket in enumerate(self.tickets):
            assert ticket.done is not None
            text = {"message": {"role": "assistant", "content": ticket.text, "refusal": None}}
            said: dict[str, Any] = text if self.chat else {"text": ticket.text}
            more = {"logprobs": self._logprobs(ticket, 0, len(ticket.ids)), "finish_reason": ticket.done.reason}
            choices.append({"index": index, **said, **more})
        return {**self._head(False), "choices": choices, "usage": self.usage(), "unmask": self.costs()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, and useful ones of the responses: up to and without the end."""
        prompts = sum(t.ask.origin + t.ask.cells - t.ask.end for t in self.tickets[:: self.each])
        written = sum(len(t.ids) for t in self.tickets)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}

    def costs(self) -> dict[str, Any]:
        """What the answer took, summed over its choices."""
        done = [ticket.done for ticket in self.tickets if ticket.done]
        forwards, decided = sum(d.forwards for d in done), sum(d.decided for d in done)
        return {
            **{"forwards": forwards, "steps": max((d.forwards for d in done), default=0), "tokens": decided},
            **{"tokens_per_forward": round(decided / max(1, forwards), 4), "positions": sum(d.positions for d in done)},
            **{"cache_hits": sum(d.cache_hits for d in done), "seed": self.seed},
            **{
                "waited": max((d.waited for d in done), default=0),
                "seconds": max((d.seconds for d in done), default=0),
            },
        }

    def opening(self, index: int, detail: bool) -> dict[str, Any]:
        """The first chunk of a choice: the role, and what is given on the canvas."""
        ticket = self.tickets[index]
        chunk = self._chunk(index, "", None, role=True)
        if detail:
            ask, canvas = ticket.ask, ticket.ask.canvas
            columns = (canvas.given[0, ask.origin : ask.end]).nonzero()[:, 0].tolist()
            ids = canvas.tokens[0, ask.origin : ask.end]
            given = [[c, int(ids[c]), self.model.tokenizer.piece(int(ids[c]))] for c in columns]
            recipe = {"name": ask.recipe.name, "expression": repr(ask.recipe)}
            lay = {"cells": ask.end - ask.origin, "given": given, "recipe": recipe, "prompt_tokens": ask.origin}
            chunk["unmask"] = {"index": index, "step": 0, **lay}
        return chunk

    def delta(self, index: int, update: Update, detail: bool) -> dict[str, Any] | None:
        """The chunk of one forward; None where there is nothing to say."""
        text = self._new(index, update.text)
        if not text and not detail:
            return None
        chunk = self._chunk(index, text, None, count=update.count)
        if detail:
            changed = [self._cell(cell) for cell in update.changed]
            top = {str(c.place): self._top(self.tickets[index], c.place) for c in update.changed}
            chunk["unmask"] = {
                **{"index": index, "step": update.step, "computed": update.computed, "changed": changed},
                **{"remasked": list(update.remasked), "draft": [self._cell(cell) for cell in update.draft], "top": top},
            }
        return chunk

    def closing(self, index: int, detail: bool) -> dict[str, Any]:
        """The last chunk of a choice: what is left of its text, and why it ended."""
        ticket = self.tickets[index]
        done = ticket.done
        assert done is not None
        chunk = self._chunk(index, self._new(index, ticket.text), done.reason, count=len(ticket.ids))
        if detail:
            chunk["unmask"] = {
                **{"index": index, "step": done.forwards, "done": True, "forwards": done.forwards},
                **{"tokens": done.decided, "useful_tokens": len(ticket.ids), "positions": done.positions},
                **{"tokens_per_forward": round(done.tokens_per_forward, 4), "seconds": done.seconds},
            }
        return chunk

    def final(self) -> dict[str, Any]:
        """The chunk with the usage, for those who asked for it."""
        return {**self._head(True), "choices": [], "usage": self.usage(), "unmask": self.costs()}

    def _chunk(
        self, index: int, text: str, reason: str | None, *, role: bool = False, count: int = 0
    ) -> dict[str, Any]:
        """A chunk of one choice: new text, and the log-probabilities of its first `count` ids that are not sent yet."""
        content = {**({"role": "assistant"} if role else {}), **({"content": text} if text or role else {})}
        said: dict[str, Any] = {"delta": content} if self.chat else {"text": text}
        before, first = self.sent.get(index, ("", 0))
        marks = None if role else self._logprobs(self.tickets[index], first, count)
        self.sent[index] = (before + text, max(first, count))
        return {**self._head(True), "choices": [{"index": index, **said, "logprobs": marks, "finish_reason": reason}]}

    def _new(self, index: int, text: str) -> str:
        """What is not sent yet."""
        return text[len(self.sent.get(index, ("", 0))[0]) :]

    def _cell(self, cell: Cell) -> list[Any]:
        return [cell.place, cell.token, self.model.tokenizer.piece(cell.token), cell.score]

    def _top(self, ticket: Ticket, place: int) -> list[list[Any]]:
        likely = ticket.logprobs.get(place, (0.0, ()))[1]
        return [[i, self.model.tokenizer.piece(i), round(exp(logp), 4)] for i, logp in likely]

    def _logprobs(self, ticket: Ticket, first: int, count: int) -> dict[str, Any] | None:
        """Log-probabilities of tokens when they were committed, from id `first` to `count`; given cells have 0."""
        if self.logprobs is None or (self.chat and first >= count):
            return None
        ids, places = ticket.written
        piece, entries = self.model.tokenizer.piece, []
        offsets = [] if self.chat else self._offsets(ids[:count], ticket.text)
        for n in range(first, min(count, len(ids))):
            own, likely = ticket.logprobs.get(places[n], (0.0, ()))
            told = [(piece(i), logp) for i, logp in likely[: self.logprobs]]
            entries.append((piece(ids[n]), own, told, 0 if self.chat else offsets[n]))
        if self.chat:
            return {"content": [_entry(piece, own, likely) for piece, own, likely, _ in entries], "refusal": None}
        return {
            "tokens": [piece for piece, *_ in entries],
            "token_logprobs": [own for _, own, *_ in entries],
            "top_logprobs": [dict(likely) for *_, likely, _ in entries] if self.logprobs else None,
            "text_offset": [at for *_, at in entries],
        }

    def _offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where the text of each id begins; the ids of one character share its place."""
        found, start, at = [], 0, 0
        for n in range(len(ids)):
            piece = self.model.tokenizer.decode(ids[start : n + 1], skip_special=False)
            if n == start and text.startswith(" ", at) and not piece.startswith(" "):
                at += 1  # a tokenizer of words puts blanks between them
            found.append(at)
            if not piece.endswith(UNFINISHED):
                start, at = n + 1, at + len(piece)
        return found


def _entry(piece: str, logp: float, likely: Sequence[tuple[str, float]]) -> dict[str, Any]:
    top = [{"token": p, "logprob": v, "bytes": list(p.encode())} for p, v in likely]
    return {"token": piece, "logprob": logp, "bytes": list(piece.encode()), "top_logprobs": top}


def problem(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    plain = message.encode("utf-8", "replace").decode()
    return {"error": {"message": plain[:1000], "type": kind, "param": param, "code": code}}
