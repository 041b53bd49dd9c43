"""`unmask demo`: the embedded dLLM by full refinement, with a stack of levers, and its autoregressive twin."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.decode import Report
    from unmask.generate import Model, Output

PLACES = (
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
    "name[The Punter], eatType[pub], food[English], near[Raja Indian Cuisine]",
    "name[The Mill], eatType[restaurant], food[Italian], area[riverside]",
    "name[The Vaults], eatType[pub], food[French], area[riverside], near[Café Adriatic]",
)
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("full refinement", "dllm", {"recipe": "llada"}),
    ("stack of levers", "dllm", {"recipe": "prefix", "threshold": 0.9}),
    ("AR twin", "twin", {"recipe": "ar"}),
)
"""What is shown: a title, the model, and how it decodes. Full refinement commits one cell a step."""
TIMED = 5
"""Runs without drawing, whose median is the time that is told."""


@dataclass(frozen=True)
class Task:
    """A prompt and how to tell whether its answer is right."""

    title: str
    prompt: str
    verdict: Callable[[str], str]


@dataclass(frozen=True)
class Line:
    """One method on one task: the output, and seconds of the decoding alone."""

    task: Task
    method: str
    output: Output
    seconds: float

    @property
    def speed(self) -> float:
        """Useful tokens a second."""
        return self.output.ledger.useful_tokens / max(1e-9, self.seconds)


def demo(
    *,
    plain: Annotated[bool, typer.Option("--plain", help="No animation: final canvases and the table.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the word problem and the restaurant.")] = 0,
) -> None:
    """Watch the embedded model unmask an answer three ways."""
    import torch
    from rich.console import Console

    from unmask.cli.show import legend
    from unmask.generate import load

    torch.set_num_threads(1)  # more only hinder so small a model
    console = Console(highlight=False)
    models = {name: load(name) for name in ("dllm", "twin")}
    console.print(legend())
    lines = []
    for task in tasks(seed):
        console.print(f"\n[bold]{task.title}[/]")
        console.print(task.prompt, markup=False)
        for title, model, settings in METHODS:
            lines.append(perform(console, task, title, models[model], settings, plain=plain))
    console.print()
    console.print(table(lines))
    console.print(
        "NFE: forwards. tok/s: useful tokens, one prompt at a time, one thread, float32, "
        f"median of {TIMED} runs without drawing.",
        style="dim",
    )


def tasks(seed: int) -> list[Task]:
    """A held-out word problem of two or three steps, and a restaurant."""
    from itertools import islice

    from unmask.train import problems, restaurants

    draws = list(islice(problems.problems(seed, "draws"), 50))
    problem = next((p for p in draws if len(p.steps) > 1), draws[0])
    place = random.Random(f"unmask-demo-{seed}").choice(PLACES)
    slots = restaurants.parse(place)

    def solved(text: str) -> str:
        return "right" if problems.answers(text) == [problem.answer] else f"not {problem.answer}"

    def described(text: str) -> str:
        said = restaurants.realised(slots, text)
        return f"{sum(said.values())}/{len(said)} slots"

    return [
        Task("word problem", problem.question, solved),
        Task("restaurant", ", ".join(f"{k}[{v}]" for k, v in slots), described),
    ]


def perform(console: Console, task: Task, title: str, model: Model, settings: dict[str, Any], *, plain: bool) -> Line:
    """Decode once for show and some times for the clock; print the ledger."""
    from unmask.cli.show import Show

    quiet = [model.generate(task.prompt, **settings) for _ in range(TIMED + 1)][1:]  # the first one warms up
    seconds = statistics.median(output.ledger.seconds for output in quiet)
    recipe = quiet[0].recipe
    console.print(f"\n[bold cyan]{title}[/]  [dim]{recipe.name}:[/] ", end="")
    console.print(f"compute {recipe.query!r}, commit {recipe.unmask!r}", markup=False, style="dim")
    with Show(console, model.tokenizer, pause=0.06, still=plain) as show:
        output = model.generate(task.prompt, on_step=show, **settings)
    line = Line(task, title, output, seconds)
    console.print(ledger(output.ledger, line.speed) + f" · {task.verdict(output.text)}", style="dim")
    return line


def ledger(report: Report, speed: float) -> str:
    """What a response cost, in one line."""
    return (
        f"{report.forwards} forwards · {report.positions} positions · {report.tokens_per_forward:.1f} tokens/forward · "
        f"{speed:.0f} useful tok/s · exit step {report.exit_steps[0]}"
        + "".join(f" · {name} {cost}" for name, cost in helpers(report).items())
    )


def helpers(report: Report) -> dict[str, str]:
    """What the guide and the sampler computed, in words, by name."""
    return {n: f"{c['forwards']:.0f} forwards, {c['positions']:.0f} positions" for n, c in report.helpers.items()}


def table(lines: list[Line]):
    """All runs side by side."""
    from rich.table import Table

    found = Table(box=None, header_style="bold", pad_edge=False)
    found.add_column("task", no_wrap=True)
    found.add_column("method", style="cyan", no_wrap=True)
    for column in ("NFE", "positions", "tok/NFE", "tok/s", "exit"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("answer", no_wrap=True)
    before = ""
    for line in lines:
        report = line.output.ledger
        numbers = (report.forwards, report.positions, f"{report.tokens_per_forward:.1f}", f"{line.speed:.0f}")
        title = line.task.title if line.task.title != before else ""
        verdict = line.task.verdict(line.output.text)
        found.add_row(title, line.method, *map(str, numbers), str(report.exit_steps[0]), verdict)
        before = line.task.title
    return found
