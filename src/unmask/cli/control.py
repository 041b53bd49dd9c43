"""`unmask bench control`: infilling, exact length and slots under faster decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def control(
    *,
    e2e: Annotated[Path, typer.Option(help="Folder of the E2E data: test.jsonl.gz.")],
    items: Annotated[int, typer.Option(help="Restaurants that are asked about, five asks each.")] = 150,
    seed: Annotated[int, typer.Option(help="Of the order, of what is drawn, and of the bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="A few restaurants, within a minute.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Measure infilling, exact length and slot constraints: success, fluency and cost, decoder by decoder.

    An interrupted run goes on where it was when the same command is given again.
    """
    from unmask.study.control import main

    raise typer.Exit(main(e2e=e2e, items=items, seed=seed, dtype=dtype, quick=quick, json=json, out=out) or 0)
