"""Published decoding loops, imported from a user's own clones, beside ours: the same weights, problems and machine."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unmask import zoo
from unmask.decode import filled
from unmask.errors import UserError
from unmask.generate import Job, Model, load
from unmask.models.transformer import Transformer
from unmask.settings import Settings
from unmask.study import tasks
from unmask.study.bench import one_thread
from unmask.study.interleaved import Kept, check, interleaved, keep

Row = dict[str, Any]
FILES = {"llada": ("generate.py",), "fast-dllm": ("v1/llada/generate.py", "llada/generate.py")}
"""Where the loop lies in each clone."""
HEADS = (
    "loop",
    "problems",
    "NFE",
    "NFE, ours",
    "ms/step",
    "ms/step, ours",
    "ms",
    "ms, ours",
    "same tokens",
    "right",
)


@dataclass(frozen=True)
class Way:
    """A published function with the settings it is called with, and our recipe of the same method."""

    peer: str
    function: str
    recipe: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """How a table names it."""
        return f"{self.peer} {self.function}"


WAYS = (
    Way("llada", "generate", "llada"),
    Way("fast-dllm", "generate", "threshold", (("threshold", 0.9),)),
    Way("fast-dllm", "generate_with_prefix_cache", "prefix", (("threshold", 0.9),)),
    Way("fast-dllm", "generate_with_dual_cache", "dual", (("threshold", 0.9),)),
)


@dataclass(frozen=True)
class Plan:
    """What is run."""

    peers: Mapping[str, str]
    items: int = 20
    length: int = 24
    block: int = 8
    seed: int = 0
    dtype: str = "float32"


@dataclass
class Stored:
    """Keys and values as published loops hold them, a list of (k, v) [B, H, L, D] a layer, as `kv` of our network."""

    past: list[tuple[Tensor, Tensor]] | None
    at: Tensor | None
    """Positions [Q] that are written over; None appends."""

    def __post_init__(self) -> None:
        self.present: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, those of this pass among them."""
        if self.past is not None:
            before = self.past[layer]
            if self.at is None:
                k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
            else:
                k, v = (old.index_copy(2, self.at, new) for old, new in zip(before, (k, v), strict=True))
        self.present.append((k, v))
        return k, v


class Face:
    """Our network behind the call that published loops make, one row; it counts forwards and their time."""

    def __init__(self, network: Transformer) -> None:
        c = network.config
        self.network, self.device, self.forwards = network, torch.device("cpu"), 0
        self.whole = torch.empty(0)
        self.banned = sorted({c.mask_id, *range(c.token_count, c.vocab_size)})

    def __call__(
        self,
        x: Tensor,
        attention_mask: Any = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> SimpleNamespace:
        """x [1, L] -> logits [1, L, V] and keys and values, the mask token never predicted."""
        start = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        at = None if replace_position is None else replace_position[0].nonzero()[:, 0]
        index = torch.arange(start, start + x.shape[1]) if at is None else at
        kv = Stored(past_key_values, at) if use_cache else None
        logits = self.network(x, index[None], kv=kv)
        logits[..., self.banned] = -torch.inf
        self.forwards += 1
        if self.network.config.shift:
            logits = self._shifted(logits, int(index[0]))
        return SimpleNamespace(logits=logits, past_key_values=kv and kv.present)

    def _shifted(self, logits: Tensor, first: int) -> Tensor:
        """For published loops that read a cell's logits at the cell, where our network has them one cell before.

        What is before a window is of the latest pass over all cells.
        """
        if first == 0:
            self.whole = logits
        return torch.cat([self.whole[:, max(0, first - 1) : max(1, first)], logits[:, :-1]], 1)


def imported(peer: str, clone: Path) -> ModuleType:
    """The module of a clone that has its loop; UserError where there is none, or what it imports is not installed."""
    file = next((clone / name for name in FILES[peer] if (clone / name).is_file()), None)
    if file is None:
        raise UserError(f"no {' or '.join(FILES[peer])} in {clone}; give --{peer} a clone of the published repository")
    spec = importlib.util.spec_from_file_location(f"peer_{peer.replace('-', '_')}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{file} cannot be imported: {error}; install what the published code needs") from None
    finally:
        sys.path.remove(str(file.parent))
    return module


def theirs(way: Way, module: ModuleType, model: Model, prompt: Tensor, plan: Plan) -> tuple[Tensor, int, float]:
    """The published loop on our weights: the cells [L] that it wrote, its forwards, and seconds."""
    face, sizes = Face(model.network), {"steps": plan.length, "gen_length": plan.length, "block_length": plan.block}
    began = time.perf_counter()
    with torch.inference_mode():
        out = getattr(module, way.function)(
            face, prompt, **sizes, temperature=0.0, mask_id=model.network.config.mask_id, **dict(way.settings)
        )
    took = time.perf_counter() - began
    return (out[0] if isinstance(out, tuple) else out)[0, prompt.shape[1] :], face.forwards, took


def prepared(way: Way, model: Model, item: tasks.Item, plan: Plan) -> Job:
    """Our recipe of the same method, which fills the canvas as the published loop does."""
    job = model.prepare([item.prompt], Settings(recipe=way.recipe, length=plan.length, block=plan.block))
    return replace(job, recipe=replace(job.recipe, stop=filled))


def ours(way: Way, model: Model, item: tasks.Item, plan: Plan) -> tuple[Tensor, int, float]:
    """Our loop: the cells [L] that it wrote, its forwards, and seconds."""
    job, forwards = prepared(way, model, item, plan), 0
    canvas, began = job.canvas, time.perf_counter()
    for after, _ in job:
        canvas, forwards = after, forwards + 1
    return canvas.tokens[0, -plan.length :], forwards, time.perf_counter() - began


def measure(way: Way, module: ModuleType, model: Model, item: tasks.Item, plan: Plan) -> Row:
    """A problem by both loops, one behind the other."""
    prompt = torch.tensor([model.encode(item.prompt)])
    them, us = theirs(way, module, model, prompt, plan), ours(way, model, item, plan)
    right = {side: item.score(_text(model, told[0]))["right"] for side, told in (("theirs", them), ("ours", us))}
    return {
        "loop": way.name,
        "recipe": way.recipe,
        "cells": plan.length,
        "same": int((them[0] == us[0]).sum()),
        **{f"forwards_{side}": told[1] for side, told in (("theirs", them), ("ours", us))},
        **{f"seconds_{side}": told[2] for side, told in (("theirs", them), ("ours", us))},
        **{f"right_{side}": int(value == 1) for side, value in right.items()},
    }


def _text(model: Model, cells: Tensor) -> str:
    ends = [n for n, token in enumerate(cells.tolist()) if token in model.network.config.eos_ids]
    return model.tokenizer.decode(cells[: ends[0] if ends else None].tolist())


def summarise(rows: Sequence[Row]) -> Row:
    """A line a published loop: NFE and milliseconds a step of both, and the share of equal cells."""
    lines = []
    for name in dict.fromkeys(row["loop"] for row in rows):
        own = [row for row in rows if row["loop"] == name]
        sums = {key: sum(row[key] for row in own) for key in own[0] if key not in ("loop", "recipe")}
        line = {
            "loop": name,
            "recipe": own[0]["recipe"],
            "problems": len(own),
            "agreement": sums["same"] / sums["cells"],
        }
        for side in ("theirs", "ours"):
            line[f"nfe_{side}"] = sums[f"forwards_{side}"] / len(own)
            line[f"ms_per_step_{side}"] = 1e3 * sums[f"seconds_{side}"] / sums[f"forwards_{side}"]
            line[f"ms_{side}"] = 1e3 * sums[f"seconds_{side}"] / len(own)
            line[f"accuracy_{side}"] = sums[f"right_{side}"] / len(own)
        lines.append(line)
    return {"rows": lines}


def main(
    clones: Mapping[str, Path],
    *,
    items: int = 20,
    length: int = 24,
    block: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    json: bool = False,
    out: Path | None = None,
) -> int:
    """Measure the clones' loops beside ours, print a table (or JSON) and write `<out or results>/peer-<UTC time>`."""
    check(items, dtype)
    if not clones:
        raise UserError(f"no clone is given; name one with {' or '.join(f'--{peer} PATH' for peer in FILES)}")
    if length < 1 or block < 1 or length % block:
        raise UserError(f"published loops need a length that is a multiple of the block, not {length} and {block}")
    modules = {peer: imported(peer, clone) for peer, clone in clones.items()}
    ways = [way for way in WAYS if way.peer in modules]
    if missing := [way.name for way in ways if not hasattr(modules[way.peer], way.function)]:
        raise UserError(f"{missing[0]} is not in the clone; take a commit that has it")
    plan = Plan({peer: str(clone) for peer, clone in clones.items()}, items, length, block, seed, dtype)
    with one_thread():
        model, problems = load(zoo.NAMES[0], dtype=dtype, compile="off"), tasks.word_problems(items, seed=seed).items
        for way in ways:
            prepared(way, model, problems[0], plan)
        units = [[(way, n) for way in ways] for n in range(items)]

        def run(one: tuple[Way, int]) -> Row:
            return {"item": one[1], **measure(one[0], modules[one[0].peer], model, problems[one[1]], plan)}

        def rows(found: Sequence[Row]) -> Iterator[Row]:
            return interleaved(units, run, warm=units[0], seed=seed)

        kept = keep("peer", asdict(plan), out, rows=rows, total=items * len(ways), summarise=summarise, show=not json)
    return _tell(kept, json=json)


def _tell(kept: Kept, *, json: bool) -> int:
    if json:
        print(jsonlib.dumps({**kept.summary, "machine": kept.machine, "folder": str(kept.folder)}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="published loops and ours, on the same weights, plain torch for both")
    for head in HEADS:
        table.add_column(head)
    for line in kept.summary["rows"]:
        sides = [f"{line[f'{key}_{side}']:.2f}" for key in ("nfe", "ms_per_step", "ms") for side in ("theirs", "ours")]
        told = f"{line['accuracy_theirs']:.3f} / {line['accuracy_ours']:.3f}"
        name = f"{line['loop']} / {line['recipe']}"
        table.add_row(name, str(line["problems"]), *sides, f"{line['agreement']:.1%}", told)
    Console().print(table)
    print(f"rows and provenance: {kept.folder}")
    return 0
