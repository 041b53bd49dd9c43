"""The embedded pair's tasks as data: prompts, what is right, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unmask.errors import UserError, suggest
from unmask.train import problems, restaurants

Score = dict[str, float]


@dataclass(frozen=True)
class Item:
    """One prompt and the function that scores a response: a share in [0, 1] and details."""

    prompt: str
    score: Callable[[str], Score]
    gold: str


@dataclass(frozen=True)
class Task:
    """A named list of items and the response length they are decoded at."""

    name: str
    items: tuple[Item, ...]
    length: int


def _sheet(prompt: str, response: str, answers: list[int]) -> Item:
    def score(text: str) -> Score:
        found = problems.answers(text)
        right = sum(a == b for a, b in zip(found, answers, strict=False))
        return {"right": right / len(answers), "exact": float(text.strip() == response)}

    return Item(prompt, score, response)


def word_problems(n: int, *, split: problems.Split = "draws", k: int = 1, seed: int = 0) -> Task:
    """n worksheets of k held-out problems: `right` is the share of right final answers, `exact` the whole response."""
    stream = problems.problems(seed, split)
    length = {1: 24, 2: 48, 3: 88, 4: 88}.get(k, 176)
    items = tuple(_sheet(*problems.worksheet(stream, k)) for _ in range(n))
    return Task(f"problems-{split}" if k == 1 else f"worksheet-{k}", items, length)


def _restaurant(row: restaurants.Restaurant) -> Item:
    def score(text: str) -> Score:
        said = restaurants.realised(row.slots, text)
        return {"right": sum(said.values()) / max(1, len(said)), "doubled": float(restaurants.doubled(text))}

    return Item(row.prompt, score, row.sentence)


def descriptions(root: Path, n: int, *, split: str = "test") -> Task:
    """n distinct meaning representations of E2E, spread over the split: `right` is the share of slots realised."""
    rows = list({r.slots: r for r in restaurants.read(root, split)}.values())
    step = max(1, len(rows) // n)
    return Task("restaurants", tuple(_restaurant(r) for r in islice(rows[::step], n)), 40)


NAMES = ("problems", "problems-templates", "problems-numbers", "worksheet-8", "restaurants")


def make(name: str, n: int, e2e: Path | None = None) -> Task:
    """A task by its name."""
    if name == "restaurants":
        if e2e is None:
            raise UserError("the restaurants task reads the E2E data; pass its folder with --e2e")
        return descriptions(e2e, n)
    if name.startswith("worksheet-") and name[10:] in tuple("2345678"):
        return word_problems(max(1, n // int(name[10:])), k=int(name[10:]))
    splits: dict[str, Any] = {"problems": "draws", "problems-templates": "templates", "problems-numbers": "numbers"}
    if name not in splits:
        raise suggest(name, NAMES, "task")
    return word_problems(n, split=splits[name])
