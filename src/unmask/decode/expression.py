"""Read rules back from the text they print: the algebra's own small language, evaluated without Python's eval."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from unmask.decode.algebra import TERMS, Pick, Rows, Rule, Where
from unmask.decode.blocks import Blocks
from unmask.errors import UserError, suggest

ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Blocks: ("onward", "entered", "ahead", "settled", "after", "quota", "when"),
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


def parse(text: str, names: Mapping[str, Any] | None = None) -> Rule:
    """The rule that `text` denotes, `names` being further words it may use; UserError with the column if it is none."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UserError(f"cannot read {text.strip()!r}: {error.msg} at column {error.offset}") from None
    except (ValueError, RecursionError, MemoryError):
        raise UserError(f"cannot read {text[:40]!r}...: nested too deeply, or not text") from None
    return rule_at(tree.body, text.strip(), names)


def rule_at(node: ast.expr, text: str, names: Mapping[str, Any] | None = None) -> Rule:
    """The rule that a part of `text` denotes, as `parse` reads it; columns are those of `text`."""
    reader = _Reader(text, names or {})
    rule = reader.read(node)
    if not isinstance(rule, Rule):
        raise UserError(f"{ast.get_source_segment(text, node) or text!r} is {rule!r}, not a rule")
    return rule


class _Reader:
    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        self.text, self.names = text, {"inf": math.inf, **TERMS, **names}

    def fail(self, node: ast.expr, message: str) -> UserError:
        *before, line = self.text.encode().splitlines(keepends=True)[: node.lineno]
        column = len(b"".join([*before, line[: node.col_offset]]).decode()) + 1
        return UserError(f"{message} at column {column} of {self.text!r}")

    def read(self, node: ast.expr) -> Any:
        kind = type(node).__name__.lower()
        method = getattr(self, f"_{kind}", None)
        if method is None:
            raise self.fail(node, f"{kind} is not part of the language (only | & ~ >> .when and calls)")
        return method(node)

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise self.fail(node, str(suggest(node.id, sorted(self.names), "rule")))
        return self.names[node.id]

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.read(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(value, int | float):
            return -value
        if isinstance(node.op, ast.Invert) and isinstance(value, Where | Rows):
            return ~value
        raise self.fail(node, f"{type(node.op).__name__} does not apply to {value!r}")

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self.read(node.left), self.read(node.right)
        sign = SIGNS.get(type(node.op))
        if sign is None or not (isinstance(left, Rule) and isinstance(right, Rule)):
            raise self.fail(node, "only rules can be joined, and only by | & >>")
        try:
            return sign(left, right)
        except TypeError:
            raise self.fail(node, f"{left!r} and {right!r} cannot be joined this way") from None

    def _attribute(self, node: ast.Attribute) -> Any:
        value = self.read(node.value)
        allowed = next((names for cls, names in ATTRIBUTES.items() if isinstance(value, cls)), ())
        if node.attr not in allowed:
            raise self.fail(node, str(suggest(node.attr, allowed, f"property of {value!r}")))
        return getattr(value, node.attr)

    def _call(self, node: ast.Call) -> Any:
        own = TERMS.get(node.func.id) if isinstance(node.func, ast.Name) else None  # a setting may bear a rule's name
        function = own if callable(own) else self.read(node.func)
        if isinstance(function, Rule) or not callable(function):
            raise self.fail(node, f"{function!r} takes no arguments")
        positional = [self.read(a) for a in node.args]
        if any(k.arg is None for k in node.keywords):
            raise self.fail(node, "** is not part of the language")
        named = {str(k.arg): self.read(k.value) for k in node.keywords}
        try:
            return function(*positional, **named)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.fail(node, str(error).replace("__init__() ", "")) from None
