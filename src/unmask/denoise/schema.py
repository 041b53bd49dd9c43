"""What a response must look like, as a regex, and whether a text of that kind fits into the cells there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unmask.denoise.automaton import Automaton
from unmask.errors import UserError

KINDS = ("text", "json_object", "json_schema", "regex")
STRING = r'"([^"\\\x00-\x1F\x7F]|\\["\\/bfnrt])*"'
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
DEPTH = 2


def pattern(response_format: Mapping[str, Any] | None) -> str | None:
    """The regex of an OpenAI `response_format`, or of {"type": "regex", "regex": ...}; None for free text.

    UserError for what is malformed or not supported.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping) or response_format.get("type") not in KINDS:
        raise UserError(f"response_format must be an object whose type is one of {', '.join(KINDS)}")
    kind = response_format["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        return anything(DEPTH, objects=True)
    if kind == "regex":
        regex = response_format.get("regex")
        if not isinstance(regex, str) or not regex:
            raise UserError('response_format of type "regex" needs the expression as a text in "regex"')
        return regex
    told = response_format.get("json_schema")
    schema = told.get("schema") if isinstance(told, Mapping) else None
    if not isinstance(schema, Mapping):
        raise UserError('response_format of type "json_schema" needs {"json_schema": {"schema": {...}}}')
    return of_schema(schema)


def anything(depth: int, *, objects: bool = False) -> str:
    """The regex of any JSON value (`objects`: any object) with so many containers inside one another."""
    value = f"({STRING}|{NUMBER}|true|false|null)"
    for level in range(depth):
        pair, item = f" ?{STRING} ?: ?{value} ?", f" ?{value} ?"
        made = rf"\{{( ?|{pair}(,{pair})*)\}}"
        if objects and level == depth - 1:
            return made
        value = rf"({STRING}|{NUMBER}|true|false|null|{made}|\[( ?|{item}(,{item})*)\])"
    return value


def of_schema(schema: Mapping[str, Any]) -> str:
    """The regex of a JSON schema; UserError for what a regex cannot say."""
    try:
        from outlines_core import json_schema
    except ImportError:
        raise UserError("constraints need outlines-core: pip install 'unmask[constrained]'") from None
    try:
        return json_schema.build_regex_from_schema(json.dumps(schema))
    except Exception as error:  # the library raises plain ones
        raise UserError(f"this JSON schema cannot be a constraint: {' '.join(str(error).split())[:300]}") from None


def fits(automaton: Automaton, row: Sequence[int | None]) -> None:
    """UserError if no text of the language has these tokens in these cells (None: free) and ends in time.

    It names the smallest number of cells that would do, if more free cells at the end would help.
    """
    ahead = torch.zeros(len(automaton.next) + 1, dtype=torch.bool)
    ahead[automaton.start] = True
    for token in row:
        ahead = after(automaton, ahead, token)
    if bool((ahead[:-1] & automaton.final).any()):
        return
    if not bool(ahead[:-1].any()):
        raise UserError("no text of the constraint fits these cells; leave out given cells, or give more cells")
    length = len(row)
    seen = ahead.clone()
    while bool(ahead[:-1].any()) and length < len(row) + len(seen):
        ahead, length = after(automaton, ahead, None), length + 1
        if bool((ahead[:-1] & automaton.final).any()):
            raise UserError(f"the shortest text of the constraint takes {length} cells, and there are {len(row)}")
    raise UserError("no text of the constraint can be spelt by this model's vocabulary")


def after(automaton: Automaton, states: torch.Tensor, token: int | None) -> torch.Tensor:
    """[S + 1] bool: the states one cell further on; the last one is the dead one."""
    here = automaton.moves[states[:-1].nonzero()[:, 0]]
    if token is not None:
        known = 0 <= token < len(automaton.classes)
        here = here[:, int(automaton.classes[token]) if known else 0]
    out = torch.zeros_like(states)
    out[here.flatten()] = True
    out[-1] = False
    return out
