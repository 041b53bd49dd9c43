"""A transformer as a denoiser: pack the queried cells, run them once, return logits where they are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unmask.decode import Canvas, Draft
from unmask.models.config import Layout
from unmask.models.kv import KVPool
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
        self.pool = KVPool(c, slots, length, dtype=model.dtype, device=device) if cached else None
        self.banned = [slice(c.token_count, None)] if c.token_count < c.vocab_size else []
        """Columns that are never generated: padding of the vocabulary and the mask."""
        self.kept: Tensor | None = None
        """[slots, length, D]: the last hidden state of every position computed, where somebody asked to keep it."""
        if 0 <= c.mask_id < c.token_count:
            self.banned.append(slice(c.mask_id, c.mask_id + 1))

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        compute, fresh = self._reach(query, need)
        live = compute.any(1)
        rows = None if bool(live.all()) else live.nonzero()[:, 0]
        logits = self._forward(
            canvas if rows is None else canvas[rows], *(t if rows is None else t[rows] for t in (compute, fresh))
        )
        for column in self.banned:
            logits[:, column] = -torch.inf
        return Draft(compute, fresh, logits)

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
        wanted = query & need
        compute = query.clone()
        compute[:, :-1] |= wanted[:, 1:]
        fresh = torch.zeros_like(need)
        fresh[:, 1:] = need[:, 1:] & compute[:, :-1]
        return compute, fresh

    def _forward(self, canvas: Canvas, compute: Tensor, fresh: Tensor) -> Tensor:
        """Logits [N, V] of the fresh cells in row-major order."""
        index, real = pack(compute)
        tokens = canvas.tokens.gather(1, index).clamp(min=0)  # the packing of a causal row may name undecided cells
        kv = None
        if self.pool is not None:
            length = compute.shape[1]
            kv = self.pool.at(
                canvas.slot, index if real is None else index.masked_fill(~real, self.pool.length), length
            )
        source = fresh.roll(-1, 1) if self.config.shift else fresh  # column 0 is never fresh there
        need = source.gather(1, index).flatten().nonzero()[:, 0]
        visible = self._visible(canvas, compute, index, real)
        return self.model(tokens, index, kv=kv, visible=visible, need=need, tap=self._tap(canvas, index, real))

    def _tap(self, canvas: Canvas, index: Tensor, real: Tensor | None) -> Callable[[Tensor], None] | None:
        if self.kept is None:
            return None

        def store(states: Tensor) -> None:
            assert self.kept is not None
            row = canvas.slot[:, None].expand_as(index)
            keep = torch.ones_like(index, dtype=torch.bool) if real is None else real
            self.kept[row[keep], index[keep]] = states[keep]

        return store

    def _visible(self, canvas: Canvas, compute: Tensor, index: Tensor, real: Tensor | None) -> Tensor | None:
        """[B, 1, Q, K] bool, or None where every query sees every key."""
        if self.pool is None:
            keys, position = real, index
        else:
            known = compute | (canvas.cached_at >= 0) & canvas.valid
            keys, position = (None if bool(known.all()) else known), canvas.position.expand_as(compute)
        allowed = self.layout.visible(index, position, canvas.origin)
        if keys is None:
            return None if allowed is None else allowed[:, None]
        seen = keys[:, None, None, :]
        return seen.expand(-1, 1, index.shape[1], -1) if allowed is None else seen & allowed[:, None]


def pack(cells: Tensor) -> tuple[Tensor, Tensor | None]:
    """Columns of the set cells [B, Q], padded to the widest row, and which of them are real (None: all)."""
    if len(cells) == 1:
        return cells.nonzero()[:, 1][None], None
    count = cells.sum(1)
    width = int(count.max())
    index = cells.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return index, None if bool((count == width).all()) else cells.gather(1, index)
