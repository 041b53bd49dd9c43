"""A second opinion: an autoregressive guide that reads the model's drafts in one forward, and beliefs mixed with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.decode import Canvas, Cost, Denoiser, Draft
from unmask.denoise.packing import pack
from unmask.errors import UserError
from unmask.models.kv import KVPool
from unmask.models.sight import Sight
from unmask.models.transformer import Transformer


class Guided:
    """Adds to each draft what a causal model thinks of it: `draft.second` (guided diffusion, FlashDLM, 2505.21467).

    The drafts are written into the undecided cells and the guide reads the text from the left, so the logits of a cell
    are given the drafts before it. Judged are the first `window` drafted cells of a row up to the first undecided cell
    without a draft, and up to the first drafted EOS: of what follows an end a guide has no opinion.

    The guide's keys and values lie in a pool of their own, beside the token each was computed from. What can be reused
    is the longest prefix of the new text that is there, so that a rejected draft needs no rolling back.
    """

    def __init__(self, denoise: Denoiser, guide: Transformer, *, slots: int, length: int, window: int = 32) -> None:
        c = self.config = guide.config
        if not (c.autoregressive and c.shift):
            raise UserError(f"a guide is an autoregressive model, and this one is not ({c.layout.kind} attention)")
        if length > c.max_positions:
            raise UserError(f"{length} cells do not fit into the guide's {c.max_positions} positions")
        if window < 1:
            raise UserError(f"a guide judges a window of at least one cell, not {window}")
        self.denoise, self.guide, self.window = denoise, guide, window
        device = guide.embed.weight.device
        self.pool = KVPool(c, slots, length, dtype=guide.dtype, device=device)
        self.stored = torch.full((slots, length), -1, device=device)
        """[slots, length]: the token that each stored key and value was computed from; -1 for none."""

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = self.denoise(canvas, query, need)
        text = torch.where(canvas.masked & draft.fresh, draft.token, canvas.tokens)
        began = time.perf_counter()
        judged = self._judged(canvas, draft, text)
        computed, logits = self._read(canvas, self._known(canvas, text), judged)
        logits = self._aligned(canvas, logits, draft.logits[judged.flatten()[draft.at]])
        second = Draft(computed, judged, logits)
        cost = Cost("guide", computed, time.perf_counter() - began)
        return replace(draft, second=second, costs=(*draft.costs, cost))

    def _judged(self, canvas: Canvas, draft: Draft, text: Tensor) -> Tensor:
        """[B, L] bool: the cells whose drafts are judged."""
        end = ends(text, canvas.eos) & ~canvas.given
        read = draft.fresh if draft.aside is None else draft.fresh & ~draft.aside
        barred = canvas.masked & ~read
        barred[:, :1] |= canvas.masked[:, :1]  # nothing stands before the first cell
        barred[:, 1:] |= end[:, :-1]
        cells = canvas.masked & (barred.cumsum(1) == 0)
        return cells & (cells.cumsum(1) <= self.window)

    def _known(self, canvas: Canvas, text: Tensor) -> Tensor:
        """The text in the guide's own tokens: its EOS for the model's, and nothing outside of its vocabulary."""
        own = self.config.eos_ids
        if own and set(canvas.eos) != set(own):
            text = text.masked_fill(ends(text, canvas.eos) & ~ends(text, own), own[0])
        return text.clamp(0, self.config.vocab_size - 1)

    def _read(self, canvas: Canvas, text: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
        """(cells computed [B, L], logits [M, V of the guide] of the judged cells in row-major order)."""
        position, width = canvas.position, text.shape[1]
        first, last = canvas.first(judged), (judged * position).amax(1)  # the last judged cell reads the one before it
        stored = self.stored[canvas.slot]
        reach = (stored[:, :width] == text).cumprod(1).sum(1)
        computed = judged.any(1)[:, None] & (position >= torch.minimum(reach, first - 1)[:, None])
        computed = computed & (position < last[:, None])
        rows = judged.any(1).nonzero()[:, 0]
        if not len(rows):
            return computed, torch.empty(0, self.config.vocab_size, dtype=self.guide.dtype, device=text.device)
        after = torch.where((reach < last)[:, None], -1, stored)  # what stands behind a change read another text
        after[:, :width] = torch.where(position < last[:, None], text, after[:, :width])
        self.stored[canvas.slot[rows]] = after[rows]
        return computed, self._forward(canvas[rows], text[rows], computed[rows], judged[rows])

    def _forward(self, canvas: Canvas, text: Tensor, computed: Tensor, judged: Tensor) -> Tensor:
        """One forward over the computed cells, of which every row has some."""
        p = pack(computed)
        sight = Sight(p.index.int(), canvas.position[None].int().expand(len(text), -1))
        need = p.of(judged.roll(-1, 1)).flatten().nonzero()[:, 0]  # the first column is never judged
        kv = self.pool.at(canvas.slot, p.index, text.shape[1], ragged=p.ragged)
        return self.guide(p.of(text), p.index, kv=kv, visible=sight, need=need, ragged=p.ragged)

    def _aligned(self, canvas: Canvas, logits: Tensor, model: Tensor) -> Tensor:
        """The guide's logits in the columns of the model's [M, V]; what the model never generates holds -inf."""
        c, width = self.config, model.shape[1]
        own, theirs = list(c.eos_ids), list(canvas.eos)
        end = logits[:, own].amax(1, keepdim=True) if own and set(own) != set(theirs) else None
        logits = F.pad(logits[:, : c.token_count], (0, max(0, width - c.token_count)), value=-torch.inf)[:, :width]
        if end is not None and theirs:
            logits[:, [t for t in own if t < width]] = -torch.inf
            logits[:, theirs] = end.expand(-1, len(theirs))
        return logits.masked_fill(model == -torch.inf, -torch.inf)


@dataclass(frozen=True)
class Blended:
    """The guide's log-probabilities, weighted, added to the model's own in the judged cells: (1 - w) log p + w log q.

    There the draft becomes the likeliest token of the mixture. A token drawn by the wrapped denoiser is lost, so
    what samples goes around this. The second opinion is kept up to the first cell whose draft changed, since that of
    a later cell is about another text.
    """

    denoise: Denoiser
    weight: float

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not 0 <= self.weight <= 1:
            raise UserError(f"the weight of a guide lies in [0, 1], not {self.weight!r}")

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = self.denoise(canvas, query, need)
        if draft.second is None:
            raise UserError("a blend mixes in a second opinion; give a guide: an autoregressive model")
        if not self.weight:
            return draft
        at = draft.second.fresh.flatten()[draft.at].nonzero()[:, 0]
        mixed = self.mix(draft.logits[at], draft.second.logits)
        logits = draft.logits.to(mixed.dtype).index_copy(0, at, mixed)
        chosen = draft.tokens.index_copy(0, at, mixed.argmax(1))
        belief = None if draft.belief is None else draft.belief.to(mixed.dtype).index_copy(0, at, mixed)
        changed = draft.spread(chosen != draft.tokens, False)
        kept = draft.second.fresh & (changed.cumsum(1) - changed.long() == 0)
        second = Draft(draft.second.computed, kept, draft.second.logits[kept.flatten()[draft.second.at]])
        return replace(draft, logits=logits, chosen=chosen, belief=belief, second=second, top=None)

    def mix(self, model: Tensor, guide: Tensor) -> Tensor:
        """Logits [M, V] of the mixture; -inf where either has none of its share."""
        wide = torch.promote_types(torch.promote_types(model.dtype, guide.dtype), torch.float32)
        own, other = (t.to(wide).log_softmax(1) for t in (model, guide))
        return other if self.weight == 1 else (1 - self.weight) * own + self.weight * other


def ends(tokens: Tensor, eos: tuple[int, ...]) -> Tensor:
    """[B, L] bool: where a token is one of `eos`."""
    return torch.isin(tokens, torch.tensor(eos, dtype=tokens.dtype, device=tokens.device))
