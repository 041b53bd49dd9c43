"""`unmask verify`: how wrong an approximate cache is, step by step and layer by layer."""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli import batch as batches
from unmask.cli import write
from unmask.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from unmask.generate import Model
    from unmask.study.results import Results
    from unmask.study.verify import Case

ITEMS = 8
"""Word problems, where no prompt is given."""
LAYERS = 6
"""Layers shown of a deeper model; JSON and the plot hold all."""
LEGEND = (
    "Δ: |delta logit| to a forward that computes everything anew. tokens: drafted tokens that agree with it; "
    "text: agreement with the text of the run without a cache; parted: prompts whose runs differ. "
    "K, V: cosine of stale keys and values with the exact ones. stale: share of the cells attended to that were not "
    "computed, age: steps since they were. NFE: forwards a prompt, then those of the run without a cache."
)


def verify(
    model: Annotated[
        str, typer.Argument(help="dllm, d2f, twin (all embedded), a checkpoint folder or a hub id.")
    ] = "dllm",
    *,
    recipes: Annotated[
        list[str] | None, typer.Option("--recipe", help="Name, TOML file or expression; default: the usual caches.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Decode this, not word problems.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help="A file of prompts: text lines, or JSON lines with a prompt.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Number of word problems; default 8.")] = None,
    length: Annotated[int | None, typer.Option(help="Cells of the response.")] = None,
    block: Annotated[
        int | None, typer.Option(help="Cells of a block; default: the model's, or 8 for the embedded dLLM.")
    ] = None,
    guide: Annotated[str | None, typer.Option(help="Autoregressive model that gives recipes a second opinion.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Folder of a joint sampler; the embedded dLLM has one.")] = None,
    template: Annotated[str | None, typer.Option(help="The response as words and slots.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out malformed lines; exit code 1.")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="Print each recipe's steps too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw this file, .png or .svg.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure how wrong a cache is: each step against a forward that computes everything anew."""
    if sum(given is not None for given in (prompts or None, batch, items)) > 1:
        raise UserError("give one of --prompt, --batch and --items")
    if items is not None and items < 1:
        raise UserError(f"--items must be at least 1, not {items}")
    write.check(plot)
    if plot is not None:
        from unmask.study import verify_plot

        verify_plot.check(plot)
    lines = [] if batch is None else batches.read(batch)

    from unmask.generate import load
    from unmask.settings import Settings
    from unmask.study.verify import prepare

    settings = Settings(length=length, block=block, guide=guide, sampler=sampler, template=template)
    loaded = load(model, dtype=dtype, device=device)
    if batch is None:
        texts = prompts or _problems(items or ITEMS)
    else:
        good = batches.sift(batch, lines, lambda p: loaded.row(p, settings), keep_going=keep_going)
        texts = [line.prompt for line in good]
    cases = prepare(loaded, recipes or (), texts, settings)
    _tell(loaded, cases, {"prompts": len(texts), "dtype": dtype}, steps=steps, json=json, plot=plot, out=out)
    if batch is not None and len(texts) < len(lines):
        raise typer.Exit(1)


def _problems(count: int) -> list[str]:
    from unmask.study.tasks import word_problems

    return [item.prompt for item in word_problems(count).items]


def _tell(
    model: Model, cases: list[Case], config: dict[str, Any], *, steps: bool, json: bool, plot: Path | None, out: Path
) -> None:
    """Measure, write the results folder and the plot, and print."""
    from rich.console import Console

    config = {"model": model.name, "recipes": {case.name: repr(case.recipe) for case in cases}, **config}
    title = f"{model.name}, {config['dtype']}, {config['prompts']} prompt{'s' * (config['prompts'] > 1)}"
    with _results(model.name, config, out) as results:
        found = _measure(model, cases, results)
        told = {"model": model.name, "machine": results.run["machine"], "recipes": found}
        folder = results.finish(told)
    if plot is not None:
        from unmask.study.verify_plot import draw

        draw(found, plot, title)
    if json:
        print(jsonlib.dumps({**told, "results": str(folder)}, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, markup=False)  # an expression may hold brackets
    console.print(summary(found, title))
    for one in found:
        console.print(f"{one['recipe']}: {one['verdict']} ({one['why']})", soft_wrap=True)
    for one in found if steps else ():
        console.print("", by_step(one), *(["", by_layer(one)] if one["key_cosine"] else []), sep="\n")
    console.print(LEGEND, style="dim")
    console.print(f"rows and provenance: {folder}", soft_wrap=True)


def _results(name: str, config: dict[str, Any], out: Path) -> Results:
    from unmask.study.results import Results

    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip(".-") or "model"
    try:
        return Results.create(f"verify-{plain}", config, out)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None


def _measure(model: Model, cases: list[Case], results: Results) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from unmask.study.verify import measure

    found, before = [], 0
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        doing = bar.add_task("", total=sum(case.holes for case in cases))
        for case in cases:
            bar.update(doing, description=case.name)

            def told(cells: int, start: int = before) -> None:
                bar.update(doing, completed=start + cells)

            found.append(measure(model, case, on_row=results.row, on_cells=told))
            before += case.holes
    return found


def summary(found: Sequence[dict[str, Any]], title: str) -> Table:
    """A row for each recipe."""
    heads = ("max Δ", "mean Δ", "tokens", "text", "parted", "K", "V", "stale", "NFE", "exact")
    table = _table(title, ("recipe", *heads))
    for one in found:
        table.add_row(
            one["recipe"],
            *(_number(one[key]) for key in ("max_delta_logit", "mean_delta_logit")),
            *(_share(one[key]) for key in ("token_agreement", "text_agreement")),
            f"{one['texts_parted']}/{len(one['texts'])}",
            *(_cosine(_mean(one[key])) for key in ("key_cosine", "value_cosine")),
            f"{one['stale_share']:.0%}",
            *(f"{one[key]:.1f}" for key in ("forwards", "exact_forwards")),
        )
    return table


def by_step(one: dict[str, Any]) -> Table:
    """A row for each step of one recipe."""
    heads = ("rows", "cells", "max Δ", "mean Δ", "tokens", "max Δp", "computed", "stale", "age", "K", "V")
    table = _table(f"{one['recipe']}, step by step", ("step", *heads))
    for s in one["steps"]:
        table.add_row(
            *(str(s[key]) for key in ("step", "rows", "compared")),
            *(_number(s[key]) for key in ("max_delta_logit", "mean_delta_logit")),
            _share(s["token_agreement"]),
            _number(s["max_delta_probability"]),
            str(s["computed"]),
            f"{s['stale_share']:.0%}",
            "-" if s["stale_age"] is None else f"{s['stale_age']:.1f}",
            *("exact" if s["by_construction"] else _cosine(_mean(s[key])) for key in ("key_cosine", "value_cosine")),
        )
    return table


def by_layer(one: dict[str, Any]) -> Table:
    """Cosines of stale keys and values: a row for each step, then all steps and the lowest cell of any."""
    layers = len(one["key_cosine"])
    shown = sorted({round(i * (layers - 1) / max(1, min(LAYERS, layers) - 1)) for i in range(min(LAYERS, layers))})
    table = _table(f"{one['recipe']}, layer by layer", ("step", *(f"{part}{i}" for part in "KV" for i in shown)))
    ends = (("all", one, ""), ("lowest", one, "_min"))
    for label, row, end in (*((str(s["step"]), s, "") for s in one["steps"]), *ends):
        cosines = [row[key + end] for key in ("key_cosine", "value_cosine")]
        table.add_row(label, *("-" if part is None else f"{part[i]:.2f}" for part in cosines for i in shown))
    return table


def _table(title: str, heads: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        if number:
            table.add_column(head, justify="right", no_wrap=True)
        else:
            table.add_column(head, style="cyan", no_wrap=True, max_width=16)  # an expression is told in full below
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mean(layers: list[float] | None) -> float | None:
    return None if layers is None else sum(layers) / len(layers)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
