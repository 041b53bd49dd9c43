"""`unmask bench step | decode | ar | batch`: what steps cost, beside a plain reference and the machine's roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.errors import UserError

Presets = Annotated[str, typer.Option("--preset", help="embedded, 31m, 0.5b, 8b, dream-7b; joined by commas.")]
Dtypes = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, int8; joined by commas.")]
Compile = Annotated[str, typer.Option(help="auto: compiled kernels if there are any; off: plain torch.")]
Threads = Annotated[int, typer.Option(help="Threads of the processor.")]
Repeats = Annotated[int, typer.Option(help="Interleaved runs of each case.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few runs, within a minute.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Draw milliseconds beside the roofline: .png or .svg.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")]
PRESETS, DTYPES, REPEATS = "embedded,31m", "bfloat16,int8", 15
QUICK = 3


def run(suite: str, said: dict[str, Any]) -> None:
    """Measure a suite by the options of its command, and end with its exit code."""
    from unmask.cli.study import drawable

    drawable(said["plot"])
    from unmask.bench.suite import Plan, main

    names = {key: _names(f"--{option}", said[key]) for key, option in (("presets", "preset"), ("dtypes", "dtype"))}
    repeats = min(said["repeats"], QUICK) if said["quick"] else said["repeats"]
    rest = {key: said[key] for key in ("compile", "threads", "quick")}
    plan = Plan(suite, **names, repeats=repeats, llama=said.get("llama") or "", **rest)
    raise typer.Exit(main(plan, json=said["json"], plot=said["plot"], out=said["out"]) or 0)


def _names(option: str, text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise UserError(f"{option} is names joined by commas, like {PRESETS if option == '--preset' else DTYPES}")
    return found


def step(
    *,
    presets: Presets = PRESETS,
    dtypes: Dtypes = DTYPES,
    compile: Compile = "auto",
    threads: Threads = 1,
    repeats: Repeats = REPEATS,
    quick: Quick = False,
    json: Json = False,
    plot: Plot = None,
    out: Out = None,
) -> None:
    """Measure one step: a block over its cache, a full forward, a token of the autoregressive twin."""
    run("step", locals())


def ar(
    *,
    presets: Presets = PRESETS,
    dtypes: Dtypes = DTYPES,
    compile: Compile = "auto",
    threads: Threads = 1,
    repeats: Repeats = REPEATS,
    llama: Annotated[str, typer.Option("--llama-bench", help="Your own build of llama.cpp's llama-bench.")] = "",
    quick: Quick = False,
    json: Json = False,
    plot: Plot = None,
    out: Out = None,
) -> None:
    """Measure the autoregressive twin, token by token, beside your llama.cpp if you name it."""
    run("ar", locals())


def batch(
    *,
    presets: Presets = PRESETS,
    dtypes: Dtypes = DTYPES,
    compile: Compile = "auto",
    threads: Threads = 1,
    repeats: Repeats = REPEATS,
    quick: Quick = False,
    json: Json = False,
    plot: Plot = None,
    out: Out = None,
) -> None:
    """Measure concurrent blocks against one after the other."""
    run("batch", locals())
