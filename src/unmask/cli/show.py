"""The canvas in a terminal: cells coloured by confidence, masks as blocks, the step's commits highlighted."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from unmask.decode import Canvas, Step
    from unmask.models.tokenizer import Tokenizer

COLOURS = ((0.99, "bright_green"), (0.9, "green"), (0.7, "yellow"), (0.5, "dark_orange"), (0.0, "red"))
"""From this confidence on, this colour."""
MASK, COMPUTED, END = "░░", "▒▒", "·"
"""An undecided cell; one that this forward computed; a cell at or after the end."""


def colour(score: float) -> str:
    """The colour of a confidence in [0, 1]."""
    return next(name for least, name in COLOURS if score >= least or least == 0.0)


def legend() -> Text:
    """One line that explains the colours."""
    line = Text("confidence: ", style="dim")
    for least, name in reversed(COLOURS):
        line.append(f"≥{least:g} " if least else "low ", style=name)
    line.append(f" {MASK} undecided  {COMPUTED} computed now  ", style="dim")
    line.append("new", style="reverse")
    return line


class Show:
    """A consumer of the loop's events: call it with every (canvas, step) inside a `with`.

    Without a terminal, or `still`, it prints the last canvas only. `pause` seconds are waited after each drawn step.
    """

    def __init__(self, console: Console, tokenizer: Tokenizer, *, pause: float = 0.0, still: bool = False) -> None:
        self.console, self.tokenizer, self.pause = console, tokenizer, pause
        moving = console.is_terminal and not still
        self.live = Live(console=console, auto_refresh=False) if moving else None
        self.last: tuple[Canvas, Step] | None = None

    def __enter__(self) -> Show:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.last is not None and self.live is not None:
            self.live.update(self.draw(self.last[0], None), refresh=True)
        if self.live is not None:
            self.live.__exit__(kind, error, trace)
        elif self.last is not None:
            self.console.print(self.draw(self.last[0], None))

    def __call__(self, canvas: Canvas, event: Step) -> None:
        """Draw one step."""
        self.last = canvas, event
        if self.live is not None:
            self.live.update(self.draw(canvas, event), refresh=True)
            time.sleep(self.pause)

    def draw(self, canvas: Canvas, event: Step | None) -> RenderableType:
        """The responses of all rows, and below them what the step did; without an event the finished canvas."""
        rows: list[RenderableType] = [self.row(canvas, event, row) for row in range(len(canvas))]
        if event is not None:
            count = [int(t.sum()) for t in (event.computed, event.pick, canvas.masked)]
            told = f"step {int(canvas.step.max())}: {count[0]} cells computed, {count[1]} committed, {count[2]} left"
            rows.append(Text(told, style="dim"))
        return Group(*rows)

    def row(self, canvas: Canvas, event: Step | None, row: int) -> Text:
        """The response of one row."""
        own = (canvas.valid[row] & (canvas.position >= canvas.origin[row])).nonzero()[:, 0].tolist()
        masked, end = canvas.masked[row].tolist(), int(canvas.first(canvas.ended)[row])
        tokens, score, given = canvas.tokens[row].tolist(), canvas.score[row].tolist(), canvas.given[row].tolist()
        fresh = [False] * len(tokens) if event is None else event.pick[row].tolist()
        computed = [False] * len(tokens) if event is None else event.computed[row].tolist()
        line = Text()
        for cell in own:
            if masked[cell] and event is None:
                continue
            if masked[cell]:
                line.append(COMPUTED if computed[cell] else MASK, style="dim")
            elif cell >= end and not given[cell]:
                line.append(END, style="dim")
            else:
                style = "italic" if given[cell] else colour(score[cell])
                line.append(self.piece(tokens[cell]), style=f"bold reverse {style}" if fresh[cell] else style)
            line.append(" ")
        return line

    def piece(self, token: int) -> str:
        """A cell's text; white space is made visible."""
        text = self.tokenizer.piece(token)
        return text.strip() or ("⏎" if "\n" in text else "␣")
