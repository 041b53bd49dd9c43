"""Queried cells of a batch, put together for one forward: a rectangle, or ragged rows one behind the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.models.sight import Ragged


@dataclass(frozen=True, eq=False)
class Packing:
    """Which columns of a batch [B, L] a forward computes, without padding."""

    index: Tensor
    """[B, Q] where every row has as many, else [1, N]."""
    flat: Tensor
    """Of the shape of `index`: where the cell stands in B * L."""
    ragged: Ragged | None

    def of(self, cells: Tensor) -> Tensor:
        """What stands at those cells of [B, L], in the shape of `index`."""
        return cells.take(self.flat)


def pack(cells: Tensor) -> Packing:
    """The set cells [B, L], of which every row has some."""
    rows, length = cells.shape
    flat = cells.view(-1).nonzero().view(-1)
    if rows == 1:
        return Packing(one := flat[None], one, None)
    count, column = cells.sum(1), flat % length
    width = int(count.max())
    if len(flat) == width * rows:
        return Packing(column.view(rows, width), flat.view(rows, width), None)
    row = flat // length
    place = torch.arange(len(flat), device=flat.device) - (count.cumsum(0) - count)[row]
    return Packing(column[None], flat[None], Ragged(row, place, count, width))


def reach(cells: Tensor) -> int:
    """How many columns there are up to the last set cell of any row."""
    return int((cells.any(0) if len(cells) > 1 else cells[0]).nonzero()[-1, 0]) + 1
