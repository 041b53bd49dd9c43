"""One thread that ticks the engines, and what requests of an event loop hear from it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

from unmask.engine import Ask, Engine, Full, Ticket, Update

log = logging.getLogger("unmask.serve")
UNREAD = 2000
"""A client that lets so many updates wait is given up."""
Heard = tuple[Ticket, Update | None]


class Draining(Full):
    """The server takes no more requests, because it is about to stop."""


class Worker:
    """Runs the engines of all models by turns in a thread of its own, and sleeps while there is nothing to do."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        self.draining = self.stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unmask-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the forward at hand; nothing is finished that has not been."""
        self.stopped = True
        self._wake.set()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        """Does it work?"""
        return self._thread.is_alive() and not self.stopped

    def submit(self, engine: Engine, asks: Sequence[Ask], *, follow: bool) -> Watch:
        """Queue requests from a coroutine; UserError, Full or Draining if they are not taken."""
        if self.draining or self.stopped:
            raise Draining("the server is about to stop; try again elsewhere or later")
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Heard]()

        def listen(ticket: Ticket, update: Update | None) -> None:
            if update is not None and inbox.qsize() > UNREAD:
                engine.abort(ticket)
                return
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, (ticket, update))
            except RuntimeError:  # the loop has ended, and nobody listens any more
                engine.abort(ticket)

        watch = Watch(self, engine, engine.submit(asks, listen, follow=follow), inbox)
        self._wake.set()
        return watch

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def _run(self) -> None:
        while not self.stopped:
            busy = [_ticked(engine) for engine in self.engines.values()]
            if not any(busy):
                self._wake.wait(timeout=0.5)
                self._wake.clear()


def _ticked(engine: Engine) -> bool:
    """`engine.tick()`; whatever it meets, the thread lives on and nobody waits for ever."""
    try:
        return engine.tick()
    except Exception as error:
        log.exception("the engine met a fault and begins anew")
        engine.reset(error)
        return False


class Watch:
    """Requests on their way, as a coroutine sees them; leaving the `with` block gives up what has not ended."""

    def __init__(self, worker: Worker, engine: Engine, tickets: list[Ticket], inbox: asyncio.Queue[Heard]) -> None:
        self.worker, self.engine, self.tickets, self.inbox = worker, engine, tickets, inbox

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for ticket in self.tickets:
            if not ticket.ended:
                self.engine.abort(ticket)
        self.worker.wake()

    async def events(self) -> AsyncIterator[Heard]:
        """Every update of every request, each followed by None when it has ended."""
        left = len(self.tickets)
        while left:
            ticket, update = await self.inbox.get()
            left -= update is None
            yield ticket, update
