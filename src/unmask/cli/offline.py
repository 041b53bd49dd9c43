"""`unmask batch`: offline inference, from a file of rows to a file of results."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.serve.files import Result, Sink, Source
    from unmask.serve.offline import Summary


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows, one a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Results; those that are there are kept.")],
    model: Annotated[str, typer.Argument(help="An embedded name, a folder, a hub id.")] = "dllm",
    *,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Rows decoded at once.")] = 16,
    length: Annotated[int | None, typer.Option(min=1, help="Most cells of one row, prompt included.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, or int8 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    ray: Annotated[bool, typer.Option("--ray", help="Replicas on Ray Data, one engine each.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: most replicas.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Answer every row of a file, as `unmask serve` would.

    A row is a line of OpenAI's batches, {"custom_id", "url", "body"}, or {"id", "prompt", ...} with the fields of a
    completion. A result is {"id", "response", "error"}, in the order in which rows end. A run that was stopped is taken
    up again by the same command: a result that is in OUT.jsonl is never computed or written twice; remove its line to
    have it again. A row without a seed draws with one derived from its id, so results depend neither on the order of
    rows nor on the number of replicas. Exit code 1: some results are errors.
    """
    try:
        import_module("unmask.serve.offline")
    except ModuleNotFoundError as error:
        told = "rows are read as the server reads them"
        raise UserError(f"{told}, and that needs {error.name}; pip install 'unmask[serve]'") from None
    from unmask.serve.files import Sink, Source

    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError("the results would replace the rows; choose another output")
    found = Source(source)
    with Sink(target, found.lines.keys()) as sink:
        if ray:
            results = _on_ray(found, sink, model, rows, length, dtype, device, replicas)
        else:
            results = _here(found, sink, model, rows, length, dtype, device)
        summary = _write(results, sink, len(found))
    told = (
        f"{summary.rows} rows, {summary.kept} of them there before, {summary.failed} failed; {summary.tokens} tokens "
    )
    told += f"in {summary.seconds:.1f} s, {summary.tokens_per_forward:.2f} per forward: {target}"
    print(jsonlib.dumps(summary.table()) if json else told)
    if summary.failed:
        raise typer.Exit(1)


def _here(
    source: Source, sink: Sink, model: str, rows: int, length: int | None, dtype: str, device: str
) -> Iterator[Result]:
    """The results that are still to come, from one engine in this process."""
    if len(sink.done) == len(source):
        return iter(())
    from unmask.generate import load
    from unmask.serve.offline import Decoder, fits

    loaded = load(model, dtype=dtype, device=device)
    fits(source, loaded.name)
    return Decoder(loaded, rows=rows, length=length).run(source.rows(sink.done))


def _on_ray(
    source: Source, sink: Sink, model: str, rows: int, length: int | None, dtype: str, device: str, replicas: int
) -> Iterator[Result]:
    """The results that are still to come, from replicas on Ray Data."""
    from unmask.serve import cluster
    from unmask.serve.offline import fits

    name, place = cluster.located(model)
    fits(source, name)
    if len(sink.done) == len(source):
        return iter(())
    made = {"place": place, "rows": rows, "length": length, "dtype": dtype, "device": device}
    return cluster.spread(source.rows(sink.done), made, replicas=replicas)


def _write(results: Iterator[Result], sink: Sink, count: int) -> Summary:
    """Append results as they come, under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from unmask.serve import offline

    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=count, completed=len(sink.done))

        def tell(summary: Summary) -> None:
            rate = summary.tokens / max(1e-9, summary.seconds)
            told = f"{rate:.0f} tokens/s, {summary.tokens_per_forward:.1f} per forward, {summary.failed} failed"
            bar.update(task, completed=len(sink.done), description=told)

        return offline.write(results, sink, rows=count, tell=tell)
