"""A recipe: what to compute, what to commit, what to give back, when to stop. A published method is one of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from unmask.decode.algebra import (
    Pick,
    Rows,
    RowsOr,
    Rule,
    Then,
    Where,
    WhereAnd,
    WhereNot,
    WhereOr,
    WhereWhen,
    Whole,
    as_pick,
    rebuilt,
)
from unmask.decode.belief import Belief, Joint
from unmask.decode.blocks import Blocks, Onward
from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft
from unmask.decode.expression import parse
from unmask.decode.pick import MOST, Drawn
from unmask.decode.probe import Pinned, probes
from unmask.decode.serial import Held
from unmask.decode.where import Dirty, Everything, Masked, filled
from unmask.errors import UserError, suggest

PARTS = ("query", "unmask", "remask", "edit", "stop")
"""The expressions of a recipe file; `beliefs` (a list of expressions) and `revisions` (a number) stand beside them."""
TABLES, WORDS = ("recipe", "let", "defaults"), ("name", "title", "about", "cite", "reproduces", "stack")
"""What stands in a recipe file: tables, and what is said in words. A stack stands in place of all tables."""


@dataclass(frozen=True, repr=False)
class Recipe:
    """`query` names the cells to compute, `unmask` chooses what to commit, `remask` what to give back.

    `edit` chooses decided cells that take the drafted token, if it is another. A cell can be given back or edited
    `revisions` times, so every run ends. `stop` ends a row, `beliefs` wrap the denoiser, the first one innermost. A
    stack that cannot work is refused here, with the reason (ValueError).
    """

    query: Where
    unmask: Pick
    remask: Pick | None = None
    stop: Rows = filled
    edit: Pick | None = None
    beliefs: tuple[Belief, ...] = ()
    revisions: int = 1
    name: str = field(default="", compare=False)
    cite: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for part, kind in (("query", Where), ("stop", Rows)):
            if not isinstance(getattr(self, part), kind):
                raise UserError(f"{part} must be a {kind.__name__}, not {getattr(self, part)!r}")
        for part in ("unmask", "remask", "edit"):
            rule = getattr(self, part)
            if isinstance(rule, Pick | Where):
                object.__setattr__(self, part, as_pick(rule))
            elif part == "unmask" or rule is not None:
                raise UserError(f"{part} must choose cells; {rule!r} does not")
        beliefs = (self.beliefs,) if isinstance(self.beliefs, Belief) else self.beliefs
        if not isinstance(beliefs, Sequence) or isinstance(beliefs, str):
            raise UserError(f"beliefs must be a list of wrappers such as joint(4), not {beliefs!r:.80}")
        object.__setattr__(self, "beliefs", tuple(beliefs))
        for belief in self.beliefs:
            if not isinstance(belief, Belief):
                raise UserError(f"beliefs are wrappers of the denoiser, such as joint(4); {belief!r} is none")
        if type(self.revisions) is not int or not 1 <= self.revisions <= MOST:
            told = f"a whole number of at least 1 and at most {MOST}"
            raise UserError(f"revisions must be {told}, not {self.revisions!r:.80}")
        self._refuse()

    def _refuse(self) -> None:
        if not (self.query.always or any(isinstance(r, Dirty) for r in self.query.walk())):
            raise UserError(f"{self.query!r} may compute no undecided cell and never end; add `| masked`")
        if not self.stop.always:
            raise UserError(f"{self.stop!r} may hold of no full row; add `| filled`")
        if not self.unmask.always:
            raise UserError(f"{self.unmask!r} may commit nothing and never end; add `| best(1)`")
        stops = {rule._name for rule in _sides(self.stop)}
        for left in (r.optional for r in self.unmask.walk() if isinstance(r, Where)):
            if left and left not in stops:
                raise UserError(f"{self.unmask!r} leaves cells undecided on purpose; its stop must be `{left}`")
        self._refuse_joint()
        self._refuse_probe()
        for rule in self.unmask.walk():
            if isinstance(rule, Held) and rule.edit != self.edit:
                raise UserError(f"held looks at what edit rewrites; give it the recipe's own, {self.edit!r}")
        for early in self.unmask.walk():
            if isinstance(early, Whole) and not reaches(self.query, early.rule):
                raise UserError(
                    f"early commit needs logits of every undecided cell of {early.rule!r}, and {self.query!r} never "
                    "computes them all; add `everything.when(every(8))` or a prefix window to the query"
                )

    def _refuse_joint(self) -> None:
        drawing = [r for r in self.unmask.walk() if isinstance(r, Drawn)]
        if len(joints := [b for b in self.beliefs if isinstance(b, Joint)]) > 1:
            raise UserError(f"{joints[0]!r} and {joints[1]!r} both draw; keep one")
        if drawing and self.joint is None:
            raise UserError(f"{self.unmask!r} takes what a joint sampler drew; add joint(4) to its beliefs")
        for rule in self.unmask.walk():
            if isinstance(rule, Then) and self.joint and any(isinstance(r, Drawn) for r in rule.right.walk()):
                sizes = [r.size for r in rule.left.walk() if isinstance(r, Blocks)]
                if sizes and self.joint.k > min(sizes):
                    raise UserError(
                        f"{self.joint!r} draws more tokens than a block of {min(sizes)} has; use at most that many"
                    )

    def _refuse_probe(self) -> None:
        pinned = {belief.probe for belief in self.beliefs if isinstance(belief, Pinned)}
        asked = probes(rule for part in (self.query, self.unmask, self.stop) for rule in part.walk())
        if len(asked | pinned) > 1:
            raise UserError(f"{' and '.join(sorted(map(repr, asked | pinned)))} are two probes; use one")
        for probe in asked ^ pinned:
            told = "add pinned(...) to its beliefs" if probe in asked else "add it to its query"
            raise UserError(f"{probe!r} is asked for in the query, and pinned by a belief; {told}")
        if pinned and (self.remask or self.edit):
            raise UserError("a probe stands behind blocks that stay as they are decided; leave remask and edit out")

    @property
    def joint(self) -> Joint | None:
        """The joint sampler that draws its tokens, if one does."""
        return next((b for b in self.beliefs if isinstance(b, Joint)), None)

    @property
    def guided(self) -> bool:
        """Does it need a guide: an autoregressive model of the same tokenizer?"""
        return any(getattr(r, "guided", False) for r in (*self.unmask.walk(), *self.beliefs))

    @property
    def allowance(self) -> int:
        """How often each cell may be given back or edited: none where the recipe does neither."""
        return self.revisions if self.remask or self.edit else 0

    @property
    def cached(self) -> bool:
        """Does any forward rely on keys and values of an earlier one?"""
        return not isinstance(self.query, Everything)

    @cached_property
    def _readers(self) -> tuple[Rule, ...]:
        return tuple(
            rule for part in (self.unmask, self.remask, self.edit, self.stop) if part for rule in _readers(part)
        )

    def walk(self) -> Iterator[Rule]:
        """Every rule of every part, and every rule inside it."""
        for part in (*(getattr(self, name) for name in PARTS), *self.beliefs):
            if part is not None:
                yield from part.walk()

    def rebuilt(self, change: Callable[[Rule], Rule]) -> Recipe:
        """The same recipe with `change` applied to every rule of every part."""
        parts = {part: rebuilt(rule, change) for part in PARTS if (rule := getattr(self, part)) is not None}
        beliefs: Any = tuple(rebuilt(belief, change) for belief in self.beliefs)
        return replace(self, **parts, beliefs=beliefs)

    def need(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: cells whose logits some rule wants: the undecided ones and what rules read beyond them."""
        found = canvas.masked
        for rule in self._readers:
            more = rule.reads(canvas)
            found = found if more is None else found | more
        return found if self.remask is None and self.edit is None else found | canvas.revocable

    def __repr__(self) -> str:
        shown = [f"{part}={getattr(self, part)!r}" for part in PARTS if getattr(self, part) is not None]
        shown += [f"beliefs=[{', '.join(map(repr, self.beliefs))}]"] if self.beliefs else []
        shown += [f"revisions={self.revisions}"] if self.revisions != 1 else []
        return f"Recipe({', '.join(shown)})"

    @property
    def hash(self) -> str:
        """Twelve hex digits that name what the recipe does, whatever it is called."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def to_toml(self) -> str:
        """The recipe as TOML; `from_toml` reads it back."""
        head = [f"{key} = {_quote(getattr(self, key))}" for key in ("name", "cite") if getattr(self, key)]
        body = [f"{part} = {_quote(repr(getattr(self, part)))}" for part in PARTS if getattr(self, part) is not None]
        body += [f"beliefs = [{', '.join(_quote(repr(b)) for b in self.beliefs)}]"] if self.beliefs else []
        body += [f"revisions = {self.revisions}"] if self.revisions != 1 else []
        return "\n".join([*head, *([""] if head else []), "[recipe]", *body, ""])

    @staticmethod
    def from_toml(text: str, **names: object) -> Recipe:
        """Read a recipe; `names` and the file's `[defaults]` table are words its expressions may use."""
        return _read(text, **names)


def remembered(make: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """`make`, asked again only for what it has not made of late: a recipe is a value, and takes long to read."""
    known = lru_cache(maxsize=256, typed=True)(make)

    @wraps(make)
    def call(*args: Any, **named: Any) -> Recipe:
        try:
            hash((args, tuple(named.values())))
        except TypeError:  # no setting that can be right, and `make` says so
            return make(*args, **named)
        return known(*args, **named)

    return call


@remembered
def _read(text: str, **names: object) -> Recipe:
    data = contents(text)
    known = {**data.get("defaults", {}), **names}
    table = data.get("recipe", {})
    if missing := [p for p in ("query", "unmask") if p not in table]:
        raise UserError(f"the recipe lacks {' and '.join(missing)}")
    for word, text_of in data.get("let", {}).items():
        known[word] = parse(text_of, known)
    parts: dict[str, Any] = {part: parse(table[part], known) for part in PARTS if part in table}
    said = table.get("beliefs", [])
    beliefs: Any = tuple(parse(text_of, known) for text_of in ([said] if isinstance(said, str) else said))
    more = {"beliefs": beliefs, "revisions": table.get("revisions", 1)}
    return Recipe(**parts, **more, name=data.get("name", ""), cite=data.get("cite", ""))


def contents(text: str) -> dict[str, Any]:
    """What a recipe file says; UserError for what has no place in one or is of another type than it must be."""
    import tomllib

    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"not a recipe file: {error}") from None
    _check_words(data)
    table = data.get("recipe", {})
    if unknown := sorted(set(table) - {*PARTS, "beliefs", "revisions"}):
        raise UserError(f"a recipe has {', '.join(PARTS)}, beliefs and revisions, not {', '.join(unknown)}")
    said = table.get("beliefs", [])
    texts = {name: value for name, value in table.items() if name in PARTS} | data.get("let", {})
    texts |= {"beliefs": said} if not isinstance(said, list) else {f"belief {n}": b for n, b in enumerate(said, 1)}
    for name, value in texts.items():
        if not isinstance(value, str):
            listed = ", or a list of such" if name == "beliefs" else ""
            raise UserError(f"{name} must be an expression in quotes{listed}, not {value!r:.80}")
    for name, value in data.get("defaults", {}).items():
        if not isinstance(value, str | int | float):
            raise UserError(f"{name} in [defaults] must be a number or a word, not {value!r:.80}")
    return data


def _check_words(data: Mapping[str, Any]) -> None:
    """UserError for what a recipe file has outside of its tables, and for a table that is none."""
    if "stack" in data and (strange := sorted(set(data) - {"stack", "name", "cite", "title", "about"})):
        raise UserError(f"a recipe file with a stack has nothing but a name and a cite beside it, not {strange[0]!r}")
    for key, value in data.items():
        if key in (*PARTS, "beliefs", "revisions"):
            raise UserError(f"{key} stands outside of its table; write [recipe] before it")
        if key not in (*TABLES, *WORDS):
            raise suggest(key, (*TABLES, *WORDS), "word of a recipe file")
        kind, told = (dict, f"a table, [{key}]") if key in TABLES else (str, "a text")
        if not isinstance(value, kind):
            raise UserError(f"{key} must be {told}, not {value!r:.80}")


def reaches(query: Where, cells: Where, *, every: bool = False) -> bool:
    """Can one forward of `query` compute every undecided cell of `cells`, in every row at some (`every`: each) step?"""
    if query == cells or isinstance(query, Everything | Masked | Onward):
        return True
    if isinstance(query, WhereOr):
        return reaches(query.left, cells, every=every) or reaches(query.right, cells, every=every)
    if isinstance(query, WhereAnd):
        return reaches(query.left, cells, every=every) and reaches(query.right, cells, every=every)
    if isinstance(query, WhereWhen):
        return not every and reaches(query.rule, cells)
    return isinstance(query, WhereNot) and query.rule.decided


def _sides(stop: Rows) -> Iterator[Rows]:
    """The conditions each of which is enough."""
    if isinstance(stop, RowsOr):
        yield from _sides(stop.left)
        yield from _sides(stop.right)
    else:
        yield stop


def _readers(rule: Rule) -> Iterator[Rule]:
    """The rules inside `rule` that answer for themselves what they read."""
    if type(rule).reads is not Rule.reads:
        yield rule
    else:
        for part in rule.parts:
            yield from _readers(part)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Mixed:
    """Several recipes in one batch: the row in slot s follows `recipes[which[s]]`. It stands where a Recipe stands."""

    recipes: tuple[Recipe, ...]
    which: Tensor
    """[slots] int64."""

    @property
    def cached(self) -> bool:
        """Does any forward of any of the recipes rely on an earlier one?"""
        return any(r.cached for r in self.recipes)

    @property
    def remask(self) -> Pick | None:
        """What each row's recipe gives back; None where no recipe gives anything back."""
        return _MixedPick(self, "remask") if any(r.remask for r in self.recipes) else None

    @property
    def edit(self) -> Pick | None:
        """What each row's recipe rewrites; None where no recipe rewrites anything."""
        return _MixedPick(self, "edit") if any(r.edit for r in self.recipes) else None

    @property
    def unmask(self) -> Pick:
        """What each row's recipe commits."""
        return _MixedPick(self, "unmask")

    def query(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: the cells that each row's recipe computes."""
        return self._rows(canvas, lambda recipe, rows: recipe.query(canvas[rows]))

    def need(self, canvas: Canvas) -> Tensor:
        """[B, L] bool: the cells whose logits each row's recipe wants."""
        return self._rows(canvas, lambda recipe, rows: recipe.need(canvas[rows]))

    def stop(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        """[B] bool: the rows that end by their own recipe."""
        return self._rows(
            canvas, lambda r, rows: r.stop(canvas[rows], None if draft is None else draft[rows]), wide=False
        )

    def _rows(self, canvas: Canvas, compute, *, wide: bool = True) -> Tensor:
        out = torch.zeros_like(canvas.given if wide else canvas.done)
        which = self.which[canvas.slot]
        for number, recipe in enumerate(self.recipes):
            rows = (which == number).nonzero()[:, 0]
            if len(rows):
                out[rows] = compute(recipe, rows)
        return out


@dataclass(frozen=True, repr=False)
class _MixedPick(Pick):
    mixed: Mixed
    part: str

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        def choose(recipe: Recipe, rows: Tensor) -> Tensor:
            rule = getattr(recipe, self.part)
            return torch.zeros_like(among[rows]) if rule is None else rule(canvas[rows], draft[rows], among[rows])

        return self.mixed._rows(canvas, choose)
