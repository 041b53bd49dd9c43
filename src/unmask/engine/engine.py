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
"""There are never more lanes than this: a request that needs another one waits, and an empty one makes room."""


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
    """Decodes requests together: at most `rows` at once whose cells sum up to at most `cells`, admitted by turns.

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
        self.queue: deque[deque[Ticket]] = deque()
        """Who waits: by turns, one request of each that were submitted together."""
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
            if self.waiting + len(tickets) > self.bound:
                raise Full(f"{self.waiting} requests are waiting, and the queue holds {self.bound}; try again later")
            self.queue.append(deque(tickets))
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
        return sum(map(len, self.queue))

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
        return bool(self.live or self.queue)

    def run(self, asks: Iterable[Ask]) -> list[Ticket]:
        """Decode all of them, as many at once as fit, in a queue of any length."""
        tickets = [Ticket(ask) for ask in asks]
        for ticket in tickets:
            self.check(ticket.ask)
        self.queue.append(deque(tickets))
        while self.tick():
            pass
        return tickets

    def _leave(self) -> None:
        """Let those go that were aborted."""
        for lane in self.lanes.values():
            gone = [ticket.aborted for ticket in lane.tickets]  # read once: another thread sets it
            if any(gone):
                left = [ticket for ticket, out in zip(lane.tickets, gone, strict=True) if out]
                lane.drop(gone)
                self._end(left)
        left = []
        with self._lock:
            for group in self.queue:
                kept = [(ticket, ticket.aborted) for ticket in group]
                left += [ticket for ticket, out in kept if out]
                if any(out for _, out in kept):
                    group.clear()
                    group.extend(ticket for ticket, out in kept if not out)
            self.queue = deque(group for group in self.queue if group)
        self._end(left)

    def _end(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            name = "failed" if ticket.error else "finished" if ticket.done else "aborted"
            setattr(self.counts, name, getattr(self.counts, name) + 1)
            if ticket.listen:
                ticket.listen(ticket, None)

    def _admit(self) -> None:
        """By turns, and never past one that does not fit yet, so that nobody starves behind smaller requests."""
        used, live, found = self.used, self.live, dict[tuple[object, ...], list[Ticket]]()
        busy = {key for key, lane in self.lanes.items() if len(lane)}
        with self._lock:
            while self.queue and live < self.rows:
                ticket, key = self.queue[0][0], self.queue[0][0].ask.key
                if used + ticket.ask.cells > self.cells or (key not in busy and len(busy) >= LANES):
                    break
                group = self.queue.popleft()
                group.popleft()
                if group:
                    self.queue.append(group)
                live, used = live + 1, used + ticket.ask.cells
                busy.add(key)
                found.setdefault(key, []).append(ticket)
        for key, tickets in found.items():
            try:
                self._join(key, tickets)
            except Exception as error:  # what one kind of request meets must not end the others
                lane = self.lanes.pop(key, None)
                self._fail([*tickets, *(lane.close() if lane else ())], error)

    def _join(self, key: tuple[object, ...], tickets: list[Ticket]) -> None:
        """Put requests into their lane, which is made if there is none."""
        if key not in self.lanes:
            empty = [name for name, lane in self.lanes.items() if not len(lane)]
            for name in empty if self.model.device.type != "cpu" else empty[: len(self.lanes) - LANES + 1]:
                del self.lanes[name]  # their keys and values are memory
            self.lanes[key] = self._lane(tickets[0].ask)
        lane = self.lanes[key] = self.lanes.pop(key)  # the one used last is given up last
        now = time.perf_counter()
        for ticket in tickets:
            ticket.started = now
            self.counts.prompt_tokens += ticket.ask.origin
        lane.admit(tickets)

    def _lane(self, kind: Ask) -> Lane:
        """A new lane; two that differ only in what draws their tokens share keys, values and slots."""
        alike = (lane for lane in self.lanes.values() if kind.mixes and lane.mixes and lane.layout == kind.layout)
        return Lane(self.model, kind, slots=self.rows, length=self.length, beside=next(alike, None))

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        tickets = [*dict.fromkeys(tickets)]
        for ticket in tickets:
            ticket.error = ticket.error or error
        self._end(tickets)

    def reset(self, error: Exception) -> None:
        """Fail every request there is, and begin anew."""
        with self._lock:
            waiting, self.queue = [ticket for group in self.queue for ticket in group], deque()
        live = [ticket for lane in self.lanes.values() for ticket in lane.tickets]
        self.lanes = {}
        self._fail([t for t in (*live, *waiting) if not t.ended], error)

    def _step(self, lane: Lane) -> None:
        """One forward of a lane, what it tells of it, and the rows that it ends."""
        rows = list(lane.tickets)
        try:
            canvas, event = lane.step()
            ended = look(self.model, lane, canvas, event)
        except Exception as error:  # one lane's fault must not end the others
            self._fail(lane.close(), error)
            return
        self.counts.steps += 1
        self.counts.forwards += len(rows)
        gone = []
        for row, ticket in enumerate(rows):
            reason = ended[row]
            if reason is not None and ticket.error is None:
                ticket.done = finish(lane, canvas, row, reason)
                self.counts.positions += ticket.done.positions
                self.counts.decided += ticket.done.decided
                self.counts.useful_tokens += len(ticket.done.tokens)
            gone.append(ticket.done is not None or ticket.error is not None)
        if any(gone):
            lane.drop(gone)
        self._end([ticket for ticket in rows if ticket.done or ticket.error])
