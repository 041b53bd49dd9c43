"""`unmask bench emergence`: when the answer is first right, when it stays right, and what stopping early is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def emergence(
    *,
    models: Annotated[
        str | None,
        typer.Option(help="Masked models joined by commas; default dllm and its under-trained checkpoints."),
    ] = None,
    items: Annotated[int, typer.Option(help="Problems that are reported on.")] = 300,
    validation: Annotated[int, typer.Option(help="Other problems, on which thresholds are chosen.")] = 100,
    length: Annotated[int, typer.Option(help="Cells of a response without a template.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the problems, the random order and the bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="A few problems, within a minute.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw emergence, exits and calibration: .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure when answers emerge over the refinement steps, and early exits against static truncation.

    An interrupted run goes on where it was when the same command is given again.
    """
    from unmask.cli.study import drawable

    drawable(plot)
    from unmask.study.emergence import main

    named = [name.strip() for name in models.split(",") if name.strip()] if models is not None else None
    sizes: dict[str, Any] = {"items": items, "validation": validation, "length": length, "seed": seed}
    raise typer.Exit(main(models=named, dtype=dtype, quick=quick, json=json, plot=plot, out=out, **sizes) or 0)
