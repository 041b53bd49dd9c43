"""What a response must look like, as a regex, and whether a text of that kind fits into the cells there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unmask.denoise.automaton import MOST_CHARACTERS, Automaton, apart, once
from unmask.errors import UserError

KINDS = ("text", "json_object", "json_schema", "regex")
STRING = r'"([^"\\\x00-\x1F\x7F]|\\["\\/bfnrt])*"'
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
DEPTH = 2
UNSAID = {
    *(
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "uniqueItems",
        "contains",
        "not",
        "if",
    ),
    *("dependentRequired", "dependentSchemas", "patternProperties", "propertyNames", "oneOf", "unevaluatedProperties"),
}
"""Keywords of JSON schema that a regex made of it would ignore."""
REGEX = """
def make(schema):
    from outlines_core import json_schema
    regex = json_schema.build_regex_from_schema(schema)
    if len(regex) > MOST:
        return dict(error="its regex has %d characters, over %d" % (len(regex), MOST))
    return dict(regex=regex)
"""


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
        return regex[regex.startswith("^") : len(regex) - (regex.endswith("$") and not regex.endswith("\\$"))]
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
    if word := unsaid(schema):
        raise UserError(
            f"{word!r} of a JSON schema cannot be held by a constraint; leave it out, and check it yourself"
        )
    return _regex(json.dumps(schema))


@once
def _regex(schema: str) -> str:
    return apart(REGEX, schema, "JSON schema", most=MOST_CHARACTERS)["regex"]


def unsaid(schema: Any) -> str:
    """The first keyword of a schema that its regex would leave out; empty if there is none."""
    if not isinstance(schema, Mapping):
        return ""
    bounds = {"minProperties", "maxProperties"} if schema.get("properties") else set()
    if word := next((word for word in schema if word in UNSAID or word in bounds), ""):
        return word
    if missing := [n for n in schema.get("required") or () if n not in (schema.get("properties") or {})]:
        return f"required: {missing[0]}"
    inside = [schema.get(word) for word in ("items", "additionalProperties")]
    for word in ("properties", "$defs", "definitions"):
        inside += [*found.values()] if isinstance(found := schema.get(word), Mapping) else []
    for word in ("anyOf", "allOf", "prefixItems"):
        inside += found if isinstance(found := schema.get(word), list) else []
    return next((word for one in inside if (word := unsaid(one))), "")


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
    if not bool(ahead[:-1].any()) and any(token is not None for token in row):
        raise UserError("no text of the constraint fits the given cells; leave some of them out, or give more cells")
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
