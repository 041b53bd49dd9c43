"""What the machine can do, measured in the same run: products at the shapes used, streaming, attention, dispatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models import native
from unmask.models.config import ModelConfig
from unmask.models.native import Arena, Weight, pointer

REPEATS = 7
Shapes = dict[tuple[int, int], int]
"""(outputs, inputs) of a matrix, and how many of it a model has."""


def clock(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median milliseconds, after a call that is not told."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def shapes(c: ModelConfig) -> Shapes:
    """The matrices of all blocks of a dense model."""
    inner = c.heads * c.head_dim
    found: Shapes = {}
    for shape in (
        (inner + 2 * c.kv_heads * c.head_dim, c.d_model),
        (c.d_model, inner),
        (2 * c.ff, c.d_model),
        (c.d_model, c.ff),
    ):
        found[shape] = found.get(shape, 0) + c.layers
    return found


def ways(groups: list[tuple[int, int, int, int]], dtype: str) -> dict[str, list[Callable[[], object]]]:
    """For each (m, n, k, count), products [m, k] x [k, n] with weights of their own, by all means for the dtype."""
    real = torch.float32 if dtype == "float32" else torch.bfloat16
    found: dict[str, list[Callable[[], object]]] = {}
    x = {(m, k): torch.randn(m, k, dtype=real) for m, _, k, _ in groups}
    if dtype != "int8":
        plain = [[torch.randn(n, k, dtype=real) for _ in range(count)] for _, n, k, count in groups]
        given = [(x[m, k], own) for (m, _, k, _), own in zip(groups, plain, strict=True)]
        found["torch"] = [partial(_each, F.linear, *one) for one in given]
        with suppress(RuntimeError, AttributeError):
            packed = [(a, [torch.ops.mkldnn._reorder_linear_weight(w, len(a)) for w in own]) for a, own in given]
            found["oneDNN"] = [partial(_each, _packed, *one) for one in packed]
    with suppress(native.Unavailable):
        library = native.library(dtype, half=dtype != "float32")
        arena = Arena(sum(count * Arena.room(torch.Size((n, k)), dtype) for _, n, k, count in groups))
        found["kernels"] = []
        for m, n, k, count in groups:
            own = [Weight(torch.randn(n, k), None, dtype, arena) for _ in range(count)]
            found["kernels"].append(partial(_each, partial(_native, library, torch.empty(m, n)), x[m, k].float(), own))
    return found


def _each(run: Callable[[Tensor, Any], object], x: Tensor, weights: list[Any]) -> None:
    for weight in weights:
        run(x, weight)


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _native(library: Any, out: Tensor, x: Tensor, weight: Weight) -> None:
    library.linear(weight.packed, pointer(x), len(x), pointer(out), torch.get_num_threads())


def products(c: ModelConfig, m: int, dtype: str, *, need: int) -> dict[str, float | str]:
    """What all products of a forward of m cells take alone, in ms, the head for `need` of them, each the best way.

    The products of all layers run one after the other, each with weights of its own, so that weights come from where
    those of the model come from.
    """
    groups = [(m, n, k, count) for (n, k), count in shapes(c).items()] + [(need, c.vocab_size, c.d_model, 1)]
    told: dict[str, list[float]] = {}
    for name, runs in ways(groups, dtype).items():
        passes = [[_once(run) for run in runs] for _ in range(REPEATS + 1)][1:]
        told[name] = [statistics.median(times) for times in zip(*passes, strict=True)]
    best = [min(told, key=lambda name: told[name][i]) for i in range(len(groups))]
    total = sum(told[name][i] for i, name in enumerate(best))
    flops = sum(2.0 * rows * n * k * count for rows, n, k, count in groups)
    return {"ms": total, "gflops": flops / total / 1e6, "ways": ", ".join(sorted(set(best)))}


def _once(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def attention(c: ModelConfig, queries: int, keys: int, dtype: str) -> float:
    """Milliseconds of all layers' attention, queries over keys that lie in a pool, the better of two ways."""
    real = torch.bfloat16 if dtype != "float32" else torch.float32
    q = torch.randn(1, c.heads, queries, c.head_dim, dtype=real)
    pool = torch.randn(c.layers, 2, 1, c.kv_heads, keys, c.head_dim, dtype=real)
    groups = c.heads // c.kv_heads

    def fused() -> None:
        for k, v in pool:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)

    def plain() -> None:
        for k, v in pool:
            wide = (t.repeat_interleave(groups, 1) for t in (k, v)) if groups > 1 else (k, v)
            _softmaxed(q, *wide)

    return min(clock(fused), clock(plain))


def _softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5).softmax(-1) @ v


def forward(c: ModelConfig, queries: int, keys: int, dtype: str, *, need: int, rows: int = 1) -> dict[str, float | str]:
    """The roofline of one forward: its products and its attention, nothing else."""
    with torch.inference_mode():
        made = products(c, queries * rows, dtype, need=need * rows)
        seen = rows * attention(c, queries, keys, dtype)
    return {**made, "attention_ms": seen, "ms": float(made["ms"]) + seen}


def machine() -> dict[str, float]:
    """GB/s of reading and of copying more than a cache holds, and microseconds of the cheapest call into torch."""
    block = torch.ones(64 << 20)
    other, small = torch.empty_like(block), torch.ones(1)
    size = block.numel() * 4 / 1e6
    with torch.inference_mode():
        read, copy = clock(block.sum, 5), clock(lambda: other.copy_(block), 5)
        calls = clock(lambda: [small.add(1) for _ in range(1000)], 5)
    return {"read_gb_s": size / read, "copy_gb_s": 2 * size / copy, "dispatch_us": calls}
