"""On a GPU: captured graphs compute what the model computes, in bounded memory, without a word to the host.

Left out by default: `python -m pytest -m gpu`.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graphed import forward, in_rows, noisy, on, through, tiny_of
from laws.common import model, ragged, run, small
from unmask.denoise import Plain
from unmask.models import transformer
from unmask.models.graphs import Graphs
from unmask.models.transformer import Transformer

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def net() -> Iterator[Transformer]:
    """Heads of 64 numbers in groups, float32."""
    made = tiny_of(64).to(DEVICE)
    yield made
    del made
    gc.collect()
    torch.cuda.empty_cache()


def calls(net: Transformer, pool: Any) -> list[dict[str, Any]]:
    """Rectangles and ragged rows, twice each bucket, so that a graph is replayed with other inputs too."""
    made = [forward(net, pool, slots, width, length) for slots, width, length in (([0], 8, 256), ([0], 7, 200))]
    made += [forward(net, pool, [0, 1, 2], width, 300) for width in (32, 20)]
    made += [forward(net, pool, [4, 1, 3], 32, 300), in_rows(net, pool, [4, 1, 0], [5, 1, 8], 50)]
    return [on(DEVICE, call) for call in [*made, in_rows(net, pool, [2, 1, 0], [1, 8, 3], 90)]]


def assert_same(net: Transformer, made: Graphs, error: float) -> None:
    pools = [noisy(net, 5, 300) for _ in range(2)]
    for one, other in zip(*(calls(net, pool) for pool in pools), strict=True):
        states: list[list[Tensor]] = [[], []]
        with torch.inference_mode():
            expected = net(**one, tap=states[0].append)
        found = made(**other, tap=states[1].append)
        torch.testing.assert_close(found, expected, rtol=error, atol=error)
        torch.testing.assert_close(*states, rtol=error, atol=error)
    torch.testing.assert_close(*(pool.data[..., :-1, :] for pool in pools), rtol=error, atol=error)
    assert made._statics and all(static.graph is not None for static in made._statics.values())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_graphs_are_the_forward(net: Transformer, dtype: torch.dtype, error: float) -> None:
    net = net.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(net, Graphs(net), error)


def test_graphs_of_flex_attention_are_the_forward(net: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = transformer.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Any) -> Tensor:
        return visible(q, k, v) if callable(visible) else plainly(q, k, v, visible)

    monkeypatch.setattr(transformer, "attend", attend)
    assert_same(net, Graphs(net, attention="flex"), 1e-2)  # its products are in TF32


@pytest.mark.parametrize(
    ("name", "kind"), [("dual", "full"), ("prefix", "shifted"), ("d2f", "block"), ("ar", "causal")]
)
def test_a_decode_in_graphs_is_the_decode(name: str, kind: str) -> None:
    """In float64, where rounding changes no token."""
    recipe, canvas, net = small(name), on(DEVICE, ragged()), copy.deepcopy(model(kind)).to(DEVICE)
    ends = []
    for graphed in (False, True):
        denoise: Any = Plain(net, slots=4, length=canvas.tokens.shape[1])
        denoise, made = through(denoise) if graphed else (denoise, None)
        ends.append(run(denoise, recipe, canvas)[0])
    assert made is not None and any(static.graph is not None for static in made._statics.values())
    assert torch.equal(ends[0].tokens, ends[1].tokens) and torch.equal(ends[0].decided_at, ends[1].decided_at)


def test_a_replay_does_not_wait(net: Transformer) -> None:
    made, pool = Graphs(net), noisy(net, 5, 300)
    todo = calls(net, pool)
    for call in todo:
        made(**call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in todo:
            made(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_shared_and_given_back(net: Transformer) -> None:
    """Many graphs take little more than the largest, for they share memory; nothing stays after a reset."""
    made, pool = Graphs(net), noisy(net, 4, 2048)
    made(**on(DEVICE, forward(net, pool, [0, 1, 2, 3], 128, 2048)))
    made.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before, taken = torch.cuda.memory_reserved(), []
    for length in range(2048, 255, -256):
        made(**on(DEVICE, forward(net, pool, [0, 1, 2, 3], 128, length)))
        taken.append(torch.cuda.memory_reserved() - before)
    assert len(made._statics) == 8 and taken[-1] <= 2 * taken[0] + 32 * 2**20
    made.reset()
    assert torch.cuda.memory_reserved() - before <= 32 * 2**20


def test_only_so_many_graphs_are_kept(net: Transformer) -> None:
    made, pool = Graphs(net, limit=2), noisy(net, 2, 300)
    for width in (1, 8, 16, 1, 32):
        call = on(DEVICE, forward(net, pool, [0], width, 200))
        with torch.inference_mode():
            expected = net(**call)
        torch.testing.assert_close(made(**call), expected, rtol=1e-4, atol=1e-4)
        assert len(made._statics) <= 2


def test_a_capture_that_fails_leaves_things_as_they_were(net: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that asks the device for a number cannot be captured."""
    plainly = transformer.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Any) -> Tensor:
        return plainly(q, k, v * float(v[0, 0, 0, 0] > -torch.inf), visible)

    monkeypatch.setattr(transformer, "attend", attend)
    made, pool, stream = Graphs(net), noisy(net, 2, 300), torch.cuda.current_stream()
    call = on(DEVICE, forward(net, pool, [0], 8, 200))
    with torch.inference_mode():
        expected = net(**call)
    with pytest.warns(UserWarning, match="without CUDA graphs") as told:
        for _ in range(2):
            torch.testing.assert_close(made(**call), expected, rtol=1e-4, atol=1e-4)
    assert len(told) == 1 and torch.cuda.current_stream() == stream
    monkeypatch.undo()
    assert_same(net, Graphs(net), 1e-4)
