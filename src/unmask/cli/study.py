"""`unmask bench` and `unmask evaluate`: what a step and a lever cost, and how often the answer is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import bench as bench_suite
from unmask.errors import UserError

app = typer.Typer(
    help="Measure what a step costs: the forward, and the rest. Or what each lever is worth.", rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    *,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", help="Measure these only.")] = None,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 8,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each.")] = 5,
    length: Annotated[int, typer.Option(help="Cells of the response.")] = 64,
    block: Annotated[int, typer.Option(help="Cells of a block.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Few recipes and runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure what a step costs, unless a command behind it measures something else."""
    if context.invoked_subcommand is not None:
        _unused(context)
        return

    from unmask.study.bench import main

    named = recipes or None
    code = main(
        prompts=prompts,
        repeats=repeats,
        recipes=named,
        length=length,
        block=block,
        quick=quick,
        json=json,
        out=out,
        dtype=dtype,
    )
    raise typer.Exit(code or 0)


def _unused(context: typer.Context) -> None:
    """UserError for an option of the group in front of a command, which would say nothing there."""
    for parameter in context.command.params:
        if _typed(context, parameter.name):
            word, command = parameter.opts[0], context.invoked_subcommand
            raise UserError(f"{word} before {command} is for `unmask bench` alone; write it behind {command}")


@app.command()
def levers(
    *,
    cases: Annotated[list[str] | None, typer.Option("--case", help="Measure these only.")] = None,
    items: Annotated[int, typer.Option(help="Held-out problems.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the problems, the order and the bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="A few problems.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against speed: .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure what each lever is worth, alone and stacked: accuracy, forwards and speed on held-out problems."""
    drawable(plot)
    from unmask.study.levers import main

    code = main(cases=cases or None, items=items, seed=seed, dtype=dtype, quick=quick, json=json, plot=plot, out=out)
    raise typer.Exit(code or 0)


@app.command()
def decode(
    context: typer.Context,
    *,
    presets: bench_suite.Presets = bench_suite.PRESETS,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8; joined by commas; with --models one.")] = "",
    compile: bench_suite.Compile = "auto",
    threads: bench_suite.Threads = 1,
    repeats: bench_suite.Repeats = bench_suite.REPEATS,
    models: Annotated[str | None, typer.Option(help="Names, folders or hub ids joined by commas.")] = None,
    lengths: Annotated[str, typer.Option(help="Cells of a canvas, joined by commas.")] = "64,256,512",
    items: Annotated[int, typer.Option(help="Held-out problems.")] = 500,
    slow_items: Annotated[int, typer.Option(help="Of these, for vanilla on 256 cells or more.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the problems, the order and the bootstrap.")] = 0,
    block: Annotated[int, typer.Option(help="Cells of a block of a model that attends to all.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="A few problems.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against speed, and costs: .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure a whole decode of random weights by preset; or what models are worth by length.

    The second with --models, --lengths, --items, --slow-items, --seed or --block: a masked model, its block-causal
    student and an autoregressive one (by their attention; without --models those that ship), their accuracy and speed.
    """
    own, other = (
        [p.opts[0] for p in context.command.params if p.name in names and _typed(context, p.name)]
        for names in (("presets", "compile", "threads", "repeats"), ("models", *COMPARED))
    )
    if own and other:
        raise UserError(f"{own[0]} is about a preset, and {other[0]} about models; leave one of them out")
    if not other:
        said = {"presets": presets, "dtypes": dtype or bench_suite.DTYPES, "compile": compile, "threads": threads}
        bench_suite.run("decode", {**said, "repeats": repeats, "quick": quick, "json": json, "plot": plot, "out": out})
    drawable(plot)
    from unmask.study.decode_bench import main

    named = [name.strip() for name in models.split(",") if name.strip()] if models is not None else None
    said = {"items": items, "slow": slow_items, "seed": seed, "dtype": dtype or "float32", "block": block}
    code = main(names=named, lengths=_numbers("--lengths", lengths), quick=quick, json=json, plot=plot, out=out, **said)
    raise typer.Exit(code or 0)


COMPARED = ("lengths", "items", "slow_items", "seed", "block")
"""Options of `unmask bench decode` that are about models."""


def _typed(context: typer.Context, name: str | None) -> bool:
    """Did the user give this option?"""
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers joined by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is whole numbers joined by commas, like 64,256, not {text!r:.80}") from None


def drawable(plot: Path | None) -> None:
    """UserError, before anything is computed, for a picture that could not be drawn or written."""
    from unmask.cli import write

    write.check(plot)
    if plot is not None:
        from unmask.study import levers_plot

        levers_plot.check(plot)


def evaluate(
    *,
    model: Annotated[str, typer.Option(help="dllm, d2f, twin, or a folder that `unmask train` made.")] = "dllm",
    tasks: Annotated[list[str] | None, typer.Option("--task", help="problems, worksheet-8, restaurants, ...")] = None,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", help="Decode with these.")] = None,
    items: Annotated[int, typer.Option(help="Problems or descriptions a task.")] = 500,
    block: Annotated[int | None, typer.Option(help="Cells of a block; default 8, or the model's own.")] = None,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    guide: Annotated[str, typer.Option(help="Autoregressive model that guided recipes ask.")] = "twin",
    sampler: Annotated[str, typer.Option(help="Folder of a joint sampler; the embedded dLLM has one.")] = "",
    e2e: Annotated[str, typer.Option(help="Folder of the E2E data, for the restaurants task.")] = "",
    card: Annotated[bool, typer.Option("--card", help="Write the accuracy into the model's card.json.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
) -> None:
    """Measure how often the decoded answers are right."""
    from dataclasses import replace

    from unmask.study.cards import Settings, main

    settings = Settings(model=model, items=items, block=block, batch=batch, dtype=dtype, e2e=e2e, guide=guide)
    settings = replace(settings, sampler=sampler)
    settings = replace(settings, tasks=tuple(tasks) if tasks else settings.tasks)
    settings = replace(settings, recipes=tuple(recipes) if recipes else settings.recipes)
    raise typer.Exit(main(settings, as_json=json, card=card, root=out) or 0)
