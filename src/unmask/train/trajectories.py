"""The embedded dLLM's own runs, on which its joint sampler is trained: word problems, restaurants."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from unmask.decode import Blocks, Canvas, Recipe, drawn, ended, everything, filled
from unmask.decode.belief import Joint
from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer
from unmask.models.transformer import Transformer
from unmask.train import problems, restaurants
from unmask.train.joint import Trajectories, record
from unmask.train.vocabulary import SEP


@dataclass(frozen=True)
class Source:
    """What is run: a task, the cells of its responses, the block they are written in, and the temperature."""

    task: str
    length: int
    block: int
    temperature: float = 0.0

    def order(self) -> Recipe:
        """One token a step, the cell of least entropy of the block first."""
        return Recipe(everything, Blocks(self.block) >> drawn, stop=filled | ended, beliefs=(Joint(1),))


SOURCES = (Source("problems", 24, 8), Source("restaurants", 40, 8, 0.7))
"""Texts of which there are many right ones are drawn, sums are not."""


def sources(e2e: Path | None) -> tuple[Source, ...]:
    """Those whose data are at hand."""
    return tuple(s for s in SOURCES if s.task == "problems" or e2e is not None)


def prompts(source: Source, count: int, seed: int, e2e: Path | None) -> list[str]:
    """`count` prompts of the training split."""
    if source.task == "problems":
        return [p.question for p in islice(problems.problems(seed, "train"), count)]
    assert e2e is not None
    rows = list({r.slots: r.prompt for r in restaurants.clean(restaurants.read(e2e, "train"))}.values())
    step = max(1, len(rows) // count)
    return rows[seed % step :: step][:count]


def share(number: int, count: int) -> int:
    """How many runs source `number` has where the first has `count`."""
    return count if number == 0 else -(-count // 3)


def collect(
    model: Transformer,
    tokenizer: Tokenizer,
    chosen: Sequence[Source],
    *,
    count: int,
    seed: int,
    e2e: Path | None = None,
    on_row: Callable[[int], object] = lambda count: None,
) -> list[Trajectories]:
    """`count` runs of the first source, a third as many of the others. A function of the seed: a resumed run makes the
    same ones again."""
    found = []
    for number, source in enumerate(chosen):
        texts = prompts(source, share(number, count), seed + number, e2e)
        ids = sorted(([*tokenizer.encode(t), SEP] for t in texts), key=len)
        c, seeds = model.config, [seed * 1_000_003 + number * count + i for i in range(len(ids))]
        canvas = Canvas.new(ids, source.length, mask_id=c.mask_id, eos=c.eos_ids, seed=seeds)
        found.append(record(model, canvas, source.order(), temperature=source.temperature, on_row=on_row))
    return found


def keep(path: Path, key: str, runs: Sequence[Trajectories]) -> None:
    """Write runs to a file that is whole or not there; `key` says what they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"key": key, "runs": [vars(r) for r in runs]}, part)
    os.replace(part, path)


def kept(path: Path, key: str) -> list[Trajectories] | None:
    """The runs of a file, or None if there is none or it holds others; UserError if it cannot be read."""
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return [Trajectories(**r) for r in found["runs"]] if found["key"] == key else None
    except Exception as error:
        raise UserError(
            f"{path} is not readable ({type(error).__name__}); delete it, and it is recorded again"
        ) from None
