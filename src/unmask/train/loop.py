"""The training loop: batch i, one step, now and then a checkpoint and an evaluation. Resumable at any step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer
from unmask.train import loss as objective
from unmask.train import optim
from unmask.train.batches import Mixture
from unmask.train.vocabulary import EOS, MASK

Kind = Literal["dllm", "ar"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The defaults are those of the embedded pair."""

    kind: Kind = "dllm"
    steps: int = 30000
    seed: int = 0
    muon_lr: float = 0.003
    adam_lr: float = 0.001
    decay: float = 0.7
    tokens_per_step: int = 4608
    mixture: Literal["even", "short"] = "even"
    d_model: int = 192
    layers: int = 6
    heads: int = 3
    ff: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    save_every: int = 500
    keep: tuple[float, ...] = ()
    """Fractions of the run at which a checkpoint is kept for good."""

    def model(self, token_count: int) -> ModelConfig:
        """The network, with its embedding padded to a multiple of 32 rows."""
        return ModelConfig(
            vocab_size=-(-token_count // 32) * 32,
            d_model=self.d_model,
            layers=self.layers,
            heads=self.heads,
            ff=self.ff,
            max_positions=1024,
            layout=Layout("causal" if self.kind == "ar" else "full"),
            shift=True,
            mask_id=-1 if self.kind == "ar" else MASK,
            eos_ids=(EOS,),
            token_count=token_count,
        )


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


class Trainer:
    """One run in one folder: `checkpoint.pt` (latest), `log.jsonl`, `kept-*.pt`."""

    def __init__(self, config: TrainConfig, mixture: Mixture, folder: Path) -> None:
        self.config, self.folder = config, Path(folder)
        self.mixture = replace(mixture, seed=config.seed, tokens=config.tokens_per_step, shares=config.mixture)
        self.model = Transformer(config.model(mixture.tokenizer.get_vocab_size())).initialise(config.seed)
        self.optimizers = optim.build(self.model, config.muon_lr, config.adam_lr)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.inherited = 0
        self.prepare = objective.ar_inputs if config.kind == "ar" else objective.dllm_inputs
        self.objective = torch.compile(objective.loss, dynamic=False) if config.compile else objective.loss

    def start_from(self, path: Path) -> None:
        """Take the weights of another run's checkpoint; its tokens are counted as seen."""
        state = read_state(path)
        self.model.load_state_dict(state["model"])
        self.inherited = state["tokens"] + state["inherited"]
        self.history = [
            *state["history"],
            {"config": state["config"], "steps": state["step"], "tokens": state["tokens"]},
        ]

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return False
        state = read_state(path)
        fixed = {
            k: v
            for k, v in asdict(replace(self.config, steps=0, keep=(), save_every=0)).items()
            if k not in ("steps", "keep", "save_every")
        }
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

    def train_step(self) -> float:
        """One batch, one update; returns the loss in nats a cell."""
        batch = self.mixture.batch(self.step)
        generator = torch.Generator().manual_seed(self.config.seed * 2_000_003 + self.step)
        inputs, weight, visible = self.prepare(batch, generator)
        target = batch.tokens[:, batch.prompt :]
        value = self.objective(self.model, inputs, target, weight, visible, getattr(torch, self.config.dtype))
        value.backward()
        optim.apply(self.optimizers, optim.schedule(self.step, self.config.steps, decay=self.config.decay))
        self.step += 1
        self.tokens += batch.tokens.numel()
        return value.item()

    def run(
        self, *, evaluate: Callable[[Transformer], dict[str, float]] | None = None, evaluate_every: int = 2000
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
