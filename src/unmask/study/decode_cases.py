"""What `unmask bench decode` measures, as data: ways to decode by the role of a model, and each of them at a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.generate import Model

ROLES = {"full": "teacher", "block": "student", "causal": "twin"}
"""The part that a model plays, by its attention layout."""
ENDS = {
    "eos": "an EOS is decided, and all before it",
    "canvas": "every cell is decided",
    "blocks": "an EOS is decided, and every block begun before that is complete",
}
"""When a response is done."""
PROBLEMS = (1, 2, 4, 8)
"""Problems of a worksheet, each a part of the largest, so that all sizes have the same problems."""
SLOW = 256
"""Cells of a canvas from which a slow way has fewer problems."""
VANILLA, ENDED, THRESHOLD, SERIAL, PIPELINED, AR = "vanilla", "vanilla-eos", "threshold", "serial", "pipelined", "ar"


@dataclass(frozen=True)
class Way:
    """A recipe, typed as a user would, and when a response is done."""

    name: str
    recipe: str
    ends: str = "eos"
    slow: bool = False
    """Does it take a forward for each cell of the canvas?"""
    swept: bool = False
    """Is it there to see what a setting does?"""
    times: int = 1
    """Blocks of how many times the size that a block-causal model was trained with?"""


def _pipelined(name: str, threshold: float = 0.9, add: float = 0.1, act: float = 0.95, *, swept: bool = True) -> Way:
    return Way(name, f"d2f({threshold!r}, {add!r}, {act!r})", swept=swept)


WAYS: dict[str, tuple[Way, ...]] = {
    "teacher": (
        Way(VANILLA, "llada", "canvas", slow=True),
        Way(ENDED, "llada"),
        Way(THRESHOLD, "threshold"),
        Way("dual", "dual"),
    ),
    "student": (
        _pipelined(SERIAL, add=1.0, swept=False),
        _pipelined(PIPELINED, swept=False),
        Way("pipelined-published", "d2f(0.9, 0.1, 0.95)", "blocks", swept=True),
        *(_pipelined(f"conf-{conf}", conf) for conf in (0.5, 0.7, 0.8, 0.95)),
        _pipelined("add-0.5", add=0.5),
        _pipelined("act-0.5", act=0.5),
        _pipelined("conf-0.7-act-0.5", 0.7, act=0.5),
        _pipelined("serial-conf-0.7", 0.7, 1.0),
        replace(_pipelined("double"), times=2),
        replace(_pipelined("double-conf-0.7", 0.7), times=2),
    ),
    "twin": (Way(AR, "ar"),),
}
"""Ways to decode, in the order of the table. What is swept of a student is told in its name, the rest is as published:
cells above 0.9 (conf), a block opened at a tenth of the one before (add), and forced on at 0.95 of it (act); `double`:
blocks of twice the size."""
LONG = {"teacher": THRESHOLD, "student": PIPELINED, "twin": AR}
"""The way that answers worksheets."""


@dataclass(frozen=True)
class Case:
    """One model decoding in one way, on a canvas of so many cells, one problem or a worksheet of `k`."""

    model: str
    role: str
    way: Way
    cells: int
    block: int
    """Cells of a block; 0 for a model without blocks."""
    sheet: bool = False
    k: int = 1
    limited: bool = False
    """Has it but a share of the problems?"""

    @property
    def name(self) -> str:
        """Of no other case."""
        return f"{self.model} {self.way.name} {f'x{self.k}' if self.sheet else self.cells}"

    @property
    def told(self) -> dict[str, Any]:
        """What a table says of it."""
        facts = ("model", "role", "cells", "block", "sheet", "k")
        way = {"way": self.way.name, "recipe": self.way.recipe, "ends": self.way.ends, "swept": self.way.swept}
        return {"case": self.name, **{fact: getattr(self, fact) for fact in facts}, **way}


def role(model: Model) -> str:
    """The part that a model plays."""
    return ROLES[model.network.config.layout.kind]


def _block(model: Model, way: Way, block: int, cells: int) -> int:
    layout = model.network.config.layout
    return {"full": min(block, cells), "block": way.times * layout.size, "causal": 0}[layout.kind]


def by_length(models: Mapping[str, Model], lengths: Sequence[int], block: int) -> list[Case]:
    """Every way of every model at every length of a canvas, one problem each."""
    return [
        Case(name, kind, way, cells, _block(model, way, block, cells), limited=way.slow and cells >= SLOW)
        for cells in lengths
        for name, model in models.items()
        for kind in (role(model),)
        for way in WAYS[kind]
    ]


def by_problems(models: Mapping[str, Model], canvases: Mapping[int, int], block: int) -> list[Case]:
    """One way of every model on worksheets of several sizes, `canvases` having the cells of each."""
    return [
        Case(name, kind, way, cells, _block(model, way, block, cells), sheet=True, k=k)
        for k, cells in canvases.items()
        for name, model in models.items()
        for kind in (role(model),)
        for way in WAYS[kind]
        if way.name == LONG[kind]
    ]
