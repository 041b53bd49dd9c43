"""The draft: what a model believes at the cells it was asked about. Statistics are computed when a rule reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cost:
    """What a helper of the denoiser (a guide, a joint sampler) computed for one draft."""

    name: str
    computed: Tensor
    """[B, L] bool: the cells it ran through its own network."""
    seconds: float


@dataclass(frozen=True, eq=False)
class Draft:
    """Logits of N cells of a canvas [B, L], and the statistics rules read, each [B, L]."""

    computed: Tensor
    """[B, L] bool: cells that were run through the model, whose key and value are now of this step."""
    fresh: Tensor
    """[B, L] bool: cells whose logits are here."""
    logits: Tensor
    """[N, V]: logits of the fresh cells in row-major order; what must never be generated holds -inf."""
    chosen: Tensor | None = None
    """[N] int64: tokens drawn by a sampler, else the most likely ones."""
    belief: Tensor | None = None
    """[N, V]: logits after temperature and filters, where confidence shall be read from them (Dream's convention)."""
    second: Draft | None = None
    """A second opinion: a guide's logits of the cell, given the tokens drafted before it. Fresh where it was asked."""
    drawn: Tensor | None = None
    """[B, L] int64: the place of each cell among those a joint sampler drew, from 1; 0 for the others."""
    costs: tuple[Cost, ...] = field(default=())
    """What the helpers of the denoiser computed for this draft."""
    aside: Tensor | None = None
    """[B, L] bool: cells of a probe. They were run through the model beside the text, and no key of them is kept."""
    top: tuple[Tensor, Tensor] | None = None
    """[N] int64 and [N]: the likeliest tokens of `logits` and their probabilities, where one pass has found both."""

    @cached_property
    def at(self) -> Tensor:
        """[N]: flat indices of the fresh cells."""
        return self.fresh.view(-1).nonzero().view(-1)

    def spread(self, value: Tensor, fill: float) -> Tensor:
        """Values [N] of the fresh cells as [B, L], `fill` elsewhere."""
        whole = torch.full(self.fresh.shape, fill, dtype=value.dtype, device=value.device)
        return whole.masked_scatter_(self.fresh, value)

    @cached_property
    def _logits(self) -> Tensor:
        source = self.logits if self.belief is None else self.belief
        return source if source.dtype == torch.float64 else source.float()

    @cached_property
    def _probability(self) -> Tensor:
        return self._logits.softmax(-1)  # less than half of the time of logsumexp

    @cached_property
    def tokens(self) -> Tensor:
        """[N]: the drafted tokens of the fresh cells."""
        if self.chosen is not None:
            return self.chosen
        return self._logits.max(-1).indices if (top := self._top) is None else top[0]

    @property
    def _top(self) -> tuple[Tensor, Tensor] | None:
        """`top`, if nothing stands between the logits and what is read."""
        return self.top if self.belief is None else None

    @cached_property
    def token(self) -> Tensor:
        """[B, L] int64: the drafted token."""
        return self.spread(self.tokens, 0)

    @cached_property
    def score(self) -> Tensor:
        """[B, L]: probability of the drafted token, float32 softmax (float64 for such logits); -inf where not fresh."""
        if self.chosen is None and (top := self._top) is not None:
            return self.spread(top[1], -torch.inf)
        return self.spread(self._probability.gather(1, self.tokens[:, None])[:, 0], -torch.inf)

    @cached_property
    def peak(self) -> Tensor:
        """[B, L]: largest probability, whichever token was drafted; -inf where not fresh."""
        top = self._top
        return self.spread(self._probability.amax(-1) if top is None else top[1], -torch.inf)

    @cached_property
    def gap(self) -> Tensor:
        """[B, L]: largest minus second largest raw logit; -inf where not fresh."""
        top = (self.logits if self.logits.dtype == torch.float64 else self.logits.float()).topk(2, -1).values
        return self.spread(top[:, 0] - top[:, 1], -torch.inf)

    @cached_property
    def margin(self) -> Tensor:
        """[B, L]: largest minus second largest probability; -inf where not fresh."""
        p = self._probability.topk(2, -1).values
        return self.spread(p[:, 0] - p[:, 1], -torch.inf)

    @cached_property
    def entropy(self) -> Tensor:
        """[B, L]: entropy of the prediction in nats; inf where not fresh."""
        return self.spread(torch.special.entr(self._probability).sum(-1), torch.inf)

    def probability_of(self, tokens: Tensor) -> Tensor:
        """[B, L]: probability of the given tokens [B, L] at the fresh cells; inf elsewhere."""
        own = tokens.flatten()[self.at].clamp(0, self.logits.shape[1] - 1)  # an undecided cell may hold any id
        return self.spread(self._probability.gather(1, own[:, None])[:, 0], torch.inf)

    def value(self, by: str) -> Tensor:
        """A statistic by name, larger = surer: score, peak, margin, gap, or entropy (negated)."""
        return -self.entropy if by == "entropy" else getattr(self, by)

    def __getitem__(self, rows: Tensor) -> Draft:
        """The rows of an increasing index tensor."""
        keep = torch.isin(self.at // self.fresh.shape[1], rows)
        rest = (None if t is None else t[keep] for t in (self.chosen, self.belief))
        second = None if self.second is None else self.second[rows]
        drawn, aside = (None if t is None else t[rows] for t in (self.drawn, self.aside))
        costs = tuple(Cost(c.name, c.computed[rows], c.seconds) for c in self.costs)
        own = (self.computed[rows], self.fresh[rows], self.logits[keep])
        top = None if self.top is None else (self.top[0][keep], self.top[1][keep])
        return Draft(*own, *rest, second=second, drawn=drawn, costs=costs, aside=aside, top=top)
