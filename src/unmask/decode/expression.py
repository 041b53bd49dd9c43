"""Read rules back from the text they print: the algebra's own small language, evaluated without Python's eval."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from unmask.decode.algebra import TERMS, Pick, Rows, Rule, Where
from unmask.decode.belief import Joint
from unmask.decode.blocks import After, Blocks
from unmask.decode.early import Clear, Sure
from unmask.decode.judge import Agrees
from unmask.decode.pick import MOST, Confident, DreamQuota, EntropyBounded, Factor, Scattered
from unmask.decode.probe import Probing
from unmask.decode.revise import Doubted
from unmask.errors import UserError, suggest

ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Blocks: ("onward", "entered", "ahead", "settled", "moot", "near", "after", "quota", "when"),
    Probing: ("answer", "taken", "when"),
    Where: ("when",),
    Pick: ("when",),
    Rows: (),
}
"""What may follow a dot."""

SIGNS: dict[type, Any] = {
    ast.BitOr: lambda a, b: a | b,
    ast.BitAnd: lambda a, b: a & b,
    ast.RShift: lambda a, b: a >> b,
}


PROBABILITY = (0, 1)
RANGES: dict[type, tuple[str, tuple[int, float]]] = {
    Confident: ("threshold", PROBABILITY),
    Doubted: ("threshold", PROBABILITY),
    Factor: ("factor", (0, math.inf)),
    EntropyBounded: ("gamma", (0, math.inf)),
    DreamQuota: ("eps", PROBABILITY),
    Scattered: ("eps", PROBABILITY),
    After: ("progress", PROBABILITY),
    Agrees: ("top", (0, MOST)),
    Joint: ("k", (1, MOST)),
}
"""What a rule that somebody typed may have as its number. Rules built in Python may go beyond, where that means
something: `confident(2)` holds of nothing."""
DEEPEST = 100
"""Expressions nested more deeply than this are refused, long before Python's own limit on recursion."""


def within(rules: Iterable[Rule]) -> None:
    """UserError for a number of a rule that is outside of RANGES, or a level of `sure` that is no probability."""
    for rule in rules:
        name, (least, most) = RANGES.get(type(rule), ("", PROBABILITY))
        value = getattr(rule, name) if name else least
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            told = f"a number in [{least}, {most}]" if most < math.inf else f"a number of at least {least}"
            raise UserError(f"{name} of {rule!r:.80} must be {told}, not {value!r:.80}")
        if isinstance(rule, Sure | Clear) and rule.criterion != "gap":
            levels = [getattr(rule.schedule, f.name) for f in fields(rule.schedule) if f.name != "rate"]
            if wrong := [level for level in levels if not 0 < level <= 1]:
                told = f"a level of {rule.criterion} is a probability above 0 and at most 1"
                raise UserError(f"{told}, not {wrong[0]!r:.80} in {rule!r:.80}")


def cut(text: str) -> str:
    """A text as an error repeats it: at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."


def deep(node: ast.AST) -> bool:
    """Is it nested more deeply than DEEPEST?"""
    level = [node]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in ast.iter_child_nodes(outer)]
    return bool(level)


def parse(text: str, names: Mapping[str, Any] | None = None) -> Rule:
    """The rule that `text` denotes, `names` being further words it may use; UserError with the column if it is none."""
    if not isinstance(text, str):
        raise UserError(f"a rule is written as a text such as 'best(1)', not {text!r:.80}")
    if not text.strip():
        raise UserError("the expression is empty: at column 1 a rule is missing, such as best(1)")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UserError(f"cannot read {cut(text.strip())!r}: {error.msg} at column {error.offset}") from None
    except (ValueError, RecursionError, MemoryError):
        raise UserError(f"cannot read {cut(text)!r}: nested too deeply, or not text") from None
    return rule_at(tree.body, text.strip(), names)


def rule_at(node: ast.expr, text: str, names: Mapping[str, Any] | None = None) -> Rule:
    """The rule that a part of `text` denotes, as `parse` reads it; columns are those of `text`."""
    if deep(node):
        raise UserError(f"cannot read {cut(text)!r}: nested more than {DEEPEST} deep; write it with fewer signs")
    reader = _Reader(text, names or {})
    rule = reader.read(node)
    if not isinstance(rule, Rule):
        raise UserError(f"{cut(ast.get_source_segment(text, node) or repr(text))} is {rule!r:.80}, not a rule")
    return rule


class _Reader:
    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        self.text, self.names = text, {"inf": math.inf, **TERMS, **names}

    def fail(self, node: ast.expr, message: str) -> UserError:
        *before, line = self.text.encode().splitlines(keepends=True)[: node.lineno]
        column = len(b"".join([*before, line[: node.col_offset]]).decode()) + 1
        return UserError(f"{message} at column {column} of {cut(self.text)!r}")

    def read(self, node: ast.expr) -> Any:
        kind = type(node).__name__.lower()
        method = getattr(self, f"_{kind}", None)
        if method is None:
            raise self.fail(node, f"{kind} is not part of the language (only | & ~ >> .when and calls)")
        return method(node)

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _tuple(self, node: ast.Tuple | ast.List) -> tuple[Any, ...]:
        return tuple(self.read(part) for part in node.elts)

    _list = _tuple

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise self.fail(node, str(suggest(cut(node.id), sorted(self.names), "rule")))
        return self.names[node.id]

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.read(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(value, int | float):
            return -value
        if isinstance(node.op, ast.Invert) and isinstance(value, Where | Rows):
            return ~value
        raise self.fail(node, f"{type(node.op).__name__} does not apply to {value!r:.80}")

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self.read(node.left), self.read(node.right)
        sign = SIGNS.get(type(node.op))
        if sign is None or not (isinstance(left, Rule) and isinstance(right, Rule)):
            raise self.fail(node, "only rules can be joined, and only by | & >>")
        try:
            return sign(left, right)
        except TypeError:
            raise self.fail(node, f"{left!r:.80} and {right!r:.80} cannot be joined this way") from None

    def _attribute(self, node: ast.Attribute) -> Any:
        value = self.read(node.value)
        allowed = next((names for cls, names in ATTRIBUTES.items() if isinstance(value, cls)), ())
        if node.attr not in allowed:
            raise self.fail(node, str(suggest(cut(node.attr), allowed, f"property of {value!r:.80}")))
        return getattr(value, node.attr)

    def _call(self, node: ast.Call) -> Any:
        own = TERMS.get(node.func.id) if isinstance(node.func, ast.Name) else None  # a setting may bear a rule's name
        function = own if callable(own) else self.read(node.func)
        if isinstance(function, Rule) or not callable(function):
            raise self.fail(node, f"{function!r:.80} takes no arguments")
        positional = [self.read(a) for a in node.args]
        if any(k.arg is None for k in node.keywords):
            raise self.fail(node, "** is not part of the language")
        named = {str(k.arg): self.read(k.value) for k in node.keywords}
        try:
            return function(*positional, **named)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.fail(node, str(error).replace("__init__() ", "")) from None
