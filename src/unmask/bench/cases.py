"""What the suite times: steps of the loop on the fast path and in plain torch, and the plain reference beside them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from unmask import recipes
from unmask.bench.presets import Preset, build
from unmask.bench.reference import Reference
from unmask.decode import Canvas, Denoiser, Draft, Recipe, decode, step
from unmask.denoise import Plain
from unmask.models.transformer import Transformer

Row = dict[str, Any]
PER_STEP = 4
"""Cells committed in a step, so that a block of 32 takes 8."""
FAST, PREPACKED, EAGER, PLAIN = "kernels", "oneDNN", "eager", "reference"


@dataclass(frozen=True)
class Case:
    """Something that is timed: what it is, by which engine, and the call."""

    what: str
    engine: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)


def spread(times: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(times) < 2:
        return times[0], 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, high - low


def timed(cases: Sequence[Case], repeats: int, *, seed: int, told: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of every call of every case, in an order shuffled anew for each repeat, after a round that warms up.

    A step is timed right behind another of the same case, as in a decode: the case before has filled the caches with
    its own. A case that returns a number has timed itself. `told` is called after every call.
    """
    times: list[list[float]] = [[] for _ in cases]
    order, collecting = random.Random(seed), gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats + 1):
            for i in order.sample(range(len(cases)), len(cases)):
                own = cases[i].run()
                began = time.perf_counter()
                if not isinstance(own, float):
                    cases[i].run()
                took = own if isinstance(own, float) else 1e3 * (time.perf_counter() - began)
                if repeat:
                    times[i].append(took)
                told()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


def schedule(preset: Preset) -> Recipe:
    """The dual cache with a fixed number of cells a step: the schedule of the reference."""
    return recipes.get("dual-quota", block=preset.block, steps=preset.length // PER_STEP)


def prompts(preset: Preset, rows: int = 1, cells: int = 0) -> list[list[int]]:
    """Random tokens, the same every time; `cells` of them in each row, or as many as the preset's prompt has."""
    draw = random.Random(0)
    most = min(preset.config.token_count, preset.config.vocab_size) - 1
    banned = {preset.config.mask_id, *preset.config.eos_ids}
    allowed = [t for t in range(most) if t not in banned]
    if cells:
        return [draw.choices(allowed, k=cells) for _ in range(rows)]
    return [
        [t for t in draw.sample(range(most), preset.prompt + 4) if t not in banned][: preset.prompt]
        for _ in range(rows)
    ]


def canvas_of(model: Transformer, texts: Sequence[Sequence[int]], length: int | list[int]) -> Canvas:
    """A fresh canvas; without ends, which random weights would write anywhere."""
    return Canvas.new(texts, length, mask_id=model.config.mask_id)


def entered(model: Transformer, recipe: Recipe, canvas: Canvas) -> tuple[Plain, Canvas]:
    """The denoiser after the full forward that enters the first block, and the canvas then."""
    denoise = Plain(model, slots=len(canvas), length=canvas.tokens.shape[1], cached=recipe.cached)
    return denoise, step(denoise, recipe, canvas)[0]


def steps(preset: Preset, model: Transformer, engine: str) -> Iterator[Case]:
    """A block step over the cached rest, and the full forward that enters a block, each with its commit."""
    recipe, start = schedule(preset), canvas_of(model, prompts(preset), preset.length)
    denoise, inside = entered(model, recipe, start)
    for what, canvas in (("block step", inside), ("full forward", start)):
        yield Case(what, engine, _stepping(denoise, recipe, canvas), {"around": _around(denoise, recipe, canvas)})


def fresh(canvas: Canvas) -> Canvas:
    """The same canvas as the step before it left it: nothing derived but what no step changes."""
    return canvas._change(("position", "_fixed"))


def _stepping(denoise: Plain, recipe: Recipe, canvas: Canvas) -> Callable[[], object]:
    """One step from the same canvas again: a step is a function of a value, and writes the same keys again."""

    def run() -> None:
        step(denoise, recipe, fresh(canvas))

    return run


def _around(denoise: Plain, recipe: Recipe, canvas: Canvas, repeats: int = 15) -> float:
    """What the loop and its rules cost, as a share of what the denoiser does: the median of some steps."""
    found: list[float] = []
    for _ in range(repeats):
        inside: list[float] = []
        began = time.perf_counter()
        step(_watched(denoise, inside), recipe, fresh(canvas))
        found.append((time.perf_counter() - began - sum(inside)) / sum(inside))
    return statistics.median(found)


def _watched(denoise: Plain, seconds: list[float]) -> Denoiser:
    def call(canvas: Canvas, query: torch.Tensor, need: torch.Tensor) -> Draft:
        began = time.perf_counter()
        draft = denoise(canvas, query, need)
        seconds.append(time.perf_counter() - began)
        return draft

    return call


def token(preset: Preset, twin: Transformer, engine: str) -> Case:
    """One token of the autoregressive twin behind half of the text."""
    recipe = recipes.get("ar")
    start = canvas_of(twin, prompts(preset), preset.length)
    denoise = Plain(twin, slots=1, length=start.tokens.shape[1])
    canvas = start
    for canvas, _ in decode(denoise, recipe, start):
        if int(canvas.step) > preset.length // 2:
            break
    return Case("one token", engine, _stepping(denoise, recipe, canvas), {"around": _around(denoise, recipe, canvas)})


def plain_steps(preset: Preset, model: Transformer) -> Iterator[Case]:
    """The same two steps of the reference."""
    made, mask = Reference(model), preset.config.mask_id
    x = torch.tensor([[*prompts(preset)[0], *[mask] * preset.length]])
    place, first, back = torch.arange(x.shape[1]), preset.prompt, int(preset.config.shift)
    last, cache = first + preset.block, made.forward(x, place, None)[1]

    def inside() -> None:
        logits, _ = made.forward(x[:, first - back : last], place[first - back : last], cache)
        made.commit(x.clone(), logits[:, : preset.block], first, last, PER_STEP)

    def full() -> None:
        logits, _ = made.forward(x, place, None)
        made.commit(x.clone(), logits[:, first - back : last - back], first, last, PER_STEP)

    yield Case("block step", PLAIN, inside)
    yield Case("full forward", PLAIN, full)


def plain_token(preset: Preset, twin: Transformer) -> Case:
    """One token of the reference's forward over concatenated keys and values."""
    made, n = Reference(twin), preset.prompt + preset.length // 2
    x = torch.randint(0, preset.config.token_count, (1, n + 1), generator=torch.Generator().manual_seed(0))
    place = torch.arange(n + 1)
    cache = made.forward(x[:, :n], place[:n], None)[1]

    def run() -> None:
        made.forward(x[:, n:], place[n:], cache)[0][0, -1].argmax().item()

    return Case("one token", PLAIN, run)


def text(preset: Preset, twin: Transformer, engine: str) -> Case:
    """The whole response of the autoregressive twin, token by token, told in milliseconds a token."""
    recipe, start = recipes.get("ar"), canvas_of(twin, prompts(preset), preset.length)

    def run() -> float:
        denoise = Plain(twin, slots=1, length=start.tokens.shape[1])
        began = time.perf_counter()
        for _ in decode(denoise, recipe, start):
            pass
        return 1e3 * (time.perf_counter() - began) / preset.length

    return Case("token, of a whole text", engine, run)


def whole(preset: Preset, model: Transformer, engine: str, kept: dict[str, Any]) -> Case:
    """A whole decode by the schedule, told in milliseconds a step; the tokens of the response go to `kept`."""
    recipe, start = schedule(preset), canvas_of(model, prompts(preset), preset.length)

    def run() -> float:
        denoise = Plain(model, slots=1, length=start.tokens.shape[1], cached=recipe.cached)
        canvas, began = start, time.perf_counter()
        for canvas, _ in decode(denoise, recipe, start):  # noqa: B007 - the last one is read
            pass
        took, forwards = 1e3 * (time.perf_counter() - began), int(canvas.step)
        kept[engine] = canvas.tokens[0, preset.prompt :].tolist(), forwards
        return took / forwards

    return Case("step, of a whole decode", engine, run)


def plain_whole(preset: Preset, model: Transformer, kept: dict[str, Any]) -> Case:
    """The same by the reference's own loop."""
    made, prompt = Reference(model), prompts(preset)[0]

    def run() -> float:
        began = time.perf_counter()
        x, forwards = made.decode(prompt, preset.length, preset.block, PER_STEP)
        kept[PLAIN] = x[preset.prompt :].tolist(), forwards
        return 1e3 * (time.perf_counter() - began) / forwards

    return Case("step, of a whole decode", PLAIN, run)


def widths(preset: Preset, rows: int, *, ragged: bool = False) -> list[int]:
    """Cells of the block of each row; ragged: a whole one, three quarters, a half, a quarter, and again."""
    return [preset.block - (i % 4) * preset.block // 4 if ragged else preset.block for i in range(rows)]


def together(preset: Preset, model: Transformer, engine: str, rows: int, *, ragged: bool = False) -> Case:
    """A block step of several rows at once; ragged: of responses that end inside of their only block.

    Ragged rows have the rest of the canvas as their prompt, so that each looks at as many cells as any other.
    """
    own = widths(preset, rows, ragged=ragged)
    recipe, lengths = schedule(preset), [preset.length] * rows
    if ragged:
        recipe, lengths = recipes.get("dual-quota", block=preset.block, steps=preset.block // PER_STEP), own
    texts = prompts(preset, rows, preset.cells - preset.block if ragged else 0)
    denoise, inside = entered(model, recipe, canvas_of(model, texts, lengths))
    return Case(several(rows, ragged=ragged), engine, _stepping(denoise, recipe, inside), {"widths": own})


def several(rows: int, *, ragged: bool = False) -> str:
    """What a case of several rows is called."""
    return f"{rows} blocks{', ragged' if ragged else ''}"


def engine_of(model: Transformer) -> str:
    """What a model runs on: our kernels, oneDNN's prepacked products, or plain torch."""
    from unmask.models.fast import PackedLinear

    if model.native is not None:
        return FAST
    return PREPACKED if any(isinstance(part, PackedLinear) for part in model.modules()) else EAGER


def model_of(preset: Preset, dtype: str, engine: str, *, twin: bool = False) -> Transformer:
    """The masked model of a preset, or its twin, for an engine."""
    return build(preset.twin if twin else preset.config, dtype, compile="auto" if engine == FAST else "off")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch until the block is left."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
