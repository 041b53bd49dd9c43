"""`unmask bench peer`: published decoding loops from a user's own clones beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def peer(
    *,
    llada: Annotated[Path | None, typer.Option(help="A clone of ML-GSAI/LLaDA.")] = None,
    fast_dllm: Annotated[Path | None, typer.Option(help="A clone of NVlabs/Fast-dLLM.")] = None,
    items: Annotated[int, typer.Option(help="Problems.")] = 20,
    length: Annotated[int, typer.Option(help="Cells of a response.")] = 24,
    block: Annotated[int, typer.Option(help="Cells of a block.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the problems and the order.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Run the loop of a clone on the embedded model, problem by problem beside ours: forwards, time, equal tokens.

    The clone's module is imported as it is, so whatever it imports has to be installed.
    """
    from unmask.study.peer import main

    clones = {"llada": llada, "fast-dllm": fast_dllm}
    given = {name: clone for name, clone in clones.items() if clone is not None}
    sizes = {"items": items, "length": length, "block": block, "seed": seed}
    raise typer.Exit(main(given, dtype=dtype, json=json, out=out, **sizes) or 0)
