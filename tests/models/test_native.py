"""The C kernels compute what torch computes: over many shapes, in every build, on any thread, whoever compiles them."""

from __future__ import annotations

import copy
import math
import multiprocessing
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.denoise.packing import pack
from unmask.models import native
from unmask.models.config import Layout, ModelConfig
from unmask.models.fast import Native, unfit
from unmask.models.kv import KVPool
from unmask.models.sight import NOBODY, Sight
from unmask.models.transformer import Transformer

try:
    native.library("float32", half=False)
except native.Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

LAYOUTS = (Layout(), Layout("causal"), Layout("block", 5), Layout("block", 8, "absolute", "blocks"))
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 300)
SLOTS, POSITIONS = 6, 310
TINY = ModelConfig(61, d_model=32, layers=2, heads=2, ff=64, max_positions=POSITIONS)
ODD = replace(TINY, vocab_size=33, d_model=20, heads=6, kv_heads=3, head_dim=18, ff=44, qk_norm=True, qkv_bias=True)
"""Nothing in it is a multiple of a vector's or a panel's size."""


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Shapes that the kernels take, most of them awkward."""
    kv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4]))
    head = 2 * draw(st.integers(1, 20) | st.sampled_from([32, 33, 48]))
    head *= 2 if kv * group * head % 4 else 1
    return ModelConfig(
        vocab_size=draw(st.integers(1, 100)),
        d_model=4 * draw(st.integers(1, 33)),
        layers=2,
        heads=kv * group,
        kv_heads=kv,
        head_dim=head,
        ff=4 * draw(st.integers(1, 35)),
        rotary=2 * draw(st.integers(0, head // 2)),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        max_positions=POSITIONS,
    )


@dataclass(frozen=True)
class Scene:
    """A batch: the cells of each row, who sees whom, whether there is a pool, and a key for what is random."""

    lengths: tuple[int, ...]
    layout: Layout
    pooled: bool
    seed: int


scenes = st.builds(
    Scene,
    st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4).map(tuple),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 1000),
)


def network(config: ModelConfig, seed: int = 0) -> Transformer:
    """A random model whose norms and biases are random too."""
    model, draw = Transformer(config).initialise(seed).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    model.embed.weight.mul_(30)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3 + (0 if name.endswith("bias") else 1))
    return model


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in another dtype, whose rotary tables stay as they are."""
    found = copy.deepcopy(model).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found.cos, found.sin = model.cos.to(wide), model.sin.to(wide)
    return found


def fast(model: Transformer, kind: str = "float32") -> Transformer:
    """A copy on the kernels of one kind of weights."""
    assert not unfit(model)
    found = copy.deepcopy(model)
    found.native = Native(found, kind)
    return found


@dataclass(frozen=True, eq=False)
class Result:
    """What a scene gives: logits of the valid cells (then of a few of them, over the pool), and the pool around it."""

    logits: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    written: Tensor | None = None


@torch.no_grad()
def play(model: Transformer, scene: Scene) -> Result:
    """All valid cells in one forward, and over a pool of noise a second one of a few."""
    c, draw = model.config, torch.Generator().manual_seed(scene.seed)
    rows, width = len(scene.lengths), max(scene.lengths)
    lengths = torch.tensor(scene.lengths)
    valid = torch.arange(width) < lengths[:, None]
    tokens = torch.randint(0, c.vocab_size, (rows, width), generator=draw)
    origin = (torch.rand(rows, generator=draw) * lengths).long()
    group = scene.layout.groups(torch.arange(width)[None], origin).int()
    if not scene.pooled:
        p = pack(valid)
        query = p.of(group)
        sight = Sight(query, query if p.ragged is None else p.ragged.pad(query, NOBODY))
        return Result(model(p.of(tokens), p.index, visible=sight, ragged=p.ragged).flatten(0, 1))
    pool = KVPool(c, SLOTS, width + 3, dtype=model.dtype)
    before = pool.data.copy_(torch.randn(pool.data.shape, generator=draw)).clone()
    slots = torch.randperm(SLOTS, generator=draw)[:rows]
    few = valid & (torch.rand(rows, width, generator=draw) < scene.seed % 3 / 10)
    few[torch.arange(rows), lengths - 1] = True
    logits = []
    for cells in (valid, few):
        p = pack(cells)
        sight = Sight(p.of(group), group.masked_fill(~valid, NOBODY))
        view = pool.at(slots, p.index, width, ragged=p.ragged)
        logits.append(model(p.of(tokens), p.index, kv=view, visible=sight, ragged=p.ragged).flatten(0, 1))
    written = torch.zeros(SLOTS, width + 4, dtype=torch.bool)
    written[slots, :width] = valid
    return Result(torch.cat(logits), before, pool.data, written[:, None, :, None].expand(before.shape[2:]))


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def close(found: Tensor, right: Tensor, by: float = 1e-5) -> bool:
    """Equal up to `by` of the largest number."""
    return bool((found - right).abs().max() <= by * right.abs().max().clamp(min=1e-30))


EDGES = [
    (ODD, Scene((1,), Layout("causal"), True, 0)),
    (ODD, Scene((300, 1, 33), Layout("causal"), True, 1)),
    (replace(ODD, rotary=4), Scene((65, 64, 63, 1), Layout("block", 5), False, 2)),
    (replace(TINY, kv_heads=1, tied=True), Scene((32, 32), Layout(), True, 3)),
]


@given(configs(), scenes)
@example(*EDGES[0])
@example(*EDGES[1])
@example(*EDGES[2])
@example(*EDGES[3])
@settings(max_examples=40)
def test_float32(config, scene):
    model = network(config, scene.seed)
    found, right = play(fast(model), scene), play(cast(model, torch.float64), scene)
    assert close(found.logits, right.logits)
    if scene.pooled:
        assert found.after is not None and found.before is not None and found.written is not None
        assert right.after is not None
        assert torch.equal(found.after.masked_fill(found.written, 0), found.before.masked_fill(found.written, 0))
        assert close(found.after, right.after)


@given(configs(), scenes)
@example(*EDGES[0])
@example(*EDGES[1])
@example(*EDGES[2])
@settings(max_examples=15)
def test_bfloat16_rounds_no_more_than_torch(config, scene):
    model = cast(network(config, scene.seed), torch.bfloat16)
    found, right = play(fast(model, "bfloat16"), scene).logits, play(cast(model, torch.float64), scene).logits
    usual = play(model, scene).logits
    assert rms(found - right) <= 2 * rms(usual - right) + 2**-9 * rms(right)


@given(configs(), scenes, st.sampled_from([torch.float32, torch.bfloat16]))
@example(*EDGES[0], torch.bfloat16)
@example(*EDGES[1], torch.float32)
@example(*EDGES[2], torch.bfloat16)
@settings(max_examples=15)
def test_int8_is_near(config, scene, dtype):
    model = cast(network(config, scene.seed), dtype)
    found, right = play(fast(model, "int8"), scene).logits.double(), play(cast(model, torch.float64), scene).logits
    assert rms(found - right) <= 0.1 * rms(right)
    assert torch.cosine_similarity(found.flatten(), right.flatten(), 0) > 0.99


@pytest.mark.parametrize("width", [1, 2, 33, 300])
@torch.no_grad()
def test_without_sight_every_query_sees_every_key(width):
    made, tokens = fast(network(ODD)), torch.arange(2 * width).view(2, width) % ODD.vocab_size
    same = torch.zeros(2, width, dtype=torch.int32)
    assert torch.equal(made(tokens), made(tokens, visible=Sight(same, same)))


@given(st.integers(1, 100), st.integers(1, 40), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=15)
def test_int8_rounds_each_output_and_each_row_by_its_largest_number(outputs, inputs, rows, seed):
    model = network(replace(TINY, vocab_size=outputs, d_model=4 * inputs, head_dim=16), seed)
    x = torch.randn(rows, 4 * inputs, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    assert model.head is not None
    w = model.head.weight
    by, of = (t.abs().amax(1, keepdim=True) / 127 for t in (w, x))
    right = ((x / of).round() @ (w / by).round().T) * of * by.T
    assert rms(Native(model, "int8").head(x) - right) <= 2e-3 * rms(right)


@pytest.mark.parametrize("kind", native.KINDS)
def test_one_row_is_computed_as_in_company(kind):
    """To the last bit, whatever the length of the others is."""
    made = fast(cast(network(ODD), torch.bfloat16 if kind == "bfloat16" else torch.float32), kind)
    lengths = (33, 1, 300, 5)
    scene = Scene(lengths, Layout("causal"), False, 4)
    together, at = play(made, scene).logits, 0
    draw = torch.Generator().manual_seed(scene.seed)
    tokens = torch.randint(0, ODD.vocab_size, (4, 300), generator=draw)
    for row, n in enumerate(lengths):
        group = torch.arange(n)[None].int()
        with torch.no_grad():
            alone = made(tokens[row : row + 1, :n], visible=Sight(group, group))[0]
        assert torch.equal(together[at : at + n], alone)
        at += n


# ---- what is large, small, or nothing ----


@pytest.mark.parametrize(
    ("part", "by"), [("head", 1e4), ("embed", 1e4), ("embed", 1e-4), ("embed", 0), ("qkv", 30), ("gate_up", 300)]
)
def test_magnitudes(part, by):
    model = network(ODD)
    for name, p in model.named_parameters():
        if part in name:
            p.mul_(by)
    for pooled in (True, False):
        scene = Scene((65, 2, 40), Layout("causal"), pooled, 7)
        found, right = play(fast(model), scene).logits, play(cast(model, torch.float64), scene).logits
        usual = play(model, scene).logits
        assert found.isfinite().all()
        worst = (usual - right).abs().max() / right.abs().max()
        assert close(found, right, max(1e-5, 2 * float(worst)))


@pytest.mark.parametrize("kind", native.KINDS)
@pytest.mark.parametrize("part", ["gate_up", "out", "qkv"])
def test_matrices_of_zeros_and_large_activations_stay_finite(kind, part):
    for by in (0, 1e4):
        model = network(ODD)
        for name, p in model.named_parameters():
            if part in name:
                p.mul_(by)
        model = cast(model, torch.bfloat16 if kind == "bfloat16" else torch.float32)
        assert play(fast(model, kind), Scene((33, 5), Layout(), True, 3)).logits.isfinite().all()


@pytest.mark.parametrize("width", [1, 40])
@torch.no_grad()
def test_a_query_that_sees_nothing_disturbs_no_other(width):
    """Its own key is hidden as well, so that all of its keys are of nobody."""
    model = network(ODD)
    made, tokens = fast(model), torch.arange(2 * width).view(2, width) % ODD.vocab_size
    key = torch.zeros(2, width, dtype=torch.int32)
    key[1] = NOBODY
    found = made(tokens, visible=Sight(torch.zeros_like(key), key))
    assert found.isfinite().all()
    assert close(found[0], model(tokens[:1])[0])
    sight = Sight(torch.arange(width).int()[None], torch.arange(1, width + 1).int()[None])  # the first sees nothing
    found = made(tokens[:1], visible=sight)
    usual = model(tokens[:1], visible=sight)
    assert found.isfinite().all() and close(found[0, 1:], usual[0, 1:], 1e-4) if width > 1 else True


@torch.no_grad()
def test_a_query_that_sees_itself_alone():
    model = network(ODD)
    made, tokens = fast(model), torch.arange(40)[None] % ODD.vocab_size
    own = torch.arange(40).int()[None]
    found = made(tokens, visible=Sight(own, own))[0, 0]
    assert close(found, model(tokens[:, :1])[0, 0])


@torch.no_grad()
def test_what_is_asked_for_is_what_the_head_gives():
    model, tokens = network(ODD), torch.arange(30).view(2, 15)
    made, seen, usual = fast(model), [], []
    need = torch.tensor([3, 0, 29])
    whole = made(tokens)
    assert torch.equal(made(tokens, need=need), whole.flatten(0, 1)[need])
    assert torch.equal(made(tokens, need=need, tap=seen.append), whole.flatten(0, 1)[need])
    model(tokens, tap=usual.append)
    assert close(seen[0], usual[0])
    assert made(tokens, need=need[:0]).shape == (0, ODD.vocab_size)


@torch.no_grad()
def test_positions_may_stand_anywhere():
    model, tokens = network(ODD), torch.arange(12).view(2, 6)
    index = torch.tensor([[5, 0, 300, 7, 2, 9], [1, 2, 3, 4, 5, 309]])
    assert close(fast(model)(tokens, index), model(tokens, index))
    assert close(fast(model)(tokens[:1].mT.mT, index.T.contiguous().T[:1]), model(tokens[:1], index[:1]))


# ---- the likeliest token ----


@given(
    st.integers(1, 5000), st.integers(0, 5), st.integers(0, 1000), st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, 1e30])
)
@example(5000, 3, 0, 1e-3)
@settings(max_examples=40)
def test_top(columns, rows, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=draw) * scale
    if seed % 2:
        logits = logits.round()  # ties
    banned = torch.rand(columns, generator=draw) < 0.3
    banned[seed % columns] = False
    logits[:, banned] = -torch.inf
    token, p = NATIVE.top(logits)
    right = logits.double().softmax(1)
    assert torch.equal(token, logits.max(1).indices)
    assert torch.allclose(p.double(), right.gather(1, token[:, None])[:, 0], rtol=1e-5)


def test_probabilities_are_those_of_exact_exponentials():
    logits = -torch.linspace(0, 30, 500)[:, None].repeat(1, 17)
    logits[:, 7] = 0
    right = logits.double().softmax(1)[:, 7]
    assert torch.allclose(NATIVE.top(logits)[1].double(), right, rtol=1e-6)


NATIVE = Native(network(TINY), "float32")


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_top_takes_the_first_of_equals(columns):
    for at in range(columns):
        row = torch.full((1, columns), -torch.inf)
        row[0, at:] = -3.5
        token, p = NATIVE.top(row)
        assert token.item() == at
        assert math.isclose(p.item(), 1 / (columns - at), rel_tol=1e-5)


# ---- threads ----


def test_two_threads_give_the_same_result():
    made, scene = fast(network(ODD)), Scene((300, 33, 1, 64), Layout("causal"), True, 9)
    one = play(made, scene).logits
    torch.set_num_threads(2)
    try:
        assert torch.equal(play(made, scene).logits, one)
    finally:
        torch.set_num_threads(1)


def test_two_callers_at_once_do_not_meet():
    made = {kind: fast(network(replace(ODD, layers=4)), kind) for kind in ("float32", "int8")}
    cases = [Scene((n, 5), Layout("causal"), True, n) for n in (3, 40, 200, 17, 300, 64)]
    right = {(k, s): play(m, s).logits for k, m in made.items() for s in cases}
    wrong: list[object] = []

    def work(mine: list[Scene]) -> None:
        for _ in range(4):
            wrong.extend(
                (k, s) for k, m in made.items() for s in mine if not torch.equal(play(m, s).logits, right[k, s])
            )

    threads = [threading.Thread(target=work, args=(mine,)) for mine in (cases, cases[::-1], cases[2:])]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---- other builds, and who keeps them ----


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for compiled kernels, of which this process has loaded none."""
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "kept"))
    native.library.cache_clear()
    yield tmp_path / "kept"
    native.library.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def compiler(path: Path, more: str) -> str:
    """The machine's compiler with flags behind all others."""
    return script(path, f'exec {shlex.join(native.compiler())} "$@" {more}\n')


def test_a_processor_with_less(kept, tmp_path, monkeypatch):
    """What is written out for the vector units of newer ones has a plain form."""
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", "-O1 -march=x86-64"))
    scene = Scene((33, 2), Layout("causal"), True, 5)
    model = cast(network(ODD), torch.bfloat16)
    right = play(cast(model, torch.float64), scene).logits
    for kind, by in (("bfloat16", 0.02), ("int8", 0.1)):
        assert rms(play(fast(model, kind), scene).logits - right) <= by * rms(right)


def test_without_openmp(kept, tmp_path, monkeypatch):
    other = shlex.join(native.compiler())
    text = 'for a in "$@"; do if [ "$a" = -fopenmp ]; then echo "error: no OpenMP" >&2; exit 1; fi; done\n'
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'{text}exec {other} "$@" -O0\n'))
    model, scene = network(ODD), Scene((33, 2), Layout("causal"), True, 5)
    assert close(play(fast(model), scene).logits, play(model, scene).logits)


def test_two_processes_compile_at_once_and_a_third_does_not(kept, tmp_path, monkeypatch):
    log = tmp_path / "calls"
    text = f'case "$*" in *--version*) ;; *) echo x >> {log}; sleep 0.3 ;; esac\n'
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'{text}exec {shlex.join(native.compiler())} "$@" -O0\n'))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=native.library, args=("float32",), kwargs={"half": False}) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text().split() == ["x", "x"]
    (made,) = kept.iterdir()  # no draft is left behind
    before, calls = made.stat().st_mtime_ns, log.read_text()
    native.library("float32", half=False)
    assert (made.stat().st_mtime_ns, log.read_text()) == (before, calls)
