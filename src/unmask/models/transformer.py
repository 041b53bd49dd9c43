"""One decoder-only transformer for every family: GQA, RoPE, optional qkv bias, qk-norm, experts. It has no policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.config import ModelConfig
from unmask.models.experts import Mixture
from unmask.models.kv import KVView
from unmask.models.layers import MLP, Embedding, Linear, RMSNorm
from unmask.models.sight import Ragged, Sight

if TYPE_CHECKING:
    from unmask.models.fast import Native
    from unmask.models.graphs import Graphs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split convention: x [B, H, Q, D], cos and sin [B or 1, 1, Q, D / 2] (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for the first dimensions of a head, as many as cos and sin have twice; the others stay."""
    width = 2 * cos.shape[-1]
    return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], -1)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, fp32 [max_positions, rotated dimensions / 2]."""
    width = config.rotary or config.head_dim
    power = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    frequency = config.rope_theta**-power
    if config.rope_scaling is not None:
        frequency = config.rope_scaling.apply(frequency)
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float64, device="cpu"), frequency)
    return angle.cos().float(), angle.sin().float()


RELEASED = (
    "this model's weights were packed for decoding, and are not there for gradients, masks as tensors or another "
    "dtype; load it with compile='off'"
)
Mask = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor] | None
"""Which keys a query sees: [B, 1, Q, K] bool (or numbers to add), all (None), or what computes the attention itself."""


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Mask) -> Tensor:
    """Softmax attention, q [B, H, Q, D], k and v [B, H_kv, K, D] -> [B, H, Q, D].

    With gradients the plain product is used: on CPU it trains 1.3-1.9 times as fast as the fused kernel.
    """
    if callable(visible) and not isinstance(visible, Tensor):
        return visible(q, k, v)
    groups = q.shape[1] // k.shape[1]
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weight = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if visible is not None:
        weight = weight.masked_fill(~visible, float("-inf"))
    return weight.softmax(-1).to(v.dtype) @ v


@dataclass(frozen=True, eq=False)
class Pass:
    """What all blocks share in one forward."""

    rope: tuple[Tensor, Tensor]
    """cos and sin of the positions."""
    kv: KVView | None = None
    visible: Mask = None
    ragged: Ragged | None = None


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for q, k and v."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.qkv = Linear(c.d_model, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_dim, c.d_model, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.rotate = rotate_part if 0 < c.rotary < c.head_dim else rotate

    def forward(self, x: Tensor, at: Pass) -> Tensor:
        """x [B, Q, D], or [1, N, D] of ragged rows."""
        c, (batch, width, _) = self.config, x.shape
        qkv = self.qkv(x).view(batch, width, c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=2))
        q, k = self.rotate(self.q_norm(q), *at.rope), self.rotate(self.k_norm(k), *at.rope)
        if at.kv is not None:
            k, v = at.kv.update(self.layer, k, v)
        elif at.ragged is not None:
            k, v = (at.ragged.pad(t.transpose(1, 2)).transpose(1, 2) for t in (k, v))
        if at.ragged is not None:
            q = at.ragged.pad(q.transpose(1, 2)).transpose(1, 2)
        y = attend(q, k, v, at.visible).transpose(1, 2)
        y = y if at.ragged is None else at.ragged.flat(y)
        return self.out(y.reshape(batch, width, c.heads * c.head_dim))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        sparse = config.experts is not None and layer >= config.experts.dense
        self.mlp = Mixture(config) if sparse else MLP(config.d_model, config.ff)

    def forward(self, x: Tensor, at: Pass) -> Tensor:
        """x [B, Q, D], or [1, N, D] of ragged rows."""
        x = x + self.attn(self.attn_norm(x), at)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """tokens -> logits. What to compute, what to keep and who sees whom is the caller's business."""

    cos: Tensor
    sin: Tensor
    native: Native | None = None
    """The same blocks in the kernels of this processor, where `accelerate` made them."""
    graphs: Graphs | None = None
    """What stands before the forward on an accelerator, where `accelerate` put it: buckets of captured graphs."""
    released = False
    """Are the weights there in the kernels' form alone?"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)
        cos, sin = rope_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        index: Tensor | None = None,
        *,
        kv: KVView | None = None,
        visible: Mask | Sight = None,
        need: Tensor | None = None,
        dtype: torch.dtype | None = None,
        tap: Callable[[Tensor], object] | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """Logits of `tokens` [B, Q] at absolute positions `index` [B, Q] (default 0, 1, ...).

        `visible` [B, 1, Q, K] bool: the keys each query sees, K being Q, or the readable length of `kv`; None = all;
        or the same as group numbers. `need` [N]: flat indices into B * Q; the head runs on these rows only and [N, V]
        is returned, else [B, Q, V]. `dtype`: activation dtype, default that of the weights. `tap` is shown the hidden
        states [B, Q, D] that the head reads. `ragged`: tokens, index and states are [1, N], row behind row.
        """
        x = self.embed(tokens).to(dtype or self.dtype)
        if self.native is not None and not self.native.current:
            self.native = None
        if (kernels := self.kernels) is not None and (visible is None or isinstance(visible, Sight)):
            x = kernels(x, index, kv, visible, ragged)
        else:
            x = self._through(x, index, kv, visible, ragged)
        if tap is not None:
            tap(x := self.normed(x))
            return self.head_of(x if need is None else x.flatten(0, 1)[need])
        if need is not None:
            x = x.flatten(0, 1)[need]
        return self.logits(x)

    def _through(
        self, x: Tensor, index: Tensor | None, kv: KVView | None, visible: Mask | Sight, ragged: Ragged | None
    ) -> Tensor:
        """x through all blocks, in torch."""
        if self.released:
            raise RuntimeError(RELEASED)
        mask = visible.dense(ragged) if isinstance(visible, Sight) else visible
        at = Pass(self.rope(x.shape[1], index, x.dtype), kv, mask, ragged)
        for block in self.blocks:
            x = block(x, at)
        return x

    def rope(self, width: int, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [B or 1, 1, Q, D / 2]."""
        pick = slice(width) if index is None else index
        shape = (1, 1, width, -1) if index is None else (len(index), 1, width, -1)
        return self.cos[pick].to(dtype).view(shape), self.sin[pick].to(dtype).view(shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [..., D] before the norm -> [..., V]."""
        return self.head_of(self.normed(hidden))

    @property
    def kernels(self) -> Native | None:
        """The compiled kernels, where there are some and no gradient is asked for."""
        return None if torch.is_grad_enabled() else self.native

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        kernels = self.kernels
        return self.norm(hidden) if kernels is None else kernels.norm(hidden)

    def head_of(self, normed: Tensor) -> Tensor:
        """The head alone: hidden states [..., D] after the norm -> [..., V]; in fp32 from the kernels."""
        if (kernels := self.kernels) is not None:
            return kernels.head(normed)
        if self.head is not None:
            return self.head(normed)
        return F.linear(normed, self.embed.weight.to(normed.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        """Move or cast, as every module; what was made for the weights as they were is left behind."""
        self.native = self.graphs = None
        return super()._apply(fn, recurse)

    @property
    def size(self) -> int:
        """How many weights it has."""
        return sum(p.numel() for p in self.parameters())

    def initialise(self, seed: int, *, gain: float = 0.6) -> Transformer:
        """Draw all weights from `seed`: matrices N(0, gain^2 / fan_in), residual outputs by 1 / sqrt(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if name.startswith("embed") else gain / math.sqrt(p.shape[1])
                if name.endswith(("attn.out.weight", "down.weight")):
                    std /= math.sqrt(2 * self.config.layers)
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self
