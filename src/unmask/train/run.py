"""One training run in one folder: steps, checkpoints, a log; resumable at any step. What a step is, a subclass says."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.train import optim
from unmask.train.batches import Batch

if TYPE_CHECKING:
    from unmask.generate import Model
    from unmask.models.transformer import Transformer

T = TypeVar("T")


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


class Alone:
    """What a run asks of the processes that it is spread over: here there is one, and nothing to do."""

    rank, world = 0, 1

    @property
    def told(self) -> str:
        """The machine, in words."""
        return "one CPU thread"

    def agree(self, question: Callable[[], T]) -> T:
        """The answer that holds for all processes; a UserError of the question is one of all of them."""
        return question()

    def load(self, name: str) -> Model:
        """The model of that name."""
        from unmask.generate import load

        return load(name)

    def place(self, model: Transformer, dtype: torch.dtype) -> Transformer:
        """The model where it computes, in `dtype`."""
        return model

    def move(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors where the model is."""
        return tensors

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        return list(numbers)

    def state(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Weights and optimizer states in one piece."""
        return {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}

    def restore(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Take what `state` returned."""
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


ALONE = Alone()


class Run(ABC):
    """One run in one folder: `checkpoint.pt` (latest), `log.jsonl`, `kept-*.pt`."""

    config: Any
    """A frozen dataclass; every run's has at least the fields of `RunConfig`."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        processes: Alone = ALONE,
    ) -> None:
        self.config, self.folder, self.processes = config, Path(folder), processes
        self.model, self.optimizers = model, optimizers
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.inherited = 0
        self.sound = processes.world == 1
        """No step is half done, and this process can save alone."""

    @abstractmethod
    def train_step(self) -> float:
        """One batch, one update; returns the loss."""

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one."""
        path, held = self.folder / "checkpoint.pt", {}

        def read() -> dict[str, Any] | None:
            state = read_state(path) if path.is_file() else None
            if state is not None:
                self._check(path, state["config"])
                held.update({k: state.pop(k) for k in ("model", "optimizers")})
                if shapes(held["model"]) != shapes(self.model.state_dict()):
                    raise UserError(f"{path} holds a model of another shape; use another --out or the same settings")
            return state

        if (state := self.processes.agree(read)) is None:
            return False
        self.processes.restore(self.model, self.optimizers, held)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.history, self.inherited = state["history"], state["inherited"]
        return True

    def _check(self, path: Path, saved: dict[str, Any]) -> None:
        """UserError if the checkpoint is of another run; a setting that it does not know yet had its default."""
        known = {f.name: f.default for f in fields(self.config)} | saved
        fixed = {k: v for k, v in asdict(self.config).items() if k not in ("steps", "keep", "save_every")}
        if changed := [k for k, v in fixed.items() if known[k] != v]:
            raise UserError(
                f"{path} is of a run with another {', '.join(changed)}; use another --out or the same settings"
            )

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "config": asdict(self.config),
            **self.processes.state(self.model, self.optimizers),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "history": self.history,
            "inherited": self.inherited,
        }

    def save(self, name: str = "checkpoint.pt") -> Path:
        """Write a checkpoint under its final name only when it is whole."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        state = self.state()
        if self.processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(state, part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def run(
        self, *, evaluate: Callable[[Any], dict[str, float]] | None = None, evaluate_every: int = 2000
    ) -> Iterator[Progress]:
        """Train to the end, yielding progress every 20 steps; `evaluate` is called every `evaluate_every` steps.

        Ctrl-C waits for the end of a step and for a checkpoint; a second one does not, nor do several processes.
        """
        start = self.step
        try:
            yield from self._steps(evaluate, evaluate_every)
        except KeyboardInterrupt:
            if self.sound and self.step > start:
                self.save()
            raise

    def _steps(self, evaluate: Callable[[Any], dict[str, float]] | None, evaluate_every: int) -> Iterator[Progress]:
        c, mean, began, metrics = self.config, 0.0, time.monotonic() - self.seconds, {}
        marks = {max(1, round(f * c.steps)): f for f in c.keep}
        start, since = self.step, time.monotonic()
        seen = self.tokens
        while self.step < c.steps:
            with unbroken() if self.processes.world == 1 else nullcontext():
                self.sound = False
                value = self.train_step()
                self.seconds = time.monotonic() - began
                self.sound = self.processes.world == 1
            weight = max(0.02, 1 / (self.step - start))
            mean += weight * (value - mean)
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
        if self.processes.rank:
            return
        if progress.step % 200 == 0 or progress.metrics or progress.step == progress.steps:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a") as out:
                out.write(json.dumps(asdict(progress)) + "\n")


class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch:
        """Batch number `step`, a function of `step` alone."""
        ...


class BatchRun(Run):
    """A run whose step is one batch of a source; what its loss is, a subclass says."""

    source: Source
    warmup = 100
    clip = math.inf
    """Longest gradient."""

    @abstractmethod
    def loss(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """The loss of a batch; all randomness comes from `draw`."""

    def train_step(self) -> float:
        """A batch in each process, one update; returns their mean loss."""
        c, p, batch = self.config, self.processes, self.source.batch(self.step)
        draw = torch.Generator().manual_seed(c.seed * 2_000_003 + self.step * p.world + p.rank)
        value = self.loss(batch, draw)
        value.backward()
        if self.clip < math.inf:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        optim.apply(self.optimizers, optim.schedule(self.step, c.steps, decay=c.decay, warmup=self.warmup))
        self.step += 1
        loss, tokens = p.total(value.item(), batch.tokens.numel())
        self.tokens += int(tokens)
        return loss / p.world


@contextmanager
def unbroken() -> Iterator[None]:
    """Within, Ctrl-C waits for the end, unless it comes twice; where it is ignored or handled elsewhere, nothing."""
    own, came = signal.getsignal(signal.SIGINT), []
    if not callable(own) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            own(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
    if came:
        own(signal.SIGINT, None)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    return {name: tuple(value.shape) for name, value in weights.items()}


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
