"""`unmask eval`: how often a model is right on benchmark tasks, under any recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def eval_(
    model: Annotated[str, typer.Argument(help="dllm, d2f, twin (all embedded), a checkpoint folder or a hub id.")],
    *,
    tasks: Annotated[str, typer.Option(help="gsm8k (from --data), or names of lm-eval's tasks, joined by commas.")],
    data: Annotated[Path | None, typer.Option(help="Folder of GSM8K's test.jsonl (.gz), run without lm-eval.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task files (YAML).")] = None,
    recipe: Annotated[str | None, typer.Option(help="A name (`unmask recipes`), TOML file or expression.")] = None,
    length: Annotated[int | None, typer.Option(help="Cells of a response; 256 unless the model is embedded.")] = None,
    block: Annotated[int | None, typer.Option(help="Cells of a block.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts, or masks of a likelihood, that are computed together.")] = 8,
    limit: Annotated[int | None, typer.Option(help="The first so many problems of each task only.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each problem; default the task's.")] = None,
    samples: Annotated[int, typer.Option(help="Masks that a likelihood of a masked model is estimated from.")] = 32,
    seed: Annotated[int, typer.Option(help="Of drawn tokens, masks and examples.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (float32), float32, bfloat16 or int8.")] = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Prompts as they are, without a chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default results/.")] = None,
) -> None:
    """Evaluate a model on benchmark tasks: by lm-eval, or GSM8K from a folder by itself.

    Likelihoods of masked models are lower bounds (ELBO) and say so. An interrupted run goes on when it is given again.
    """
    from unmask.cli import write

    write.check_folder(out or Path("results"))
    from unmask.study.harness import Plan, main

    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    decoding = {"recipe": recipe, "length": length, "block": block, "dtype": dtype, "plain": plain}
    sizes = {"batch": batch, "limit": limit, "shots": shots, "samples": samples, "seed": seed}
    plan = Plan(model, names, **decoding, **sizes)
    raise typer.Exit(main(plan, data=data, folder=task_folder, json=json, out=out) or 0)
