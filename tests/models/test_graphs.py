"""Forwards in fixed shapes: what they compute, what they leave alone, and what a step asks of the host."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphed import forward, in_rows, noisy, numbers, through, tiny_of
from laws.common import model, plain, ragged, results, run, small
from unmask.decode import cat, decode, step
from unmask.denoise import Plain
from unmask.errors import UserError
from unmask.models import graphs, transformer
from unmask.models.attention import attend_flex, kernels_first
from unmask.models.config import Experts, Layout, ModelConfig
from unmask.models.graphs import Graphs
from unmask.models.kv import KVView
from unmask.models.sight import NOBODY, Ragged, Sight
from unmask.models.transformer import Transformer

RUNS = [
    ("threshold", "full"),
    ("dual", "full"),
    ("dual", "shifted"),
    ("prefix", "shifted"),
    ("dkv", "full"),
    ("adjust", "full"),
    ("ar", "causal"),
    ("d2f", "block"),
    ("d2f", "block-shifted"),
    ("sdar", "absolute"),
    ("fast-dllm-v2", "absolute-shifted"),
]
"""Recipes and models: without a cache, with rectangles and ragged rows, hidden states kept, every layout."""


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    """Heads in groups and a bias, float32."""
    return tiny_of()


# What is computed


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_decode_in_buckets_is_the_decode(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    expected, events = run(plain(kind, recipe, canvas, cached=True), recipe, canvas)
    denoise, made = through(plain(kind, recipe, canvas, cached=True))
    end, seen = run(denoise, recipe, canvas)
    assert results(end) == results(expected)
    for (_, one), (_, other) in zip(seen, events, strict=True):
        torch.testing.assert_close(one.draft.logits, other.draft.logits, rtol=1e-9, atol=1e-9)
    assert 0 < len(made.buckets) <= 12


@pytest.mark.parametrize(("name", "kind"), [("dual", "full"), ("d2f", "block"), ("ar", "causal")])
def test_also_in_float32(name: str, kind: str) -> None:
    recipe, canvas, net = small(name), ragged(), copy.deepcopy(model(kind)).float()
    ends = []
    for graphed in (False, True):
        denoise: Any = Plain(net, slots=4, length=canvas.tokens.shape[1])
        denoise = through(denoise)[0] if graphed else denoise
        ends.append(run(denoise, recipe, canvas)[0])
    assert torch.equal(ends[0].tokens, ends[1].tokens) and torch.equal(ends[0].decided_at, ends[1].decided_at)


@pytest.mark.parametrize(
    ("name", "kind"), [("dual", "full"), ("prefix", "shifted"), ("d2f", "block"), ("ar", "causal")]
)
def test_rows_that_join_late(name: str, kind: str) -> None:
    recipe, ends = small(name), []
    for graphed in (False, True):
        canvas = ragged()[torch.tensor([1, 3])]
        late = replace(ragged(first=20), slot=torch.tensor([6, 0, 5, 2])).widen(30)
        denoise = plain(kind, recipe, late, cached=True)
        denoise = through(denoise)[0] if graphed else denoise
        for _ in range(2):
            canvas, _ = step(denoise, recipe, canvas)
        ends.append(results(run(denoise, recipe, cat([late, canvas]))[0]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("slots", [[0], [3], [0, 1, 2], [1, 2], [4, 0, 3]], ids=str)
@pytest.mark.parametrize(("width", "length"), [(1, 1), (5, 40), (8, 64), (33, 256), (40, 300)])
def test_rectangles(tiny: Transformer, slots: list[int], width: int, length: int) -> None:
    one, other = noisy(tiny, 5, 300), noisy(tiny, 5, 300)
    with torch.inference_mode():
        expected = tiny(**forward(tiny, one, slots, width, length))
    found = Graphs(tiny)(**forward(tiny, other, slots, width, length))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.data[..., :-1, :], one.data[..., :-1, :], rtol=1e-5, atol=1e-5)
    at = torch.arange(300)
    untouched = (at < length - width) | (at >= length)
    assert torch.equal(other.data[..., :-1, :][..., untouched, :], one.data[..., :-1, :][..., untouched, :])
    others = [slot for slot in range(5) if slot not in slots]
    assert torch.equal(other.data[:, :, others, :, :-1], one.data[:, :, others, :, :-1])


@pytest.mark.parametrize("counts", [[5, 1, 8], [2, 7], [1, 1, 1, 2, 3]], ids=str)
def test_ragged_rows_and_their_hidden_states(tiny: Transformer, counts: list[int]) -> None:
    slots, found, states = [4, 1, 0, 2, 3][: len(counts)], [], []
    made = Graphs(tiny)
    for call in (tiny, made):
        pool = noisy(tiny, 5, 60)
        with torch.inference_mode():
            found.append(call(**in_rows(tiny, pool, slots, counts, 50), tap=states.append))
        found.append(pool.data[..., :-1, :])
    assert len(made.buckets) == 1
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("slots", "width"), [([0, 1, 3], 5), ([0, 1, 2, 3], 8)], ids=str)
def test_what_no_query_sees_does_not_matter(tiny: Transformer, slots: list[int], width: int) -> None:
    """Not even large numbers in keys that are hidden, nor what stands in the bin: NaN."""
    found = []
    for seed in (1, 2):
        pool = noisy(tiny, 4, 60, seed=1)
        pool.data[..., 40:60, :] *= seed * 1e3
        pool.data[..., 60, :] = torch.nan
        found.append(Graphs(tiny)(**forward(tiny, pool, slots, width, 40)))
    assert torch.equal(*found) and found[0].isfinite().all()


def test_every_query_sees_a_key(tiny: Transformer) -> None:
    """Those that pad a row or a batch as well: what sees nothing is NaN in some kernels."""
    made, pool = Graphs(tiny), noisy(tiny, 5, 60)
    for call in (forward(tiny, pool, [3, 1, 0], 5, 40), in_rows(tiny, pool, [4, 1, 0], [5, 1, 8], 50)):
        made(**call)
        assert all(static.sight.dense().any(-1).all() for static in made._statics.values())


def test_an_earlier_forward_leaves_no_trace(tiny: Transformer) -> None:
    """Buffers of one bucket, filled with fewer cells than before."""
    made, pool = Graphs(tiny), noisy(tiny, 8, 300)
    for slots, width, length in (([0, 1, 2, 3], 8, 250), ([0, 1, 2], 6, 100), ([0, 1, 2, 3], 7, 30)):
        with torch.inference_mode():
            expected = tiny(**forward(tiny, pool, slots, width, length))
        found = made(**forward(tiny, pool, slots, width, length))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(made.buckets) == 1


def test_logits_are_the_callers_own(tiny: Transformer) -> None:
    made, pool = Graphs(tiny), noisy(tiny, 2, 60)
    first = made(**forward(tiny, pool, [0], 4, 40))
    kept = first.clone()
    with torch.inference_mode():
        first.fill_(-torch.inf)
    again = made(**forward(tiny, pool, [0], 4, 40))
    assert torch.equal(again, kept)
    made(**{**forward(tiny, pool, [0], 4, 40), "tokens": numbers(1, 4, below=97, seed=9)})
    assert torch.equal(again, kept)


# What a graph may hold


def test_a_forward_in_a_bucket_asks_nothing_of_the_device(tiny: Transformer) -> None:
    """A meta tensor has a shape and no numbers: each question about data, and each tensor of another device, raises."""
    net = copy.deepcopy(tiny).to("meta")
    data = torch.empty(2, 2, 8, 2, 257, 8, device="meta")
    slots, index, need = (torch.empty(*s, dtype=torch.int64, device="meta") for s in ((3,), (3, 5), (7,)))
    kv, made = KVView(data, slots, index, 200, slice(0, 3)), Graphs(net)
    assert made(index, index, kv=kv, need=need).shape == (7, 97)
    row, flat = (torch.empty(*s, dtype=torch.int64, device="meta") for s in ((11,), (1, 11)))
    packed = Ragged(row, row, slots, 5)
    sight = Sight(flat.int(), torch.empty(3, 200, dtype=torch.int32, device="meta"))
    states: list[Tensor] = []
    kv = KVView(data, slots, flat, 200, None, None, packed)
    logits = made(flat, flat, kv=kv, visible=sight, need=need, ragged=packed, tap=states.append)
    assert logits.shape == (7, 97) and states[0].shape == (1, 11, 32) and len(made.buckets) == 2


class Tape(TorchDispatchMode):
    """Every operation of a forward with the tensors it read and wrote, which `replay` repeats: a graph of a processor.

    As in a CUDA graph, addresses and shapes are those of the capture, and whatever the host did is not repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            now = func(*args, **kwargs)
            for old, new in zip(*(t if isinstance(t, tuple | list) else [t] for t in (out, now)), strict=True):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Taped(Graphs):
    """Graphs on a processor."""

    def _record(self, static: Any, kv: KVView) -> Any:
        self._step(static, kv)
        with Tape() as tape:
            self._step(static, kv)
        return tape


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_decode_of_replayed_graphs_is_the_decode(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    expected, _ = run(plain(kind, recipe, canvas, cached=True), recipe, canvas)
    denoise, made = through(plain(kind, recipe, canvas, cached=True), kind=Taped, capture=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end, seen = run(denoise, recipe, canvas)
    assert results(end) == results(expected)
    assert all(static.graph is not None for static in made._statics.values()) and len(made._statics) <= len(seen)


class Asked(TorchDispatchMode):
    """Counts the operations that make the host wait for the device: what reads a number, or a shape from data."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.on = 0, False

    def __enter__(self) -> Any:
        self.count, self.on = 0, True
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self.on = False
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2"):
            self.count += 1
        if name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    mode, tolist = Asked(), Tensor.tolist

    def told(self: Tensor) -> Any:
        mode.count += mode.on
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", told)  # on the processor it reads memory and is no operation
    yield mode


def test_what_waits_for_the_device_is_counted(asked: Asked) -> None:
    x = torch.arange(6)
    with asked:
        for question in (lambda: bool(x[0]), lambda: int(x[1]), x.tolist, x.nonzero, lambda: x[x > 2]):
            before = asked.count
            question()
            assert asked.count == before + 1
        x + x, x[x], x.sum()
    assert asked.count == 5


def questions(name: str, kind: str, rows: int, asked: Asked) -> list[int]:
    """What each step of a decode asked, commits and the check for the end included."""
    canvas = cat([ragged(first=4 * i) for i in range(-(-rows // 4))])[torch.arange(rows)]
    canvas = replace(canvas, slot=torch.arange(rows))
    recipe = small(name)
    denoise, found = through(plain(kind, recipe, canvas, slots=rows, cached=True))[0], []
    with asked:
        for _ in decode(denoise, recipe, canvas):
            found.append(asked.count)
            asked.count = 0
    return found


BOUND = 12
"""Questions of a step: rows done and moved, rows queried, cells queried (how many, how wide), reach of the known keys,
are all known, slots, cells needed, cells drafted."""


@pytest.mark.parametrize(
    ("name", "kind"), [("threshold", "full"), ("dual", "full"), ("d2f", "block"), ("ar", "causal")]
)
def test_a_step_asks_no_more_for_more_rows(name: str, kind: str, asked: Asked) -> None:
    """Neither for a row nor for a token: the device commits, and the host learns sizes."""
    one, eight, many = (max(questions(name, kind, rows, asked)) for rows in (1, 8, 24))
    assert eight == many
    assert max(one, eight) <= BOUND


def test_buckets_add_no_question(asked: Asked, tiny: Transformer) -> None:
    pool, made = noisy(tiny, 8, 60), Graphs(tiny)
    calls = [forward(tiny, pool, [0, 1, 2], 5, 40), in_rows(tiny, pool, [4, 1, 0], [5, 1, 8], 50)]
    with asked:
        for call in calls:
            made(**call)
    assert asked.count == 0


# Buckets


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_buckets_hold_what_they_are_for(one: int, other: int) -> None:
    for size in (graphs.rows_of, graphs.width_of, graphs.keys_of):
        assert size(one) >= one and size(size(one)) == size(one)
        assert one > other or size(one) <= size(other)
    assert min(one, other) <= graphs.needed_of(one, other) <= other


def test_there_are_few_buckets() -> None:
    assert sorted({graphs.rows_of(n) for n in range(1, 33)}) == [1, 2, 4, 8, 16, 32]
    assert sorted({graphs.width_of(n) for n in range(1, 257)}) == [1, 8, 16, 32, 64, 128, 256]
    assert len({graphs.keys_of(n) for n in range(1, 4097)}) == 10
    assert sorted({graphs.needed_of(n, 256) for n in range(257)}) == [32, 128, 256]


def test_only_so_many_are_kept(tiny: Transformer) -> None:
    made, pool = Graphs(tiny, limit=2), noisy(tiny, 2, 60)
    for width in (1, 8, 1, 16, 32, 1):
        made(**forward(tiny, pool, [0], width, 40))
        assert len(made._statics) <= 2
    assert {b.width for _, b in made._statics} == {32, 1}


def test_buffers_go_with_their_pool(tiny: Transformer) -> None:
    made = Graphs(tiny)
    for _ in range(3):
        pool = noisy(tiny, 2, 60)
        made(**forward(tiny, pool, [0], 4, 40))
        assert len(made._statics) == 1
        del pool
        gc.collect()


def test_a_pool_is_lent_again(tiny: Transformer) -> None:
    made = Graphs(tiny)
    one, other = made.pool(3, 100), made.pool(3, 100)
    assert one.data is not other.data and one.data.shape[2] == 4 and one.length >= 100
    made(**forward(tiny, one, [0], 4, 40))
    buffers, data = list(made._statics), one.data
    del one
    gc.collect()
    again = made.pool(2, 60)
    assert again.data is data and not data.any()
    made(**forward(tiny, again, [0], 4, 40))
    assert list(made._statics) == buffers, "the same graph"
    assert made.pool(40, 60).data.shape[2] == 64


# Where there is no graph


def alike(made: Graphs, net: Transformer, **call: Any) -> bool:
    with torch.inference_mode():
        return torch.equal(made(**call), net(**call))


def test_what_cannot_be_captured_is_computed_and_told_once(tiny: Transformer) -> None:
    made, pool = Graphs(tiny, capture=True), noisy(tiny, 2, 60)
    with pytest.warns(UserWarning, match="without CUDA graphs.*on cpu") as told:
        for _ in range(3):
            assert alike(made, tiny, **forward(tiny, pool, [0], 4, 40))
    assert len(told) == 1 and not made._statics


def test_memory_that_is_short_is_given_back(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pool = Graphs(tiny, capture=True), noisy(tiny, 2, 60)

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made, "_record", short)
    with pytest.warns(UserWarning, match="out of memory"):
        assert alike(made, tiny, **forward(tiny, pool, [0], 4, 40))
    assert not made._statics and not made._outputs


def test_a_mistake_in_the_forward_is_not_hidden(tiny: Transformer) -> None:
    made, pool = Graphs(tiny), noisy(tiny, 2, 60)
    call = forward(tiny, pool, [0], 4, 40)
    with pytest.raises((IndexError, RuntimeError)):
        made(**{**call, "tokens": call["tokens"] + 1000})


def test_more_rows_than_a_graph_takes(tiny: Transformer) -> None:
    made, pool = Graphs(tiny), noisy(tiny, 40, 60)
    with pytest.warns(UserWarning, match="32 rows") as told:
        for rows in (33, 40):
            assert alike(made, tiny, **forward(tiny, pool, list(range(rows)), 2, 40))
    assert len(told) == 1


def test_what_gains_nothing_is_the_models_own(tiny: Transformer) -> None:
    made, pool = Graphs(tiny), noisy(tiny, 8, 1200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alike(made, tiny, **forward(tiny, pool, list(range(8)), 600, 1200)), "many cells"
        assert alike(made, tiny, **in_rows(tiny, pool, [0, 1, 2, 3], [300, 2, 2, 2], 400)), "mostly padding"
        assert alike(made, tiny, tokens=numbers(2, 9, below=97), index=torch.arange(9).expand(2, -1)), "no pool"
    assert not made.buckets


def test_experts_are_not_captured() -> None:
    config = ModelConfig(31, d_model=16, layers=1, heads=2, ff=16, experts=Experts(4, 2, 8), layout=Layout())
    net = Transformer(config).initialise(1).eval().requires_grad_(False)
    made, pool = Graphs(net, capture=True), noisy(net, 2, 60)
    with pytest.warns(UserWarning, match="experts"):
        assert alike(made, net, **forward(net, pool, [0], 4, 40))


def test_a_copy_of_a_model_has_graphs_of_its_own(tiny: Transformer) -> None:
    net = copy.deepcopy(tiny)
    net.graphs = Graphs(net, limit=3)
    net.graphs(**forward(net, noisy(net, 2, 60), [0], 4, 40))
    other = copy.deepcopy(net)
    assert other.graphs.model is other and other.graphs.limit == 3 and not other.graphs.buckets


# Attention


def test_attention_has_known_names(tiny: Transformer) -> None:
    with pytest.raises(UserError, match="did you mean 'flex'"):
        Graphs(tiny, attention="flx")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [2, 4])
def test_flex_attention_sees_what_is_in_sight(heads: int) -> None:
    q, k, v = (torch.randn(3, h, n, 16) for h, n in ((4, 9), (heads, 40), (heads, 40)))
    sight = Sight(numbers(3, 9, below=6).int(), numbers(3, 40, below=9, seed=1).int())
    sight.key[:, 0], sight.key[:, 30:] = 0, NOBODY
    found = attend_flex(q, k, v, sight)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.dense(), enable_gqa=heads < 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_attends_by_flex(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = transformer.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Any) -> Tensor:
        return visible(q, k, v) if callable(visible) else plainly(q, k, v, visible)

    monkeypatch.setattr(transformer, "attend", attend)
    found = []
    for call in (tiny, Graphs(tiny, attention="flex")):
        with torch.inference_mode():
            found.append(call(**in_rows(tiny, noisy(tiny, 5, 60), [4, 1, 0], [5, 1, 8], 50)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_kernels_can_be_ordered() -> None:
    q = torch.randn(1, 2, 3, 8)
    with kernels_first():
        found = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q))
