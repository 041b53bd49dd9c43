"""The ledger: what a run cost and what it gave. A consumer of the loop's events."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask.decode.canvas import Canvas
from unmask.decode.loop import Step


def useful(canvas: Canvas) -> Tensor:
    """[B, L] bool: decided response cells before the first EOS of their stretch; given cells never count."""
    return canvas.valid & ~canvas.given & ~canvas.masked & ~canvas.behind


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
    helpers: dict[str, dict[str, float]] = field(default_factory=dict)
    """By name of a helper (guide, sampler, ...): its own forwards, positions and seconds, which `seconds` includes."""
    revised: int = 0
    """Cells given back or rewritten."""

    @property
    def tokens_per_forward(self) -> float:
        """Cells decided for each forward of a row."""
        return self.tokens / max(1, self.forwards)

    @property
    def useful_tokens_per_second(self) -> float:
        """Response cells before the first EOS for each second of wall-clock time."""
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
        self.canvas: Canvas | None = None
        self._recent: list[Tensor] = []
        self._forwards: Tensor | None = None
        self._positions = self._hits = 0
        self._seen: Tensor | None = None
        self._helpers: dict[str, dict[str, float]] = {}
        self._revised = 0

    def update(self, canvas: Canvas, event: Step) -> None:
        """Count one step."""
        self._recent.append(event.computed)
        if len(self._recent) == 64:
            self._fold()
        for cost in event.draft.costs:
            total = self._helpers.setdefault(cost.name, {"forwards": 0, "positions": 0, "seconds": 0.0})
            total["forwards"] += int(cost.computed.any(1).sum())
            total["positions"] += int(cost.computed.sum())
            total["seconds"] += cost.seconds
        for cells in (event.back, event.edit):
            self._revised += 0 if cells is None else int(cells.sum())
        self.canvas, self.last = canvas, time.perf_counter()

    def _fold(self) -> None:
        """Add up the steps kept back: 64 at once cost as much as one."""
        if not self._recent:
            return
        computed = torch.stack(self._recent)
        self._recent = []
        before = computed[:1] & False if self._seen is None else self._seen[None]
        seen = torch.cat([before, computed]).cummax(0).values
        live = computed.any(2)
        self._forwards = live.sum(0) + (0 if self._forwards is None else self._forwards)
        self._positions += int(computed.sum())
        self._hits += int((seen[:-1] & ~computed & live[..., None]).sum())
        self._seen = seen[-1]

    def report(self) -> Report:
        """The totals so far."""
        self._fold()
        if self.canvas is None or self._forwards is None:
            return Report(0, 0, 0, 0, 0, 0, 0.0, ())
        return Report(
            rows=len(self.canvas),
            forwards=int(self._forwards.sum()),
            positions=self._positions,
            cache_hits=self._hits,
            tokens=int((self.canvas.valid & ~self.canvas.given & ~self.canvas.masked).sum()),
            useful_tokens=int(useful(self.canvas).sum()),
            seconds=self.last - self.began,
            exit_steps=tuple(self._forwards.tolist()),
            helpers={name: dict(total) for name, total in self._helpers.items()},
            revised=self._revised,
        )
