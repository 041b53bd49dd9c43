"""`unmask trace`: write a decode down, play it again without the model, compare two, and look at one in a browser."""

from __future__ import annotations

import inspect
import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from unmask.cli import write
from unmask.cli.generate import generate, settings_of
from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.decode import Report
    from unmask.study.trace import Trace
    from unmask.study.trace_diff import Difference, RowDifference

OWN = ("prompt", "batch", "keep_going", "visual", "json", "output")
"""Parameters of `unmask generate` that are not about how one batch is decoded."""
LOADED = ("dtype", "device", "base", "family", "compile")
"""Those that say how the model is loaded."""
SHOWN = 8
"""Cells with another token that `unmask trace diff` prints for each row."""
PARTED = 1
"""The exit code of `unmask trace diff` for traces that are not equal, as that of diff."""

LABELS = (
    "model",
    "recipe",
    "forwards",
    "cells computed",
    "guide",
    "joint sampler",
    "tokens per forward",
    "milliseconds",
)
"""What `unmask trace diff` tells of both traces, in this order."""

app = typer.Typer(
    help="Record how a text was decoded; replay, compare and show it without the model.", rich_markup_mode=None
)

File = Annotated[Path, typer.Argument(help="A trace, of `unmask trace record`.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def decodes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of `unmask generate` that say how to decode; it takes their values as one dict."""
    own = inspect.signature(command, eval_str=True).parameters
    theirs = inspect.signature(generate, eval_str=True).parameters
    shared = [p for name, p in theirs.items() if name not in OWN]

    def run(**values: Any) -> None:
        decoding = {p.name: values.pop(p.name) for p in shared}
        command(**values, decoding=decoding)

    every = [*(p for name, p in own.items() if name != "decoding"), *shared]
    every = [p.replace(kind=p.KEYWORD_ONLY) for p in every]
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(every)
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


@app.command()
@decodes
def record(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Decoded together; - reads one of stdin.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace; compressed if it ends in .gz.")],
    drafts: Annotated[bool, typer.Option("--drafts", help="Keep what was drafted for undecided cells, too.")] = False,
    json: Json = False,
    decoding: dict[str, Any],
) -> None:
    """Decode, and write down every step."""
    write.check(output)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if not all(text.strip() for text in texts):
        raise UserError("a prompt is empty; write a question")

    from unmask.generate import load
    from unmask.study import recorder, trace_file

    settings, rest = settings_of(decoding)
    if unused := rest.keys() - {*LOADED, "model", "suffix"}:
        raise TypeError(f"{', '.join(sorted(unused))}: options that nothing is done with")
    model = load(rest["model"], **{name: rest[name] for name in LOADED})
    trace = recorder.record(model, texts, settings, suffix=rest["suffix"], drafts=drafts)
    size = trace_file.write(trace, output)
    if json:
        print(jsonlib.dumps({"trace": str(output), "bytes": size, **told(trace)}, ensure_ascii=False))
        return
    print("".join(f"{row.text}\n" for row in trace.rows), end="")
    print(f"{output}: {len(trace.steps)} steps, {_size(size)}", file=sys.stderr)


@app.command()
def replay(
    file: File,
    *,
    visual: Annotated[bool, typer.Option("--visual", help="Show the canvas unmasking.")] = False,
    json: Json = False,
) -> None:
    """Play a trace again, without the model, and print the text and the ledger."""
    from rich.console import Console

    from unmask.cli.demo import ledger as line
    from unmask.cli.show import Show
    from unmask.study import trace as traces
    from unmask.study.trace_file import read

    trace = read(file)
    if visual:
        with Show(Console(stderr=True), cast(Any, trace), pause=0.1) as show:
            for canvas, event in traces.replay(trace):
                show(canvas, event)
    if json:
        print(jsonlib.dumps(told(trace), ensure_ascii=False))
        return
    report = traces.ledger(trace)
    print("".join(f"{row.text}\n" for row in trace.rows), end="")
    Console(highlight=False).print(line(report, report.useful_tokens_per_second), style="dim", soft_wrap=True)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A trace.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    *,
    json: Json = False,
) -> None:
    """Say where two traces of the same prompts part.

    The exit code is 1 if something else was decided in some step. Cost, confidence and time may differ.
    """
    from unmask.study.trace_diff import diff as compare
    from unmask.study.trace_file import read

    traces = read(a), read(b)
    found = compare(*traces)
    if json:
        print(jsonlib.dumps(found.as_dict(), ensure_ascii=False))
    else:
        _print(found, traces, (str(a), str(b)))
    raise typer.Exit(0 if found.equal else PARTED)


@app.command()
def html(
    file: File,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")],
    against: Annotated[Path | None, typer.Option(help="A second trace, to show beside the first.")] = None,
) -> None:
    """Draw a trace as one HTML page: the canvas at every step, and the order of commits."""
    write.check(output)
    from unmask.study.page import page
    from unmask.study.trace_diff import comparable
    from unmask.study.trace_file import read

    one, two = read(file), None if against is None else read(against)
    if two is not None:
        comparable(one, two)
    text = page(one, two)
    write.emit(text, output)
    print(f"{output}: {_size(len(text.encode()))}", file=sys.stderr)


def told(trace: Trace) -> dict[str, Any]:
    """What a trace is of, and its ledger, as JSON can hold it."""
    from unmask.study.trace import ledger

    report = ledger(trace)
    spent = report.exit_steps or (0,) * len(trace.rows)
    rows = [{"prompt": r.prompt, "text": r.text, "forwards": n} for r, n in zip(trace.rows, spent, strict=True)]
    recipes = [{"name": r.name, "hash": r.hash, "expression": r.expression} for r in trace.recipes]
    head = {"model": trace.model, "recipes": recipes, "settings": trace.settings, "unmask": trace.unmask}
    return {**head, "steps": len(trace.steps), "rows": rows, "ledger": report.as_dict()}


def _print(found: Difference, traces: tuple[Trace, Trace], names: tuple[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(escape(name), style="cyan", overflow="fold")
    for line in sides(found, traces):
        table.add_row(*map(escape, line))
    console.print(table)
    for number, row in enumerate(found.rows, 1):
        console.print(f"row {number}: {verdict(row)}", markup=False, soft_wrap=True)
        for cell in row.tokens[:SHOWN]:
            words = ("undecided" if word is None else repr(word) for word in (cell.a, cell.b))
            console.print(f"  cell {cell.column}: {' / '.join(words)}", markup=False, soft_wrap=True)
        if len(row.tokens) > SHOWN:
            console.print(f"  and {len(row.tokens) - SHOWN} more; --json has them all")


def sides(found: Difference, traces: tuple[Trace, Trace]) -> list[tuple[str, str, str]]:
    """What each trace is and cost: a label and two values a line."""
    from unmask.cli.demo import helpers

    def facts(trace: Trace, report: Report) -> dict[str, str]:
        return {
            "model": trace.model,
            "recipe": ", ".join(r.name or r.expression for r in trace.recipes),
            "forwards": str(report.forwards),
            "cells computed": str(report.positions),
            **helpers(report),
            "tokens per forward": f"{report.tokens_per_forward:.2f}",
            "milliseconds": f"{report.seconds * 1e3:.1f}",
        }

    one, two = (facts(trace, report) for trace, report in zip(traces, (found.a, found.b), strict=True))
    labels = sorted(one | two, key=lambda label: [*LABELS, label].index(label))
    return [(label, one.get(label, "-"), two.get(label, "-")) for label in labels]


def verdict(row: RowDifference) -> str:
    """One row of two traces, in one line."""
    cost = f"{row.forwards[0]} and {row.forwards[1]} forwards, {row.positions[0]} and {row.positions[1]} cells computed"
    if row.parted is None:
        return f"equal in every step ({cost})"
    order = "" if row.order is None else f", order tau {row.order:.2f}"
    return (
        f"parts at step {row.parted} ({cost}); {len(row.tokens)} cells hold another token; "
        f"{row.moved} of {row.both} were decided in another step (on average {row.shift:.1f} apart{order})"
    )


def _size(count: int) -> str:
    return f"{count / 1000:.1f} kB"
