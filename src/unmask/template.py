"""Templates for in-place prompting: a response of given words and of slots to write, each slot with its own cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.decode import Canvas, Recipe, Region, response, useful
from unmask.decode.where import Phase, thinking
from unmask.errors import UserError, suggest

SLOTS = {"write": 0, "think": 1, "answer": 2}
"""What a slot may be called, and the region its cells are in."""
REGIONS = {0: "written", 1: "thinking", 2: "answer"}
"""What the cells of a region are called in an output."""
ALLOCATIONS = ("even", "front", "back")
"""How slots without a number share what is left: alike, the first the most, the last the most."""
CHAINS = {n: f"{{think:{6 * n - 1}}} #### {{answer:1}}" for n in (1, 2, 3)}
"""Templates of the embedded pair's word problems, by their number of equations. It learned to end a response behind the
answer, and with more cells to think in than the equations take it answers within them."""

LONGEST = 1_000_000
"""The most cells of a response."""

_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CELLS = re.compile(r"[0-9]{1,9}")


class Form(NamedTuple):
    """The cells of one response: a token where given, None where to be written; and the region of each."""

    cells: list[int | None]
    region: list[int]


@dataclass(frozen=True)
class Slot:
    """Cells to write: `kind` is one of SLOTS; `cells` None is a share of what is left."""

    kind: str
    cells: int | None = None

    def __str__(self) -> str:
        return f"{{{self.kind}}}" if self.cells is None else f"{{{self.kind}:{self.cells}}}"


@dataclass(frozen=True)
class Template:
    """Words (str) and slots in order; `str` writes them as `parse` reads them."""

    parts: tuple[str | Slot, ...]

    @staticmethod
    def parse(text: str) -> Template:
        """Read `Step 1: {think:16} So {think} The answer is {answer:5}`; UserError with the column of a mistake.

        `{{` and `}}` are braces. A number is a slot's cells; `{think}` and `{write}` may go without one, an answer not.
        """
        if not isinstance(text, str):
            raise UserError(f"a template is a text with slots such as {{think}}, not {text!r:.80}")
        parts: list[str | Slot] = []
        words, at = "", 0
        for mark in _MARK.finditer(text):
            words += text[at : mark.start()]
            at = mark.end()
            if mark[0] in ("{{", "}}"):
                words += mark[0][0]
                continue
            parts += [words] if words else []
            parts.append(_slot(mark))
            words = ""
        words += text[at:]
        found = Template((*parts, *([words] if words else [])))
        if not found.slots:
            raise UserError("the template has no slot to write into; add {think}, {write} or, say, {answer:5}")
        return found

    def __str__(self) -> str:
        return "".join(p.replace("{", "{{").replace("}", "}}") if isinstance(p, str) else str(p) for p in self.parts)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots in order."""
        return tuple(p for p in self.parts if isinstance(p, Slot))

    def lay(
        self, encode: Callable[[str], list[int]], *, length: int | None, default: int, allocation: str = "even"
    ) -> Form:
        """The cells of a response of `length`, the template's own words included; UserError if they do not fit.

        Slots without a number share what is left by `allocation`. With no such slot the template has its own length;
        else `default` stands for a `length` of None. A blank before a slot is left to the slot, as tokens begin with
        theirs.
        """
        given = [self._words(at, encode) for at in range(len(self.parts))]
        words, fixed = sum(map(len, given)), sum(slot.cells or 0 for slot in self.slots)
        told = f"the template has {words} tokens of its own and {fixed} cells in numbered slots"
        open_ = sum(slot.cells is None for slot in self.slots)
        total = length if length is not None else default if open_ else words + fixed
        if not open_ and total != words + fixed:
            raise UserError(
                f"{told}, {words + fixed} in all, and length is {length}; leave length out, or the number of a slot"
            )
        if total > LONGEST:
            raise UserError(f"a response of {total} cells is too long; a template has at most {LONGEST}")
        if (left := total - words - fixed) < open_:
            raise UserError(f"{told}, and {open_} more to fill: a response of {total} cells is too short; raise length")
        counts = iter(allocate(left, open_, allocation) if open_ else [])
        form = Form([], [])
        for ids, part in zip(given, self.parts, strict=True):
            slot = part if isinstance(part, Slot) else None
            cells = [None] * (next(counts) if slot.cells is None else slot.cells) if slot else ids
            region = SLOTS[slot.kind] if slot else 0
            if slot and form.cells and form.cells[-1] is None and form.region[-1] == region:
                raise UserError(f"two slots {slot} stand side by side; put words between them, or make them one")
            form.cells.extend(cells)
            form.region.extend([region] * len(cells))
        return form

    def _words(self, at: int, encode: Callable[[str], list[int]]) -> list[int]:
        part = self.parts[at]
        if isinstance(part, Slot):
            return []
        part = part.rstrip(" ") if at + 1 < len(self.parts) else part
        return encode(part) if part else []

    def check(self, recipe: Recipe) -> None:
        """UserError if the recipe watches an answer and the template has none."""
        rules = [*recipe.unmask.walk(), *recipe.stop.walk()]
        watched = {rule.number for rule in rules if isinstance(rule, Region)} - {0, 1}
        if unknown := sorted(watched - {SLOTS[slot.kind] for slot in self.slots}):
            name = repr(recipe.name) if recipe.name else repr(recipe)
            what = "an answer" if unknown == [2] else f"region {unknown[-1]}"
            raise UserError(f"recipe {name} watches {what}, and the template has none; add a slot such as {{answer:5}}")


def check_without(recipe: Recipe) -> Recipe:
    """The same recipe; UserError if it writes by the thinking and the answer of a template, and there is none."""
    rules = [rule for part in (recipe.query, recipe.unmask, recipe.stop) for rule in part.walk()]
    if any(isinstance(rule, Phase) or rule == thinking for rule in rules):
        name = repr(recipe.name) if recipe.name else repr(recipe)
        raise UserError(f"recipe {name} writes into a template; give template='{{think:11}} #### {{answer:1}}', say")
    return recipe


def _slot(mark: re.Match[str]) -> Slot:
    """The slot that a pair of braces holds."""
    column = f"column {mark.start() + 1} of the template"
    if mark[1] is None:
        fault = "opens a slot that never ends" if mark[0] == "{" else "ends no slot"
        raise UserError(f"the brace at {column} {fault}; a brace of the text is written {mark[0] * 2}")
    kind, sign, cells = (part.strip() for part in mark[1].partition(":"))
    if kind not in SLOTS:
        raise UserError(f"{suggest(kind, SLOTS, 'slot')} (at {column})")
    if not sign and kind == "answer":
        raise UserError(f"{{answer}} at {column} needs a number of cells, as in {{answer:5}}")
    if sign and (not _CELLS.fullmatch(cells) or int(cells) < 1):
        raise UserError(f"{mark[0]} at {column}: a slot has a whole number of cells, at least 1 and at most 999999999")
    return Slot(kind, int(cells) if sign else None)


def allocate(total: int, n: int, how: str = "even") -> list[int]:
    """`total` cells for n slots, at least one each, the rest by weights: 1 ("even"), n..1 ("front"), 1..n ("back")."""
    if how not in ALLOCATIONS:
        raise suggest(how, ALLOCATIONS, "allocation")
    assert total >= n >= 1, "every slot has a cell"
    weights = {"even": [1] * n, "front": list(range(n, 0, -1)), "back": list(range(1, n + 1))}[how]
    whole, rest = zip(*(divmod((total - n) * weight, sum(weights)) for weight in weights), strict=True)
    short = total - n - sum(whole)
    lucky = sorted(range(n), key=lambda i: (-rest[i], -weights[i], i))[:short]
    return [1 + whole[i] + (i in lucky) for i in range(n)]


def mark(canvas: Canvas, forms: Sequence[Form]) -> Canvas:
    """The canvas with the regions of its rows' forms, each of which ends its row."""
    region = torch.zeros_like(canvas.region)
    for row, form in enumerate(forms):
        end = int(canvas.valid[row].sum())
        region[row, end - len(form.region) : end] = torch.tensor(form.region, dtype=region.dtype)
    return replace(canvas, region=region)


def shown(canvas: Canvas) -> Tensor:
    """[B, L] bool: what a filled template reads: its own words, and each slot up to its EOS."""
    return useful(canvas) | (response(canvas) & canvas.given)


def regions(canvas: Canvas, decode: Callable[[list[int]], str]) -> dict[str, str]:
    """What was written into each kind of slot of a one-row canvas, by name; several slots of a kind are lines."""
    own, keep, stretch = canvas.valid[0] & ~canvas.given[0], useful(canvas)[0], canvas.stretch[0]
    found: dict[str, str] = {}
    for number, name in REGIONS.items():
        cells = own & (canvas.region[0] == number)
        parts = [canvas.tokens[0][keep & (stretch == n)].tolist() for n in stretch[cells].unique().tolist()]
        if parts:
            found[name] = "\n".join(decode(part).strip() for part in parts)
    return found
