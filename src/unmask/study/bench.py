"""What a step costs: the forward, and everything else, per recipe, for a masked model and its autoregressive twin."""

from __future__ import annotations

import gc
import json as jsonlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unmask import recipes as known_recipes
from unmask.decode import Canvas, Ledger, Recipe, decode
from unmask.denoise import Plain
from unmask.errors import UserError
from unmask.models.fast import accelerate
from unmask.models.transformer import Transformer
from unmask.study import machine
from unmask.study.evaluate import recipe_for
from unmask.study.results import Results

RECIPES = ("llada", "threshold", "factor", "eb", "prophet", "prefix", "dual", "freecache", "dkv", "ar")
"""What is measured unless recipes are named; `ar` runs on the twin, all others on the masked model."""
QUICK = ("llada", "threshold", "prefix", "ar")

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The masked model and its autoregressive twin."""

    dllm: Transformer
    twin: Transformer


@dataclass(frozen=True)
class Plan:
    """What is run: every recipe on every prompt, `repeats` times, in an order shuffled anew each time."""

    recipes: tuple[str, ...] = RECIPES
    length: int = 64
    block: int = 32
    repeats: int = 5
    seed: int = 0
    dtype: str = "float32"
    prompts: int = 8

    def recipe(self, name: str, model: Transformer) -> Recipe:
        """The recipe that `generate` would use at this length; a row also ends at a settled EOS."""
        return recipe_for(model, name, self.length, block=self.block)


class Stopwatch:
    """Seconds spent inside a model's forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    @contextmanager
    def on(self, model: Transformer) -> Iterator[None]:
        """Time every call of `model` until the block is left."""
        forward, clock = model.forward, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            out = forward(*args, **kwargs)
            self.seconds += clock() - began
            self.calls += 1
            return out

        model.forward = timed
        try:
            yield
        finally:
            del model.forward


def measure(model: Transformer, recipe: Recipe, prompt: Sequence[int], length: int) -> Row:
    """Decode one prompt at batch 1: per-step milliseconds, and the ledger. Setting up is timed apart from the steps."""
    watch, began, c = Stopwatch(), time.perf_counter(), model.config
    canvas = Canvas.new([prompt], length, mask_id=c.mask_id, eos=c.eos_ids)
    canvas = replace(canvas, region=(~canvas.given).to(torch.int8) * 2)
    denoise = Plain(model, slots=1, length=canvas.tokens.shape[1], cached=recipe.cached)
    with watch.on(model):
        ledger, start = Ledger(), time.perf_counter()
        for after, event in decode(denoise, recipe, canvas):
            ledger.update(after, event)
        stop = time.perf_counter()
    report, steps = ledger.report(), watch.calls
    total, forward = (stop - start) * 1e3 / steps, watch.seconds * 1e3 / steps
    return {
        "steps": steps,
        "step_ms": total,
        "forward_ms": forward,
        "other_ms": total - forward,
        "share": (total - forward) / total,
        "setup_ms": (start - began) * 1e3,
        "seconds": stop - began,
        "forwards": report.forwards,
        "positions": report.positions,
        "tokens": report.tokens,
        "useful_tokens": report.useful_tokens,
        "tokens_per_forward": report.tokens_per_forward,
    }


def runs(pair: Pair, prompts: Sequence[Sequence[int]], plan: Plan) -> Iterator[Row]:
    """One row a run, interleaved over recipes, after a warm-up of each, with no garbage collected meanwhile."""
    model = {name: pair.twin if name == "ar" else pair.dllm for name in plan.recipes}
    jobs = [(name, plan.recipe(name, model[name]), i) for name in plan.recipes for i in range(len(prompts))]
    for name, recipe, i in jobs:
        if i == 0:
            measure(model[name], recipe, prompts[i], plan.length)
    order, collecting = random.Random(plan.seed), gc.isenabled()
    gc.disable()
    try:
        for repeat in range(plan.repeats):
            order.shuffle(jobs)
            gc.collect()
            for name, recipe, i in jobs:
                row = measure(model[name], recipe, prompts[i], plan.length)
                yield {"recipe": name, "prompt": i, "repeat": repeat, "prompt_tokens": len(prompts[i]), **row}
    finally:
        if collecting:
            gc.enable()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range."""
    if len(values) < 2:
        return {"median": values[0], "iqr": 0.0}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "iqr": high - low}


def summarise(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """A line per recipe: medians over its runs; useful tokens per second from each prompt's median time."""
    lines = []
    for name in names:
        own = [r for r in rows if r["recipe"] == name]
        by_prompt = [[r for r in own if r["prompt"] == i] for i in sorted({r["prompt"] for r in own})]
        seconds = sum(statistics.median(r["seconds"] for r in group) for group in by_prompt)
        firsts = [group[0] for group in by_prompt]
        mean = {k: statistics.fmean(r[k] for r in firsts) for k in ("forwards", "positions", "tokens", "useful_tokens")}
        times = {k: spread([r[k] for r in own]) for k in ("step_ms", "forward_ms", "other_ms", "share")}
        lines.append(
            {
                "recipe": name,
                "model": "twin" if name == "ar" else "dllm",
                "runs": len(own),
                **{k: v["median"] for k, v in times.items()},
                **{f"{k}_iqr": v["iqr"] for k, v in times.items()},
                **mean,
                "tokens_per_forward": mean["tokens"] / mean["forwards"],
                "useful_tokens_per_second": sum(r["useful_tokens"] for r in firsts) / seconds,
            }
        )
    return lines


def worksheets(encode: Callable[[str], list[int]], count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """Held-out word problems, one for each 32 cells of the response, as token prompts ending in the separator."""
    from unmask.train import problems
    from unmask.train.vocabulary import SEP

    stream, k = problems.problems(seed, "draws"), min(8, max(1, length // 32))
    return [[*encode(problems.worksheet(stream, k)[0]), SEP] for _ in range(count)]


def embedded() -> tuple[Pair, Callable[[str], list[int]]]:
    """The pair that ships with the package, and its tokenizer's encoder."""
    from importlib import resources

    from unmask.models.load import load_checkpoint

    zoo = Path(str(resources.files("unmask") / "zoo"))
    dllm, twin = (load_checkpoint(zoo / name) for name in ("dllm", "twin"))
    assert dllm.tokenizer is not None  # the package ships one
    return Pair(dllm.model, twin.model), dllm.tokenizer.encode


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread until the block is left."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(pair: Pair, prompts: Sequence[Sequence[int]], plan: Plan, results: Results, *, show: bool = True) -> list[Row]:
    """Run the plan, row by row into `results`; the summary lines."""
    from rich.console import Console
    from rich.progress import track

    rows, total = [], plan.repeats * len(plan.recipes) * len(prompts)
    console, todo = Console(stderr=True), runs(pair, prompts, plan)
    for row in track(todo, "measuring", total=total, console=console, transient=True, disable=not show):
        results.row(row)
        rows.append(row)
    return summarise(rows, plan.recipes)


def table(lines: Sequence[Row], plan: Plan, where: dict[str, Any]) -> Any:
    """The summary as a rich table."""
    from rich.table import Table

    load = ", ".join(map(str, where["load"])) or "unknown"
    title = (
        f"{plan.length} cells, blocks of {plan.block}, batch 1, {plan.dtype}, {where['threads']} thread; load {load}"
    )
    caption = f"median ± interquartile range; {where['cpu']}, torch {where['torch']}"
    shown = Table(title=title, caption=caption, padding=(0, 0))
    heads = ("ms/step", "forward", "everything else", "share", "NFE", "positions", "tok/forward", "useful tok/s")
    shown.add_column("recipe")
    for head in heads:
        shown.add_column(head, justify="right")
    for line in lines:
        times = [f"{line[k]:.2f} ± {line[f'{k}_iqr']:.2f}" for k in ("step_ms", "forward_ms", "other_ms")]
        counts = [f"{line['forwards']:.1f}", f"{line['positions']:.0f}", f"{line['tokens_per_forward']:.2f}"]
        speed = f"{line['useful_tokens_per_second']:.0f}"
        shown.add_row(line["recipe"], *times, f"{line['share']:.0%}", *counts, speed)
    return shown


def _plan(prompts: int, repeats: int, recipes: list[str] | None, quick: bool, **settings: Any) -> Plan:
    names = tuple(recipes or (QUICK if quick else RECIPES))
    for name in names:
        known_recipes.entry(name)
    if quick:
        prompts, repeats = min(prompts, 2), min(repeats, 2)
    plan = Plan(names, repeats=repeats, prompts=prompts, **settings)
    if min(plan.prompts, plan.repeats, plan.length, plan.block) < 1:
        raise UserError("prompts, repeats, length and block must all be at least 1")
    if plan.dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"dtype is float32, bfloat16 or float64, not {plan.dtype!r}")
    return plan


def main(
    *,
    prompts: int = 8,
    repeats: int = 5,
    recipes: list[str] | None = None,
    length: int = 64,
    block: int = 32,
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
    dtype: str = "float32",
    source: Callable[[], tuple[Pair, Callable[[str], list[int]]]] = embedded,
) -> int:
    """Measure the embedded pair, print the table (or JSON) and write `<out or results>/bench-<UTC time>`.

    `source` gives another pair and the encoder of its prompts. Returns the exit code.
    """
    from rich.console import Console

    plan = _plan(prompts, repeats, recipes, quick, length=length, block=block, dtype=dtype)
    pair, encode = source()
    pair = Pair(*(accelerate(m.to(getattr(torch, dtype)).eval()) for m in (pair.dllm, pair.twin)))
    texts = worksheets(encode, plan.prompts, plan.length, seed=plan.seed)
    with (
        one_thread(),
        torch.inference_mode(),
        Results.create("bench", plan, out or "results", seeds=plan.seed) as results,
    ):
        lines = run(pair, texts, plan, results, show=not json)
        where = {**results.run["machine"], "load_after": machine.load()}
        folder = results.finish({"rows": lines, "load_after": where["load_after"]})
    if json:
        print(jsonlib.dumps({"rows": lines, "machine": where, "folder": str(folder)}, indent=2))
    else:
        console = Console()
        console.print(table(lines, plan, where))
        console.print(f"written to {folder}")
    return 0
