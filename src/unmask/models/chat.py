"""A checkpoint's chat template, rendered in a sandbox with the helpers that published templates use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from unmask.errors import UserError

GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""Marks around what an assistant wrote, for training on it only; to us they mean nothing."""
FAILURES = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)


class ChatTemplate:
    """One compiled jinja2 template; it can reach nothing but its values."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self.template = environment.from_string(GENERATION.sub(marked, source))
        except TemplateError as error:
            raise UserError(f"the model's chat template is broken: {error}") from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The conversation as text; UserError if the template fails or refuses it."""
        try:
            return self.template.render(values)
        except UserError:
            raise
        except FAILURES as error:
            raise UserError(f"the model's chat template cannot render this conversation: {error}") from error


def marked(match: re.Match[str]) -> str:
    """A generation mark as a tag that jinja2 knows, with the same control of white space."""
    left, end, right = match.groups("")
    return f"{{%{left} {'endif' if end else 'if true'} {right}%}}"


def refuse(message: str) -> NoReturn:
    """`raise_exception` of a template: it does not take the conversation."""
    raise UserError(f"the model's chat template refuses this conversation: {message}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
