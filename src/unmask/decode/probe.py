"""The probe: an answer asked for ahead of the text, behind the last block in flight. Nothing earlier sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.decode.algebra import Rows, Rule, Where, term
from unmask.decode.belief import Belief
from unmask.decode.blocks import After
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.pick import counted
from unmask.errors import UserError


class Laid(NamedTuple):
    """Where a probe stands on a canvas."""

    place: Tensor
    """[B, L] int64: place of each cell in the probe, from 0; -1 outside of it."""
    tokens: Tensor
    """[B, L] int64: the anchor's tokens in its cells, 0 elsewhere."""


@term("probing")
@dataclass(frozen=True, repr=False)
class Probing(Where):
    """The cells right behind the last block that `after` opens: those of `anchor`, then `cells` for an answer.

    They lie in one block, so that block-causal attention shows them all of the text and the text nothing of them. A row
    has none where they are not all undecided (the row ends, or given words stand there), where an EOS is decided, or
    where the text has come to the anchor by itself. `anchor`: token ids, or words that `spelled` makes ids of.
    """

    after: After
    anchor: str | tuple[int, ...]
    cells: int

    def __post_init__(self) -> None:
        if not isinstance(self.after, After):
            raise ValueError(f"probing stands behind blocks such as blocks(8).after(0.1), not {self.after!r:.80}")
        counted(self.cells, "a probe has a whole number of cells for its answer, at least 1")
        if isinstance(self.anchor, str):
            if not self.anchor.strip():
                raise ValueError("a probe needs an anchor, such as '####'; the text is empty")
        elif not isinstance(self.anchor, tuple) or not self.anchor or any(type(t) is not int for t in self.anchor):
            raise ValueError(f"an anchor is a text, or token ids such as [17, 3], not {self.anchor!r:.80}")
        least = 1 if isinstance(self.anchor, str) else len(self.anchor)
        if least + self.cells > self.after.blocks.size:
            told = f"{'at least ' * isinstance(self.anchor, str)}{least} of them for the anchor"
            fault = f"a probe of {least + self.cells} cells ({told}) does not fit into a block of"
            raise ValueError(f"{fault} {self.after.blocks.size}; use fewer cells, or larger blocks")

    def __call__(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: the cells of the probe."""
        return self.laid(canvas).place >= 0

    def laid(self, canvas: Canvas) -> Laid:
        """The probe of each row."""
        return canvas.derive(self, lambda: self._lay(canvas))

    def _lay(self, canvas: Canvas) -> Laid:
        anchor = torch.tensor(self.ids, device=canvas.tokens.device)
        size = len(anchor) + self.cells
        start = (self.after(canvas) * (canvas.position + 1)).amax(1)
        place = canvas.position - start[:, None]
        inside = (place >= 0) & (place < size)
        free = (inside & canvas.masked).sum(1) == size
        rows = free & ~canvas.ended.any(1) & ~stated(canvas, anchor)
        place = place.masked_fill(~(inside & rows[:, None]), -1)
        tokens = anchor[place.clamp(0, len(anchor) - 1)]
        return Laid(place, tokens.masked_fill((place < 0) | (place >= len(anchor)), 0))

    @property
    def ids(self) -> tuple[int, ...]:
        """The anchor's tokens; UserError while it is a text."""
        if isinstance(self.anchor, str):
            raise UserError(f"the anchor {self.anchor!r} is a text, and only a tokenizer knows its ids; use `spelled`")
        return self.anchor

    @property
    def answer(self) -> Answer:
        """The cells behind the anchor."""
        return Answer(self)

    @property
    def taken(self) -> Taken:
        """As a stop: the probe was committed."""
        return Taken(self)


@dataclass(frozen=True, repr=False)
class Answer(Where):
    """The cells of a probe behind its anchor."""

    probe: Probing

    def __repr__(self) -> str:
        return f"{self.probe!r}.answer"

    def __call__(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: the cells of the answer."""
        return self.probe.laid(canvas).place >= len(self.probe.ids)


@dataclass(frozen=True, repr=False)
class Taken(Rows):
    """Rows that have decided on a cell of a block that is not opened. Only the commit of a probe does that, where no
    cell is ever given back; the committed answer is the memory."""

    probe: Probing

    def __repr__(self) -> str:
        return f"{self.probe!r}.taken"

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        """[B] bool: does the row end with its probe?"""
        return (canvas.valid & (canvas.decided_at > 0) & ~self.probe.after(canvas)).any(1)


@term("pinned")
@dataclass(frozen=True, repr=False)
class Pinned(Belief):
    """The model reads the anchor of a probe in its cells, though they are undecided, and keeps no key of the probe."""

    probe: Probing

    def __post_init__(self) -> None:
        if not isinstance(self.probe, Probing):
            raise ValueError(
                f"pinned takes a probe such as probing(blocks(8).after(0.1), '####', 4), not {self.probe!r}"
            )


def stated(canvas: Canvas, anchor: Tensor) -> Tensor:
    """[B] bool: rows that have decided on these tokens [A], one behind the other."""
    width = canvas.tokens.shape[1] - len(anchor) + 1
    if width < 1:
        return torch.zeros_like(canvas.done)
    own = torch.where(canvas.valid & (canvas.decided_at > 0), canvas.tokens, -1)
    found = torch.ones_like(own[:, :width], dtype=torch.bool)
    for at, token in enumerate(anchor.tolist()):
        found = found & (own[:, at : at + width] == token)
    return found.any(1)


def probes(rules: Iterable[Rule]) -> set[Probing]:
    """The probes among these rules."""
    return {rule for rule in rules if isinstance(rule, Probing)}


def respelled(rule: Rule, ids: Mapping[str, tuple[int, ...]]) -> Rule:
    """A probe with its anchor by ids, where it was one of these texts; any other rule as it is."""
    if isinstance(rule, Probing) and isinstance(rule.anchor, str):
        return Probing(rule.after, ids[rule.anchor], rule.cells)
    return rule
