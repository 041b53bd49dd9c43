"""Continuous batching over the one step: admit, step, retire. Rows join and leave between any two forwards."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from unmask.engine.ask import Ask, Listen, Ticket
from unmask.engine.lane import Lane
from unmask.engine.tell import finish, look
from unmask.errors import UserError
from unmask.generate import Model

LANES = 4
"""Empty lanes above this number are given up, with their keys and values."""


class Full(RuntimeError):
    """The queue is at its bound; try again later."""


@dataclass
class Counts:
    """What an engine has done since it was made."""

    finished: int = 0
    aborted: int = 0
    failed: int = 0
    steps: int = 0
    """Batched forwards."""
    forwards: int = 0
    """Forwards of rows: a batched forward over eight rows counts eight."""
    positions: int = 0
    decided: int = 0
    prompt_tokens: int = 0
    useful_tokens: int = 0


class Engine:
    """Decodes requests together: at most `rows` at once whose cells sum up to at most `cells`, first come first served.

    `submit` and `abort` may be called from any thread, `tick` from one. A response does not depend on its company:
    each row has its own recipe, settings, seed and clock, and a forward computes live rows only.
    """

    def __init__(
        self, model: Model, *, rows: int = 16, cells: int | None = None, queue: int = 256, length: int | None = None
    ) -> None:
        longest = model.network.config.max_positions
        self.model, self.rows, self.bound = model, rows, queue
        self.length = min(length or longest, longest)
        """The most cells of one request, prompt and suffix included."""
        self.cells = cells or rows * self.length
        for name, value in (("rows", rows), ("queue", queue), ("length", self.length), ("cells", self.cells)):
            if value < 1:
                raise UserError(f"{name} of an engine must be at least 1, not {value}")
        self.counts = Counts()
        self.queue: deque[Ticket] = deque()
        self.lanes: dict[tuple[object, ...], Lane] = {}
        self._lock = threading.Lock()

    def submit(self, asks: Iterable[Ask], listen: Listen | None = None, *, follow: bool = True) -> list[Ticket]:
        """Queue requests that belong together: all of them, or none (Full).

        `listen` hears of every forward of each (`follow`: or only of the end).
        """
        tickets = [Ticket(ask, listen, follow=follow) for ask in asks]
        for ticket in tickets:
            self.check(ticket.ask)
        with self._lock:
            if len(self.queue) + len(tickets) > self.bound:
                raise Full(f"{len(self.queue)} requests are waiting, and the queue holds {self.bound}; try again later")
            self.queue.extend(tickets)
        return tickets

    def check(self, ask: Ask) -> None:
        """UserError for a request that would never be admitted."""
        most = min(self.length, self.cells)
        if ask.cells > most:
            raise UserError(f"the request takes {ask.cells} cells, prompt included, and this engine has {most} for one")

    def abort(self, ticket: Ticket) -> None:
        """Give a request up: its slot is free before the next forward."""
        ticket.aborted = True

    @property
    def live(self) -> int:
        """Rows that are being decoded."""
        return sum(map(len, self.lanes.values()))

    @property
    def used(self) -> int:
        """Cells of the rows that are being decoded, out of `cells`."""
        return sum(ticket.ask.cells for lane in self.lanes.values() for ticket in lane.tickets)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self.queue)

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self.queue and not self.live

    def tick(self) -> bool:
        """Admit what fits, and one forward of every lane; False if there was nothing to do."""
        self._leave()
        self._admit()
        for lane in [lane for lane in self.lanes.values() if len(lane)]:
            self._step(lane)
        empty = [key for key, lane in self.lanes.items() if not len(lane)]
        for key in empty[: max(0, len(self.lanes) - LANES)]:
            del self.lanes[key]
        return bool(self.live or self.queue)

    def run(self, asks: Iterable[Ask]) -> list[Ticket]:
        """Decode all of them, as many at once as fit, in a queue of any length."""
        tickets = [Ticket(ask) for ask in asks]
        for ticket in tickets:
            self.check(ticket.ask)
        self.queue.extend(tickets)
        while self.tick():
            pass
        return tickets

    def _leave(self) -> None:
        """Let those go that were aborted."""
        for lane in self.lanes.values():
            gone = [ticket.aborted for ticket in lane.tickets]
            if any(gone):
                self._end([t for t in lane.tickets if t.aborted])
                lane.drop(gone)
        with self._lock:
            gone = [ticket for ticket in self.queue if ticket.aborted]
            if gone:
                self.queue = deque(ticket for ticket in self.queue if not ticket.aborted)
        self._end(gone)

    def _end(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            name = "failed" if ticket.error else "finished" if ticket.done else "aborted"
            setattr(self.counts, name, getattr(self.counts, name) + 1)
            if ticket.listen:
                ticket.listen(ticket, None)

    def _admit(self) -> None:
        """Strictly in order, so that nobody starves behind smaller requests."""
        used, live, found = self.used, self.live, dict[tuple[object, ...], list[Ticket]]()
        with self._lock:
            while self.queue and live < self.rows and used + self.queue[0].ask.cells <= self.cells:
                ticket = self.queue.popleft()
                live, used = live + 1, used + ticket.ask.cells
                found.setdefault(ticket.ask.key, []).append(ticket)
        for key, tickets in found.items():
            try:
                self._join(key, tickets)
            except Exception as error:  # what one kind of request meets must not end the others
                self.lanes.pop(key, None)
                self._fail(tickets, error)

    def _join(self, key: tuple[object, ...], tickets: list[Ticket]) -> None:
        """Put requests into their lane, which is made if there is none."""
        lane = self.lanes.pop(key, None)
        if lane is None:  # an empty lane is false too
            if self.model.device.type != "cpu":  # there, zeros are memory
                self.lanes = {name: lane for name, lane in self.lanes.items() if len(lane)}
            lane = Lane(self.model, tickets[0].ask, slots=self.rows, length=self.length)
        now = time.perf_counter()
        for ticket in tickets:
            ticket.started = now
            self.counts.prompt_tokens += ticket.ask.origin
        lane.admit(tickets)
        self.lanes[key] = lane  # the lane used last is given up last

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in tickets:
            ticket.error = ticket.error or error
        self._end(tickets)

    def reset(self, error: Exception) -> None:
        """Fail every request there is, and begin anew."""
        with self._lock:
            waiting, self.queue = list(self.queue), deque()
        live = [ticket for lane in self.lanes.values() for ticket in lane.tickets]
        self.lanes = {}
        self._fail([t for t in (*live, *waiting) if not t.ended], error)

    def _step(self, lane: Lane) -> None:
        """One forward of a lane, what it tells of it, and the rows that it ends."""
        rows = list(lane.tickets)
        try:
            before, canvas, event = lane.step()
            ended = look(self.model, lane, before, canvas, event)
        except Exception as error:  # one lane's fault must not end the others
            lane.drop([True] * len(rows))
            self._fail(rows, error)
            return
        self.counts.steps += 1
        self.counts.forwards += len(rows)
        gone = []
        for row, ticket in enumerate(rows):
            if ended[row] is not None and ticket.error is None:
                ticket.done = finish(self.model, lane, canvas, row, ended[row] or "length")
                self.counts.positions += ticket.done.positions
                self.counts.decided += ticket.done.decided
                self.counts.useful_tokens += len(ticket.done.tokens)
            gone.append(ticket.done is not None or ticket.error is not None)
        if any(gone):
            lane.drop(gone)
        self._end([ticket for ticket in rows if ticket.done or ticket.error])
