"""Stacks: levers joined by `+`, as in `dual + threshold(0.9) + prophet(7.5, 5, 2.5)`, composed into one recipe."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from itertools import combinations
from operator import and_, or_
from typing import Any

from unmask.decode.algebra import TERMS, Pick, Rule, Where, as_pick
from unmask.decode.belief import Belief
from unmask.decode.blocks import Blocks
from unmask.decode.early import Prefer
from unmask.decode.expression import cut, parse
from unmask.decode.pick import Drawn
from unmask.decode.recipe import Recipe, contents, reaches, remembered
from unmask.decode.where import Everything, everything, filled, masked
from unmask.errors import UserError
from unmask.models.config import Layout
from unmask.recipes.levers import levers
from unmask.recipes.reading import Reader, Use, lever_in, pieces, tidy

SIMPLE = "threshold"
"""The lever that commits where none is typed and none of those typed brings one."""
BLOCK = 32
"""Cells of a block where none is asked for."""
ONCE = {
    "block": "both set the size of the blocks",
    "query": "both say what is computed",
    "commit": "both say how many cells a forward commits",
    "watch": "both end a row early",
    "remask": "both say what is given back",
    "edit": "both rewrite what is decided",
    "stop": "both say when a row is done",
}
"""Parts of a recipe that one lever fills, and what two that do so both do."""


def is_stack(text: str) -> bool:
    """Is it levers joined by `+` (or meant to be), or one lever whose name is no rule that could stand for itself?"""
    if len(list(pieces(text))) > 1:
        return True
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if isinstance(node, ast.BinOp | ast.UnaryOp):  # levers joined by another sign, which `build` tells
        return lever_in(node) is not None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        word = TERMS.get(node.func.id)
        return node.func.id != "Recipe" and (word is None or (isinstance(word, type) and issubclass(word, Belief)))
    return isinstance(node, ast.Name) and node.id in levers()


def build(
    text: str,
    *,
    given: Mapping[str, Any] | None = None,
    length: int | None = None,
    layout: Layout | None = None,
    cite: str = "",
) -> Recipe:
    """The recipe of a stack, named by its text; UserError, with the column, for what is no stack or cannot work.

    `given`: settings said elsewhere, for the levers that have them. Blocks and steps not said are `fitted` to `length`
    (cells of the response) and to the model's `layout`.
    """
    return _composed(tidy(text), length, layout, cite, **(given or {}))


@remembered
def _composed(text: str, length: int | None, layout: Layout | None, cite: str, /, **given: Any) -> Recipe:
    return _Composer(text, given, length, layout).recipe(cite)


def fitted(length: int | None, layout: Layout | None = None, block: int | None = None) -> dict[str, Any]:
    """What follows from the cells of the response and from the model's layout, where they are known.

    Blocks and their grid are those a block-causal model attends in, or else 32 cells or as many as there are; steps are
    one a cell. A schedule gives every block the same number of steps, so an incomplete last one counts as whole.
    """
    found: dict[str, Any] = {}
    if layout is not None and layout.kind == "block":
        found = {"block": block or layout.size, "grid": layout.grid}
    elif length is not None:
        found = {"block": block or min(BLOCK, length)}
    if length is not None and found:
        found["steps"] = -(-length // found["block"]) * found["block"]
    return found


def refusal(one: str, other: str) -> str:
    """Why two levers cannot stand in one stack, at their default settings; "" if they can."""
    try:
        build(f"{one} + {other}")
    except UserError as error:
        return _plain(error, f"{one} + {other}")
    return ""


def _plain(error: UserError, text: str) -> str:
    return re.sub(rf" at column \d+ of {re.escape(repr(cut(text)))}", "", str(error))


def from_toml(
    text: str, *, given: Mapping[str, Any] | None = None, length: int | None = None, layout: Layout | None = None
) -> Recipe | None:
    """The recipe of a TOML file that says `stack = "..."` (and may have a name and a cite); None for one without."""
    table = contents(text)
    if "stack" not in table:
        return None
    made = build(table["stack"], given=given, length=length, layout=layout, cite=table.get("cite", ""))
    return replace(made, name=table.get("name", made.name))


class _Composer(Reader):
    """One recipe of several levers."""

    def __init__(self, text: str, given: dict[str, Any], length: int | None, layout: Layout | None) -> None:
        super().__init__(text)
        self.given, self.length, self.layout = given, length, layout
        uses = self.read()
        self._refuse_pairs(uses)
        order = list(levers())
        uses = self._settled(sorted(self._completed(uses), key=lambda use: order.index(use.name)))
        self.values = {use.name: use.values for use in uses}
        self.block: int = self.values["blocks"]["block"]
        self.blocks = Blocks(self.block, self.layout.grid if self.layout and self.layout.kind == "block" else "origin")
        self.parts = {use.name: self._parts(use, uses) for use in uses}
        self.uses = uses

    def _refuse_pairs(self, uses: list[Use]) -> None:
        """UserError, with the reason and what to do instead, for two levers that do not go together."""
        for one, two in combinations(uses, 2):
            if two.name in one.lever.beside or one.name in two.lever.beside:
                continue
            for a, b in ((one, two), (two, one)):
                if reason := b.of(a.lever.refuses):
                    raise self.fail(two.column, *reason.format(other=b.name).split("; ", 1))
            for part, what in ONCE.items():
                if part in one.lever.parts and part in two.lever.parts:
                    raise self.fail(two.column, f"{one.name} and {two.name} {what}", "keep one")
        for use in uses:
            if (upon := use.lever.upon) and not any(other.name == upon for other in uses):
                raise self.fail(use.column, f"{use.name} needs {upon}", f"write {upon} + {use.name}")

    def _completed(self, uses: list[Use]) -> list[Use]:
        """With the size of the blocks and with what commits, where they are not typed."""
        more = [] if any(use.name == "blocks" for use in uses) else [Use(levers()["blocks"], 1, implied=True)]
        if not any("commit" in use.lever.parts for use in uses):
            order = list(levers())
            bases = [use.lever for use in uses if use.lever.base]
            bases.sort(key=lambda lever: (lever.kind != "revise", order.index(lever.name)))
            base = Reader(bases[0].base if bases else SIMPLE).read()[0]
            more.append(Use(base.lever, 1, values=base.typed, implied=True))
        return [*uses, *more]

    def _settled(self, uses: list[Use]) -> list[Use]:
        """With a value for every setting: as typed, as said elsewhere, as follows from the length, or the default."""
        self._check_given(uses)
        size = next(use for use in uses if use.name == "blocks").typed.get("block", self.given.get("block"))
        found = fitted(self.length, self.layout, size)
        return [replace(use, values=self._values(use, found)) for use in uses]

    def _check_given(self, uses: list[Use]) -> None:
        """UserError for a setting said elsewhere that no lever has, that it cannot have, or that is typed otherwise."""
        if strange := [name for name in self.given if not any(name in use.lever.settings for use in uses)]:
            has = ", ".join(dict.fromkeys(name for use in uses for name in use.lever.settings))
            raise UserError(f"no lever of {cut(self.text)!r} has a setting {strange[0]}; they have {has}")
        for use in uses:
            for name, value in self.given.items():
                if name not in use.lever.settings:
                    continue
                if fault := use.lever.settings[name].fault(value):
                    raise UserError(f"{name} of {use.name} must be {fault}, not {value!r:.80}")
                if (typed := use.typed.get(name, value)) != value:
                    told = f"{name} of {use.name} is {value!r} elsewhere and {typed!r}", "give one"
                    raise self.fail(use.columns[name], *told)

    def _values(self, use: Use, fitted: Mapping[str, Any]) -> dict[str, Any]:
        default = use.lever.defaults
        known, given = ({k: v for k, v in table.items() if k in default} for table in (fitted, self.given))
        return {**default, **known, **use.values, **given, **use.typed}

    def _parts(self, use: Use, uses: list[Use]) -> dict[str, Any]:
        """What the lever fills in beside the others, as rules."""
        texts, words = dict(use.lever.parts), dict(use.values)
        changed: dict[str, Use] = {}
        for other in (other for other in uses if other is not use and not other.implied):
            for part, text in (other.of(use.lever.beside) or {}).items():
                if texts.get(part) != text and part in changed:
                    three = f"{use.name}, {changed[part].name} and {other.name}"
                    last = max(use.column, other.column, changed[part].column)
                    raise self.fail(last, f"{three} do not go together", "leave one out")
                texts[part], changed[part], words = text, other, {**other.values, **words}
        words["b"] = self.blocks
        for word, text in texts.pop("let", {}).items():
            words[word] = self._rule(use, text, words)
        rules = {part: text for part, text in texts.items() if isinstance(text, str) and text and part != "sure"}
        return {**texts, **{part: self._rule(use, text, words) for part, text in rules.items()}}

    def _rule(self, use: Use, text: str, words: Mapping[str, Any]) -> Rule:
        try:
            return parse(text, words)
        except UserError as error:
            raise self.fail(use.column, *_plain(error, text).split("; ", 1)) from None

    def _filled(self, part: str) -> list[Any]:
        """What the levers say of a part of the recipe."""
        return [found for parts in self.parts.values() if (found := parts.get(part))]

    def recipe(self, cite: str) -> Recipe:
        """All parts together."""
        query = reduce(and_, self._filled("only"), next(iter(self._filled("query")), everything))
        if not isinstance(query, Everything):
            for more in self._filled("reads"):
                query = query | more
        query, unmask = self._early(query, self._commit())
        parts: dict[str, Any] = {part: next(iter(self._filled(part)), None) for part in ("remask", "edit")}
        stop = reduce(or_, self._filled("ends"), next(iter(self._filled("stop")), filled))
        parts |= {"stop": stop, "beliefs": tuple(self._filled("belief"))}
        self._check(query, unmask, parts)
        cites = "; ".join(dict.fromkeys(use.lever.cite for use in self.uses if use.lever.cite))
        revisions = max([1, *self._filled("revisions")])
        try:
            return Recipe(query, unmask, **parts, revisions=revisions, name=self.text, cite=cite or cites)
        except UserError as error:
            raise UserError(f"{error} (the stack {cut(self.text)!r})") from None

    def _commit(self) -> Pick:
        """What a forward commits: within the block, or in what an exit leaves to be written.

        Where a lever commits more (`also`) it says itself in what; what it commits `first` it commits alone.
        """
        (commit,) = self._filled("commit")
        places = {use.lever.kind: place for use in self.uses if (place := self.parts[use.name].get("within"))}
        place = places.get("exit", places.get("commit"))
        commit = reduce(or_, self._filled("also"), as_pick(commit) if place is None else place >> commit)
        return reduce(lambda rest, first: Prefer(first, rest), self._filled("first"), commit)

    def _early(self, query: Where, commit: Pick) -> tuple[Where, Pick]:
        """What is computed and committed where a lever watches an answer and ends a row early.

        What it watches is computed in every forward. The rest is committed with it, if its logits are there (and if it
        is to be committed at all); where the query does not compute all that is undecided, the answer is committed
        alone, and the next forward, which sees that it was (`b.ahead`), is a full one and commits the rest. The
        committed answer is the only memory.
        """
        use = next((use for use in self.uses if "sure" in use.lever.parts), None)
        if use is None:
            return query, commit
        watch, clock = self.parts[use.name]["watch"], next(iter(self._filled("clock")), None)
        words = {**use.values, "watch": watch, "clock": clock, "b": self.blocks}
        sure: Any = self._rule(use, use.lever.parts["sure"], words)
        if not isinstance(query, Everything):
            query = query | watch
        if use.lever.parts.get("alone"):
            return query, Prefer(watch.when(sure), commit)
        if reaches(query, masked, every=True):
            return query, everything.when(sure) | commit
        ahead = self.blocks.ahead
        return query | everything.when(ahead), everything.when(sure | ahead) | watch.when(sure) | commit

    def _check(self, query: Where, unmask: Pick, parts: Mapping[str, Any]) -> None:
        """UserError for settings that do not fit each other, with the column of the one to change."""
        joint = next((use for use in self.uses if use.name == "joint"), None)
        drawing = any(isinstance(rule, Drawn) for rule in unmask.walk())
        confined = drawing and any(isinstance(r, Blocks) for p in self._filled("within") for r in p.walk())
        if joint is not None and confined and joint.values["k"] > self.block:
            told = f"joint({joint.values['k']}) draws more cells than a block of {self.block} has"
            raise self.fail(joint.columns.get("k", joint.column), told, "use at most that many")
        blocks = next(use for use in self.uses if use.name == "blocks")
        rules = [query, unmask, *(rule for rule in parts.values() if isinstance(rule, Rule))]
        if any(isinstance(inner, Blocks) for rule in rules for inner in rule.walk()):
            return
        if not blocks.implied:
            told = "no lever of this stack goes by blocks, so that blocks changes nothing", "leave it out"
            raise self.fail(blocks.column, *told)
        if "block" in self.given:
            raise UserError(f"no lever of {cut(self.text)!r} goes by blocks; leave out block")
