"""What becomes of logits before they are a draft: biases and penalties, filters, one draw a cell, and its confidence.

Randomness is counter-based (decode/noise.py), and every setting may be one for all rows or a row's own, so that a
sample does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from unmask.decode import Canvas, Denoiser, Draft, noise
from unmask.denoise import penalties
from unmask.denoise.guide import ends
from unmask.denoise.penalties import Bias
from unmask.denoise.rows import Number, Whole, Word, at, each, fits, listed, number, whole, word

CONFIDENCE = ("raw", "shaped")
"""What confidence is read from: logits before temperature and filters (LLaDA), or after them (Dream, SDAR)."""
EOS = ("free", "never", "last")
"""What becomes of the end of a text: as the model says, never written, or written where nothing else is left."""
TINY, MANY = 1e-30, 2**31
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How tokens are drawn from what the model believes; each setting is one value, or a sequence with one a slot.

    In this order: `logit_bias`, the penalties on tokens that the row has committed, and EOS at -inf (`eos="never"`,
    LLaDA's logits_eos_inf) make the draft's logits; temperature, top-k, top-p and min-p shape what one token a cell is
    drawn from (Gumbel-max). Temperature 0 takes the most likely one. `confidence="raw"` is read before the shaping,
    "shaped" after it. With `eos="last"` a cell whose token is an EOS is the least confident one, and EOS has no share
    in the confidence of the others (LLaDA's confidence_eos_eot_inf). UserError for values outside of their range.
    """

    temperature: Number = 0.0
    top_k: Whole = 0
    top_p: Number = 1.0
    min_p: Number = 0.0
    confidence: Word = "raw"
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Bias | Sequence[Bias] = field(default_factory=dict)
    eos: Word = "free"

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", *NEUTRAL):
            self._set(name, partial(number, name))
        self._set("top_k", lambda v: whole("top_k", v, 0, MANY))
        self._set("confidence", lambda v: word("confidence", v, CONFIDENCE))
        self._set("eos", lambda v: word("eos", v, EOS))
        self._set("logit_bias", penalties.biased)

    def _set(self, name: str, one: Callable[[Any], object]) -> None:
        object.__setattr__(self, name, each(name, getattr(self, name), one))

    def check(self, rows: int) -> None:
        """UserError where a setting has neither one value nor one for each of so many rows."""
        for f in fields(Draws):
            fits(f.name, getattr(self, f.name), rows)

    @property
    def active(self) -> bool:
        """Does any row's draft differ from the model's own?"""
        return self._shaping or self._penalised or any(listed(self.logit_bias)) or set(listed(self.eos)) != {"free"}

    @property
    def _shaping(self) -> bool:
        filtered = any(listed(self.top_k)) or min(listed(self.top_p)) < 1 or any(listed(self.min_p))
        return any(listed(self.temperature)) or (filtered and "shaped" in listed(self.confidence))

    @property
    def _penalised(self) -> bool:
        return any(set(listed(getattr(self, name))) != {neutral} for name, neutral in NEUTRAL.items())

    def settle(self, canvas: Canvas, draft: Draft) -> Draft:
        """The draft with its logits biased and penalised, its tokens drawn, and what confidence is read from."""
        if not self.active:
            return draft
        slot = canvas.slot[draft.at // draft.fresh.shape[1]]
        draft = replace(draft, logits=self._logits(canvas, draft, slot), chosen=None, belief=None, top=None)
        if self._shaping:
            draft = self._drawn(canvas, draft, slot)
        return self._ends_last(canvas, draft, slot) if "last" in listed(self.eos) else draft

    def _logits(self, canvas: Canvas, draft: Draft, slot: Tensor) -> Tensor:
        """[N, V] float: biased, penalised, and without an EOS where there shall be none."""
        logits = draft.logits if draft.logits.dtype == torch.float64 else draft.logits.float()
        if any(listed(self.logit_bias)):
            table = self._bias(logits)
            logits = logits + (table if len(table) == 1 else table[slot])
        if self._penalised:
            amounts = (at(getattr(self, name), slot, logits.dtype) for name in NEUTRAL)
            count = penalties.committed(canvas, draft, logits.shape[1])
            logits = penalties.penalised(logits, count, *amounts)
        if "never" in listed(self.eos):
            columns = ends(torch.arange(logits.shape[1], device=slot.device), canvas.eos)
            logits = logits.masked_fill(self._is("eos", "never", slot) & columns, -torch.inf)
        return logits

    @cached_property
    def _tables(self) -> dict[tuple[object, ...], Tensor]:
        return {}

    def _bias(self, like: Tensor) -> Tensor:
        """[1 or slots, V]: what is added to the logits."""
        key = (like.shape[1], like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = penalties.dense(listed(self.logit_bias), like.shape[1], like)
        return self._tables[key]

    def _is(self, name: str, value: str, slot: Tensor) -> Tensor:
        """[N or 1, 1] bool: has the row this value of the setting?"""
        return at(tuple(v == value for v in listed(getattr(self, name))), slot, torch.bool)

    def _drawn(self, canvas: Canvas, draft: Draft, slot: Tensor) -> Draft:
        """The draft with a token drawn in every cell of a row with a temperature, and the shaped logits as belief."""
        heat = at(self.temperature, slot, draft.logits.dtype)
        shaped = self.shape(draft.logits / torch.where(heat > 0, heat.clamp(min=TINY), 1), slot)
        if all(listed(self.temperature)):
            chosen = _draw(canvas, draft.at, draft, shaped)
        else:
            cells = (heat > 0).expand(len(slot), 1)[:, 0].nonzero()[:, 0]
            chosen = draft.tokens.index_copy(0, cells, _draw(canvas, draft.at[cells], draft, shaped[cells]))
        ways, belief = set(listed(self.confidence)), None
        if "shaped" in ways:
            mixed = len(ways) > 1
            belief = torch.where(self._is("confidence", "shaped", slot), shaped, draft.logits) if mixed else shaped
        return replace(draft, chosen=chosen, belief=belief)

    def shape(self, logits: Tensor, slot: Tensor | None = None) -> Tensor:
        """Logits [N, V] with everything outside of top-k, then top-p, then min-p at -inf; one token always stays.

        `slot` [N] says whose settings hold, where rows have their own. Tokens as likely as the k-th stay with it.
        """
        slot = torch.zeros(1, dtype=torch.int64, device=logits.device) if slot is None else slot
        if top := min(max(listed(self.top_k)), logits.shape[1]):
            k = at(self.top_k, slot, torch.int64)
            last = (k.clamp(1, top) - 1).expand(len(logits), 1)
            least = logits.topk(top, -1).values.gather(1, last)
            logits = logits.masked_fill((k > 0) & (logits < least), -torch.inf)
        if min(listed(self.top_p)) < 1:
            share = at(self.top_p, slot, logits.dtype)
            value, order = logits.sort(dim=-1, descending=True, stable=True)
            p = value.softmax(-1)
            outside = (p.cumsum(-1) - p >= share) & (share < 1)
            outside[:, :1] = False
            logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
        if any(listed(self.min_p)):
            least = logits.amax(-1, keepdim=True) + at(self.min_p, slot, logits.dtype).log()
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits

    def _ends_last(self, canvas: Canvas, draft: Draft, slot: Tensor) -> Draft:
        """Confidence without EOS; a cell whose token is one believes nothing, unless it is that EOS already."""
        chosen, read = draft.tokens, draft.logits if draft.belief is None else draft.belief
        columns = ends(torch.arange(read.shape[1], device=slot.device), canvas.eos)
        belief = torch.where(ends(chosen, canvas.eos)[:, None], 0, read).masked_fill(columns, -torch.inf)
        decided = (~canvas.masked & ends(canvas.tokens, canvas.eos)).flatten()[draft.at]
        concerned = self._is("eos", "last", slot) & ~decided[:, None]
        return replace(draft, chosen=chosen, belief=torch.where(concerned, belief, read))


@dataclass(frozen=True)
class Sampled(Draws):
    """A denoiser whose drafts are settled: Draws over it."""

    denoise: Denoiser

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        return self.settle(canvas, self.denoise(canvas, query, need))


def _draw(canvas: Canvas, cells: Tensor, draft: Draft, shaped: Tensor) -> Tensor:
    """[N]: one token of each of the cells (flat indices [N]), from logits [N, V]."""
    row, column = cells // draft.fresh.shape[1], cells % draft.fresh.shape[1]
    words = torch.arange(shaped.shape[1], device=shaped.device)
    shift = noise.gumbel(canvas.seed[row, None], canvas.step[row, None], column[:, None], words + 1)
    return (shaped + shift).argmax(-1)
