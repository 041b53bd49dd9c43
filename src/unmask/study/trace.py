"""Traces: a decode written down step by step, as a value, and played again without the model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unmask import __version__
from unmask.decode import Canvas, Cost, Draft, Ledger, Report, Step
from unmask.errors import UserError

DTYPES = ("float32", "float64", "float16", "bfloat16")
WIDEST = 2**20
"""Columns of a canvas that a file may claim."""
BROKEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file can raise that does not hold what it should."""


@dataclass(frozen=True)
class Named:
    """A recipe as it prints itself."""

    name: str
    hash: str
    expression: str
    toml: str


@dataclass(frozen=True)
class Row:
    """One row before the first step; `tokens` holds None where a cell is to be written, `recipe` numbers its recipe."""

    prompt: str
    text: str
    """The response up to its end, as the tokenizer writes it."""
    origin: int
    seed: int
    slot: int
    recipe: int
    tokens: tuple[int | None, ...]


@dataclass(frozen=True)
class Written:
    """Cells of a row with the tokens they took (or were drafted), and their confidence; None where it is no number."""

    cells: tuple[int, ...]
    tokens: tuple[int, ...]
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Move:
    """What one step did to one row. `computed` and `fresh` are ranges of columns: start, stop, start, stop, ..."""

    computed: tuple[int, ...]
    fresh: tuple[int, ...]
    pick: Written
    back: tuple[int, ...] | None = None
    """Cells given back; None where the recipe gives nothing back."""
    edit: Written | None = None
    drafts: Written | None = None
    """What the model believed of the cells that stayed undecided, confidence to 4 digits; None if not recorded."""


@dataclass(frozen=True)
class Helped:
    """What a helper (guide, sampler) computed in a step: ranges of columns for each row."""

    name: str
    computed: tuple[tuple[int, ...], ...]
    seconds: float


@dataclass(frozen=True)
class Event:
    """One step of the batch: seconds it took, a move for each row (None: it was done before), and the rows now done."""

    seconds: float
    moves: tuple[Move | None, ...]
    done: tuple[int, ...]
    costs: tuple[Helped, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A recorded decode: where it came from, the canvas it began with, and every step."""

    model: str
    recipes: tuple[Named, ...]
    settings: dict[str, Any]
    mask_id: int
    eos: tuple[int, ...]
    dtype: str
    width: int
    pieces: dict[int, str]
    """The text of every token that occurs, as a cell shows it."""
    rows: tuple[Row, ...]
    steps: tuple[Event, ...]
    state: dict[str, Any] = field(default_factory=dict)
    """Fields of the first canvas that are not those of a new one: regions, revisions, whatever was decided before."""
    unmask: str = __version__

    @property
    def seconds(self) -> float:
        """Wall-clock time of the recorded decode."""
        return sum(event.seconds for event in self.steps)

    @property
    def occurring(self) -> set[int]:
        """Every token that stands in some cell at some time, or is drafted there."""
        found = {t for row in self.rows for t in row.tokens if t is not None}
        if "decided_at" in self.state:
            start = self.start()
            found |= set(start.tokens[start.decided_at > 0].tolist())
        for move in (m for event in self.steps for m in event.moves if m is not None):
            for written in (move.pick, move.edit, move.drafts):
                found.update(() if written is None else written.tokens)
        return found

    def piece(self, id: int) -> str:
        """One cell as it is displayed; empty for a token that does not occur."""
        return self.pieces.get(id, "")

    def start(self) -> Canvas:
        """The canvas before the first step; ValueError where the rows do not make one."""
        if self.dtype not in DTYPES or not max(len(r.tokens) for r in self.rows) <= self.width <= WIDEST:
            raise ValueError(f"no canvas of {self.width} columns of {self.dtype}")
        origin, seed, slot = ([getattr(r, key) for r in self.rows] for key in ("origin", "seed", "slot"))
        canvas = Canvas.of(
            [r.tokens for r in self.rows],
            origin=origin,
            mask_id=self.mask_id,
            eos=self.eos,
            seed=seed,
            dtype=getattr(torch, self.dtype),
        ).widen(self.width)
        made = {name: torch.tensor(value, dtype=getattr(canvas, name).dtype) for name, value in self.state.items()}
        if wrong := [name for name, value in made.items() if value.shape != getattr(canvas, name).shape]:
            raise ValueError(f"{wrong[0]} is not one value for each cell or row")
        return replace(canvas, slot=torch.tensor(slot), **made)


@dataclass(frozen=True, eq=False)
class Recalled(Draft):
    """A draft as a trace keeps it: which cells it had, and the tokens and scores [N] that were recorded.

    Elsewhere the token is the mask's and the score is NaN. There are no logits: what a rule would derive from them is a
    UserError.
    """

    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    @cached_property
    def score(self) -> Tensor:
        """[B, L]: probability of the drafted token; NaN where it was not recorded, -inf where not fresh."""
        return self.spread(self.scores, -torch.inf)

    @property
    def _logits(self) -> Tensor:
        raise UserError("a trace holds no logits; decode with the model to read them")

    @property
    def gap(self) -> Tensor:
        """Of logits, which are not there."""
        return self._logits


def replay(trace: Trace) -> Iterator[tuple[Canvas, Step]]:
    """What `decode` yielded when the trace was recorded, on the CPU; UserError where a step is impossible."""
    canvas = trace.start()
    for event in trace.steps:
        canvas, step = _play(canvas, event)
        yield canvas, step


def end(trace: Trace) -> Canvas:
    """The last canvas of a trace."""
    return deque((canvas for canvas, _ in replay(trace)), maxlen=1).pop() if trace.steps else trace.start()


def ledger(trace: Trace) -> Report:
    """The ledger of the recorded run: counted while it is played, with the seconds that were recorded."""
    found = Ledger()
    for canvas, event in replay(trace):
        found.update(canvas, event)
    return replace(found.report(), seconds=trace.seconds)


def _play(canvas: Canvas, event: Event) -> tuple[Canvas, Step]:
    moves = event.moves
    if len(moves) != len(canvas):
        raise UserError(f"step {int(canvas.step.max()) + 1} is of {len(moves)} rows, not {len(canvas)}")
    token = torch.full_like(canvas.tokens, canvas.mask_id)
    score = torch.full_like(canvas.score, torch.nan)

    def written(of: Callable[[Move], Written | None]) -> Tensor | None:
        found = [None if move is None else of(move) for move in moves]
        for row, put in enumerate(found):
            if put is not None and put.cells:
                cells = list(put.cells)
                token[row, cells] = torch.tensor(put.tokens)
                score[row, cells] = torch.tensor([math.nan if s is None else s for s in put.scores], dtype=score.dtype)
        return _mask(canvas, [None if put is None else put.cells for put in found])

    written(lambda move: move.drafts)
    pick, edit = written(lambda move: move.pick), written(lambda move: move.edit)
    back = _mask(canvas, [None if move is None else move.back for move in moves])
    computed = _ranged(canvas, [() if move is None else move.computed for move in moves])
    fresh = _ranged(canvas, [() if move is None else move.fresh for move in moves])
    costs = tuple(Cost(c.name, _ranged(canvas, c.computed), c.seconds) for c in event.costs)
    if pick is None:
        raise UserError(f"step {int(canvas.step.max()) + 1} moves no row")
    _check(canvas, {"computed": computed, "fresh": fresh, "pick": pick, "back": back, "edit": edit})
    at = fresh.flatten().nonzero()[:, 0]
    draft = Recalled(
        computed, fresh, torch.empty(len(at), 0), token.flatten()[at], costs=costs, scores=score.flatten()[at]
    )
    done = torch.zeros_like(canvas.done)
    done[list(event.done)] = True
    after = canvas.advance(pick, back, draft, edit=edit).finish(done)
    return after, Step(after.step, computed, pick, back, draft, edit)


def _mask(canvas: Canvas, rows: Sequence[Sequence[int] | None]) -> Tensor | None:
    """[B, L] bool from columns for each row; None where no row has any say."""
    if all(row is None for row in rows):
        return None
    found = torch.zeros_like(canvas.given)
    for number, row in enumerate(rows):
        if row:
            found[number, list(row)] = True
    return found


def _ranged(canvas: Canvas, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, L] bool from ranges of columns for each row."""
    found = torch.zeros_like(canvas.given)
    for number, row in enumerate(rows):
        for start, stop in zip(row[::2], row[1::2], strict=True):
            if not start < stop <= found.shape[1]:
                raise UserError(f"row {number} has no cells {start} to {stop}")
            found[number, start:stop] = True
    return found


def ranges(cells: Tensor) -> tuple[int, ...]:
    """The set cells of a row [L] as ranges of columns: start, stop, start, stop, ..."""
    padded = torch.nn.functional.pad(cells.to(torch.int8), (1, 1))
    return tuple(padded.diff().nonzero()[:, 0].tolist())


def _check(canvas: Canvas, cells: dict[str, Tensor | None]) -> None:
    """UserError for a step that this canvas cannot have taken."""
    live = canvas.valid & ~canvas.done[:, None]
    decided = ~canvas.given & ~canvas.masked
    fresh = cells["fresh"]
    assert fresh is not None
    allowed = {"pick": canvas.masked & fresh, "back": decided, "edit": decided}
    for name, found in cells.items():
        if found is not None and bool((wrong := found & ~(live & allowed.get(name, live))).any()):
            row, column = wrong.nonzero()[0].tolist()
            number = int(canvas.step[row]) + 1
            raise UserError(f"step {number} of row {row} cannot have cell {column} in its {name!r}")
