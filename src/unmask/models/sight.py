"""What one forward looks like where it is no rectangle: rows of different lengths, and who sees whom as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NOBODY = 2**31 - 1
"""Group of a key that no query sees: one that was never computed, or padding."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """N tokens of several rows, one row behind the other, in place of [B, Q] with padding."""

    row: Tensor
    """[N]: the row of each token, increasing."""
    column: Tensor
    """[N]: its place among the tokens of its row."""
    count: Tensor
    """[B]: tokens of each row."""
    width: int
    """Tokens of the longest row."""

    def pad(self, x: Tensor, fill: int = 0) -> Tensor:
        """[1, N, ...] -> [B, Q, ...]."""
        wide = x.new_full((len(self.count), self.width, *x.shape[2:]), fill)
        wide[self.row, self.column] = x[0]
        return wide

    def flat(self, x: Tensor) -> Tensor:
        """[B, Q, ...] -> [1, N, ...]."""
        return x[self.row, self.column][None]


@dataclass(frozen=True, eq=False)
class Sight:
    """A query sees the keys whose group is not later than its own (`Layout.groups`): O(Q + K), where a mask has Q K."""

    query: Tensor
    """[B, Q] int32, or [1, N] of ragged rows."""
    key: Tensor
    """[B, K] int32; `NOBODY` where there is nothing to see."""

    def dense(self, ragged: Ragged | None = None) -> Tensor:
        """The mask that attention kernels take, [B, 1, Q, K] bool."""
        query = self.query if ragged is None else ragged.pad(self.query, NOBODY - 1)
        return (self.key[:, None, :] <= query[:, :, None])[:, None]
