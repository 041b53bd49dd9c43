"""The algebra of rules: positions (Where), choices (Pick) and rows (Rows), joined by `| & ~ >> .when` and nothing else.

Every rule is a frozen dataclass; its repr is the expression that makes it (`parse` in expression.py reads it back).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor

from unmask.decode.canvas import Canvas
from unmask.decode.draft import Draft

TERMS: dict[str, Any] = {}
"""Names that an expression may use: rule classes (called) and ready rules (as they are)."""

R = TypeVar("R", bound="Rule")


def term(name: str) -> Callable[[type[R]], type[R]]:
    """Register a rule class under the name that expressions and reprs use."""

    def register(cls: type[R]) -> type[R]:
        TERMS[name] = cls
        cls._name = name
        return cls

    return register


def ready(name: str, rule: R) -> R:
    """Register a rule without parameters: expressions use it by name, without a call."""
    TERMS[name] = rule
    type(rule)._name = name
    return rule


class Rule:
    """What all rules share: a printable form, and what they must be shown."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    _name = ""
    _binds = 5
    """How tightly the printed form binds: 1 |, 2 &, 3 >>, 4 ~, 5 everything else."""

    def __repr__(self) -> str:
        if isinstance(TERMS.get(self._name), Rule):
            return self._name
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is MISSING:
                parts.append(repr(value))
            elif value != f.default:
                parts.append(f"{f.name}={value!r}")
        return f"{self._name}({', '.join(parts)})"

    @cached_property
    def parts(self) -> tuple[Rule, ...]:
        """The rules this one is made of."""
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(v for v in values if isinstance(v, Rule))

    def walk(self) -> Iterator[Rule]:
        """This rule and every rule inside it."""
        yield self
        yield from self._inside

    @cached_property
    def _inside(self) -> tuple[Rule, ...]:
        return tuple(rule for part in self.parts for rule in part.walk())

    def reads(self, canvas: Canvas) -> Tensor | None:
        """[B, L] bool: decided cells whose logits the rule wants to see too; None for none."""
        found = None
        for part in self.parts:
            more = part.reads(canvas)
            found = more if found is None else found if more is None else found | more
        return found

    def inside(self, part: Rule, binds: int) -> str:
        """`part` printed as an operand."""
        return repr(part) if part._binds >= binds else f"({part!r})"


class Where(Rule, ABC):
    """A set of positions named from the canvas alone: canvas -> [B, L] bool."""

    always = False
    """Does it hold an undecided cell of every row that has one and is to go on?"""
    optional = ""
    """The stop under which a row may end with these cells undecided, by its name."""
    decided = False
    """Does it hold no undecided cell?"""

    @abstractmethod
    def __call__(self, canvas: Canvas) -> Tensor: ...

    def __or__(self, other: Where | Pick) -> Any:
        return WhereOr(self, other) if isinstance(other, Where) else PickOr(Chosen(self), other)

    def __and__(self, other: Where) -> WhereAnd:
        return WhereAnd(self, other)

    def __invert__(self) -> WhereNot:
        return WhereNot(self)

    def __rshift__(self, other: Pick | Where) -> Then:
        return Then(Chosen(self), as_pick(other))

    def when(self, rows: Rows) -> Any:
        """These positions in the rows that satisfy `rows`; a choice of all or none, where `rows` looks at the draft."""
        return Whole(self, rows) if rows.drafted else WhereWhen(self, rows)


class Pick(Rule, ABC):
    """A choice function: (canvas, draft, candidates [B, L]) -> the chosen candidates [B, L]."""

    always = False
    """Does it choose at least one cell of every row that has a candidate?"""
    guided = False
    """Does it read the second opinion of a guide?"""

    @abstractmethod
    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor: ...

    def __or__(self, other: Pick | Where) -> PickOr:
        return PickOr(self, as_pick(other))

    def __rshift__(self, other: Pick | Where) -> Then:
        return Then(self, as_pick(other))

    def when(self, rows: Rows) -> PickWhen:
        """The same choice in the rows that satisfy `rows`, nothing elsewhere."""
        return PickWhen(self, rows)


class Rows(Rule, ABC):
    """A condition on rows: (canvas, draft) -> [B] bool. `drafted` ones need the draft."""

    drafted = False
    always = False
    """As a stop: does it hold for every row without undecided cells?"""

    @abstractmethod
    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor: ...

    def __or__(self, other: Rows) -> RowsOr:
        return RowsOr(self, other)

    def __and__(self, other: Rows) -> RowsAnd:
        return RowsAnd(self, other)

    def __invert__(self) -> RowsNot:
        return RowsNot(self)


def rebuilt(rule: R, change: Callable[[Rule], Rule]) -> R:
    """The same rule with `change` applied to every rule inside it, from the inside out, and to itself."""
    parts = {f.name: rebuilt(v, change) for f in fields(rule) if isinstance(v := getattr(rule, f.name), Rule)}
    return cast(R, change(replace(rule, **parts) if parts else rule))


def as_pick(rule: Pick | Where) -> Pick:
    """A Where as the choice of all candidates that lie in it."""
    return Chosen(rule) if isinstance(rule, Where) else rule


class _Binary(Rule):
    _sign = ""

    def __repr__(self) -> str:
        left, right = self.parts
        return f"{self.inside(left, self._binds)} {self._sign} {self.inside(right, self._binds + 1)}"


class _Or(_Binary):
    _sign, _binds = "|", 1


class _And(_Binary):
    _sign, _binds = "&", 2


class _Not(Rule):
    _binds = 4

    def __repr__(self) -> str:
        return f"~{self.inside(self.parts[0], 4)}"


class _When(Rule):
    def __repr__(self) -> str:
        return f"{self.inside(self.parts[0], 5)}.when({self.parts[1]!r})"


@dataclass(frozen=True, repr=False)
class WhereOr(_Or, Where):
    """Positions in either."""

    left: Where
    right: Where

    @property
    def always(self) -> bool:
        """One of the two is enough."""
        return self.left.always or self.right.always

    def __call__(self, canvas: Canvas) -> Tensor:
        return self.left(canvas) | self.right(canvas)


@dataclass(frozen=True, repr=False)
class WhereAnd(_And, Where):
    """Positions in both."""

    left: Where
    right: Where

    @property
    def always(self) -> bool:
        """It takes both."""
        return self.left.always and self.right.always

    def __call__(self, canvas: Canvas) -> Tensor:
        return self.left(canvas) & self.right(canvas)


@dataclass(frozen=True, repr=False)
class WhereNot(_Not, Where):
    """Positions outside of `rule`, the padding included."""

    rule: Where

    @property
    def always(self) -> bool:
        """Are the cells it leaves out optional or decided?"""
        return bool(self.rule.optional) or self.rule.decided

    def __call__(self, canvas: Canvas) -> Tensor:
        return ~self.rule(canvas)


@dataclass(frozen=True, repr=False)
class WhereWhen(_When, Where):
    """Positions of `rule` in the rows that satisfy `rows`."""

    rule: Where
    rows: Rows

    def __call__(self, canvas: Canvas) -> Tensor:
        return self.rule(canvas) & self.rows(canvas)[:, None]


@dataclass(frozen=True, repr=False)
class Chosen(Pick):
    """All candidates within a Where."""

    rule: Where

    def __repr__(self) -> str:
        return repr(self.rule)

    @property
    def _binds(self) -> int:
        return self.rule._binds

    @property
    def always(self) -> bool:
        """As much as the positions do."""
        return self.rule.always

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return among & self.rule(canvas)


@dataclass(frozen=True, repr=False)
class PickOr(_Or, Pick):
    """What either chooses among the candidates."""

    left: Pick
    right: Pick

    @property
    def always(self) -> bool:
        """One of the two is enough."""
        return self.left.always or self.right.always

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return self.left(canvas, draft, among) | self.right(canvas, draft, among)


@dataclass(frozen=True, repr=False)
class Then(_Binary, Pick):
    """`left >> right`: right chooses among what left chose."""

    left: Pick
    right: Pick
    _sign, _binds = ">>", 3

    @property
    def always(self) -> bool:
        """It takes both."""
        return self.left.always and self.right.always

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return self.right(canvas, draft, self.left(canvas, draft, among))


@dataclass(frozen=True, repr=False)
class PickWhen(_When, Pick):
    """What `rule` chooses in the rows that satisfy `rows`."""

    rule: Pick
    rows: Rows

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        return self.rule(canvas, draft, among) & self.rows(canvas, draft)[:, None]


@dataclass(frozen=True, repr=False)
class Whole(_When, Pick):
    """Every undecided position of `rule` at once, in rows that satisfy `rows` and had all of them in reach."""

    rule: Where
    rows: Rows

    def __call__(self, canvas: Canvas, draft: Draft, among: Tensor) -> Tensor:
        cells = self.rule(canvas)
        read = ~(cells & canvas.masked & ~draft.fresh).any(1)
        return among & cells & (read & self.rows(canvas, draft))[:, None]


@dataclass(frozen=True, repr=False)
class RowsOr(_Or, Rows):
    """Rows that satisfy either."""

    left: Rows
    right: Rows

    @property
    def drafted(self) -> bool:
        """Does either look at the draft?"""
        return self.left.drafted or self.right.drafted

    @property
    def always(self) -> bool:
        """One of the two is enough."""
        return self.left.always or self.right.always

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return self.left(canvas, draft) | self.right(canvas, draft)


@dataclass(frozen=True, repr=False)
class RowsAnd(_And, Rows):
    """Rows that satisfy both."""

    left: Rows
    right: Rows

    @property
    def drafted(self) -> bool:
        """Does either look at the draft?"""
        return self.left.drafted or self.right.drafted

    @property
    def always(self) -> bool:
        """It takes both."""
        return self.left.always and self.right.always

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return self.left(canvas, draft) & self.right(canvas, draft)


@dataclass(frozen=True, repr=False)
class RowsNot(_Not, Rows):
    """Rows that do not satisfy `rule`."""

    rule: Rows

    @property
    def drafted(self) -> bool:
        """Does the negated condition look at the draft?"""
        return self.rule.drafted

    def __call__(self, canvas: Canvas, draft: Draft | None = None) -> Tensor:
        return ~self.rule(canvas, draft)
