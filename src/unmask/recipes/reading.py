"""Reading a stack: the levers that a text names, with their settings and where they are typed."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from unmask.decode.algebra import TERMS
from unmask.decode.expression import cut, deep
from unmask.errors import UserError, suggest
from unmask.recipes import entries
from unmask.recipes.levers import Lever, levers

QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
"""A text in quotes, as Python writes it: what it holds is none of the signs of a stack."""
TOO_MANY = ""
"""In place of a setting's name: there is no setting left for this argument."""


@dataclass(frozen=True, eq=False)
class Use:
    """A lever in a stack, its settings, and where each of them is typed (columns from 1)."""

    lever: Lever
    column: int
    typed: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    implied: bool = False
    """Is it not typed, but there because a stack needs one of its kind?"""

    @property
    def name(self) -> str:
        """The lever's."""
        return self.lever.name

    def of(self, table: Mapping[str, Any]) -> Any:
        """What a table says of this lever, by its name or else its kind; None for nothing."""
        return table.get(self.name, table.get(self.lever.kind))


def lever_in(node: ast.expr) -> ast.Name | None:
    """The first word that is a lever and no rule."""
    known = levers().keys() - TERMS.keys()
    return next((word for word in ast.walk(node) if isinstance(word, ast.Name) and word.id in known), None)


def bare(text: str) -> str:
    """The text with a blank in place of every letter in quotes."""
    return re.sub(QUOTED, lambda found: " " * len(found[0]), text)


def tidy(text: str) -> str:
    """The text with single blanks, those in quotes aside."""
    return re.sub(rf"({QUOTED})|\s+", lambda found: found[1] or " ", text).strip()


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """What stands between the `+` outside of all brackets and quotes, and the index where it begins."""
    depth, start = 0, 0
    for at, sign in enumerate(bare(text)):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "+" and depth == 0:
            yield start, text[start:at]
            start = at + 1
    yield start, text[start:]


def _arguments(node: ast.Call, names: list[str]) -> Iterator[tuple[int, str | None, ast.expr]]:
    """(offset, setting, its expression) of every argument; the setting is None for what is unpacked."""
    for number, part in enumerate(node.args):
        name = names[number] if number < len(names) else TOO_MANY
        yield part.col_offset, None if isinstance(part, ast.Starred) else name, part
    for keyword in node.keywords:
        yield keyword.col_offset, keyword.arg, keyword.value


class Reader:
    """The levers that a text names, with their settings."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, column: int, fault: str, advice: str = "") -> UserError:
        """An error that points at a column of the text."""
        return UserError(f"{fault} at column {column} of {cut(self.text)!r}{'; ' * bool(advice)}{advice}")

    def unknown(self, column: int, name: str, known: Iterable[str], kind: str) -> UserError:
        """An error for an unknown word: with the nearest one, or else with all there are."""
        fault = f"unknown {kind} {cut(name)!r}"
        near, _, names = str(suggest(cut(name), known, kind)).removeprefix(fault).partition(" Known: ")
        advice = near.removeprefix("; ") if near[:1] == ";" else f"known: {names}" if names else "there is none"
        return self.fail(column, fault, advice)

    def read(self) -> list[Use]:
        """Every lever of the text, from the left; UserError for what is none, or twice there."""
        uses: list[Use] = []
        if "#" in bare(self.text):
            raise self.fail(bare(self.text).index("#") + 1, "a stack has no comments", "leave out all from # on")
        for start, piece in pieces(self.text):
            use = self._use(start + len(piece) - len(piece.lstrip()), piece.strip())
            if any(other.name == use.name for other in uses):
                raise self.fail(use.column, f"{use.name} is given twice", "keep one")
            uses.append(use)
        return uses

    def _use(self, start: int, piece: str) -> Use:
        """One lever; `start` is the index of its first letter."""
        if not piece:
            raise self.fail(start + 1, "a lever is missing")
        if re.fullmatch(r"[\w-]+", piece):
            return Use(self._lever(piece, start + 1), start + 1)
        node = self._parsed(start, piece)

        def column(offset: int) -> int:
            return start + 1 + len(piece.encode()[:offset].decode())

        if isinstance(node, ast.Name):
            return Use(self._lever(node.id, column(node.col_offset)), column(node.col_offset))
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            if isinstance(node, ast.BinOp | ast.UnaryOp) and (word := lever_in(node)) is not None:
                fault = f"{word.id} is a lever, and levers are joined by + alone"
                raise self.fail(column(word.col_offset), fault, "as in dual + threshold(0.9)")
            told = f"a lever is a name or a call such as threshold(0.9), and {cut(piece)!r} is neither"
            raise self.fail(start + 1, told)
        lever = self._lever(node.func.id, column(node.col_offset))
        values, columns = {}, {}
        for offset, name, part in _arguments(node, list(lever.settings)):
            setting, place = self._setting(lever, name, values, column(offset)), column(part.col_offset)
            values[setting], columns[setting] = self._value(lever, setting, part, place), place
        return Use(lever, column(node.col_offset), values, columns)

    def _parsed(self, start: int, piece: str) -> ast.expr:
        try:
            node = ast.parse(piece, mode="eval").body
        except SyntaxError as error:
            raise self.fail(start + (error.offset or 1), f"cannot read {cut(piece)!r}: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError):
            raise self.fail(start + 1, "nested too deeply, or not text") from None
        if deep(node):
            raise self.fail(start + 1, "nested too deeply")
        return node

    def _lever(self, name: str, column: int) -> Lever:
        if name in (known := levers()):
            return known[name]
        if len(list(pieces(self.text))) == 1:
            raise self.unknown(column, name, [*known, *TERMS], "lever or rule")
        if (word := name.replace("-", "_")) in known:
            raise self.fail(column, f"the lever is written {word}")
        if name in TERMS or name in entries():
            told = f"{name} is a {'rule' if name in TERMS else 'recipe'}, and a stack is made of levers"
            raise self.fail(column, told, f"known: {', '.join(known)}")
        raise self.unknown(column, word, known, "lever")

    def _setting(self, lever: Lever, name: str | None, seen: Mapping[str, Any], column: int) -> str:
        """The setting's name, if the lever has one of that name and it is not given yet."""
        if name == TOO_MANY:
            count = len(lever.settings)
            raise self.fail(column, f"{lever} has {count or 'no'} setting{'s' * (count != 1)}, not so many")
        if name is None:
            raise self.fail(column, "* is not part of a stack")
        if name not in lever.settings:
            raise self.unknown(column, name, lever.settings, f"setting of {lever.name}")
        if name in seen:
            raise self.fail(column, f"{name} of {lever.name} is given twice")
        return name

    def _value(self, lever: Lever, name: str, node: ast.expr, column: int) -> Any:
        """The number, word, text or token ids of a setting."""
        sign = node.op if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd) else None
        inner = node.operand if isinstance(node, ast.UnaryOp) and sign else node
        value: Any = inner.value if isinstance(inner, ast.Constant) else None
        if isinstance(inner, ast.Name) and inner.id == "inf":
            value = math.inf
        if isinstance(inner, ast.List | ast.Tuple):
            ids = [part.value for part in inner.elts if isinstance(part, ast.Constant) and type(part.value) is int]
            value = tuple(ids) if len(ids) == len(inner.elts) else None
        if sign:
            value = (-value if isinstance(sign, ast.USub) else value) if type(value) in (int, float) else None
        if fault := lever.settings[name].fault(value):
            raise self.fail(column, f"{name} of {lever.name} must be {fault}, not {cut(ast.unparse(node))}")
        return float(value) if isinstance(lever.settings[name].default, float) else value
