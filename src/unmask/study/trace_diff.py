"""Where two traces part: what was decided otherwise, in which order, and what each run cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.decode import Canvas, Report
from unmask.errors import UserError
from unmask.study.trace import Move, Trace, end, ledger


@dataclass(frozen=True)
class Cell:
    """A cell that holds another token at the end; None where it is undecided."""

    column: int
    a: str | None
    b: str | None


@dataclass(frozen=True)
class RowDifference:
    """One row of both traces."""

    prompt: str
    parted: int | None
    """The row's first step, from 1, in which something else was decided, given back or rewritten; None for none."""
    tokens: tuple[Cell, ...]
    both: int
    """Cells decided in both."""
    moved: int
    """Of these, cells decided at another step."""
    shift: float
    """Mean distance of the two steps at which a cell was decided, over the cells decided in both."""
    order: float | None
    """Kendall's tau-b of the two orders of decision; None where one of them decided all at once."""
    score: float
    """Largest difference in confidence at commit, over cells that hold the same token in both."""
    forwards: tuple[int, int]
    positions: tuple[int, int]
    """Cells run through the model."""


@dataclass(frozen=True)
class Difference:
    """Two traces of the same prompts. `a` and `b` are their ledgers."""

    a: Report
    b: Report
    rows: tuple[RowDifference, ...]

    @property
    def equal(self) -> bool:
        """Did both decide the same, step by step? Cost, confidence and time may differ."""
        return all(row.parted is None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "equal": self.equal,
            "rows": [asdict(row) for row in self.rows],
            "ledgers": [self.a.as_dict(), self.b.as_dict()],
        }


def diff(a: Trace, b: Trace) -> Difference:
    """Compare two decodes of the same prompts at the same lengths; UserError where they cannot be compared."""
    comparable(a, b)
    ends = end(a), end(b)
    return Difference(ledger(a), ledger(b), tuple(_row((a, b), ends, row) for row in range(len(a.rows))))


def comparable(a: Trace, b: Trace) -> None:
    """UserError, with rows numbered from 1, where two traces are of other prompts, lengths or vocabularies."""
    if len(a.rows) != len(b.rows):
        raise UserError(
            f"the traces have {len(a.rows)} and {len(b.rows)} rows; record the same prompts to compare them"
        )
    for id in a.pieces.keys() & b.pieces.keys():
        if a.pieces[id] != b.pieces[id]:
            told = f"token {id} is {a.pieces[id]!r} in one and {b.pieces[id]!r} in the other"
            raise UserError(f"the traces are of different vocabularies: {told}")
    for number, (one, two) in enumerate(zip(a.rows, b.rows, strict=True), 1):
        pairs = zip(one.tokens, two.tokens, strict=False)
        parted = next((i for i, (t, u) in enumerate(pairs) if t != u and i < max(one.origin, two.origin)), None)
        if parted is not None:
            words = [_word(a, b, row.tokens[parted]) for row in (one, two)]
            told = f"the prompts of row {number} part at cell {parted} ({words[0]} and {words[1]})"
            raise UserError(f"{told}; record the same prompt to compare")
        if one.tokens != two.tokens:
            holes = [row.tokens.count(None) for row in (one, two)]
            told = f"the responses of row {number} have {holes[0]} and {holes[1]} cells, or other text around them"
            raise UserError(f"{told}; record both at one length to compare")


def _word(a: Trace, b: Trace, token: int | None) -> str:
    return "a hole" if token is None else repr(a.piece(token) or b.piece(token))


def _row(traces: tuple[Trace, Trace], ends: tuple[Canvas, Canvas], row: int) -> RowDifference:
    a, b = ends
    moves = [[m for event in trace.steps if (m := event.moves[row]) is not None] for trace in traces]
    width = len(traces[0].rows[row].tokens)
    decided = [(~end.given & ~end.masked)[row, :width] for end in ends]
    both = decided[0] & decided[1]
    steps = [end.decided_at[row, :width][both].double() for end in ends]
    other = [i for i in range(width) if a.tokens[row, i] != b.tokens[row, i] or a.masked[row, i] != b.masked[row, i]]
    held = [_texts(end, trace, row) for end, trace in zip(ends, traces, strict=True)]
    same = both & (a.tokens[row, :width] == b.tokens[row, :width])
    scores = [end.score[row, :width][same].double() for end in ends]
    return RowDifference(
        prompt=traces[0].rows[row].prompt,
        parted=_parted(*moves),
        tokens=tuple(Cell(i, held[0][i], held[1][i]) for i in other),
        both=int(both.sum()),
        moved=int((steps[0] != steps[1]).sum()),
        shift=float((steps[0] - steps[1]).abs().mean()) if both.any() else 0.0,
        order=kendall(*steps),
        score=float((scores[0] - scores[1]).abs().max()) if same.any() else 0.0,
        forwards=(len(moves[0]), len(moves[1])),
        positions=(_computed(moves[0]), _computed(moves[1])),
    )


def _texts(end: Canvas, trace: Trace, row: int) -> list[str | None]:
    masked = end.masked[row].tolist()
    return [None if m else trace.piece(t) for t, m in zip(end.tokens[row].tolist(), masked, strict=True)]


def _computed(moves: list[Move]) -> int:
    return sum(sum(move.computed[1::2]) - sum(move.computed[::2]) for move in moves)


def _parted(a: list[Move], b: list[Move]) -> int | None:
    """The first step, from 1, in which two rows decided something else."""
    for number, (one, two) in enumerate(zip(a, b, strict=False), 1):
        if _decisions(one) != _decisions(two):
            return number
    return None if len(a) == len(b) else min(len(a), len(b)) + 1


def _decisions(move: Move) -> tuple[object, ...]:
    written = [{} if w is None else dict(zip(w.cells, w.tokens, strict=True)) for w in (move.pick, move.edit)]
    return (*written, move.back or ())


def kendall(a: Tensor, b: Tensor) -> float | None:
    """Kendall's tau-b of two rankings [N] with ties; None where one of them is all ties."""
    signs = [torch.sign(t[:, None] - t).flatten() for t in (a, b)]
    free = float((signs[0] != 0).sum()) * float((signs[1] != 0).sum())
    return float((signs[0] * signs[1]).sum()) / free**0.5 if free else None
