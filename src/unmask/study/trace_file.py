"""Traces as files: JSON, compressed or not, checked by being played before anything is done with them."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.models.files import write_atomically
from unmask.study.trace import Event, Helped, Move, Named, Row, Trace, Written, ledger

FORMAT, VERSION = "unmask-trace", 1
BROKEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file can raise that does not hold what it should."""


def as_dict(trace: Trace) -> dict[str, Any]:
    """For JSON; `from_dict` reads it back."""
    own = asdict(trace, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None})
    return {"format": FORMAT, "version": VERSION, "unmask": own.pop("unmask"), **own}


def from_dict(data: Any) -> Trace:
    """The trace that `data` holds, played once; UserError where it is none, of another version, or damaged."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError("not a trace; `unmask trace record` makes one")
    if data.get("version") != VERSION:
        raise UserError(f"a trace of format {data.get('version')!r:.40}, and this version of unmask reads {VERSION}")
    try:
        trace = _trace(data)
        for row in trace.rows:
            if not (0 <= row.recipe < len(trace.recipes) and 0 <= row.origin <= len(row.tokens)):
                raise ValueError("a row without a recipe, or that begins outside of itself")
        ledger(trace)
    except BROKEN as error:
        reason = f"{error} is missing" if type(error) is KeyError else f"{error}" or type(error).__name__
        raise UserError(f"a damaged trace: {reason.splitlines()[0]}") from None
    return trace


def write(trace: Trace, path: str | Path) -> int:
    """Save as JSON, compressed if the name ends in .gz; bytes written. The file is whole or not there (UserError)."""
    path = Path(path)
    text = json.dumps(as_dict(trace), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = (text + "\n").encode("utf-8", "surrogatepass")
    data = gzip.compress(data, mtime=0) if path.suffix == ".gz" else data
    try:
        write_atomically(path, lambda name: Path(name).write_bytes(data))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return len(data)


def read(path: str | Path) -> Trace:
    """The trace in a file, compressed or not; UserError that names the file where there is none."""
    try:
        data = Path(path).read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return from_dict(json.loads(text, parse_float=_finite, parse_constant=_finite))
    except UserError as error:
        raise UserError(f"{path} is {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path} is truncated or damaged") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a trace, or truncated: {error}") from None


def _finite(text: str) -> float:
    """The number that a file holds; ValueError for what JavaScript could not read."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _trace(data: dict[str, Any]) -> Trace:
    """The values that a file holds; any of BROKEN where they are not of the kind they should be."""
    return Trace(
        model=_is(data["model"], str),
        recipes=tuple(
            Named(*(_is(r[k], str) for k in ("name", "hash", "expression", "toml"))) for r in data["recipes"]
        ),
        settings=_is(data["settings"], dict),
        mask_id=_is(data["mask_id"], int),
        eos=_ints(data["eos"]),
        dtype=_is(data["dtype"], str),
        width=_is(data["width"], int),
        pieces={int(id): _is(text, str) for id, text in data["pieces"].items()},
        rows=tuple(_row(row) for row in data["rows"]),
        steps=tuple(_event(event) for event in data["steps"]),
        state=_is(data["state"], dict),
        unmask=_is(data["unmask"], str),
    )


def _row(data: dict[str, Any]) -> Row:
    words = [_is(data[key], str) for key in ("prompt", "text")]
    numbers = [_is(data[key], int) for key in ("origin", "seed", "slot", "recipe")]
    tokens = tuple(None if t is None else _is(t, int) for t in data["tokens"])
    return Row(words[0], words[1], *numbers, tokens=tokens)


def _event(data: dict[str, Any]) -> Event:
    costs = (Helped(_is(c["name"], str), tuple(map(_ints, c["computed"])), float(c["seconds"])) for c in data["costs"])
    moves = (None if move is None else _move(move) for move in data["moves"])
    return Event(float(data["seconds"]), tuple(moves), _ints(data["done"]), tuple(costs))


def _move(data: dict[str, Any]) -> Move:
    back = None if "back" not in data else _ints(data["back"])
    edit, drafts = (None if key not in data else _written(data[key]) for key in ("edit", "drafts"))
    return Move(_ints(data["computed"]), _ints(data["fresh"]), _written(data["pick"]), back, edit, drafts)


def _written(data: dict[str, Any]) -> Written:
    found = Written(
        _ints(data["cells"]), _ints(data["tokens"]), tuple(s if s is None else float(s) for s in data["scores"])
    )
    if not len(found.cells) == len(found.tokens) == len(found.scores):
        raise ValueError("cells, tokens and scores of different number")
    return found


def _ints(data: Any) -> tuple[int, ...]:
    if any(_is(number, int) < 0 for number in _is(data, list)):
        raise ValueError("a negative number where there is none")
    return tuple(data)


def _is(value: Any, kind: type) -> Any:
    """`value`, if it is of this kind (and fits into 64 bits); TypeError."""
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or abs(value) >= 2**63)):
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value
