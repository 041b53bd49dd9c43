"""Comparing decoders fairly: interleaved runs of one text each, timed by the ledger, kept with their provenance."""

from __future__ import annotations

import gc
import json as jsonlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from unmask.errors import UserError
from unmask.generate import Job, Model, Output
from unmask.study import machine
from unmask.study.results import Results
from unmask.study.tasks import Item

DTYPES = ("float32", "bfloat16", "int8", "float64")
Row = dict[str, Any]
Run = TypeVar("Run")


def check(items: int, dtype: str) -> None:
    """UserError for a number of items or a dtype that nothing can be measured with."""
    if items < 1:
        raise UserError(f"items must be at least 1, not {items}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {dtype!r}")


def decoded(prepare: Callable[[], tuple[Model, Job]], item: Item) -> tuple[Output, Row]:
    """Decode one text: is it right, and what did it cost. Seconds are the ledger's; setting up is told apart."""
    began = time.perf_counter()
    model, job = prepare()
    ready = time.perf_counter() - began
    (out,) = model.run(job)
    report, score = out.ledger, item.score(out.text)
    return out, {
        "right": score["right"],
        "exact": int(score["exact"]),
        "forwards": report.forwards,
        "positions": report.positions,
        "tokens": report.tokens,
        "useful_tokens": report.useful_tokens,
        "seconds": report.seconds,
        "setup_seconds": ready,
        "helpers": report.helpers,
        "text": out.text,
    }


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected until the block is left."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def interleaved(
    units: Iterable[Sequence[Run]], run: Callable[[Run], Row], *, warm: Iterable[Run], seed: int
) -> Iterator[Row]:
    """A row a run: unit by unit, all runs of each in an order shuffled anew, after the runs of `warm`, untold."""
    for one in warm:
        run(one)
    order = random.Random(seed)
    with _uncollected():
        for unit in units:
            todo = list(unit)
            order.shuffle(todo)
            gc.collect()
            yield from map(run, todo)


@dataclass(frozen=True)
class Kept:
    """What a finished folder has: its summary, the machine it was measured on, and where it is."""

    summary: Row
    machine: Row
    folder: Path

    def tell(self, show: Callable[[Row, Row, Row], object], config: Row, *, json: bool) -> int:
        """Print it: as JSON, or as tables by `show(summary, config, machine)`, and where it lies; the exit code."""
        if json:
            print(jsonlib.dumps({**self.summary, "machine": self.machine, "folder": str(self.folder)}, indent=2))
            return 0
        show(self.summary, config, self.machine)
        print(f"rows and provenance: {self.folder}")
        return 0


class Keyed(Protocol):
    """What is run: its key is that of its row."""

    @property
    def key(self) -> tuple[Any, ...]:
        """By what its row is found again."""
        ...


One = TypeVar("One", bound=Keyed)


def left(units: Sequence[Sequence[One]], found: Sequence[Row], names: Sequence[str]) -> list[list[One]]:
    """The runs of each unit that have no row yet; `names`: what of a row makes the key of its run."""
    have = {tuple(row[name] for name in names) for row in found}
    return [[run for run in unit if run.key not in have] for unit in units]


def keep(
    name: str,
    config: Row,
    out: Path | None,
    *,
    rows: Callable[[list[Row]], Iterator[Row]],
    total: int,
    summarise: Callable[[list[Row]], Row],
    show: bool,
    resume: bool = False,
) -> Kept:
    """Write `<out or results>/<name>-<UTC time>` from rows as they come, with a progress bar if they are shown.

    `config` has the `seed`. `rows` is shown the rows that are there already (of an earlier run alike that was
    interrupted, if this one may `resume`) and gives the others. UserError, before the first row is asked for, for a
    folder that cannot be written; and when the disk is full.
    """
    from rich.console import Console
    from rich.progress import track

    root, console = out or Path("results"), Console(stderr=True)
    try:
        results = Results.create(name, config, root, seeds=config["seed"], resume=resume)
    except OSError as error:
        raise UserError(f"cannot write into {root}: {error.strerror}") from None
    with results:
        found = list(results.found)
        if found and show:
            console.print(f"{len(found)} rows of an interrupted run are here already")
        todo, left = rows(list(found)), max(0, total - len(found))
        for row in track(todo, "measuring", total=left, console=console, transient=True, disable=not show):
            with _written(results):
                results.row(row)
            found.append(row)
        summary = summarise(found)
        where = {**results.run["machine"], "load_after": machine.load()}
        summary |= {"load_after": where["load_after"], "resumed": len(results.found)}
        with _written(results):
            folder = results.finish(summary)
        return Kept(summary, where, folder)


@contextmanager
def _written(results: Results) -> Iterator[None]:
    """What is written below is kept; UserError where it cannot be, such as on a full disk."""
    try:
        yield
    except OSError as error:
        kept = f"; {results.count} rows are kept, run the same again to go on" if results.resumable else ""
        raise UserError(f"cannot write into {results.folder.parent}: {error.strerror}{kept}") from None
