"""What is added to logits before tokens are drawn: biases of single tokens, and penalties on those already written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.decode import Canvas, Draft
from unmask.denoise.guide import ends
from unmask.denoise.rows import number
from unmask.errors import UserError

Bias = Mapping[int, float]
"""Numbers that are added to the logits of single tokens, by id."""


class Encoder(Protocol):
    """A tokenizer, as far as a bias needs one."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ...


def committed(canvas: Canvas, draft: Draft, words: int) -> Tensor:
    """[N, words] float32: how often each token was committed in the row of each fresh cell, the cell itself aside.

    Given cells do not count, and neither do EOS: behind the end of a text they are padding, not repetition.
    """
    row = draft.at // draft.fresh.shape[1]
    own = (canvas.valid & ~canvas.given & ~canvas.masked & ~ends(canvas.tokens, canvas.eos)).float()
    tokens = canvas.tokens.clamp(0, words - 1)  # an undecided cell may hold any id
    total = torch.zeros(len(canvas), words, device=own.device).scatter_add_(1, tokens, own)
    itself = tokens.flatten()[draft.at], own.flatten()[draft.at]
    return total[row].scatter_add_(1, itself[0][:, None], -itself[1][:, None])


def penalised(logits: Tensor, count: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Logits [N, V] of tokens that were written `count` [N, V] times; the penalties are [N, 1] or [1, 1].

    First repetition (Keskar et al. 2019, as in transformers): a present token's positive logit is divided by it, its
    negative one multiplied. Then presence is subtracted once and frequency once an occurrence (OpenAI's definition).
    """
    present, count = count > 0, count.to(logits.dtype)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(present, repeated, logits) - presence * present - frequency * count


def biased(bias: Any, *, words: bool = False) -> dict[Any, float]:
    """A logit bias, checked: finite numbers by token id (or text, `words`). None is no bias; else a UserError."""
    if bias is not None and not isinstance(bias, Mapping):
        raise UserError(f"logit_bias maps token ids to numbers, and {bias!r:.80} does not")
    for id in bias or ():
        if not (words and isinstance(id, str)) and (
            isinstance(id, bool) or not isinstance(id, Integral) or int(id) < 0
        ):
            raise UserError(f"logit_bias is by token id, a whole number >= 0, not {id!r:.80}")
    return {id: number("logit_bias", value) for id, value in (bias or {}).items()}


def spelled(bias: Any, tokenizer: Encoder) -> Any:
    """The same bias by ids, where tokens may also be given as text: digits are an id, other text must be one token."""
    if not isinstance(bias, Mapping):
        return bias
    found: dict[Any, float] = {}
    for key, value in bias.items():
        id = _id(key, tokenizer) if isinstance(key, str) else key
        if id in found:
            raise UserError(f"logit_bias names token {id} twice; {key!r} is the second time")
        found[id] = value
    return found


def _id(text: str, tokenizer: Encoder) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"logit_bias is for single tokens, and {text!r} has {len(ids)} in this model's vocabulary")
    return ids[0]


def bounded(bias: Bias, words: int) -> None:
    """UserError for an id outside of a vocabulary of so many words."""
    if bias and max(bias) >= words:
        raise UserError(f"logit_bias names token {max(bias)}, and this model has tokens 0 to {words - 1}")


def dense(biases: Sequence[Bias], words: int, like: Tensor) -> Tensor:
    """[len(biases), words]: each bias as a row to add; UserError for an id outside of the vocabulary."""
    table = torch.zeros(len(biases), words, dtype=like.dtype)
    for row, bias in zip(table, biases, strict=True):
        if bias:
            bounded(bias, words)
            row[torch.tensor(list(bias))] = torch.tensor(list(bias.values()), dtype=like.dtype)
    return table.to(like.device)
