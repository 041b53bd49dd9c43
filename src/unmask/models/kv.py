"""The key/value pool: a mutable resource addressed by slot and absolute position. It holds no policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.models.config import ModelConfig
from unmask.models.sight import Ragged


class KVPool:
    """Keys and values of `slots` rows of up to `length` positions: [layers, 2, slots, kv_heads, length + 1, head_dim].

    The last position is a bin: padded queries of a ragged batch write there and nobody reads it.
    """

    def __init__(
        self, config: ModelConfig, slots: int, length: int, *, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        shape = (config.layers, 2, slots, config.kv_heads, length + 1, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length

    def at(
        self, slots: Tensor, index: Tensor, length: int, *, ragged: Ragged | None = None, look: bool = True
    ) -> KVView:
        """Address the rows `slots` [B]: write at positions `index` [B, Q], or [1, N] of ragged rows (`self.length` =
        bin), and read [0, length). `look`: is it worth a look whether these are slices? The kernels need none."""
        span = window = None
        if not look:
            pass
        elif len(slots) == 1:
            first = int(slots)
            span = slice(first, first + 1)
            start, last = int(index[0, 0]), int(index[0, -1])
            window = slice(start, last + 1) if last - start + 1 == index.shape[1] else None
        else:
            rows = slots.tolist()
            span = slice(rows[0], rows[0] + len(rows)) if rows == list(range(rows[0], rows[0] + len(rows))) else None
        return KVView(self.data, slots, index, length, span, window, ragged)


@dataclass(frozen=True, eq=False)
class KVView:
    """One forward's window on the pool."""

    data: Tensor
    slots: Tensor
    index: Tensor
    length: int
    span: slice | None = None
    """The slots as a slice, where they are contiguous."""
    window: slice | None = None
    """The written positions as a slice, where the batch is one row and they are contiguous."""
    ragged: Ragged | None = None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, Q, head_dim] and return what can be read, [B, kv_heads, length, head_dim] each."""
        pool = self.data[layer]
        if self.window is not None and self.span is not None:
            pool[0, self.span, :, self.window] = k
            pool[1, self.span, :, self.window] = v
        else:
            rows = self.slots[:, None] if self.ragged is None else self.slots[self.ragged.row][None]
            pool[0].transpose(1, 2)[rows, self.index] = k.transpose(1, 2)
            pool[1].transpose(1, 2)[rows, self.index] = v.transpose(1, 2)
        rows = self.span if self.span is not None else self.slots
        return pool[0, rows, :, : self.length], pool[1, rows, :, : self.length]
