"""`unmask bench step | decode | ar | batch`: what steps cost, beside a plain reference and the machine's roofline."""

from __future__ import annotations

import errno
import json as jsonlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from unmask.bench import cases, roofline
from unmask.bench.cases import EAGER, FAST, PLAIN, Case, Row, model_of, threads
from unmask.bench.presets import Preset, find, fits, room
from unmask.errors import UserError, suggest
from unmask.models.transformer import Transformer
from unmask.study import machine
from unmask.study.results import Results

DTYPES = ("float32", "bfloat16", "int8")
SUITES = ("step", "decode", "ar", "batch")
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What is timed: every case of every preset and dtype, `repeats` times, interleaved."""

    suite: str
    presets: tuple[str, ...]
    dtypes: tuple[str, ...]
    repeats: int = 15
    compile: str = "auto"
    threads: int = 1
    seed: int = 0
    llama: str = ""
    """A llama-bench to put beside the twin."""
    quick: bool = False

    @property
    def engines(self) -> tuple[str, ...]:
        """Ours: on the fast path, and in plain torch."""
        return (EAGER,) if self.compile == "off" else (FAST, EAGER)


def contestants(plan: Plan, preset: Preset, dtype: str) -> Iterator[Case]:
    """All cases of one preset in one dtype; plain torch has no int8, and the reference beside it is in bfloat16."""
    engines = [engine for engine in plan.engines if engine == FAST or dtype != "int8"]
    return {"step": _steps, "decode": _decodes, "ar": _tokens, "batch": _batches}[plan.suite](
        plan, preset, dtype, engines
    )


def _ours(
    preset: Preset, dtype: str, engines: Sequence[str], *, twin: bool = False
) -> Iterator[tuple[str, Transformer]]:
    """Our models by the engine that they turned out to run on; the fast path only where there is one."""
    for engine in engines:
        model = model_of(preset, dtype, engine, twin=twin)
        if engine == EAGER or cases.engine_of(model) != EAGER or EAGER not in engines:
            yield cases.engine_of(model), model


def _bare(preset: Preset, dtype: str, *, twin: bool = False) -> Transformer:
    """The weights of the reference."""
    return model_of(preset, "bfloat16" if dtype == "int8" else dtype, EAGER, twin=twin)


def _steps(plan: Plan, preset: Preset, dtype: str, engines: Sequence[str]) -> Iterator[Case]:
    for engine, model in _ours(preset, dtype, engines):
        yield from cases.steps(preset, model, engine)
    for engine, twin in _ours(preset, dtype, engines, twin=True):
        yield cases.token(preset, twin, engine)
    yield from cases.plain_steps(preset, _bare(preset, dtype))
    yield cases.plain_token(preset, _bare(preset, dtype, twin=True))


def _decodes(plan: Plan, preset: Preset, dtype: str, engines: Sequence[str]) -> Iterator[Case]:
    kept: dict[str, Any] = {}
    for engine, model in _ours(preset, dtype, engines):
        case = cases.whole(preset, model, engine, kept)
        yield Case(case.what, engine, case.run, {"kept": kept})
    yield cases.plain_whole(preset, _bare(preset, dtype), kept)


def _tokens(plan: Plan, preset: Preset, dtype: str, engines: Sequence[str]) -> Iterator[Case]:
    for engine, twin in _ours(preset, dtype, engines, twin=True):
        yield cases.token(preset, twin, engine)
        yield cases.text(preset, twin, engine)
    yield cases.plain_token(preset, _bare(preset, dtype, twin=True))
    if plan.llama:
        yield llama(plan, preset, dtype)


def _batches(plan: Plan, preset: Preset, dtype: str, engines: Sequence[str]) -> Iterator[Case]:
    for engine, model in _ours(preset, dtype, engines):
        for rows in ROWS:
            yield cases.together(preset, model, engine, rows)
        yield cases.together(preset, model, engine, ROWS[-1], ragged=True)


def llama(plan: Plan, preset: Preset, dtype: str) -> Case:
    """The user's own llama-bench on a file of the twin's shape, behind the prompt and half of the response."""
    from unmask.bench.llama import contestant

    tokens, depth = (16 if plan.quick else 64), preset.prompt + preset.length // 2 - 32
    made = contestant(plan.llama, preset.twin, dtype=dtype, threads=plan.threads, tokens=tokens, depth=max(0, depth))
    return Case("one token", "llama.cpp", made.__call__)


def ceilings(plan: Plan, preset: Preset, dtype: str) -> dict[str, dict[str, float | str]]:
    """The roofline of everything that is timed, by what it is."""
    c, shift = preset.config, int(preset.config.shift)
    block, cells = preset.block + shift, preset.cells
    if plan.suite == "batch":
        found = {}
        for rows, ragged in (*((n, False) for n in ROWS), (ROWS[-1], True)):
            own = cases.widths(preset, rows, ragged=ragged)
            given = [(width + shift, cells - preset.block + width) for width in own]
            found[cases.several(rows, ragged=ragged)] = roofline.forward(c, given, dtype, need=sum(own))
        return found
    one = roofline.forward(c, [(1, preset.prompt + preset.length // 2)], dtype, need=1)
    if plan.suite == "ar":
        return {"one token": one, "token, of a whole text": one}
    inside = roofline.forward(c, [(block, cells)], dtype, need=preset.block)
    full = roofline.forward(c, [(cells, cells)], dtype, need=preset.block)
    if plan.suite == "step":
        return {"block step": inside, "full forward": full, "one token": one}
    each = preset.block // cases.PER_STEP
    mean = ((each - 1) * float(inside["ms"]) + float(full["ms"])) / each
    return {"step, of a whole decode": {"ms": mean, "ways": inside["ways"]}}


def lines(plan: Plan, preset: Preset, dtype: str, group: Sequence[Case], times: Sequence[Sequence[float]]) -> list[Row]:
    """A row a case, with its ratios to the reference and to the roofline."""
    tops = ceilings(plan, preset, dtype)
    medians = {(case.what, case.engine): cases.spread(own)[0] for case, own in zip(group, times, strict=True)}
    found = []
    for case, own in zip(group, times, strict=True):
        ms, wide = cases.spread(own)
        base, top = medians.get((case.what, PLAIN)), tops.get(case.what, {}).get("ms")
        row = {
            "preset": preset.name,
            "dtype": "bfloat16" if dtype == "int8" and case.engine == PLAIN else dtype,
            "what": case.what,
            "engine": case.engine,
            "ms": ms,
            "spread": wide,
            "ratio_to_reference": base / ms if base else None,
            "ratio_to_roofline": ms / top if isinstance(top, float) else None,
            "roofline_ms": top,
            "roofline_ways": tops.get(case.what, {}).get("ways"),
            "around": case.facts.get("around"),
        }
        if kept := case.facts.get("kept"):
            row |= agreement(kept, case.engine)
        if plan.suite == "batch":
            row |= gain(case, preset, medians, tops)
        found.append(row)
    return found


def agreement(kept: dict[str, Any], engine: str) -> Row:
    """Share of the response's tokens equal to those of the reference, and how many forwards both took."""
    own, forwards = kept[engine]
    if PLAIN not in kept:
        return {"forwards": forwards}
    other, theirs = kept[PLAIN]
    return {
        "forwards": forwards,
        "reference_forwards": theirs,
        "equal_tokens": sum(a == b for a, b in zip(own, other, strict=True)) / len(own),
    }


def gain(
    case: Case, preset: Preset, medians: dict[tuple[str, str], float], tops: dict[str, dict[str, float | str]]
) -> Row:
    """Cells a second over those of one block after the other, and what the roofline allows."""
    own, single = case.facts["widths"], cases.several(1)
    blocks = sum(own) / preset.block
    most = blocks * float(tops[single]["ms"]) / float(tops[case.what]["ms"])
    faster = blocks * medians[single, case.engine] / medians[case.what, case.engine]
    return {"rows": len(own), "blocks": blocks, "throughput": faster, "throughput_ceiling": most}


def memory(plan: Plan, preset: str, dtype: str) -> float:
    """Peak resident megabytes of a fresh process that decodes once with this preset."""
    call = [sys.executable, "-m", "unmask.bench.memory", preset, dtype, plan.compile]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"preset {preset} in {dtype} could not be run: {(done.stderr.splitlines() or ['?'])[-1]}")
    return float(done.stdout)


def checked(plan: Plan) -> None:
    """UserError for what cannot be timed here, before anything is."""
    from unmask.models.fast import check

    if plan.threads < 1 or plan.threads > machine.cores():
        raise UserError(f"threads must be from 1 to the {machine.cores()} of this machine, not {plan.threads}")
    if plan.repeats < 1:
        raise UserError(f"repeats must be at least 1, not {plan.repeats}")
    for dtype in plan.dtypes:
        if dtype not in DTYPES:
            raise suggest(dtype, DTYPES, "dtype")
        check(plan.compile, "int8" if dtype == "int8" else "", torch.device("cpu"))
        if dtype == "int8":
            _kernels()
    if plan.llama:
        from unmask.bench import llama as peer

        peer.program(plan.llama)
        for name, dtype in product(plan.presets, plan.dtypes):
            peer.check(find(name).twin, dtype)
    for name, dtype in product(plan.presets, plan.dtypes):
        fits(find(name), room(find(name), dtype, **alive(plan)), "cpu")


def alive(plan: Plan) -> dict[str, int]:
    """How many models there are at once: ours, and those in plain torch, of which the reference has its own."""
    each = 2 if plan.suite == "step" else 1
    plain = (EAGER in plan.engines) + (plan.suite != "batch")
    return {"kernels": each * (FAST in plan.engines), "plain": each * plain}


def _kernels() -> None:
    """UserError where int8 cannot be measured, for want of a compiler."""
    from unmask.models import native

    try:
        native.library("int8", half=True)
    except native.Unavailable as error:
        raise UserError(f"int8 needs the compiled kernels, and {error}; leave it out of --dtype") from None


def measure(plan: Plan, results: Results, *, show: bool) -> list[Row]:
    """Time everything, row by row into `results`; the summary lines."""
    from rich.console import Console
    from rich.progress import Progress

    found: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        for preset in map(find, plan.presets):
            for dtype in plan.dtypes:
                task = bar.add_task(f"{preset.name}, {dtype}", total=None)
                group = list(contestants(plan, preset, dtype))
                bar.update(task, total=len(group) * (plan.repeats + 1))
                times = cases.timed(group, plan.repeats, seed=plan.seed, told=lambda task=task: bar.advance(task))
                for case, own in zip(group, times, strict=True):
                    for repeat, ms in enumerate(own):
                        row = {"preset": preset.name, "dtype": dtype, "what": case.what, "engine": case.engine}
                        results.row({**row, "repeat": repeat, "ms": ms})
                group = [replace(case, run=bool) for case in group]  # without the models, which the roofline needs not
                found += lines(plan, preset, dtype, group, times)
                bar.remove_task(task)
    return found


def main(plan: Plan, *, json: bool = False, plot: Path | None = None, out: Path | None = None) -> int:
    """Measure a suite, print its table (or JSON) and write `<out or results>/bench-<suite>-<UTC time>`; the exit code.

    UserError, before anything is written, for what this machine cannot run.
    """
    checked(plan)
    try:
        results = Results.create(
            f"bench-{plan.suite}", {**asdict(plan), "llama": Path(plan.llama).name}, out or "results", seeds=plan.seed
        )
    except OSError as error:
        raise UserError(f"cannot write into {out or 'results'}: {error.strerror}") from None
    with results, threads(plan.threads), torch.inference_mode():
        try:
            rows = measure(plan, results, show=not json)
        except (MemoryError, OSError, RuntimeError) as error:
            if not short(error):
                raise
            raise UserError("out of memory; use a smaller preset, or a machine with more memory") from None
        where = {**results.run["machine"], "threads": plan.threads, **roofline.machine()}
        where |= {"load_after": machine.load()}
        used = {} if plan.quick else {f"{p} {d}": memory(plan, p, d) for p in plan.presets for d in plan.dtypes}
        summary = {"rows": rows, "machine": where, "peak_mb": used}
        folder = results.finish(summary)
    tell(plan, summary, folder, json=json, plot=plot)
    return 0


def short(error: BaseException) -> bool:
    """Did memory run out? Torch's own allocator says it in a RuntimeError, the system in an OSError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def tell(plan: Plan, summary: Row, folder: Path, *, json: bool, plot: Path | None) -> None:
    """Print what was found, and draw it."""
    from unmask.bench import show

    if plot is not None:
        show.draw(summary, plot)
    if json:
        print(jsonlib.dumps({**summary, "folder": str(folder)}, indent=2))
    else:
        show.show(plan.suite, summary)
        print(f"rows and provenance: {folder}")
