"""Procedural grade-school word problems within 100, with held-out draws, templates and numbers.

A problem is a question in words, a chain of equations and one answer. Every template group keeps its last phrasing for
testing (`split="templates"`); every equation whose hash falls in the reserved sixteenth is kept for testing
(`split="numbers"`); every question whose hash falls in the reserved sixty-fourth is kept for testing (`split="draws"`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

LIMIT = 100
"""All numbers, given and computed, lie in [0, LIMIT)."""

Split = Literal["train", "draws", "templates", "numbers"]

WOMEN = "Anna Mary Lisa Emma Sara Julia Kate Nina Rosa Olga Maya Zoe Ella Lucy Amy Jane".split()
MEN = "Tom John Ben Max Leo Paul Sam Jack Adam Carl Dan Eric Fred Hugo Ivan Mark".split()
ITEMS = (
    "apples books pencils cards coins stamps marbles shells stickers cookies eggs balls toys flowers pears cups".split()
)
BOXES = "boxes bags baskets packs jars".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

PHRASES: dict[str, tuple[str, ...]] = {
    "start": (
        "{n} has {a} {i} .",
        "{n} starts with {a} {i} .",
        "There are {a} {i} in the bag of {n} .",
        "{n} owns {a} {i} .",
    ),
    "gain": (
        "{P} buys {a} more {i} .",
        "{o} gives {a} {i} to {n} .",
        "On {d} {p} finds {a} more {i} .",
        "Then {p} gets {a} {i} from {o} .",
    ),
    "lose": (
        "{P} gives {a} {i} to {o} .",
        "On {d} {p} loses {a} {i} .",
        "Then {p} sells {a} {i} .",
        "{o} takes {a} {i} from {n} .",
    ),
    "packs": (
        "{P} buys {a} {x} of {b} {i} each .",
        "{o} brings {n} {a} {x} with {b} {i} each .",
        "Then {p} gets {a} {x} of {b} {i} .",
    ),
    "share": (
        "{P} gives {b} {i} to each of {a} friends .",
        "{P} sells {b} {i} to each of {a} people .",
        "Each of {a} friends takes {b} {i} from {n} .",
    ),
    "double": ("Then {p} doubles the {i} .", "The number of {i} doubles .", "Now {n} has twice as many {i} ."),
    "halve": ("{P} gives half of the {i} to {o} .", "Then {p} loses half of the {i} .", "{o} takes half of the {i} ."),
    "now": (
        "How many {i} does {n} have now ?",
        "How many {i} does {n} have at the end ?",
        "How many {i} are left for {n} ?",
    ),
    "more": (
        "{o} has {a} more {i} than {n} .",
        "{o} owns {a} more {i} than {n} .",
        "{n} has {i} too but {o} has {a} more .",
    ),
    "fewer": (
        "{o} has {a} fewer {i} than {n} .",
        "{o} has {a} {i} less than {n} .",
        "{n} has {i} too but {o} has {a} fewer .",
    ),
    "twice": (
        "{o} has twice as many {i} as {n} .",
        "{o} has two times as many {i} as {n} .",
        "{o} has double the {i} of {n} .",
    ),
    "half": (
        "{o} has half as many {i} as {n} .",
        "{o} has half of what {n} has .",
        "{o} has one half of the {i} of {n} .",
    ),
    "other": ("How many {i} does {o} have ?", "How many {i} are with {o} ?"),
    "together": (
        "How many {i} do they have together ?",
        "How many {i} do {n} and {o} have in total ?",
        "How many {i} is that for both ?",
    ),
    "cost": (
        "{P} buys {a} {i} for {b} dollars each .",
        "{P} pays {b} dollars each for {a} {i} .",
        "{P} gets {a} {i} at {b} dollars each .",
    ),
    "purse": (
        "{n} has {a} dollars .",
        "{n} goes to the shop with {a} dollars .",
        "There are {a} dollars in the purse of {n} .",
    ),
    "left": ("How many dollars does {p} have left ?", "How many dollars are left ?", "How much money is left ?"),
    "spent": ("How many dollars does {p} spend ?", "How many dollars does {p} pay in total ?", "What does {p} pay ?"),
    "rate": ("{n} makes {a} {i} every day .", "{n} collects {a} {i} a day .", "Every day {n} makes {a} {i} ."),
    "days": ("{P} does so for {b} days .", "This goes on for {b} days .", "{b} days go by ."),
    "broken": ("Then {a} of the {i} break .", "{a} of them are broken .", "{P} finds that {a} are broken ."),
    "good": ("How many good {i} are there ?", "How many {i} are good ?"),
    "split": (
        "{P} puts the {i} equally into {b} {x} .",
        "The {i} go equally into {b} {x} .",
        "{b} {x} share the {i} equally .",
    ),
    "each": ("How many {i} are in each of the {x} ?", "How many {i} does each hold ?"),
    "total": ("How many {i} are there in total ?", "How many {i} is that in total ?"),
}

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


@dataclass(frozen=True)
class Equation:
    """a op b = result, all in [0, LIMIT)."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        """The number on the right-hand side."""
        return OPERATIONS[self.op](self.a, self.b)

    @property
    def reserved(self) -> bool:
        """Kept for testing: one in sixteen of the sums and differences of two numbers of two digits."""
        wide = self.op in "+-" and min(self.a, self.b) >= 10
        return wide and zlib.crc32(f"{self.a}{self.op}{self.b}".encode()) % 16 == 0

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """One word problem: question text, the chain of equations, the answer."""

    question: str
    steps: tuple[Equation, ...]
    family: str
    held_template: bool

    @property
    def answer(self) -> int:
        """The result of the last equation."""
        return self.steps[-1].result

    @property
    def response(self) -> str:
        """The text a model should write: `a op b = c ; ... #### n`."""
        return " ; ".join(map(str, self.steps)) + f" #### {self.answer}"

    @property
    def split(self) -> Split | None:
        """The one split this problem belongs to; None if it is both of a held-out template and of held-out numbers."""
        reserved = any(step.reserved for step in self.steps)
        if self.held_template or reserved:
            return None if self.held_template and reserved else "templates" if self.held_template else "numbers"
        return "draws" if zlib.crc32(self.question.encode()) % 64 == 0 else "train"


class Overflow(Exception):
    """A number left [0, LIMIT): draw again."""


@dataclass
class Story:
    """A problem being told: sentences, equations and the current value."""

    r: random.Random
    held: float
    words: dict[str, str]
    text: list[str] = field(default_factory=list)
    steps: list[Equation] = field(default_factory=list)
    used_held: bool = False

    def say(self, group: str, **numbers: int) -> None:
        """Tell one sentence of the group, in its held-out phrasing with probability `held`."""
        phrases = PHRASES[group]
        held = self.r.random() < self.held
        self.used_held |= held
        phrase = phrases[-1] if held else self.r.choice(phrases[:-1])
        self.text.append(phrase.format(**self.words, **numbers))

    def calc(self, a: int, op: str, b: int) -> int:
        """Add an equation and return its result; Overflow where it does not stay a whole number in [0, LIMIT)."""
        if op == "/" and (b == 0 or a % b):
            raise Overflow
        equation = Equation(a, op, b)
        if not 0 <= equation.result < LIMIT or max(a, b) >= LIMIT:
            raise Overflow
        self.steps.append(equation)
        return equation.result

    def rename(self, **words: str) -> None:
        """Use these words in the sentences that follow."""
        self.words = self.words | words


def chain(s: Story, size: int) -> None:
    """One owner, `size` changes."""
    r, value, last = s.r, s.r.randint(5, 60), ""
    s.say("start", a=value)
    while len(s.steps) < size:
        op = r.choice(["gain", "lose", "packs", "share", "double", "halve"])
        if op == last:
            continue
        last = op
        if op in ("gain", "lose"):
            a = r.randint(2, 45)
            s.say(op, a=a)
            value = s.calc(value, "+" if op == "gain" else "-", a)
        elif op in ("packs", "share"):
            a, b = r.randint(2, 9), r.randint(2, 9)
            s.say(op, a=a, b=b)
            value = s.calc(value, "+" if op == "packs" else "-", s.calc(a, "*", b))
        else:
            s.say(op)
            value = s.calc(value, "*" if op == "double" else "/", 2)
    s.say("now")


def compare(s: Story, size: int) -> None:
    """Two people, one relation, then one of them or both."""
    value, a = s.r.randint(6, 60), s.r.randint(2, 40)
    s.say("start", a=value)
    op = s.r.choice(["more", "fewer", "twice", "half"])
    if op in ("more", "fewer"):
        s.say(op, a=a)
        other = s.calc(value, "+" if op == "more" else "-", a)
    else:
        s.say(op)
        other = s.calc(value, "*" if op == "twice" else "/", 2)
    if size == 1:
        s.say("other")
        return
    s.say("together")
    s.calc(value, "+", other)


def money(s: Story, size: int) -> None:
    """Purchases: what is spent, or what is left."""
    r, total = s.r, 0
    purse = r.randint(20, 99) if size % 2 == 0 else 0
    if purse:
        s.say("purse", a=purse)
    else:
        s.say("start", a=r.randint(5, 60))
    items = r.sample(ITEMS, 2)
    for k in range(2 if size >= 3 else 1):
        a, b = r.randint(2, 9), r.randint(2, 9)
        s.rename(i=items[k])
        s.say("cost", a=a, b=b)
        price = s.calc(a, "*", b)
        total = s.calc(total, "+", price) if k else price
    if purse:
        s.say("left")
        s.calc(purse, "-", total)
    else:
        s.say("spent")


def rate(s: Story, size: int) -> None:
    """So many a day for some days, then broken, split or kept."""
    r = s.r
    a, b = r.randint(2, 30), r.randint(2, 9)
    s.say("rate", a=a)
    s.say("days", b=b)
    value = s.calc(a, "*", b)
    if size == 1:
        s.say("total")
    elif r.random() < 0.5:
        c = r.randint(1, max(1, value - 1))
        s.say("broken", a=c)
        s.calc(value, "-", c)
        s.say("good")
    else:
        c = r.choice([x for x in range(2, 10) if value % x == 0] or [1])
        if c == 1:
            raise Overflow
        s.say("split", b=c)
        s.calc(value, "/", c)
        s.say("each")


FAMILIES = {"chain": chain, "compare": compare, "money": money, "rate": rate}


def draw(r: random.Random, *, held: float = 0.0) -> Problem:
    """Draw one problem; `held` is the probability of a held-out phrasing per sentence."""
    while True:
        woman = r.random() < 0.5
        n, o = r.sample(WOMEN if woman else MEN, 2)
        p = "she" if woman else "he"
        words = {
            "n": n,
            "o": o,
            "p": p,
            "P": p.capitalize(),
            "i": r.choice(ITEMS),
            "x": r.choice(BOXES),
            "d": r.choice(DAYS),
        }
        family = r.choice(["chain", "chain", "compare", "money", "rate"])
        story = Story(r, held, words)
        try:
            FAMILIES[family](story, r.choice([1, 2, 2, 3, 3]))
        except Overflow:
            continue
        if len(story.steps) <= 3:
            return Problem(" ".join(story.text), tuple(story.steps), family, story.used_held)


def problems(seed: int, split: Split = "train") -> Iterator[Problem]:
    """An endless stream of problems of one split; the same seed gives the same stream on every machine."""
    r = random.Random(f"unmask-{split}-{seed}")
    held = 0.3 if split == "templates" else 0.0
    while True:
        problem = draw(r, held=held)
        if problem.split == split:
            yield problem


def worksheet(stream: Iterator[Problem], k: int) -> tuple[str, str, list[int]]:
    """k problems as one prompt: (prompt, response, answers). k = 1 is the bare problem."""
    items = [next(stream) for _ in range(k)]
    if k == 1:
        return items[0].question, items[0].response, [items[0].answer]
    prompt = " ".join(f"Q{j} {p.question}" for j, p in enumerate(items, 1))
    response = " ".join(f"Q{j} {p.response}" for j, p in enumerate(items, 1))
    return prompt, response, [p.answer for p in items]


def answers(text: str) -> list[int | None]:
    """The numbers behind each `####` of a response; None where no number follows."""
    tails = [part.split() for part in text.split("####")[1:]]
    return [int(t[0]) if t and t[0].isdigit() else None for t in tails]
