"""`unmask chat`: a conversation in the terminal, with the canvas while it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.generate import Model

HELP = "/recipe NAME, /length N, /temperature T, /seed N set what follows; /new forgets the conversation; /quit ends."
KINDS = {
    "recipe": str,
    "length": int,
    "temperature": float,
    "seed": int,
    "steps": int,
    "block": int,
    "threshold": float,
}
"""Settings that a line beginning with / can change."""


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Embedded name, folder or hub id; default the embedded dLLM.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="How to decode; default the model's own.")] = None,
    length: Annotated[int | None, typer.Option(help="Cells of a response.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    system: Annotated[str, typer.Option(help="What the system says first.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, or int8 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    plain: Annotated[bool, typer.Option("--plain", help="No live canvas: answers alone.")] = False,
) -> None:
    """Talk with a model and watch it write. A line that begins with / changes a setting; /help lists them."""
    import torch
    from rich.console import Console

    from unmask.generate import load

    torch.set_num_threads(1)
    loaded, console = load(model, dtype=dtype, device=device), Console(highlight=False)
    said: dict[str, Any] = {"recipe": recipe, "length": length, "temperature": temperature, "seed": seed}
    talk = Talk(loaded, console, said, system=system, plain=plain)
    if console.is_terminal:
        console.print(f"{loaded.name}; {HELP}", style="dim")
    for line in lines(console):
        try:
            if not talk.hear(line):
                break
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def lines(console: Console) -> Iterator[str]:
    """What is typed, or piped in, until its end."""
    while True:
        try:
            line = console.input("[bold cyan]> [/]") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        except UnicodeDecodeError:
            print("error: that line is not UTF-8", file=sys.stderr)
            continue
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


class Talk:
    """A conversation: its messages and the settings that hold now."""

    def __init__(self, model: Model, console: Console, said: dict[str, Any], *, system: str, plain: bool) -> None:
        self.model, self.console, self.plain = model, console, plain
        self.said = {name: value for name, value in said.items() if value is not None}
        self.first = [{"role": "system", "content": system}] if system else []
        self.remembers = model.tokenizer.has_chat_template and not model.embedded
        if system and not self.remembers:
            raise UserError(f"{model.name} knows no conversation; leave --system out")
        self.messages = [*self.first]

    def hear(self, line: str) -> bool:
        """Answer a line, or follow it if it is a command; False if it ends the talk."""
        if line.startswith("/"):
            return self.command(*line[1:].partition(" ")[::2])
        asked = [*self.messages, {"role": "user", "content": line}]
        answer = self.write(asked if self.remembers else line)
        if self.remembers:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return True

    def write(self, prompt: Any) -> str:
        """Decode one response before the reader's eyes, and say what it cost."""
        from unmask.cli.show import Show

        if self.plain or not self.console.is_terminal:
            output = self.model.generate(prompt, **self.said)
            print(output.text, flush=True)
            return output.text
        with Show(self.console, self.model.tokenizer) as show:
            output = self.model.generate(prompt, on_step=show, **self.said)
        told = output.ledger
        self.console.print(
            f"{output.recipe.name}: {told.forwards} forwards, {told.tokens_per_forward:.1f} tokens a forward, "
            f"{told.useful_tokens_per_second:.0f} useful tok/s",
            style="dim",
        )
        return output.text

    def command(self, name: str, value: str) -> bool:
        """Follow a line that begins with /; False for /quit. UserError for one that is unknown or wrong."""
        from unmask.errors import suggest

        value = value.strip()
        if name in ("quit", "exit", "q"):
            return False
        if name == "help":
            self.console.print(HELP, style="dim")
        elif name == "new":
            self.messages = [*self.first]
        elif name not in KINDS:
            raise suggest(name, [*KINDS, "help", "new", "quit"], "command")
        elif not value:
            self.said.pop(name, None)
        else:
            self.set(name, value)
        return True

    def set(self, name: str, value: str) -> None:
        """Change a setting if it can hold, and keep the old one if not."""
        from unmask.settings import resolve

        try:
            found = {**self.said, name: KINDS[name](value)}
        except ValueError:
            raise UserError(f"/{name} takes a number, not {value[:40]!r}") from None
        self.model.recipe(["?"], resolve(found, {}))
        self.said = found
