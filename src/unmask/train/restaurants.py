"""E2E restaurant descriptions (Novikova et al. 2017, CC BY-SA 4.0): meaning representation -> sentence, and scoring."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from unmask.errors import UserError

SCORED = ("name", "near", "food", "area", "eatType")
"""Slots whose value must appear word for word in the sentence."""

NAMES = {"customerrating": "customer rating"}
WORD = re.compile(r"####|'s|[^\W_]+|[^\w\s]")
FILES = {"train": "train.jsonl.gz", "valid": "valid.jsonl.gz", "test": "test.jsonl.gz"}


@dataclass(frozen=True)
class Restaurant:
    """A meaning representation and one reference sentence."""

    slots: tuple[tuple[str, str], ...]
    sentence: str

    @property
    def prompt(self) -> str:
        """`name[Blue Spice], eatType[pub], ...`, spelled as the data set spells it."""
        return ", ".join(f"{k}[{v}]" for k, v in self.slots)


def parse(meaning: str) -> tuple[tuple[str, str], ...]:
    """Split a meaning representation into (slot, value) pairs with the spelling of slots and prices made uniform."""
    pairs: list[tuple[str, str]] = re.findall(r"([\w ]+)\[([^\]]*)\]", meaning)
    if not pairs:
        raise UserError(f"not a meaning representation: {meaning!r}; expected e.g. 'name[Blue Spice], eatType[pub]'")
    named = ((key.strip(), value) for key, value in pairs)
    return tuple((NAMES.get(key, key), re.sub(r"\s*([£-])\s*", r" \1 ", value).strip()) for key, value in named)


def words(text: str) -> list[str]:
    """Words and punctuation of a text, the units of realisation and doubling checks."""
    return WORD.findall(text)


def realised(slots: tuple[tuple[str, str], ...], text: str) -> dict[str, bool]:
    """For each scored slot: does its value appear word for word (case ignored, center = centre)?"""
    flat = f" {' '.join(words(text))} ".lower().replace(" center ", " centre ")
    return {k: f" {' '.join(words(v))} ".lower() in flat for k, v in slots if k in SCORED}


def doubled(text: str) -> bool:
    """Does any word follow itself?"""
    flat = words(text.lower())
    return any(a == b and a[0].isalnum() for a, b in pairwise(flat))


def read(root: Path, split: str) -> list[Restaurant]:
    """All pairs of a split of the data in `root`."""
    path = Path(root) / FILES[split]
    if not path.is_file():
        raise UserError(f"no E2E data at {path}; pass the folder that holds {FILES[split]} with --e2e")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Restaurant(parse(row["mr"]), " ".join(words(row["ref"]))) for row in rows]


def clean(rows: list[Restaurant], *, rare: int = 50, longest: int = 36) -> list[Restaurant]:
    """Pairs that say every scored slot, double no word, end in a full stop, are short and use frequent words only."""
    rows = [r for r in rows if all(realised(r.slots, r.sentence).values()) and not doubled(r.sentence)]
    rows = [Restaurant(r.slots, r.sentence if r.sentence.endswith(".") else r.sentence + " .") for r in rows]
    count = Counter(w for r in rows for w in words(r.sentence))
    return [r for r in rows if len(w := words(r.sentence)) <= longest and all(count[x] >= rare for x in w)]


def stream(rows: list[Restaurant], seed: int) -> Iterator[Restaurant]:
    """Endless shuffled passes over the rows."""
    r = random.Random(f"unmask-e2e-{seed}")
    while True:
        yield from r.sample(rows, len(rows))


def guide(source: Iterator[Restaurant], k: int) -> tuple[str, str, list[Restaurant]]:
    """k restaurants as one prompt: (prompt, response, rows). k = 1 is the bare pair."""
    items = [next(source) for _ in range(k)]
    if k == 1:
        return items[0].prompt, items[0].sentence, items
    prompt = " ".join(f"Q{j} {r.prompt}" for j, r in enumerate(items, 1))
    response = " ".join(f"Q{j} {r.sentence}" for j, r in enumerate(items, 1))
    return prompt, response, items
