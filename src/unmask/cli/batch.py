"""A file of prompts, one a line: plain text, or JSON objects with a `prompt`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import UserError


@dataclass(frozen=True)
class Line:
    """A prompt and where it stands; `error` says why it is none."""

    number: int
    prompt: str
    error: str = ""


def read(path: Path) -> list[Line]:
    """The lines of a batch file (`-`: stdin). JSON if its name ends in .jsonl or its first line opens a brace."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    as_json = path.suffix in (".jsonl", ".ndjson") or text.lstrip().startswith("{")
    rows = [(number, row) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    if not rows:
        raise UserError(f"{path} holds no prompt")
    return [_parse(number, row) if as_json else Line(number, row.strip()) for number, row in rows]


def _parse(number: int, row: str) -> Line:
    try:
        record = json.loads(row)
    except ValueError as error:
        return Line(number, "", f"not JSON ({error})")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return Line(number, "", 'expected an object like {"prompt": "..."}')
    return Line(number, record["prompt"])


def sift(path: Path, lines: list[Line], check: Callable[[str], object], *, keep_going: bool) -> list[Line]:
    """The good lines. A bad one ends everything with its number, or with `keep_going` is reported and left out."""
    good = []
    for line in lines:
        error = line.error
        try:
            if not error:
                check(line.prompt)
        except UserError as found:
            error = str(found)
        if not error:
            good.append(line)
        elif keep_going:
            print(f"error: {path}, line {line.number}: {error}", file=sys.stderr)
        else:
            raise UserError(f"{path}, line {line.number}: {error}; --keep-going leaves such lines out")
    return good
