"""What `unmask bench gap` measures: an AR twin, vanilla decoding, every lever, every pair and triple that can stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from unmask.errors import UserError

TWIN, VANILLA, FULL = "twin", "vanilla", "vanilla, canvas filled"
"""The rows that others are told over; the last one goes on behind the end of the text, as published loops do."""


@dataclass(frozen=True)
class Lever:
    """A lever as a user types it, its kind, and what makes it a recipe of its own."""

    name: str
    kind: str
    text: str
    base: str = ""
    """What commits where it does not: one cell a forward."""


LEVERS: tuple[Lever, ...] = (
    *(Lever(name, "cache", name, "quota") for name in ("prefix", "dual", "freecache", "freecache_lag")),
    Lever("dkv", "cache", "dkv(8)", "quota"),
    Lever("threshold", "commit", "threshold(0.9)"),
    Lever("factor", "commit", "factor(1.0)"),
    Lever("eb", "commit", "eb(0.1)"),
    Lever("guided", "commit", "guided(1)"),
    Lever("joint", "commit", "joint(4)"),
    Lever("prophet", "exit", "prophet(7.5, 5, 2.5)"),
    Lever("sched", "exit", "sched(7.5, 2.5)"),
    Lever("wino", "revise", "wino"),
)
"""The levers of a model with full attention, in the order in which a stack names them."""
STUDENT: tuple[str, ...] = ("d2f", "d2f(0.7, 0.1, 0.95)", "d2f + guided(1)", "d2f + block_gap(10, 8, 6)")
"""What a block-causal student is measured with: distillation is a lever that changes the weights."""


@dataclass(frozen=True)
class Case:
    """One row of the table: a model's role, the recipe it decodes with, and the levers that the recipe joins."""

    name: str
    role: str
    """"dllm", "student" or "twin"."""
    recipe: str
    levers: tuple[str, ...] = ()
    ends: bool = True
    """Does a row end with its text? Otherwise when the canvas is full."""
    slow: bool = False
    """Does it take as many forwards as the canvas has cells?"""

    @property
    def told(self) -> dict[str, Any]:
        """What a table says of it."""
        return {"case": self.name, "role": self.role, "recipe": self.recipe, "levers": list(self.levers)}


def reference(*, student: bool) -> list[Case]:
    """The twin, vanilla decoding with and without an end, and the student's own ways."""
    found = [
        Case(TWIN, "twin", "ar"),
        Case(VANILLA, "dllm", "llada", slow=True),
        Case(FULL, "dllm", "llada", ends=False, slow=True),
    ]
    return found + [Case(f"student: {text}", "student", text) for text in STUDENT if student]


def stack(levers: Sequence[Lever], block: int) -> Case:
    """The levers in one recipe; alone, a cache commits one cell a forward, as vanilla does."""
    commits = any(lever.kind in ("commit", "revise") for lever in levers)
    bases = [] if commits else list(dict.fromkeys(lever.base for lever in levers if lever.base))
    blocks = [] if any(lever.name == "guided" for lever in levers) and not _windows(levers) else [f"blocks({block})"]
    text = " + ".join([*blocks, *(lever.text for lever in levers), *bases])
    return Case(
        " + ".join(lever.name for lever in levers),
        "dllm",
        text,
        tuple(lever.name for lever in levers),
        slow=not commits,
    )


def _windows(levers: Sequence[Lever]) -> bool:
    """Does any of them compute by blocks?"""
    return any(lever.kind == "cache" and lever.name != "dkv" for lever in levers)


def stacks(size: int, block: int, levers: Sequence[Lever] = LEVERS) -> Iterator[Case]:
    """Every set of `size` levers of different kinds, in blocks of so many cells."""
    for chosen in combinations(levers, size):
        if len({lever.kind for lever in chosen}) == size:
            yield stack(chosen, block)


def sorted_out(cases: Sequence[Case], check: Callable[[Case], object]) -> tuple[list[Case], list[dict[str, Any]]]:
    """Those that `check` lets pass, and the others with the reason it gave (UserError)."""
    good, refused = [], []
    for case in cases:
        try:
            check(case)
        except UserError as error:
            refused.append({**case.told, "why": str(error)})
        else:
            good.append(case)
    return good, refused
