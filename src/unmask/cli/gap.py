"""`unmask bench gap`: what each lever and each stack is worth against an autoregressive twin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.errors import UserError


def gap(
    *,
    model: Annotated[str | None, typer.Option(help="A masked model that attends to all cells; default dllm.")] = None,
    twin: Annotated[str | None, typer.Option(help="An autoregressive model of the same tokenizer.")] = None,
    student: Annotated[str | None, typer.Option(help="A block-causal student of the masked model, if any.")] = None,
    items: Annotated[int, typer.Option(help="Problems that are reported on.")] = 300,
    validation: Annotated[int, typer.Option(help="Other problems, on which the best stack is chosen.")] = 100,
    length: Annotated[int, typer.Option(help="Cells of a response.")] = 24,
    block: Annotated[int, typer.Option(help="Cells of a block.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the problems, the order and the bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="A few problems and levers, within a minute.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against cost: .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure the gap to an autoregressive twin: vanilla decoding, each lever, each pair, the best stack, a verdict.

    An interrupted run goes on where it was when the same command is given again.
    """
    from unmask.cli.study import drawable

    drawable(plot)
    from unmask.study.gap import main

    named = {"dllm": model, "twin": twin, "student": student}
    names = {role: name for role, name in named.items() if name is not None}
    if names and not {"dllm", "twin"} <= names.keys():
        raise UserError("give both --model and --twin, or neither for the models that ship")
    sizes = {"items": items, "validation": validation, "length": length, "block": block, "seed": seed}
    raise typer.Exit(main(names=names, dtype=dtype, quick=quick, json=json, plot=plot, out=out, **sizes) or 0)
