"""The published schedule of a dual cache done the plain way, as a yardstick: nothing fused, nothing packed, no tricks.

Query, key, value, gate and up are products of their own; norms are composite and in fp32; the rotary tables are made
for every forward; keys and values are concatenated; the head and a float64 softmax run over all cells of the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.layers import MLP
from unmask.models.transformer import Block, Transformer

Cache = list[tuple[Tensor, Tensor]]


class Reference:
    """The weights of a transformer (dense, with rotary heads) in a forward of the plain kind; batch 1."""

    def __init__(self, model: Transformer) -> None:
        self.model, c = model, model.config
        self.config = c
        sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        self.parts = []
        for block in model.blocks:
            assert isinstance(block, Block) and isinstance(block.mlp, MLP)
            matrices = block.attn.qkv.weight.split(sizes)
            biases = [None] * 3 if block.attn.qkv.bias is None else [*block.attn.qkv.bias.split(sizes)]
            gate_up = block.mlp.gate_up.weight.chunk(2)
            self.parts.append((block, matrices, biases, gate_up))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return weight * wide.to(x.dtype)

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x [1, H, Q, D] at positions [Q], in fp32."""
        width = x.shape[-1]
        power = torch.arange(0, width, 2, dtype=torch.float32) / width
        angle = position.float()[:, None] * (self.config.rope_theta**-power)[None]
        cos, sin = (torch.cat([f, f], -1)[None, None] for f in (angle.cos(), angle.sin()))
        wide = x.float()
        first, second = wide.chunk(2, -1)
        return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, position: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits [1, Q, V] of tokens [1, Q] at positions [Q], and the cache with their keys and values in place."""
        c, x, made = self.config, self.model.embed(tokens), []
        first, last = int(position[0]), int(position[-1]) + 1
        for i, (block, matrices, biases, gate_up) in enumerate(self.parts):
            h = self.norm(x, block.attn_norm.weight)
            q, k, v = (F.linear(h, w, b) for w, b in zip(matrices, biases, strict=True))
            q, k, v = (t.view(1, -1, t.shape[-1] // c.head_dim, c.head_dim).transpose(1, 2) for t in (q, k, v))
            q, k = self.rotate(q, position), self.rotate(k, position)
            if cache is not None:
                k, v = (
                    torch.cat([old[:, :, :first], new, old[:, :, last:]], 2)
                    for old, new in zip(cache[i], (k, v), strict=True)
                )
            made.append((k, v))
            causal = c.autoregressive and tokens.shape[1] > 1
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=c.heads != c.kv_heads)
            x = x + F.linear(y.transpose(1, 2).reshape(1, tokens.shape[1], -1), block.attn.out.weight)
            h = self.norm(x, block.mlp_norm.weight)
            gate, up = (F.linear(h, w) for w in gate_up)
            x = x + F.linear(F.silu(gate) * up, block.mlp.down.weight)
        x = self.norm(x, self.model.norm.weight)
        head = self.model.embed.weight if self.model.head is None else self.model.head.weight
        return F.linear(x, head), made

    @torch.inference_mode()
    def commit(self, x: Tensor, logits: Tensor, first: int, last: int, k: int) -> Tensor:
        """x [1, L] with the k surest undecided cells of [first, last) filled; logits [1, Q, V] of those cells."""
        mask = self.config.mask_id
        logits[..., mask] = -torch.inf
        logits[..., self.config.token_count :] = -torch.inf
        window, p = x[:, first:last], F.softmax(logits.to(torch.float64), -1)
        token = p.argmax(-1)
        sure = torch.gather(p, -1, token.unsqueeze(-1)).squeeze(-1)
        sure = torch.where(window == mask, sure, -torch.inf)
        for row in range(len(x)):
            _, place = torch.topk(sure[row], k)
            x[row, first + place] = token[row, place]
        return x

    def decode(self, prompt: list[int], length: int, block: int, per_step: int) -> tuple[Tensor, int]:
        """The whole schedule: each block is entered by a full forward, then computed alone. (tokens [L], forwards).

        Where logits are shifted, those of a cell are read at the cell before it.
        """
        x = torch.tensor([[*prompt, *[self.config.mask_id] * length]])
        forwards, everything, back = 0, torch.arange(x.shape[1]), int(self.config.shift)
        for first in range(len(prompt), x.shape[1], block):
            last, cache = min(first + block, x.shape[1]), None
            while bool((x[0, first:last] == self.config.mask_id).any()):
                if cache is None:
                    logits, cache = self.forward(x, everything, None)
                    logits = logits[:, first - back : last - back]
                else:
                    logits, cache = self.forward(x[:, first - back : last], everything[first - back : last], cache)
                    logits = logits[:, : last - first]
                x = self.commit(x, logits, first, last, per_step)
                forwards += 1
        return x[0], forwards
