"""Attention on an accelerator: which kernels are tried, what mask they take, and flex_attention as another way."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.models.sight import Sight

if TYPE_CHECKING:
    from collections.abc import Callable


def masked(sight: Sight, dtype: torch.dtype) -> Tensor:
    """Who sees whom as numbers to add, [B, 1, Q, K]: made once, where kernels would turn a bool mask in every layer."""
    seen = sight.dense()
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def kernels_first() -> Any:
    """The order in which attention kernels are tried: flash (takes no mask), efficient, cuDNN, and the unfused product
    last, which is what heads in groups would get by default under a mask before efficient attention took them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(sight: Sight) -> Any:
    """Which blocks of keys which blocks of queries see: what flex_attention takes (Dong et al. 2024)."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = sight.query, sight.key

    def sees(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return key[row, k] <= query[row, q]

    return create_block_mask(sees, len(query), None, query.shape[1], key.shape[1], device=str(query.device))


def attend_flex(q: Tensor, k: Tensor, v: Tensor, sight: Sight, *, blocks: Any = None) -> Tensor:
    """Softmax attention, q [B, H, Q, D], k and v [B, H_kv, K, D], of what is in `sight` (`blocks`: its block mask).

    Compiled on CUDA; elsewhere the unfused reference of the same call.
    """
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if q.is_cuda else flex_attention
    groups = q.shape[1] // k.shape[1]
    return run(q, k, v, block_mask=block_mask(sight) if blocks is None else blocks, enable_gqa=groups > 1)


def flexed(sight: Sight, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by `attend_flex` as what `Transformer.forward` takes for `visible`; the block mask is made once."""
    blocks = block_mask(sight)
    return lambda q, k, v: attend_flex(q, k, v, sight, blocks=blocks)
