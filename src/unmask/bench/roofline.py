"""What the machine can do, measured in the same run: products at the shapes used, streaming, attention, dispatch."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
Group = tuple[int, int, int, int]
"""Rows, outputs and inputs of a product, and how many of it a forward has."""


def clock(run: Callable[[], object], repeats: int = REPEATS, *, of: Callable[[list[float]], float] = min) -> float:
    """The least milliseconds of some calls, after one that is not told: what the machine can do, others left aside."""
    run()
    return of([_once(run) for _ in range(repeats)])


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


def ways(groups: list[Group], dtype: str) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """For each (m, n, k, count), products [m, k] x [k, n] with weights of their own, by all means for the dtype.

    A way is made when it is asked for, so that the weights of one are gone before those of the next but one.
    """
    real = torch.float32 if dtype == "float32" else torch.bfloat16
    x = {(m, k): torch.randn(m, k, dtype=real) for m, _, k, _ in groups}
    if dtype != "int8":
        plain = [[torch.randn(n, k, dtype=real) for _ in range(count)] for _, n, k, count in groups]
        given = [(x[m, k], own) for (m, _, k, _), own in zip(groups, plain, strict=True)]
        yield "torch", [partial(_each, F.linear, *one) for one in given]
        with suppress(RuntimeError, AttributeError):
            packed = [(a, [torch.ops.mkldnn._reorder_linear_weight(w, len(a)) for w in own]) for a, own in given]
            del plain, given
            yield "oneDNN", [partial(_each, _packed, *one) for one in packed]
            del packed
    else:
        with suppress(RuntimeError, AttributeError):
            rounded = [(x[m, k].float(), [_rounded(n, k) for _ in range(count)]) for m, n, k, count in groups]
            yield "fbgemm", [partial(_each, torch.ops.quantized.linear_dynamic, *one) for one in rounded]
            del rounded
    with suppress(native.Unavailable):
        library = native.library(dtype, half=dtype != "float32")
        arena = Arena(sum(count * Arena.room(torch.Size((n, k)), dtype) for _, n, k, count in groups))
        made = []
        for m, n, k, count in groups:
            own = [Weight(torch.randn(n, k), None, dtype, arena) for _ in range(count)]
            made.append(partial(_each, partial(_native, library, torch.empty(m, n)), x[m, k].float(), own))
        yield "kernels", made


def _each(run: Callable[[Tensor, Any], object], x: Tensor, weights: list[Any]) -> None:
    for weight in weights:
        run(x, weight)


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _rounded(n: int, k: int) -> Any:
    """A random matrix as torch's own dynamic int8 takes it: a scale an output."""
    scale, zero = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.long)
    with warnings.catch_warnings():  # torch says that it will not always have this; then it is left out
        warnings.simplefilter("ignore")
        whole = torch.quantize_per_channel(torch.randn(n, k), scale.double(), zero, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(whole, None)


def _native(library: Any, out: Tensor, x: Tensor, weight: Weight) -> None:
    library.linear(weight.packed, pointer(x), len(x), pointer(out), torch.get_num_threads())


def products(c: ModelConfig, m: int, dtype: str, *, need: int) -> dict[str, float | str]:
    """What all products of a forward of m cells take alone, in ms, the head for `need` of them, each the best way.

    The products of all layers run one after the other, each with weights of its own, so that weights come from where
    those of the model come from.
    """
    groups = [(m, n, k, count) for (n, k), count in shapes(c).items()] + [(need, c.vocab_size, c.d_model, 1)]
    told: dict[str, list[float]] = {}
    for name, runs in ways(groups, dtype):
        passes = [[_once(run) for run in runs] for _ in range(REPEATS + 1)][1:]
        told[name] = [min(times) for times in zip(*passes, strict=True)]
    best = [min(told, key=lambda name: told[name][i]) for i in range(len(groups))]
    total = sum(told[name][i] for i, name in enumerate(best))
    flops = sum(2.0 * rows * n * k * count for rows, n, k, count in groups)
    return {"ms": total, "gflops": flops / total / 1e6, "ways": ", ".join(sorted(set(best)))}


def _once(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def attention(c: ModelConfig, queries: int, keys: int, dtype: str) -> float:
    """Milliseconds of all layers' attention, queries over keys that lie in a pool, the best of four ways.

    The fused one and two products, layer by layer or, since a small one costs what its call costs, all in one call.
    """
    real = torch.bfloat16 if dtype != "float32" else torch.float32
    q = torch.randn(1, c.heads, queries, c.head_dim, dtype=real)
    pool = torch.randn(c.layers, 2, 1, c.kv_heads, keys, c.head_dim, dtype=real)
    groups = c.heads // c.kv_heads

    def fused(q: Tensor, pairs: Sequence[Any]) -> None:
        for k, v in pairs:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)

    def plain(q: Tensor, pairs: Sequence[Any]) -> None:
        for k, v in pairs:
            wide = (t.repeat_interleave(groups, 1) for t in (k, v)) if groups > 1 else (k, v)
            _softmaxed(q, *wide)

    whole = q.expand(c.layers, -1, -1, -1).contiguous(), [tuple(pool[:, i, 0].contiguous() for i in range(2))]
    return min(clock(partial(way, *given)) for way in (fused, plain) for given in ((q, list(pool)), whole))


def _softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5).softmax(-1) @ v


def forward(c: ModelConfig, rows: Sequence[tuple[int, int]], dtype: str, *, need: int) -> dict[str, float | str]:
    """The roofline of one forward of rows of (queries, keys) each: its products and its attention, nothing else.

    `need`: cells of all rows whose logits are asked for.
    """
    with torch.inference_mode():
        made = products(c, sum(queries for queries, _ in rows), dtype, need=need)
        seen = sum(count * attention(c, *row, dtype) for row, count in Counter(rows).items())
    return {**made, "attention_ms": seen, "ms": float(made["ms"]) + seen}


def machine() -> dict[str, float]:
    """GB/s of reading and of copying more than a cache holds, and microseconds of the cheapest call into torch."""
    block = torch.ones(64 << 20)
    other, small = torch.empty_like(block), torch.ones(1)
    size = block.numel() * 4 / 1e6
    with torch.inference_mode():
        read, copy = (
            clock(block.sum, 5, of=statistics.median),
            clock(lambda: other.copy_(block), 5, of=statistics.median),
        )
        calls = clock(lambda: [small.add(1) for _ in range(1000)], 5, of=statistics.median)
    return {"read_gb_s": size / read, "copy_gb_s": 2 * size / copy, "dispatch_us": calls}
