"""One training run in one folder: steps, checkpoints, a log; resumable at any step. What a step is, a subclass says."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from unmask.errors import UserError


class RunConfig(Protocol):
    """What every run's configuration (a frozen dataclass) says."""

    @property
    def steps(self) -> int:
        """Length of the run; the rate decays to its end."""
        ...

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        ...

    @property
    def keep(self) -> tuple[float, ...]:
        """Fractions of the run at which a checkpoint is kept for good."""
        ...


@dataclass(frozen=True)
class Progress:
    """One line of the log: where the run is and how it does."""

    step: int
    steps: int
    seconds: float
    loss: float
    tokens: int
    tokens_per_second: float
    metrics: dict[str, float]

    @property
    def eta(self) -> float:
        """Seconds left at the present speed."""
        return self.seconds / max(1, self.step) * (self.steps - self.step)


class Run(ABC):
    """One run in one folder: `checkpoint.pt` (latest), `log.jsonl`, `kept-*.pt`."""

    config: Any
    """A frozen dataclass; every run's has at least the fields of `RunConfig`."""

    def __init__(
        self, config: RunConfig, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self.model, self.optimizers = model, optimizers
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.inherited = 0

    @abstractmethod
    def train_step(self) -> float:
        """One batch, one update; returns the loss."""

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return False
        state = read_state(path)
        fixed = {k: v for k, v in asdict(self.config).items() if k not in ("steps", "keep", "save_every")}
        if changed := [k for k, v in fixed.items() if state["config"].get(k) != v]:
            raise UserError(
                f"{path} is of a run with another {', '.join(changed)}; use another --out or the same settings"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.history, self.inherited = state["history"], state["inherited"]
        return True

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "history": self.history,
            "inherited": self.inherited,
        }

    def save(self, name: str = "checkpoint.pt") -> Path:
        """Write a checkpoint under its final name only when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, part = self.folder / name, self.folder / f"{name}.part"
        torch.save(self.state(), part)
        os.replace(part, path)
        return path

    def run(
        self, *, evaluate: Callable[[Any], dict[str, float]] | None = None, evaluate_every: int = 2000
    ) -> Iterator[Progress]:
        """Train to the end, yielding progress every 20 steps; `evaluate` is called every `evaluate_every` steps."""
        c, mean, began, metrics = self.config, 0.0, time.monotonic() - self.seconds, {}
        marks = {max(1, round(f * c.steps)): f for f in c.keep}
        start, since = self.step, time.monotonic()
        seen = self.tokens
        while self.step < c.steps:
            value = self.train_step()
            weight = max(0.02, 1 / (self.step - start))
            mean += weight * (value - mean)
            self.seconds = time.monotonic() - began
            last = self.step == c.steps
            if self.step in marks:
                self.save(f"kept-{round(100 * marks[self.step]):03d}.pt")
            if self.step % c.save_every == 0 or last:
                self.save()
            if evaluate and (self.step % evaluate_every == 0 or last):
                metrics = evaluate(self.model)
            if self.step % 20 == 0 or last:
                speed = (self.tokens - seen) / (time.monotonic() - since)
                progress = Progress(self.step, c.steps, self.seconds, mean, self.tokens, speed, metrics)
                self._log(progress)
                yield progress
                metrics = {}

    def _log(self, progress: Progress) -> None:
        if progress.step % 200 == 0 or progress.metrics or progress.step == progress.steps:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a") as out:
                out.write(json.dumps(asdict(progress)) + "\n")


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint of a run, with the path of the run's log beside it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "log": str(Path(path).parent / "log.jsonl")}
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); delete it or pass another --out"
        ) from None
