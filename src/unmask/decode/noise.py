"""Counter-based randomness: every number is a function of (row seed, step, position, draw) and of nothing else.

Batch composition, restart and tracing therefore cannot change a sample. The generator is splitmix64 (Steele et al.
2014) chained over the four counters; torch's int64 products wrap, which is what it needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def uniform(seed: Tensor, step: Tensor, position: Tensor, draw: Tensor | int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32, for int64 counters that broadcast against each other.

    23 random bits, so that no value is 0 or 1; for rows use seed [B, 1], step [B, 1], position [L].
    """
    h = _mix(seed + _GOLDEN)
    h = _mix((h ^ step) + _GOLDEN)
    h = _mix((h ^ position) + _GOLDEN)
    h = _mix((h ^ draw) + _GOLDEN)
    return ((_shift(h, 41).double() + 0.5) / (1 << 23)).float()


def gumbel(seed: Tensor, step: Tensor, position: Tensor, draw: Tensor | int = 0) -> Tensor:
    """Standard Gumbel numbers from the same counters: argmax(logits / T + gumbel) samples softmax(logits / T)."""
    return -torch.log(-torch.log(uniform(seed, step, position, draw)))
