"""Forwards over a K/V pool, and denoisers whose forwards go through graphs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.denoise import Plain
from unmask.models.config import ModelConfig
from unmask.models.graphs import Graphs
from unmask.models.kv import KVPool
from unmask.models.sight import NOBODY, Ragged, Sight
from unmask.models.transformer import Transformer


class Through:
    """A model whose forwards go through graphs."""

    graphs = None  # these are its own

    def __init__(self, net: Transformer, made: Graphs) -> None:
        self.net, self.made = net, made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        return self.made(*args, **more)


def innermost(denoise: Any) -> Plain:
    """The denoiser that runs the model."""
    while not isinstance(denoise, Plain):
        denoise = getattr(denoise, "plain", None) or denoise.denoise
    return denoise


def through(denoise: Any, *, kind: type[Graphs] = Graphs, **settings: Any) -> tuple[Any, Graphs]:
    """The same denoiser, its model's forwards in static buffers, and what runs them."""
    inner = innermost(denoise)
    made = kind(inner.model, **settings)
    inner.model = Through(inner.model, made)
    return denoise, made


def tiny_of(head_dim: int = 8) -> Transformer:
    """Random weights with heads in groups and a bias, float32."""
    sizes = {"d_model": 4 * head_dim, "layers": 2, "heads": 4, "kv_heads": 2, "ff": 48}
    config = ModelConfig(97, **sizes, max_positions=2048, qkv_bias=True)
    net = Transformer(config).initialise(3).eval().requires_grad_(False)
    for block in net.blocks:
        block.attn.qkv.bias.copy_(numbers(len(block.attn.qkv.bias), below=9) / 9 - 0.5)
    return net


def numbers(*shape: int, below: int, seed: int = 0) -> Tensor:
    """Whole numbers from `seed`."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def noisy(net: Transformer, slots: int, length: int, seed: int = 1) -> KVPool:
    """A pool full of numbers, so that what is read by mistake is seen."""
    pool = KVPool(net.config, slots, length, dtype=net.dtype, device=net.embed.weight.device)
    pool.data.copy_(torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


def forward(net: Transformer, pool: KVPool, slots: list[int], width: int, length: int) -> dict[str, Any]:
    """The arguments of a forward over the last cells that are read, each second of which is needed."""
    rows = len(slots)
    index = torch.arange(length - width, length).expand(rows, -1).contiguous()
    kv = pool.at(torch.tensor(slots), index, length)
    need = torch.arange(0, rows * width, 2)
    tokens = numbers(rows, width, below=net.config.vocab_size)
    return {"tokens": tokens, "index": index, "kv": kv, "need": need, "visible": None}


def in_rows(net: Transformer, pool: KVPool, slots: list[int], counts: list[int], length: int) -> dict[str, Any]:
    """The arguments of a forward of ragged rows, each of which sees a different number of keys."""
    count = torch.tensor(counts)
    row = torch.arange(len(counts)).repeat_interleave(count)
    column = torch.cat([torch.arange(c) for c in counts])
    last = torch.tensor([length - 3 * i for i in range(len(counts))])
    index = (last[row] - count[row] + column)[None]
    packed = Ragged(row, column, count, max(counts))
    key = (torch.arange(length) // 4).expand(len(counts), -1)
    sight = Sight((index // 4).int(), key.masked_fill(torch.arange(length) >= last[:, None], NOBODY).int())
    kv = pool.at(torch.tensor(slots), index, length, ragged=packed)
    tokens = numbers(1, len(row), below=net.config.vocab_size)
    return {
        "tokens": tokens,
        "index": index,
        "kv": kv,
        "visible": sight,
        "need": torch.arange(1, len(row), 3),
        "ragged": packed,
    }


def on(device: str, value: Any) -> Any:
    """The same value, its tensors on a device."""
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on(device, getattr(value, f.name)) for f in fields(value)})
    return value.to(device) if torch.is_tensor(value) else value
