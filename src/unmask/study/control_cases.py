"""What `unmask bench control` asks and whom: constraints on restaurant descriptions, decoders of the same models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.template import Slot, Template
from unmask.train import restaurants
from unmask.train.restaurants import Restaurant, words

Encode = Callable[[str], list[int]]
TASKS = ("infill", "length", "slot")
"""Write between given words; write exactly so many words; write around two values that stand at given places."""
KEPT = 0.3
"""The share of a reference's words that infilling is given at its start, and again at its end."""
OFFSETS = (-2, 0, 2)
"""Words over those of the reference, in the lengths that are asked for."""
SECOND = ("food", "near", "area", "eatType")
"""The slot that is held at its place beside the name: the first of these that there is."""
SHORTEST, LONGEST = 10, 36
"""Words of a reference that is asked about."""


@dataclass(frozen=True)
class Case:
    """One decoder: the role of its model, its recipe, and how it is asked.

    `way`: "template"; "suffix", where infilling is asked for as a continuation towards a suffix; "blind", where a
    left-to-right model is made to write the given words when it comes to them, which it cannot see before; "best",
    the same drawn several times, the check and then the likelihood choosing.
    """

    name: str
    role: str
    recipe: str
    way: str = "template"
    share: int = 1
    """Cells a forward, for a recipe with a schedule."""

    @property
    def told(self) -> dict[str, Any]:
        """What a table says of it."""
        return {"case": self.name, "role": self.role, "recipe": self.recipe, "way": self.way}


VANILLA, BLIND, STUDENT, DRAWN = "vanilla", "twin, blind", "student, by template", 8
"""The row that others are told over, the left-to-right row, the student's, and texts that the best is chosen from."""
CASES = (
    Case(VANILLA, "dllm", "llada"),
    Case("2 a forward", "dllm", "llada", share=2),
    Case("4 a forward", "dllm", "llada", share=4),
    Case("threshold", "dllm", "threshold"),
    Case("dual cache", "dllm", "dual"),
    Case("prophet", "dllm", "prophet"),
    Case("student", "student", "d2f", "suffix"),
    Case(STUDENT, "student", "d2f"),
    Case("twin", "twin", "ar", "suffix"),
    Case(BLIND, "twin", "ar", "blind"),
    Case(f"twin, best of {DRAWN}", "twin", "ar", "best"),
)


@dataclass(frozen=True)
class Ask:
    """One constraint on one restaurant: the response as a template, and as the words before and behind its slot."""

    task: str
    row: Restaurant
    parts: tuple[str | Slot, ...]

    @property
    def template(self) -> str:
        """As `generate` takes it. What is to be written is marked as the answer, which early exits watch."""
        return str(Template(self.parts))

    @property
    def ends(self) -> tuple[str, int, str]:
        """(words before, cells, words behind) of an ask with one slot."""
        (at,) = (n for n, part in enumerate(self.parts) if isinstance(part, Slot))
        given = ["".join(p for p in some if isinstance(p, str)) for some in (self.parts[:at], self.parts[at + 1 :])]
        return given[0].strip(), cells(self.parts[at]), given[1].strip()

    def form(self, encode: Encode) -> list[int | None]:
        """The cells of the response: a token where given, None where to be written."""
        return Template(self.parts).lay(encode, length=None, default=0).cells

    def check(self, form: Sequence[int | None], ids: Sequence[int], text: str) -> dict[str, int]:
        """0 or 1 each: given words in place and no early end, all slots said, no word doubled, so many words, and all
        that the task asks for."""
        held = len(ids) == len(form) and all(a is None or a == b for a, b in zip(form, ids, strict=True))
        said, twice = all(restaurants.realised(self.row.slots, text).values()), restaurants.doubled(text)
        flat = words(text)
        exact = held and len(flat) == len(form) and flat[-1] == "."
        good = exact and said if self.task == "length" else held and said and not twice
        found = {"right": good, "held": held, "said": said, "doubled": twice, "words": exact}
        return {key: int(value) for key, value in found.items()}


def cells(part: str | Slot) -> int:
    """Cells of a numbered slot."""
    assert isinstance(part, Slot)
    assert part.cells
    return part.cells


def _parts(flat: Sequence[str], given: set[int]) -> tuple[str | Slot, ...]:
    """The words at the places `given`, and a slot for each stretch between them."""
    found: list[str | Slot] = []
    for own, run in groupby(range(len(flat)), key=given.__contains__):
        at = list(run)
        blank = " " if at[0] else ""
        found.append(blank + " ".join(flat[n] for n in at) + " " if own else Slot("answer", len(at)))
    last = found[-1]
    return (*found[:-1], last.rstrip() if isinstance(last, str) else last)


def infill(row: Restaurant) -> Ask | None:
    """The middle of the reference is to be written; None if the given words say every slot already."""
    flat = words(row.sentence)
    n = max(1, int(KEPT * len(flat)))
    given = " ".join(flat[:n]) + " | " + " ".join(flat[-n:])
    if all(restaurants.realised(row.slots, given).values()):
        return None
    return Ask("infill", row, _parts(flat, {*range(n), *range(len(flat) - n, len(flat))}))


def lengths(row: Restaurant) -> list[Ask]:
    """As many words as the reference has, and some more and fewer; the full stop at the end is given."""
    n = len(words(row.sentence))
    return [Ask("length", row, (Slot("answer", n + more - 1), " .")) for more in OFFSETS]


def slot(row: Restaurant) -> Ask | None:
    """The name and a second value stand where the reference has them; None if they cannot be found there."""
    flat, values = words(row.sentence), dict(row.slots)
    second = next((key for key in SECOND if key in values), None)
    if second is None or "name" not in values:
        return None
    spans = [_span(flat, words(values[key])) for key in ("name", second)]
    given = {*spans[0], *spans[1], len(flat) - 1}
    if not all(spans) or len(given) < sum(map(len, spans)) + 1 or len(given) == len(flat):
        return None
    return Ask("slot", row, _parts(flat, given))


def _span(flat: Sequence[str], value: Sequence[str]) -> range:
    """Where a value's words first stand; empty for nowhere."""
    low, wanted = [word.lower() for word in flat], [word.lower() for word in value]
    starts = (at for at in range(len(low)) if low[at : at + len(wanted)] == wanted)
    at = next(starts, None)
    return range(0) if at is None else range(at, at + len(wanted))


def asks(row: Restaurant) -> tuple[Ask, ...]:
    """All that is asked about a restaurant; nothing if one of the tasks would be empty for it."""
    between, around = infill(row), slot(row)
    return () if between is None or around is None else (between, *lengths(row), around)


def _sound(rows: Sequence[Restaurant], encode: Encode) -> Iterator[Restaurant]:
    """References that say all of their slots in a plain sentence, each word a token of the model."""
    for row in rows:
        flat = words(row.sentence)
        plain = SHORTEST <= len(flat) <= LONGEST and flat[-1] == "." and not restaurants.doubled(row.sentence)
        if (
            plain
            and all(restaurants.realised(row.slots, row.sentence).values())
            and len(flat) == len(encode(row.sentence))
        ):
            yield row


def read(root: Path, items: int, encode: Encode) -> list[tuple[Ask, ...]]:
    """What is asked, restaurant by restaurant, spread over the test split: one reference for each meaning.

    UserError for a folder without the data, for a file that cannot be read, and for more items than there are.
    """
    try:
        rows = restaurants.read(root, "test")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the E2E data in {root}: {type(error).__name__}: {error}") from None
    found: dict[Any, tuple[Ask, ...]] = {}
    for row in _sound(rows, encode):
        if row.slots not in found and (all_ := asks(row)):
            found[row.slots] = all_
    if len(found) < items:
        raise UserError(f"{root} has {len(found)} restaurants that can be asked about; set items to at most that many")
    every = list(found.values())
    return [every[n * len(every) // items] for n in range(items)]
