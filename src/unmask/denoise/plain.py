"""A transformer as a denoiser: pack the queried cells, run them once, return logits where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unmask.decode import Canvas, Draft
from unmask.denoise.packing import Packing, pack, reach
from unmask.models.config import Layout
from unmask.models.kv import KVPool, KVView
from unmask.models.sight import NOBODY, Sight
from unmask.models.transformer import Transformer


class Plain:
    """(canvas, query, need) -> Draft over one model and one K/V pool addressed by `canvas.slot`.

    `cached=False` keeps no keys and values: each forward attends to the cells it computes. Where logits are shifted the
    cell before each needed one is computed too, so that no logit is guessed. `layout`: who sees whom, if not as the
    model was trained (a block-causal model may be run in larger or smaller blocks).
    """

    def __init__(
        self, model: Transformer, *, slots: int, length: int, cached: bool = True, layout: Layout | None = None
    ) -> None:
        c = self.config = model.config
        self.layout = layout or c.layout
        if length > c.max_positions:
            raise ValueError(f"{length} cells do not fit into the model's {c.max_positions} positions")
        self.model, self.slots, self.length = model, slots, length
        device = model.embed.weight.device
        lend = model.graphs.pool if model.graphs else partial(KVPool, c, dtype=model.dtype, device=device)
        self.pool = lend(slots, length) if cached else None
        banned = {*range(c.token_count, c.vocab_size), *([c.mask_id] if 0 <= c.mask_id < c.token_count else [])}
        self.banned = torch.tensor(sorted(banned), dtype=torch.int64, device=device)
        """Columns that are never generated: padding of the vocabulary and the mask."""
        self.behind = torch.arange(length, device=device) > 0
        """[length] bool: where there is a cell before."""
        self.kept: Tensor | None = None
        """[slots, length, D]: the last hidden state of every position computed, where somebody asked to keep it."""

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        compute, fresh = self._reach(query, need)
        rows = None if len(canvas) == 1 or bool((live := compute.any(1)).all()) else live.nonzero()[:, 0]
        logits = self._forward(
            canvas if rows is None else canvas[rows], *(t if rows is None else t[rows] for t in (compute, fresh))
        )
        if len(self.banned):
            logits.index_fill_(1, self.banned, -torch.inf)
        kernels = self.model.kernels
        return Draft(compute, fresh, logits, top=None if kernels is None else kernels.top(logits))

    def keep_hidden(self) -> None:
        """Keep the last hidden states from now on."""
        c, weight = self.config, self.model.embed.weight
        slots = self.slots
        self.kept = torch.zeros(slots, self.length, c.d_model, dtype=self.model.dtype, device=weight.device)

    def hidden(self, canvas: Canvas, draft: Draft) -> tuple[Tensor, Tensor]:
        """(states [B, L, D] from which each cell was predicted, [B, L] bool where there is one), after `draft`."""
        assert self.kept is not None, "call keep_hidden first"
        known = draft.computed | (canvas.cached_at >= 0) & canvas.valid
        state = self.kept[canvas.slot, : canvas.tokens.shape[1]]
        if not self.config.shift:
            return state, known
        known = known.roll(1, 1) & canvas.valid
        known[:, 0] = False
        return state.roll(1, 1), known

    def _reach(self, query: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
        """(cells to compute, cells whose logits that gives), both [B, L]."""
        if not self.config.shift:
            return query, query & need
        need = need & self.behind[: need.shape[1]]
        compute = query | (query & need).roll(-1, 1)
        return compute, need & compute.roll(1, 1)

    def _forward(self, canvas: Canvas, compute: Tensor, fresh: Tensor) -> Tensor:
        """Logits [N, V] of the fresh cells in row-major order."""
        p = pack(compute)
        source = fresh.roll(-1, 1) if self.config.shift else fresh  # column 0 is never fresh there
        known, kv = compute, None
        if self.pool is not None:
            known = compute | (canvas.cached_at >= 0) & canvas.valid
            length = reach(known)
            known, kv = known[:, :length], self._view(canvas, p, length)
        tokens = p.of(canvas.tokens).clamp(min=0)  # the packing of a causal row may name undecided cells
        more = {"visible": self._sight(canvas, known, p), "need": p.of(source).flatten().nonzero()[:, 0]}
        forward = self.model.graphs or self.model
        return forward(tokens, p.index, kv=kv, tap=self._tap(canvas, p), ragged=p.ragged, **more)

    def _view(self, canvas: Canvas, p: Packing, length: int) -> KVView:
        assert self.pool is not None
        return self.pool.at(canvas.slot, p.index, length, ragged=p.ragged, look=self.model.kernels is None)

    def _tap(self, canvas: Canvas, p: Packing) -> Callable[[Tensor], None] | None:
        if self.kept is None:
            return None

        def store(states: Tensor) -> None:
            assert self.kept is not None
            slot = canvas.slot[:, None] if p.ragged is None else canvas.slot[p.ragged.row][None]
            self.kept[slot, p.index] = states.to(self.kept.dtype)

        return store

    def _sight(self, canvas: Canvas, known: Tensor, p: Packing) -> Sight | None:
        """Who sees whom, or None where every query sees every key."""
        if self.layout.kind == "full" and (p.ragged is None if self.pool is None else bool(known.all())):
            return None
        group = canvas.derive(
            (self.layout, "groups"),
            lambda: self.layout.groups(canvas.position, canvas.origin).int(),
            fixed=True,
        )
        query = p.of(group)
        if self.pool is not None:
            return Sight(query, group[:, : known.shape[1]].masked_fill(~known, NOBODY))
        return Sight(query, query if p.ragged is None else p.ragged.pad(query, NOBODY))
