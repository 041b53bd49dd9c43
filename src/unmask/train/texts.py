"""Prompts and responses from a JSON-lines file as batches: batch number i is a function of (seed, i) alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from unmask.errors import UserError
from unmask.generate import Model
from unmask.train.batches import Batch


@dataclass(frozen=True)
class Texts:
    """Rows of (prompt ids, response ids with their EOS), laid out as batches of about `tokens` cells.

    Prompts are right-aligned, responses padded with EOS to a whole number of blocks of `unit` cells.
    """

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    eos: int
    unit: int = 1
    tokens: int = 4608
    seed: int = 0
    share: tuple[int, int] = (0, 1)
    """(number of this process, how many there are): each takes rows of its own."""
    left_out: int = 0
    """Rows of the file that are too long to be learned."""

    @cached_property
    def widest(self) -> int:
        """Cells of the longest row."""
        return max(len(p) + len(r) for p, r in self.pairs)

    @property
    def cells(self) -> tuple[int, int]:
        """(prompt, response): columns of the widest batch there can be, without the padding to whole blocks."""
        return max(len(p) for p, _ in self.pairs), max(len(r) for _, r in self.pairs)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name the rows, in their order."""
        return hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()[:16]

    def batch(self, step: int) -> Batch:
        """Batch number `step`: the next rows of an endless sequence of shuffled epochs."""
        rank, world = self.share
        count = max(1, self.tokens // self.widest)
        first = (step * world + rank) * count
        rows = [self.pairs[self._order(n // len(self.pairs))[n % len(self.pairs)]] for n in range(first, first + count)]
        return lay_out(rows, self.eos, self.unit)

    def _order(self, epoch: int) -> list[int]:
        return _shuffled(len(self.pairs), f"{self.seed}-{epoch}")


@lru_cache(maxsize=4)
def _shuffled(count: int, key: str) -> list[int]:
    order = list(range(count))
    random.Random(f"unmask-texts-{key}").shuffle(order)
    return order


def lay_out(rows: Sequence[tuple[Sequence[int], Sequence[int]]], eos: int, unit: int) -> Batch:
    """tokens [B, P + R] of (prompt, response) rows: prompts end at column P, responses are filled up with EOS."""
    prompt, width = (max(len(row[part]) for row in rows) for part in (0, 1))
    width = -(-width // unit) * unit
    tokens = torch.full((len(rows), prompt + width), eos)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    for row, (before, after) in enumerate(rows):
        start = prompt - len(before)
        tokens[row, start : prompt + len(after)] = torch.tensor([*before, *after])
        valid[row, :start] = False
    return Batch(tokens, valid, prompt)


def read(path: str | Path, model: Model, *, eos: int, longest: int, **layout: Any) -> Texts:
    """The rows {"prompt": ..., "response": ...} of a JSON-lines file that fit into `longest` cells; UserError else."""
    pairs, left_out = [], 0
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path} line {number}: expected {{"prompt": "...", "response": "..."}}') from None
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise UserError(f"{path} line {number}: prompt and response must be texts")
        try:
            pair = tuple(model.encode(prompt)), (*model.tokenizer.encode(response), eos)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        if len(pair[0]) + len(pair[1]) <= longest:
            pairs.append(pair)
        else:
            left_out += 1
    if not pairs:
        raise UserError(f"{path} has no row that fits into {longest} cells; give longer rows room by --longest")
    return Texts(tuple(pairs), eos, left_out=left_out, **layout)
