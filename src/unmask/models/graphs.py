"""Forwards of a few fixed shapes for an accelerator: inputs in static buffers, the work captured as CUDA graphs.

A graph replays hundreds of kernels with one launch, which is what a block step of few cells waits for. It may hold no
host sync, no shape that depends on data and no address that changes (PyTorch's notes on CUDA graphs). So a forward is
rounded up to a `Bucket` and copied into the buffers of that bucket (`Static`), and only what reads those buffers is
captured. All but the capture runs on any device.

Commits stay on the device as well. A step of the loop asks the host a bounded number of questions (is every row done,
did every row move, how many cells are queried and needed, how far do the known keys reach), whatever the number of rows
and cells, and `Graphs` adds none: it learns sizes from shapes (`tests/models/test_graphs.py` counts them).
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import OrderedDict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.errors import suggest
from unmask.models.attention import flexed, kernels_first, masked
from unmask.models.kv import KVPool, KVView
from unmask.models.sight import NOBODY, Ragged, Sight

if TYPE_CHECKING:
    from collections.abc import Callable

    from unmask.models.transformer import Transformer

ATTENTION = ("sdpa", "flex")
ROWS = 32
"""Most rows of a graph."""
CELLS = 4096
"""Most cells of a graph, rows times width: a larger forward does not wait for launches."""
SMALL = 256
"""Cells that cost about as much as one: so few wait for the weights to be read, not for products."""
WARM = 2
"""Runs before a capture, in which libraries choose their kernels and make their workspaces."""


@dataclass(frozen=True)
class Bucket:
    """The shape of a graph."""

    rows: int
    """A power of two."""
    width: int
    """Queries a row."""
    keys: int
    """Keys a row reads."""
    needed: int
    """Cells whose logits are computed."""
    masked: bool
    """Are some keys hidden from some queries?"""
    tapped: bool
    """Are the last hidden states kept?"""
    whole: bool
    """Are the rows the first slots of the pool, so that its keys and values are read where they lie?"""


def rows_of(rows: int) -> int:
    """The number of rows of a bucket: the next power of two."""
    return 1 << (rows - 1).bit_length()


def width_of(width: int) -> int:
    """The width of a bucket: 1, 8, 16, 32, 64, 128, and then multiples of 128."""
    return 1 if width <= 1 else max(8, rows_of(width)) if width <= 128 else -(-width // 128) * 128


def keys_of(keys: int) -> int:
    """The keys of a bucket: multiples of 256 up to 2048, and then of 1024."""
    unit = 256 if keys <= 2048 else 1024
    return max(1, -(-keys // unit)) * unit


def needed_of(needed: int, cells: int) -> int:
    """The logits of a bucket of so many cells: 32, 128, 512, ..., at most all of them."""
    count = 32
    while count < needed:
        count *= 4
    return min(count, cells)


class Static:
    """The buffers of one bucket over one pool, and the forward that reads them.

    What pads them is harmless: a padded query writes to the bin of a slot and sees the known keys of its row (all keys
    hidden would be NaN), a padded row sees the first key of slot 0, a padded key is in nobody's sight, and the logits
    behind those that were asked for are dropped.
    """

    def __init__(self, bucket: Bucket, pool: Tensor) -> None:
        self.bucket, self.pool = bucket, weakref.ref(pool)
        rows, width, device = bucket.rows, bucket.width, pool.device
        self.bin = pool.shape[-2] - 1
        self.tokens, self.index, self.place = torch.zeros(3, rows, width, dtype=torch.int64, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.need = torch.zeros(bucket.needed, dtype=torch.int64, device=device)
        self.sight = Sight(
            torch.zeros(rows, width, dtype=torch.int32, device=device),
            torch.zeros(rows, bucket.keys, dtype=torch.int32, device=device),
        )
        self.filled: tuple[int, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[Tensor] = []
        """Logits [needed, V], and the last hidden states [rows, width, D] where they are kept."""

    def load(
        self, tokens: Tensor, index: Tensor, kv: KVView, visible: Sight | None, need: Tensor, ragged: Ragged | None
    ) -> None:
        """Copy a forward of [B, Q], or of [1, N] ragged cells, into the buffers; nothing is asked of the device."""
        rows, width = len(kv.slots), tokens.shape[1]
        shape = (rows, width if ragged is None else -1, kv.length, len(need))
        if ragged is not None or shape != self.filled:
            self._blank()
        self.filled = shape
        here: Any = (slice(rows), slice(width)) if ragged is None else (ragged.row, ragged.column)
        query = 0 if visible is None else visible.query
        for buffer, value in (
            (self.tokens, tokens),
            (self.index, index),
            (self.place, kv.index),
            (self.sight.query, query),
        ):
            buffer[here] = value if ragged is None or not torch.is_tensor(value) else value[0]
        self.slots[:rows] = kv.slots
        self.sight.key[:rows, : kv.length] = 0 if visible is None else visible.key
        row, column = (need // width, need % width) if ragged is None else (ragged.row[need], ragged.column[need])
        self.need[: len(need)] = row * self.bucket.width + column

    def _blank(self) -> None:
        for buffer, value in ((self.tokens, 0), (self.index, 0), (self.place, self.bin), (self.slots, 0)):
            buffer.fill_(value)
        self.need.fill_(0)
        self.sight.query.fill_(NOBODY - 1)
        self.sight.key.fill_(NOBODY)
        self.sight.key[:, 0] = 0

    def run(self, model: Transformer, kv: KVView, see: Callable[[Sight, torch.dtype], Any]) -> list[Tensor]:
        """The forward over the buffers: logits, and the hidden states where they are kept."""
        b, hidden = self.bucket, []
        span = slice(b.rows) if b.whole else None
        view = KVView(kv.data, self.slots, self.place, b.keys, span)
        visible = see(self.sight, model.dtype) if b.masked else None
        tap = hidden.append if b.tapped else None
        logits = model(self.tokens, self.index, kv=view, visible=visible, need=self.need, tap=tap)
        return [logits, *hidden]

    def shown(self, count: int, rows: int, width: int, ragged: Ragged | None) -> tuple[Tensor, Tensor | None]:
        """Copies of what was asked for: logits [count, V], hidden states in the shape of the tokens or None."""
        logits = self.outputs[0][:count].clone()  # the next forward of this shape overwrites the buffer
        if not self.bucket.tapped:
            return logits, None
        states = self.outputs[1]
        return logits, states[:rows, :width].clone() if ragged is None else ragged.flat(states)


@dataclass(eq=False)
class Graphs:
    """A model as a callable with the interface of `Transformer.forward`, for inference over K/V pools.

    `attention`: "sdpa" (a mask of [B, 1, Q, K] numbers, or the flash kernel where every query sees every key) or "flex"
    (no mask, and blocks of keys that nobody sees are skipped). `capture`: capture graphs, by default on CUDA; without,
    the same buffers are computed eagerly. `limit`: most graphs kept; the one used longest ago is dropped.

    Where a graph could gain nothing the forward is the model's own: without a pool or without `need`, in a forward of
    more than 4096 cells, in a ragged batch that would be padded to more than twice its cells. It is too in a batch of
    more than 32 rows, and from then on where a capture fails or memory is short; this is told once, as a warning.
    Weights must stay where they are: call `reset` after moving or changing them. Not for several threads at once.
    """

    model: Transformer
    attention: str = "sdpa"
    capture: bool | None = None
    limit: int = 32
    buckets: set[Bucket] = field(default_factory=set, init=False)
    """Every shape that was used since the last reset."""

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise suggest(str(self.attention), ATTENTION, "attention")
        self._statics: OrderedDict[tuple[int, Bucket], Static] = OrderedDict()
        self._outputs: dict[tuple[Any, ...], Tensor] = {}
        self._idle: list[KVPool] = []
        self._stream: Any = None
        self._off = False
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs(copy.deepcopy(self.model, memo), self.attention, self.capture, self.limit)

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Tensor,
        index: Tensor,
        *,
        kv: KVView | None = None,
        visible: Sight | None = None,
        need: Tensor | None = None,
        tap: Callable[[Tensor], object] | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """Logits [N, V] of the cells `need` of tokens at positions `index`, [B, Q] or [1, N] of ragged rows."""
        bucket = None
        if kv is not None and need is not None:
            bucket = self.bucket(tokens, kv=kv, visible=visible, need=need, tapped=tap is not None, ragged=ragged)
        if kv is None or need is None or bucket is None:
            return self.model(tokens, index, kv=kv, visible=visible, need=need, tap=tap, ragged=ragged)
        static = self._static(bucket, kv.data)
        static.load(tokens, index, kv, visible, need, ragged)
        if not self._replay(static, kv):
            return self.model(tokens, index, kv=kv, visible=visible, need=need, tap=tap, ragged=ragged)
        logits, states = static.shown(len(need), len(kv.slots), tokens.shape[1], ragged)
        if tap is not None and states is not None:
            tap(states)
        return logits

    def bucket(
        self, tokens: Tensor, *, kv: KVView, visible: Any, need: Tensor, tapped: bool, ragged: Ragged | None
    ) -> Bucket | None:
        """The bucket of a forward, or None where the model's own forward is better or the only one."""
        c, real = self.model.config, tokens.numel()
        rows, width = rows_of(len(kv.slots)), width_of(tokens.shape[1] if ragged is None else ragged.width)
        sparse = ragged is not None and rows * width > max(SMALL, 2 * real)
        if self._off or sparse or torch.is_tensor(visible):
            return None
        if self._captures and c.experts is not None:
            return self._tell("experts are chosen on the host, so no graph can hold them")
        if rows > ROWS:
            return self._tell(f"a graph takes {ROWS} rows; use batches of at most so many")
        if rows * width > CELLS:
            return None
        positions = kv.data.shape[-2] - 1
        keys = min(keys_of(kv.length), positions)
        span = kv.span
        whole = span is not None and span.start == 0 and rows <= kv.data.shape[2]
        hides = visible is not None or keys != kv.length
        return Bucket(rows, width, keys, needed_of(len(need), rows * width), hides, tapped, whole)

    def pool(self, slots: int, length: int) -> KVPool:
        """A pool that fits `slots` rows of `length` positions, whose graphs outlive its user: it is lent again once
        the object returned is gone. Its sizes are rounded up, so that buckets fit into it."""
        fits = [p for p in self._idle if p.data.shape[2] >= slots and p.length >= length]
        if fits:
            owned = min(fits, key=lambda p: p.data.numel())
            self._idle.remove(owned)
            owned.data.zero_()
        else:
            self._idle.clear()
            m, sizes = self.model, (rows_of(slots), keys_of(length))
            owned = KVPool(m.config, *sizes, dtype=m.dtype, device=m.embed.weight.device)
        lent = copy.copy(owned)
        weakref.finalize(lent, self._idle.append, owned).atexit = False
        return lent

    def reset(self) -> None:
        """Drop all graphs, buffers and idle pools, and give their memory back."""
        while self._statics:
            self._drop(next(iter(self._statics)))
        for kept in (self._outputs, self._idle, self.buckets):
            kept.clear()
        if self.model.embed.weight.is_cuda:
            gc.collect()
            with suppress(RuntimeError):  # a capture that failed may leave the allocator unable to
                torch.cuda.empty_cache()

    @property
    def _captures(self) -> bool:
        return self.model.embed.weight.is_cuda if self.capture is None else self.capture

    def _static(self, bucket: Bucket, pool: Tensor) -> Static:
        key = (id(pool), bucket)
        found = self._statics.get(key)
        if found is None or found.pool() is not pool:
            self._shed()
            while len(self._statics) >= self.limit:
                self._drop(next(iter(self._statics)))
            found = self._statics[key] = Static(bucket, pool)
            self.buckets.add(bucket)
        self._statics.move_to_end(key)
        return found

    def _shed(self) -> None:
        """Drop what belongs to pools that are gone."""
        for key in [key for key, static in self._statics.items() if static.pool() is None]:
            self._drop(key)

    def _drop(self, key: tuple[int, Bucket]) -> None:
        weight = self.model.embed.weight
        if self._statics[key].graph is not None and weight.is_cuda:
            torch.cuda.synchronize(weight.device)  # it may still be running
        del self._statics[key]

    def _replay(self, static: Static, kv: KVView) -> bool:
        """Fill the outputs of `static`; False where it cannot be captured."""
        if not self._captures:
            self._step(static, kv)
        elif static.graph is not None:
            static.graph.replay()
        else:
            try:
                static.graph = self._record(static, kv)
                static.graph.replay()
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self._off = True
                self.reset()
                self._tell(str(error).strip().split("\n")[0])
                return False
        return True

    def _step(self, static: Static, kv: KVView) -> None:
        """One forward, its results copied into buffers that all graphs of this size share: what is captured."""
        made = static.run(self.model, kv, flexed if self.attention == "flex" else masked)
        for result in made:
            key = (tuple(result.shape), result.dtype)
            if key not in self._outputs:
                self._outputs[key] = torch.empty_like(result)
            self._outputs[key].copy_(result)
        static.outputs = [self._outputs[tuple(result.shape), result.dtype] for result in made]

    def _record(self, static: Static, kv: KVView) -> torch.cuda.CUDAGraph:
        """Warm up and capture on one side stream; the graphs share their memory. RuntimeError where that fails.

        The warm-up computes the forward that was asked for: it writes to the pool what the replay will write again.
        """
        device = self.model.embed.weight.device
        if device.type != "cuda":
            raise RuntimeError(f"the weights are on {device.type}, which captures none")
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(kernels_first())
            current = torch.cuda.current_stream()
            stack.callback(torch.cuda.set_stream, current)  # a capture that fails leaves its own stream current
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM):
                        self._step(static, kv)
            finally:
                current.wait_stream(self._stream)
            alive = next((s.graph for s in self._statics.values() if s.graph is not None), None)
            graph = torch.cuda.CUDAGraph()
            memory = None if alive is None else alive.pool()
            with torch.cuda.graph(graph, pool=memory, stream=self._stream, capture_error_mode="thread_local"):
                self._step(static, kv)
        return graph

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"decoding without CUDA graphs, which is slower for few cells: {reason}", stacklevel=4)
