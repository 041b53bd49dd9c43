"""Joint sampling: several dependent tokens from one forward (ADJUST, arXiv 2509.22738)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.decode import Canvas, Cost, Draft, Pick, account
from unmask.decode.algebra import Whole
from unmask.decode.belief import Joint
from unmask.decode.early import Clear
from unmask.decode.pick import Drawn, rank
from unmask.denoise.plain import Plain
from unmask.models.joint import JointSampler


@dataclass(eq=False)
class Jointly:
    """Draws up to k tokens a forward, one after the other, each knowing those before it.

    The first is the model's own; for each further one the sampler, which keeps the base's last hidden states of every
    cell ever computed, reads what was drawn. A row stops when it has no cell left, or is not sure enough of any. Logits
    and confidence of the draft stay the model's; its tokens are the drawn ones, in other undecided cells the sampler's
    latest guess. `settle` draws tokens from logits (temperature and filters).
    """

    plain: Plain
    sampler: JointSampler | None
    joint: Joint
    unmask: Pick
    settle: Callable[[Canvas, Draft], Draft]

    def __post_init__(self) -> None:
        if self.joint.k > 1:
            self.plain.keep_hidden()

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        raw = self.plain(canvas, query, need)
        first = now = self.settle(canvas, raw)
        among, quota = self._cells(canvas, first)
        drawn, going = torch.zeros_like(canvas.tokens), ~canvas.done
        token, guess, hidden, costs = canvas.tokens, first.token, None, []
        for turn in range(1, self.joint.k + 1):
            pick = self._next(canvas, now, among & (drawn == 0) & going[:, None], quota, turn)
            drawn, token = torch.where(pick, turn, drawn), torch.where(pick, now.token, token)
            guess = torch.where(pick, now.token, guess)
            going = pick.any(1) & (among & (drawn == 0)).any(1)
            if turn == self.joint.k or not bool(going.any()):
                break
            began = time.perf_counter()
            hidden, computed, logits = self._sample(canvas, raw, token, hidden)
            now = self.settle(canvas, replace(raw, logits=logits, top=None))
            guess = torch.where(going[:, None] & canvas.masked & (drawn == 0), now.token, guess)
            costs.append(Cost("joint sampler", computed & going[:, None], time.perf_counter() - began))
        return replace(first, chosen=guess.flatten()[first.at], drawn=drawn, costs=(*first.costs, *costs))

    def _cells(self, canvas: Canvas, draft: Draft) -> tuple[Tensor, Tensor]:
        """(cells to draw [B, L], cells a draw [B]): the candidates of `drawn`, or all that an early commit takes."""
        open_ = canvas.masked & draft.fresh & ~canvas.done[:, None]
        drawing = any(isinstance(r, Drawn) for r in self.unmask.walk())
        among, whole = torch.zeros_like(open_) if drawing else open_, torch.zeros_like(open_)
        for part in account(self.unmask, canvas, draft, open_) if drawing or self._exits else ():
            if isinstance(part.rule, Drawn):
                among = among | part.among
            elif isinstance(part.rule, Whole | Clear):
                whole = whole | part.rule(canvas, draft, part.among)
        count = -(-whole.sum(1) // self.joint.k)
        return torch.where(whole.any(1)[:, None], whole, among), count.clamp(min=1)

    @property
    def _exits(self) -> bool:
        return any(isinstance(r, Whole | Clear) for r in self.unmask.walk())

    def _next(self, canvas: Canvas, now: Draft, left: Tensor, quota: Tensor, turn: int) -> Tensor:
        """[B, L]: the surest cells of those left, `quota` a row; none in rows that are not sure enough any more."""
        pick = left & (rank(canvas, now, left, self.joint.by) < quota[:, None])
        if self.joint.least and turn > 1:
            sure = (now.score.masked_fill(~pick, -torch.inf).amax(1) >= self.joint.least) | (quota > 1)
            pick = pick & sure[:, None]
        return pick

    def _sample(
        self, canvas: Canvas, raw: Draft, token: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states [B, L, D], cells computed [B, L], logits [N, V] of the fresh cells) after what was drawn."""
        assert self.sampler is not None
        model = self.plain.model
        base, seen = self.plain.hidden(canvas, raw)
        index = canvas.position.expand_as(token)
        allowed = self.plain.layout.visible(index, index, canvas.origin)
        visible = seen[:, None, None, :].expand(-1, 1, token.shape[1], -1)
        visible = visible if allowed is None else visible & allowed[:, None]
        rope = model.rope(token.shape[1], None, base.dtype)
        known = model.embed(token.clamp(min=0)).to(base.dtype)
        hidden = self.sampler(known, base if before is None else before, rope, visible)
        logits = model.head_of(hidden.flatten(0, 1)[raw.at])
        return hidden, seen, logits.masked_fill(raw.logits == -torch.inf, -torch.inf)
