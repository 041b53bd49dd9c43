"""Offline inference: rows of a file through one engine, each result written once. It knows neither HTTP nor Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from unmask.engine import Engine, Ticket
from unmask.errors import UserError, suggest
from unmask.generate import Model
from unmask.serve import reading
from unmask.serve.files import Result, Row, Sink, Source, digest, key
from unmask.serve.reading import Limits, Reading, Unknown
from unmask.serve.schema import Chat, Completion
from unmask.serve.shapes import Answer, problem

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MOST = 4096
"""Choices and prompts of one row."""
INVALID = "invalid_request_error"


def seed_of(row: Row) -> int:
    """The seed of a row that has none of its own: 48 bits of the digest of its id."""
    return int(digest(key(row))[:12], 16)


def request(row: Row) -> tuple[bool, dict[str, Any]]:
    """(is it a chat?, body) of a row in either form; UserError for a row that is neither."""
    if "body" not in row and "url" not in row:
        body = {field: value for field, value in row.items() if field not in ("id", "custom_id")}
        return "messages" in body, body
    url, body = row.get("url"), row.get("body")
    if url not in (COMPLETION, CHAT):
        raise suggest(str(url)[:80], (COMPLETION, CHAT), "url")
    if row.get("method", "POST") != "POST":
        raise UserError("a row is sent by the method POST; leave method out")
    if not isinstance(body, dict):
        raise UserError("the body of a row is an object, as the server takes it")
    return url == CHAT, body


@dataclass
class Under:
    """A row that is being decoded."""

    row: Row
    chat: bool
    read: Reading
    tickets: Sequence[Ticket]

    @property
    def ended(self) -> bool:
        """Have all of its choices ended?"""
        return all(ticket.ended for ticket in self.tickets)

    def result(self) -> Result:
        """Its line: what the server would answer, or why there is nothing."""
        if error := next((ticket.error for ticket in self.tickets if ticket.error), None):
            return failure(self.row, error)
        read, name = self.read, digest(key(self.row))[:32]
        answer = Answer(read.model, self.chat, self.tickets, read.seed, logprobs=read.logprobs, each=read.each, id=name)
        return {"id": _id(self.row), "response": {"status_code": 200, "body": answer.whole()}, "error": None}


def _id(row: Row) -> str | int:
    return row.get("custom_id", row.get("id"))  # type: ignore[return-value]


def failure(row: Row, error: BaseException) -> Result:
    """The line of a row that cannot be answered, with OpenAI's error object."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        told = problem(f"{where or 'body'}: {first['msg']}", INVALID, param=where or None)
    elif isinstance(error, Unknown):
        told = problem(str(error), INVALID, param="model", code="model_not_found")
    elif isinstance(error, UserError):
        told = problem(str(error), INVALID)
    else:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        told = problem(f"the engine failed on this row: {why}", "server_error")
    return {"id": _id(row), "response": None, **told}


class Decoder:
    """One model and its engine, through which rows stream: a row joins as soon as another one has left."""

    def __init__(self, model: Model, *, rows: int = 16, length: int | None = None) -> None:
        self.engine = Engine(model, rows=rows, queue=2**31, length=length)
        self.models = {model.name: model}
        self.limits = Limits(choices=MOST, prompts=MOST, length=self.engine.length)

    def run(self, rows: Iterable[Row]) -> Iterator[Result]:
        """The result of each row, as they end; no more is read ahead than fills the engine once."""
        source, under = iter(rows), list[Under]()
        while True:
            while self.engine.waiting < self.engine.rows and (row := next(source, None)) is not None:
                found = self._begin(row)
                if isinstance(found, Under):
                    under.append(found)
                else:
                    yield found
            if not under:
                return
            self.engine.tick()
            ended = [item for item in under if item.ended]
            under = [item for item in under if not item.ended] if ended else under
            yield from (item.result() for item in ended)

    def _begin(self, row: Row) -> Under | Result:
        """Queue a row, or say what is wrong with it."""
        try:
            chat, body = request(row)
            if body.get("stream"):
                raise UserError("a row of a file is answered whole; leave stream out")
            if body.get("seed") is None:
                body = {**body, "seed": seed_of(row)}
            if chat:
                read = reading.chat(Chat.model_validate(body), self.models, self.limits)
            else:
                read = reading.completion(Completion.model_validate(body), self.models, self.limits)
            return Under(row, chat, read, self.engine.submit(read.asks))
        except Exception as error:  # one row's fault, or ours on it, must not end the others
            return failure(row, error)


@dataclass
class Summary:
    """What a run has done. Counts but `rows`, `kept` and `failed` are those of this run alone."""

    rows: int
    kept: int
    """Results that were there before."""
    failed: int = 0
    """Results that are errors, earlier ones too."""
    written: int = 0
    tokens: int = 0
    """Useful tokens: up to and without the end."""
    decided: int = 0
    """Cells that were decided."""
    forwards: int = 0
    """Forwards of rows: one over eight rows counts eight."""
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Cells decided for each forward."""
        return self.decided / max(1, self.forwards)

    def add(self, result: Result) -> None:
        """Count one result."""
        self.written += 1
        self.failed += result["error"] is not None
        if result["response"]:
            body = result["response"]["body"]
            self.tokens += body["usage"]["completion_tokens"]
            self.decided += body["unmask"]["tokens"]
            self.forwards += body["unmask"]["forwards"]

    def table(self) -> dict[str, int | float]:
        """As JSON has it."""
        found = {field: getattr(self, field) for field in self.__dataclass_fields__}
        return {**found, "seconds": round(self.seconds, 3), "tokens_per_forward": round(self.tokens_per_forward, 4)}


def fits(source: Source, model: str) -> None:
    """UserError if every row asks for another model than this one."""
    if not source.models.keys() & {None, model}:
        others = ", ".join(sorted(str(other) for other in source.models)[:3])
        raise UserError(f"no row of {source.path} asks for {model}, but for {others}; name that model")


def write(results: Iterable[Result], sink: Sink, *, rows: int, tell: Callable[[Summary], None]) -> Summary:
    """Append each result as it comes, and tell of it. UserError if rows are left without one."""
    summary, began = Summary(rows, len(sink.done), sink.failed), time.perf_counter()
    for result in results:
        if sink.add(result):
            summary.add(result)
        summary.seconds = time.perf_counter() - began
        tell(summary)
    sink.begin()
    if left := rows - len(sink.done):
        raise UserError(f"{left} rows have no result, the input changed or a machine was lost; run again to go on")
    return summary
