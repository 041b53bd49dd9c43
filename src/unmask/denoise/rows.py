"""Settings of which every row may have its own: one value for all, or one a slot, as keys and values are addressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from unmask.errors import UserError, suggest

T = TypeVar("T")
Number = float | Sequence[float]
"""One number for all rows, or one a row."""
Whole = int | Sequence[int]
Word = str | Sequence[str]

LIMIT = 1e30
"""Larger numbers stand for this one, so that float32 holds what is made of them."""
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: 0 <= v < math.inf, "a finite number >= 0"),
    "top_p": (lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "repetition_penalty": (lambda v: 0 < v < math.inf, "a finite number above 0"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "a number in [-2, 2]"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "a number in [-2, 2]"),
    "cfg": (lambda v: 0 <= v < math.inf, "a finite number >= 0"),
    "logit_bias": (lambda v: -math.inf < v < math.inf, "a finite number for each token"),
}
"""What each number must be. The penalties have OpenAI's range, min_p that of transformers and vLLM."""


def each(name: str, value: Any, one: Callable[[Any], T]) -> T | tuple[T, ...]:
    """`one` of the value, or of each value of a sequence, which must have some (UserError)."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return one(value)
    if not value:
        raise UserError(f"{name} is an empty list; give one value, or one a row")
    return tuple(one(v) for v in value)


def listed(value: Any) -> tuple[Any, ...]:
    """The values of all rows: one of them where they share it."""
    return value if isinstance(value, tuple) else (value,)


def number(name: str, value: Any) -> float:
    """The value as a float; UserError outside of its range."""
    within, what = RANGES[name]
    real: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not within(real):
        raise UserError(f"{name} must be {what}, not {value!r:.80}")
    return float(max(-LIMIT, min(LIMIT, real)))


def whole(name: str, value: Any, least: int, below: int) -> int:
    """The value as an int of at least `least` and below `below`; UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < below:
        bound = f"of at least {least} and at most {below - 1}" if least > -below else f"between {least} and {below}"
        raise UserError(f"{name} must be a whole number {bound}, not {value!r:.80}")
    return int(value)


def word(name: str, value: Any, known: Sequence[str]) -> str:
    """The value, which must be one of the known words; UserError otherwise."""
    if value not in known:
        raise suggest(str(value), known, f"value of {name}")
    return value


def fits(name: str, value: Any, rows: int) -> None:
    """UserError where there is neither one value for all rows nor one for each."""
    if isinstance(value, list | tuple) and len(value) != rows:
        raise UserError(f"{name} has {len(value)} values for {rows} rows; give one value, or one a row")


def at(value: Any, slot: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 1] each row's value for the slots [N], or [1, 1] where all rows share it."""
    table = _table(listed(value), dtype, slot.device)
    return (table if len(table) == 1 else table[slot])[:, None]


@lru_cache(maxsize=64)
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
