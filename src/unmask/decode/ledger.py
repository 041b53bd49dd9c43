"""The ledger: what a run cost and what it gave. A consumer of the loop's events."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.decode.canvas import Canvas
from unmask.decode.loop import Step


def useful(canvas: Canvas) -> Tensor:
    """[B, L] bool: decided response cells before the row's first EOS; the prompt and given cells never count."""
    own = canvas.valid & ~canvas.given & ~canvas.masked
    return own & (canvas.position < canvas.first(canvas.ended)[:, None])


@dataclass(frozen=True)
class Report:
    """Totals over the rows of a run. Time is wall-clock from the ledger's start to its last event."""

    rows: int
    forwards: int
    """NFE, summed over rows: steps in which the row was computed."""
    positions: int
    """Cells run through the model."""
    cache_hits: int
    """Cells that were attended to from the cache instead of being computed."""
    tokens: int
    """Cells decided."""
    useful_tokens: int
    seconds: float
    exit_steps: tuple[int, ...]
    """Per row: forwards spent when it was done."""

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)

    @property
    def useful_tokens_per_second(self) -> float:
        return self.useful_tokens / max(1e-9, self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rates = {
            "tokens_per_forward": self.tokens_per_forward,
            "useful_tokens_per_second": self.useful_tokens_per_second,
        }
        return {**asdict(self), "exit_steps": list(self.exit_steps), **rates}


class Ledger:
    """Feed it every (canvas, step) of a run in order; ask it for the report at any time."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.forwards: Tensor | None = None
        self.computed: list[Tensor] = []
        self.canvas: Canvas | None = None
        self.seen: Tensor | None = None
        self.hits: list[Tensor] = []

    def update(self, canvas: Canvas, event: Step) -> None:
        """Count one step."""
        live = event.computed.any(1)
        known = self.seen if self.seen is not None else torch.zeros_like(event.computed)
        self.forwards = live.long() if self.forwards is None else self.forwards + live
        self.computed.append(event.computed.sum())
        self.hits.append((known & ~event.computed & live[:, None]).sum())
        self.seen = known | event.computed
        self.canvas, self.last = canvas, time.perf_counter()

    def report(self) -> Report:
        """The totals so far."""
        if self.canvas is None or self.forwards is None:
            return Report(0, 0, 0, 0, 0, 0, 0.0, ())
        own = self.canvas.valid & ~self.canvas.given & ~self.canvas.masked
        return Report(
            rows=len(self.canvas),
            forwards=int(self.forwards.sum()),
            positions=int(torch.stack(self.computed).sum()),
            cache_hits=int(torch.stack(self.hits).sum()),
            tokens=int(own.sum()),
            useful_tokens=int(useful(self.canvas).sum()),
            seconds=self.last - self.began,
            exit_steps=tuple(self.forwards.tolist()),
        )
