"""Beliefs: filters and penalties by definition, guidance by its formula, policies of the end, a row's own settings."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from torch import Tensor

import embedded
import unmask
from golden import toy
from laws.common import BLOCK, EOS, Synthetic, model, ragged, result, results, run, small
from unmask import UserError
from unmask.cli import main
from unmask.decode import Blocks, Canvas, Draft, Every, Ledger, Recipe, best, decode, drawn, everything, leftmost
from unmask.decode.belief import Blend, Joint
from unmask.denoise import ClassifierFree, Draws, Plain, Sampled, dress
from unmask.models.joint import JointSampler
from unmask.settings import Settings, resolve, source

t = torch.tensor
b = Blocks(BLOCK)


def dressed(kind: str, recipe: Recipe, canvas: Canvas, *, cfg: Any = 0.0, **draws: Any) -> Any:
    """The denoiser that `generate` would make for these settings, over a toy."""
    slots, length = canvas.tokens.shape
    return dress(ending(kind, canvas), recipe, slots=slots, length=length, cfg=cfg, draws=Draws(**draws))


def ending(kind: str, canvas: Canvas) -> Any:
    """The toy, which names the canvas's EOS its own."""
    net = copy(model(kind))
    net.config = replace(net.config, eos_ids=canvas.eos)
    return net


# Filters, by definition


def kept(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn: the k likeliest; of these the fewest whose share is top_p; of these, by min_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[:top_k] if top_k else order
    total = sum(math.exp(logits[i]) for i in order)
    inside, before = [], 0.0
    for i in order:
        assume(abs(before - top_p) > 1e-6)
        if before < top_p:
            inside.append(i)
        before += math.exp(logits[i]) / total
    ratio = {i: math.exp(logits[i] - logits[order[0]]) for i in inside}
    assume(all(abs(r - min_p) > 1e-6 for r in list(ratio.values())[1:]))
    return {i for i in inside if ratio[i] >= min_p}


filters = st.fixed_dictionaries(
    {"top_k": st.integers(0, 9), "top_p": st.floats(0.01, 1), "min_p": st.sampled_from([0.0, 1.0]) | st.floats(0, 1)}
)
rows_of_logits = st.lists(st.integers(-60, 60), min_size=2, max_size=8, unique=True).map(lambda v: [i / 8 for i in v])


@given(rows_of_logits, filters)
def test_filters_are_what_their_definition_says(logits: list[float], how: dict[str, Any]) -> None:
    shaped = Draws(**how).shape(t([logits], dtype=torch.float64))[0]
    inside = kept(logits, **how)
    assert {i for i, v in enumerate(shaped.tolist()) if v > -math.inf} == inside != set()
    assert all(shaped[i] == logits[i] for i in inside)


@given(st.lists(st.tuples(st.lists(st.integers(-3, 3), min_size=5, max_size=5), filters), min_size=2, max_size=5))
def test_filters_of_a_row_are_its_own_and_keep_a_token(rows: list[tuple[list[int], dict[str, Any]]]) -> None:
    logits = t([v for v, _ in rows], dtype=torch.float32)
    own = Draws(**{name: [how[name] for _, how in rows] for name in ("top_k", "top_p", "min_p")})
    together = own.shape(logits, torch.arange(len(rows)))
    assert together.isfinite().any(1).all()
    for i, (_, how) in enumerate(rows):
        assert torch.equal(Draws(**how).shape(logits[i : i + 1])[0], together[i])


SHARES = [0.5, 0.25, 0.15, 0.08, 0.02]
NARROW = [
    ({"top_k": 2}, 2), ({"top_k": 9}, 5), ({"top_p": 0.49}, 1), ({"top_p": 0.51}, 2), ({"top_p": 0.74}, 2),
    ({"top_p": 0.76}, 3), ({"top_p": 0.99}, 5), ({"top_p": 1e-300}, 1), ({"min_p": 0.29}, 3), ({"min_p": 0.31}, 2),
    ({"min_p": 0.03}, 5),
    ({"min_p": 0.05}, 4), ({"min_p": 1.0}, 1), ({"top_k": 2, "top_p": 0.6}, 1), ({"top_k": 3, "top_p": 0.56}, 2),
    ({"top_k": 4, "top_p": 0.9, "min_p": 0.4}, 2),
]  # fmt: skip


@pytest.mark.parametrize(("how", "count"), NARROW, ids=str)
def test_how_many_tokens_a_filter_leaves(how: dict[str, Any], count: int) -> None:
    assert Draws(**how).shape(t([SHARES]).log()).isfinite().sum() == count


def test_a_row_without_a_filter_keeps_all_beside_one_that_has_it() -> None:
    """Also where the first token's share rounds to 1."""
    logits = t([[60.0, 1.0, 0.0], [60.0, 1.0, 0.0]])
    own = Draws(top_p=[1.0, 0.5], top_k=[0, 2], min_p=[0.0, 0.9])
    assert own.shape(logits, t([0, 1])).isfinite().sum(1).tolist() == [3, 1]


@dataclass(frozen=True)
class Fixed:
    """The same logits [V] in every cell."""

    logits: tuple[float, ...]

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        fresh = query & need
        return Draft(query, fresh, t(self.logits, dtype=torch.float64).repeat(int(fresh.sum()), 1))


def test_tokens_are_drawn_from_the_shaped_distribution() -> None:
    canvas, logits = Canvas.new([[0]], 20_000, mask_id=9), (2.0, 1.5, 1.0, 0.0, -4.0)
    how = Draws(temperature=0.8, top_k=4, min_p=0.2)
    denoise = Sampled(Fixed(logits), temperature=0.8, top_k=4, min_p=0.2)
    draft = denoise(canvas, canvas.valid, canvas.masked)
    later = denoise(replace(canvas, step=canvas.step + 1), canvas.valid, canvas.masked)
    assert 0.3 < (draft.tokens == later.tokens).float().mean() < 0.5  # as two independent draws agree
    share = torch.bincount(draft.tokens, minlength=5) / 20_000
    wanted = how.shape(t([logits], dtype=torch.float64) / 0.8).softmax(1)[0]
    assert (share - wanted).abs().max() < 0.012 and set(draft.tokens.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("confidence", ["raw", "shaped"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidence_is_read_before_or_after_the_shaping(temperature: float, confidence: str) -> None:
    canvas, how = ragged(), {"temperature": temperature, "top_k": 3, "confidence": confidence}
    raw = Synthetic()(canvas, canvas.valid, canvas.masked)
    draft = Draws(**how).settle(canvas, raw)
    read = Draws(top_k=3).shape(raw.logits / (temperature or 1)) if confidence == "shaped" else raw.logits
    own = draft.tokens[:, None]
    assert torch.equal(draft.score[draft.fresh], read.softmax(1).gather(1, own)[:, 0])
    assert torch.equal(draft.gap, raw.gap) and (temperature > 0 or torch.equal(draft.token, raw.token))


@pytest.mark.parametrize("recipe", ["llada", "threshold", "dream", "dream-origin"])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "qwen2"])
def test_confidence_is_read_as_in_the_source_model(recipe: str, family: str) -> None:
    config = replace(model("full").config, family=family)
    shaped = family in ("dream", "sdar") or recipe.startswith("dream")
    assert source(small(recipe), config) == ("shaped" if shaped else "raw")
    for said in ("raw", "shaped"):
        assert Settings(confidence=said).draws(small(recipe), config, None).confidence == said  # type: ignore[arg-type]
    assert Settings().draws(small(recipe), config, None).confidence == source(small(recipe), config)  # type: ignore[arg-type]


def test_what_was_drawn_before_does_not_matter() -> None:
    canvas = ragged()
    raw = Synthetic()(canvas, canvas.valid, canvas.masked)
    hot = Draws(temperature=2.0, top_k=4, confidence="shaped").settle(canvas, raw)
    for how in ({"eos": "last"}, {"logit_bias": {1: 2.0}}, {"temperature": 0.5, "confidence": "shaped"}):
        once, again = (Draws(**how).settle(canvas, draft) for draft in (raw, hot))
        assert torch.equal(once.tokens, again.tokens) and torch.equal(once.score, again.score)
    assert not torch.equal(hot.tokens, raw.tokens)


def test_nothing_asked_is_nothing_done() -> None:
    canvas = ragged()
    draft = Synthetic()(canvas, canvas.valid, canvas.masked)
    for idle in ({}, {"top_k": 3, "top_p": 0.5}, {"temperature": [0.0] * 4, "eos": ["free"] * 4}):
        assert Draws(**idle).settle(canvas, draft) is draft and not Draws(**idle).active
        assert isinstance(dressed("full", small("threshold"), canvas, cfg=[0.0] * 4, **idle), Plain)


# Penalties and biases, by hand


def written(canvas: Canvas, row: int, cell: int, token: int) -> int:
    """How often the row committed the token outside of the cell; an EOS is no repetition."""
    own = canvas.valid[row] & ~canvas.given[row] & (canvas.decided_at[row] > 0)
    return sum(int(canvas.tokens[row, c]) == token for c in own.nonzero()[:, 0].tolist() if c != cell)


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 0.6, "presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {2: 3.0, 5: -1.5}},
    {"repetition_penalty": [1.0, 1.5, 0.5, 2.0], "frequency_penalty": [0.0, 0.5, 1.0, 1.5]},
    {"logit_bias": [{0: 1.0}, {}, {3: -2.0, 7: 2.0}, {1: 9.0}]},
]


@pytest.mark.parametrize("how", PENALTIES, ids=str)
def test_penalties_by_hand(how: dict[str, Any]) -> None:
    """Committed tokens count, given ones do not, nor the cell's own, nor EOS (7 here), nor another row's."""
    start = replace(ragged(), tokens=ragged().tokens % 8, seed=t([5, 6, 7, 8]))
    denoise = Synthetic(scale=6.0, moving=True)
    canvas = [c for c, _ in run(denoise, Recipe(everything, best(2)), start)[1]][3]
    raw = replace(draft := denoise(canvas, canvas.valid, canvas.valid), logits=draft.logits - 3.0)
    found = Draws(**how).settle(canvas, raw)
    cells = raw.fresh.nonzero().tolist()
    value = {k: v if isinstance(v, list) else [v] * 4 for k, v in how.items()}
    counts, changed = set(), 0
    for n, (row, cell) in enumerate(cells):
        for token in range(8):
            x = float(raw.logits[n, token]) + value.get("logit_bias", [{}] * 4)[row].get(token, 0.0)
            c = 0 if token == 7 else written(canvas, row, cell, token)
            counts.add(c)
            if c:
                factor = value.get("repetition_penalty", [1.0] * 4)[row]
                x = x / factor if x > 0 else x * factor
                x -= value.get("presence_penalty", [0.0] * 4)[row] + c * value.get("frequency_penalty", [0.0] * 4)[row]
            assert float(found.logits[n, token]) == pytest.approx(x)
            changed += x != float(raw.logits[n, token])
    assert changed and counts > {0, 1} and int((canvas.tokens == 7)[~canvas.given & ~canvas.masked].sum())
    assert torch.equal(found.tokens, found.logits.argmax(1)) and found.belief is None


def test_penalties_make_a_text_less_repetitive() -> None:
    canvas, recipe = ragged(eos=False), small("llada")
    distinct = []
    for amount in (0.0, 2.0):
        end, _ = run(dressed("full", recipe, canvas, frequency_penalty=amount, presence_penalty=amount), recipe, canvas)
        distinct.append(sum(len(set(end.tokens[r][~end.given[r]].tolist())) for r in range(4)))
    assert distinct[1] > distinct[0]


# What is never written


class Loud(torch.nn.Module):
    """A model that wants nothing but the mask (60) and what lies beyond its vocabulary (59)."""

    graphs = kernels = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = model(kind)
        self.config = replace(self.inner.config, token_count=59, eos_ids=(7,))
        self.embed, self.dtype = self.inner.embed, self.inner.dtype

    def forward(self, *args: Any, **named: Any) -> Tensor:
        return self.inner(*args, **named).index_fill(-1, t([59, 60]), 1e9)


LOUD = [
    {"temperature": 2.0, "top_k": 3, "confidence": "shaped"},
    {"temperature": 1.0, "top_p": 0.1, "min_p": 0.9, "eos": "last"},
    {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0, "eos": "never"},
    {"temperature": 1e30, "eos": "last", "confidence": "shaped"},
]


@pytest.mark.parametrize("how", LOUD, ids=str)
@pytest.mark.parametrize("kind", ["full", "shifted"])
def test_what_is_no_token_is_never_committed(kind: str, how: dict[str, Any]) -> None:
    canvas, recipe, loud = ragged(), small("threshold"), Loud(kind)
    slots, length = canvas.tokens.shape
    plain, blind = (Plain(loud, slots=slots, length=length, cached=False) for _ in range(2))  # type: ignore[arg-type]
    denoise = Sampled(ClassifierFree(plain, blind, 3.0), **how, logit_bias={59: 100.0, 60: 1e300})
    end, seen = run(denoise, recipe, canvas)
    assert max(int(after.tokens[event.pick].max()) for after, event in seen) < 59
    assert all(event.draft.score[event.pick].isfinite().all() for _, event in seen)
    assert not end.masked[end.done & ~end.ended.any(1)].any()


# The end of a text


@dataclass(frozen=True)
class Eager:
    """Beliefs at random, in which the last of 8 tokens, an EOS of `ragged`, is likely everywhere."""

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = Synthetic(scale=9.0)(canvas, query, need)
        return replace(draft, logits=draft.logits + 3.0 * (torch.arange(8) == 7))


EAGER = Eager()


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "logit_bias": {7: 50.0}}], ids=str)
@pytest.mark.parametrize("name", ["threshold", "llada", "dream", "dream-origin", "dual"])
def test_an_end_that_is_never_written(name: str, how: dict[str, Any]) -> None:
    canvas, recipe = ragged(), small(name)
    free, _ = run(Sampled(EAGER, **how), recipe, canvas)
    never, _ = run(Sampled(EAGER, **how, eos="never"), recipe, canvas)
    assert free.ended.any() and not never.ended.any() and not never.masked.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("confidence", ["raw", "shaped"])
@pytest.mark.parametrize(
    ("name", "by"),
    [("threshold", None), ("factor", None), ("llada", "score"), ("llada", "margin"), ("llada", "entropy")],
)
def test_an_end_is_written_last_of_its_block(name: str, by: str | None, confidence: str, temperature: float) -> None:
    canvas = ragged(infill=False)
    recipe = small(name, **({"by": by} if by else {}))
    how: dict[str, Any] = {"temperature": temperature, "confidence": confidence, "top_k": 2}
    ends = 0
    for eos in ("free", "last"):
        early = 0
        before = canvas
        for after, event in run(Sampled(EAGER, **how, eos=eos), recipe, canvas)[1]:
            end, left = event.draft.token == 7, before.masked & ~event.pick & b(before) & ~before.done[:, None]
            rows = (event.pick & end).any(1)
            ends += int(rows.sum())
            early += int((rows & (left & ~end).any(1)).sum())
            if eos == "last":
                assert (event.draft.score[before.masked & end & event.draft.fresh] == 0).all()
                if name != "llada":  # no threshold takes one: it takes a step in which nothing else is left
                    assert (event.pick & end).sum(1).max() <= 1
            before = after
        assert (early > 0) == (eos == "free")
    assert ends


def test_an_end_has_no_share_in_the_confidence_of_others() -> None:
    canvas = ragged()
    raw = EAGER(canvas, canvas.valid, canvas.masked)
    draft = Draws(eos="last").settle(canvas, raw)
    rest = raw.logits[:, :7].softmax(1).gather(1, raw.tokens[:, None].clamp(max=6))[:, 0]
    assert torch.equal(draft.tokens, raw.tokens) and (raw.tokens == 7).any()
    assert torch.equal(draft.score[draft.fresh], torch.where(raw.tokens == 7, 0.0, rest))
    end = draft.spread(draft.tokens == 7, False)
    assert draft.entropy[end].min() == pytest.approx(math.log(7)) and draft.margin[end].max() == 0
    assert draft.entropy[end].min() >= draft.entropy[draft.fresh].max()


def test_an_end_that_stands_is_not_doubted_for_being_one() -> None:
    canvas = ragged()
    tokens = canvas.tokens.masked_fill(canvas.masked, 7)
    full = replace(canvas, tokens=tokens, decided_at=torch.where(canvas.masked, 1, canvas.decided_at))
    raw = EAGER(full, full.valid, full.valid)
    draft = Draws(eos="last").settle(full, raw)
    own = full.valid & (full.tokens == 7) & (draft.token == 7)
    assert own.any() and torch.equal(draft.probability_of(tokens)[own], raw.probability_of(tokens)[own])


@torch.no_grad()
def test_ends_last_is_what_llada_does_at_temperature_0() -> None:
    """Its quotas, with the confidence of a cell whose token is an EOS at 0 (confidence_eos_eot_inf)."""
    canvas, recipe = ragged(infill=False)[:1], small("llada", steps=6)
    canvas = canvas._map(lambda _, v: v if v.dim() == 1 else v[:, : int(ragged().valid[0].sum())])
    ends = [58, 34, 52]  # what this text is full of
    canvas = replace(canvas, eos=tuple(ends))
    net, tokens = model("full"), canvas.tokens[0].clone()
    for start in range(3, 15, 4):
        cells = torch.arange(start, start + 4)
        for step in range(2):
            logits = net(tokens[None])[0]
            logits[:, toy.MASK] = -torch.inf
            chosen = logits.argmax(1)
            logits[:, ends] = -torch.inf
            p = logits.softmax(1).gather(1, chosen[:, None])[:, 0]
            left = cells[tokens[cells] == toy.MASK]
            order = left[p[left].argsort(descending=True, stable=True)][: len(left) if step else 2]
            tokens[order] = chosen[order]
    recipe = replace(recipe, stop=small("llada").stop)
    end, _ = run(dressed("full", recipe, canvas, eos="last"), recipe, canvas)
    free, _ = run(dressed("full", recipe, canvas), recipe, canvas)
    assert end.tokens[0].tolist() == tokens.tolist() != free.tokens[0].tolist()


# Classifier-free guidance


def test_no_guidance_is_no_guidance() -> None:
    canvas, recipe = ragged(), small("dual")
    one, none = dressed("shifted", recipe, canvas), dressed("shifted", recipe, canvas, cfg=0.0)
    zero = ClassifierFree(dressed("shifted", recipe, canvas), dressed("shifted", recipe, canvas), 0.0)
    seen = [run(d, recipe, canvas)[1] for d in (one, none, zero)]
    for (a, x), *others in zip(*seen, strict=True):
        for other, y in others:
            assert torch.equal(x.draft.logits, y.draft.logits) and results(a) == results(other)
            assert not y.draft.costs


@torch.no_grad()
def formula(kind: str, canvas: Canvas, scale: Tensor) -> Tensor:
    """[B, L, V]: un + (scale + 1) (conditional - un) of two forwards over whole rows, one row at a time."""
    found = torch.zeros(*canvas.tokens.shape, toy.VOCAB, dtype=torch.float64)
    for row in range(len(canvas)):
        width, prompt = int(canvas.valid[row].sum()), int(canvas.origin[row])
        tokens = canvas.tokens[row, :width]
        blind = torch.where(canvas.given[row, :width] & (torch.arange(width) < prompt), toy.MASK, tokens)
        own, un = (model(kind)(x[None])[0] for x in (tokens, blind))
        both = un + (scale[row] + 1) * (own - un)
        both[:, toy.MASK] = -torch.inf
        found[row, :width] = both.roll(1, 0) if kind == "shifted" else both
    return found


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("query", [everything, b, b.onward], ids=repr)
@pytest.mark.parametrize("scale", [1.5, [0.0, 0.5, 2.0, 4.0]], ids=str)
def test_guidance_is_its_formula_under_every_cache_that_computes_everything(query, kind: str, scale: Any) -> None:
    canvas = ragged()
    recipe = Recipe(query if query is everything else query | everything.when(Every(1)), b >> best(2))
    denoise, before = dressed(kind, recipe, canvas, cfg=scale), canvas
    for after, event in run(denoise, recipe, canvas)[1]:
        wanted = formula(kind, before, t(scale).expand(4).double())
        assert torch.allclose(event.draft.logits, wanted[event.draft.fresh])
        before = after
    plain = run(dressed(kind, recipe, canvas), recipe, canvas)[0]
    assert results(before) != results(plain)


def test_guidance_keeps_an_exact_cache_exact() -> None:
    canvas, cached = ragged(eos=False), small("d2f")
    uncached = Recipe(everything, cached.unmask, stop=cached.stop)
    found = [run(dressed("block", r, canvas, cfg=1.0), r, canvas)[0] for r in (cached, uncached)]
    assert results(found[0]) == results(found[1]) != results(run(dressed("block", cached, canvas), cached, canvas)[0])


def test_guidance_is_paid_for_by_the_rows_that_have_it() -> None:
    canvas, recipe, ledger = ragged(), small("dual"), Ledger()
    for after, event in run(dressed("full", recipe, canvas, cfg=[0.0, 1.0, 0.0, 1.0]), recipe, canvas)[1]:
        ledger.update(after, event)
    told = ledger.report()
    assert told.helpers["unconditional"]["forwards"] == told.exit_steps[1] + told.exit_steps[3]
    assert 0 < told.helpers["unconditional"]["positions"] < told.positions


@pytest.mark.parametrize("count", [1, 2])
def test_a_joint_sampler_settles_what_it_draws(count: int) -> None:
    recipe = Recipe(everything, b >> drawn, beliefs=(Joint(count),))
    canvas, how = ragged(), {"eos": "never", "temperature": 1.0, "logit_bias": {EOS: 20.0, 7: 20.0}}
    net, sampler = ending("full", canvas), JointSampler(model("full").config).double().initialise(1, gain=0.5)
    slots, length = canvas.tokens.shape
    free, never = (
        run(
            dress(net, recipe, slots=slots, length=length, draws=Draws(**{**how, **more}), sampler=sampler),
            recipe,
            canvas,
        )[0]
        for more in ({"eos": "free"}, {})
    )
    assert free.ended.any() and not never.ended.any()
    if count == 1:  # one draw a forward needs no sampler, and may be guided
        one = Recipe(everything, b >> best(1, by="entropy"))
        assert results(run(dressed("full", recipe, canvas, cfg=2.0), recipe, canvas)[0]) == results(
            run(dressed("full", one, canvas, cfg=2.0), one, canvas)[0]
        )


# A row's own settings, and its own noise

OWN: list[dict[str, list[Any]]] = [
    {"temperature": [0.0, 0.5, 1.0, 1.5], "cfg": [0.5, 0.0, 1.0, 3.0]},
    {
        "temperature": [1.0, 0.0, 0.7, 1.3],
        "top_k": [5, 0, 0, 20],
        "top_p": [1.0, 0.9, 0.5, 0.95],
        "min_p": [0.0, 0.2, 0.1, 0.0],
        "confidence": ["raw", "shaped", "shaped", "raw"],
    },
    {
        "temperature": [0.0, 0.8, 0.0, 0.9],
        "repetition_penalty": [1.0, 1.4, 0.8, 1.0],
        "presence_penalty": [0.0, 0.5, 0.0, -1.0],
        "frequency_penalty": [1.0, 0.0, 0.5, 0.0],
        "logit_bias": [{}, {3: 4.0}, {}, {5: 2.0, 8: 9.0}],
        "eos": ["free", "never", "last", "free"],
    },
]


@pytest.mark.parametrize("own", OWN, ids=["noise", "filters", "logits"])
@pytest.mark.parametrize(("name", "kind"), [("llada", "full"), ("dual", "shifted"), ("d2f", "block"), ("ar", "causal")])
def test_rows_of_one_batch_have_their_own_settings(name: str, kind: str, own: dict[str, list[Any]]) -> None:
    recipe, canvas = small(name), ragged(infill=False)
    if name == "ar":  # has neither a mask nor an order
        own = {k: ["never" if v == "last" else v for v in values] for k, values in own.items() if k != "cfg"}
    whole, _ = run(dressed(kind, recipe, canvas, **own), recipe, canvas)
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]._map(
            lambda k, v, w=width: v * 0 if k == "slot" else v if v.dim() == 1 else v[:, :w]
        )
        alone, _ = run(dressed(kind, recipe, one, **{k: v[row] for k, v in own.items()}), recipe, one)
        assert result(alone, 0) == result(whole, row)
    order = t([2, 0, 3, 1])
    assert results(run(dressed(kind, recipe, canvas, **own), recipe, canvas[order])[0]) == [
        result(whole, row) for row in order.tolist()
    ]
    shared, _ = run(dressed(kind, recipe, canvas, **{k: v[1] for k, v in own.items()}), recipe, canvas)
    assert result(shared, 1) == result(whole, 1) and results(shared) != results(whole)


@tries(max_examples=12, deadline=None)
@given(
    st.floats(0.1, 3), st.integers(0, 30), st.floats(0.3, 1), st.floats(0, 0.5), st.floats(0.5, 2), st.floats(-2, 2),
    st.sampled_from(["free", "never", "last"]), st.integers(0, 3),
)  # fmt: skip
def test_a_sample_is_the_same_alone_and_restarted_from_any_step(
    heat, top_k, top_p, min_p, again, often, eos, row
) -> None:
    how = {"temperature": heat, "top_k": top_k, "top_p": top_p, "min_p": min_p, "eos": eos}
    how |= {"repetition_penalty": again, "frequency_penalty": often}
    recipe, canvas = small("threshold"), ragged(infill=False)
    whole, seen = run(Sampled(EAGER, **how), recipe, canvas)
    for at in [canvas, *(after for after, _ in seen)]:
        one = at[row : row + 1]
        alone = [*decode(Sampled(EAGER, **how), recipe, one)]
        assert result(alone[-1][0] if alone else one, 0) == result(whole, row)


# What is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "dllm"))


@pytest.fixture(scope="module")
def written_by(folder):
    return unmask.load(folder)


RANGES = [
    ({"temperature": -0.1}, "temperature must be a finite number >= 0"),
    ({"temperature": [0.5, math.inf]}, "temperature must be a finite number >= 0, not inf"),
    ({"temperature": []}, "temperature is an empty list"),
    ({"temperature": "hot"}, "temperature must be a finite number"),
    ({"temperature": True}, "temperature must be a finite number"),
    ({"top_k": -1}, "top_k must be a whole number of at least 0"),
    ({"top_k": [3, 2.5]}, "top_k must be a whole number of at least 0 and at most 2147483647, not 2.5"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
    ({"top_p": [0.5, 1.1]}, "top_p must be a number above 0 and at most 1, not 1.1"),
    ({"min_p": -0.1}, r"min_p must be a number in \[0, 1\]"),
    ({"min_p": math.nan}, r"min_p must be a number in \[0, 1\]"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0"),
    ({"presence_penalty": 2.1}, r"presence_penalty must be a number in \[-2, 2\]"),
    ({"frequency_penalty": -2.1}, r"frequency_penalty must be a number in \[-2, 2\]"),
    ({"cfg": -1}, "cfg must be a finite number >= 0"),
    ({"logit_bias": 3}, "logit_bias maps token ids to numbers"),
    ({"logit_bias": {-1: 2.0}}, "logit_bias is by token id"),
    ({"logit_bias": {1.5: 2.0}}, "logit_bias is by token id"),
    ({"logit_bias": {3: math.inf}}, "logit_bias must be a finite number for each token"),
    ({"eos": "sometimes"}, "unknown value of eos 'sometimes'"),
    ({"confidence": "shape"}, "did you mean 'shaped'"),
    ({"threshold": 1.2}, r"threshold is a probability in \[0, 1\]"),
    ({"seed": [1, 2**70]}, "seed must be a whole number between"),
]


@pytest.mark.parametrize(("wrong", "message"), RANGES, ids=str)
def test_a_setting_outside_of_its_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Settings(**wrong)
    assert "\n" not in str(error.value)


CALLS = [
    ({"logit_bias": {10**6: 1.0}}, "logit_bias names token 1000000, and this model has tokens 0 to"),
    ({"logit_bias": {"Tom has": 1.0}}, "logit_bias is for single tokens, and 'Tom has' has 2"),
    ({"logit_bias": {"Tom": 1.0, "7": 1.0, 7: 2.0}}, "logit_bias names token 7 twice"),
    ({"temperature": [0.5, 0.5]}, "temperature has 2 values for 1 rows"),
    ({"cfg": [0.0, 0.0]}, "cfg has 2 values for 1 rows"),
    ({"eos": ["last"] * 3}, "eos has 3 values for 1 rows"),
    ({"seed": [1, 2, 3]}, "seed has 3 values for 1 rows"),
    ({"eos": "last", "recipe": "llada", "remasking": "random"}, "does not commit by probability"),
    ({"eos": "last", "recipe": "llada", "by": "gap"}, "does not commit by probability"),
    ({"logits_eos_inf": True, "confidence_eos_eot_inf": True}, "contradict each other"),
    ({"guidance_scale": 2.0}, "use cfg, which is one less"),
]


@pytest.mark.parametrize(("wrong", "message"), CALLS, ids=str)
def test_a_call_that_cannot_be_answered(written_by, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        written_by.generate(embedded.PROMPT, **{"length": 8, **wrong})
    assert "\n" not in str(error.value)


def test_stacks_that_cannot_work() -> None:
    canvas, ar = ragged(), small("ar")
    joint = Recipe(everything, b >> drawn, beliefs=(Joint(2),))
    blend = Recipe(everything, b >> best(1), beliefs=(Blend(0.5),))
    sampler = JointSampler(model("full").config).double()
    place = {"slots": 4, "length": canvas.tokens.shape[1]}
    with pytest.raises(UserError, match="an autoregressive model has no mask"):
        dress(model("causal"), ar, **place, cfg=1.0)
    with pytest.raises(UserError, match="draws by a joint sampler, whose logits cfg does not guide"):
        dress(model("full"), joint, **place, cfg=1.0, sampler=sampler)
    for how in ({"temperature": 1.0}, {"frequency_penalty": 0.5}, {"eos": "last"}):
        with pytest.raises(UserError, match="a blend takes the likeliest token"):
            dressed("full", blend, canvas, **how)
    with pytest.raises(UserError, match="about a token that this model does not name"):
        dressed("full", small("threshold"), ragged(eos=False), eos="never")
    with pytest.raises(UserError, match="does not commit by probability"):
        dressed("full", Recipe(everything, leftmost(1)), canvas, eos="last")


OPTIONS = [
    (("--min-p", "1.5"), "min_p must be a number in [0, 1]"),
    (("--cfg", "-1"), "cfg must be a finite number >= 0"),
    (("--eos", "sometimes"), "unknown value of eos"),
    (("--confidence", "low"), "unknown value of confidence"),
    (("--repetition-penalty", "0"), "repetition_penalty must be"),
    (("--presence-penalty", "3"), "presence_penalty must be"),
    (("--frequency-penalty", "nan"), "frequency_penalty must be"),
    (("--logit-bias", "5"), "--logit-bias takes a token and a number, such as 42=-5, once each, not '5'"),
    (("--logit-bias", "5=x"), "--logit-bias takes a token and a number"),
    (("--logit-bias", "5=1", "--logit-bias", "5=2"), "--logit-bias takes a token and a number"),
    (("--logit-bias", "5=inf"), "logit_bias must be a finite number"),
    (("--logit-bias", "no such token=1"), "logit_bias is for single tokens"),
    (("--threshold", "1.5"), "threshold is a probability in [0, 1]"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_mistakes_on_the_command_line(folder: str, capsys, tmp_path, options: tuple[str, ...], message: str) -> None:
    out = tmp_path / "out.txt"
    code = main(["generate", embedded.PROMPT, "--model", folder, "--length", "8", "--output", str(out), *options])
    printed, told = capsys.readouterr()
    assert (code, printed, told.count("\n"), out.exists()) == (2, "", 1, False)
    assert told.startswith("error: ") and message in told


# From Python and from the command line


def test_published_names() -> None:
    said = {"cfg_scale": 1.5, "confidence_eos_eot_inf": True, "logits_eos_inf": False, "repetition_penalty": 1.1}
    assert resolve({}, said) == Settings(cfg=1.5, eos="last", repetition_penalty=1.1)
    assert resolve({"eos": "never"}, {"logits_eos_inf": True, "guidance_scale": 1}) == Settings(eos="never")


def test_a_list_is_a_value_for_each_text(written_by) -> None:
    prompts = [embedded.PROMPT, "Tom has 7 eggs .", "Tom has 8 eggs ."]
    own: dict[str, list[Any]] = {
        "temperature": [0.0, 1.0, 0.7],
        "top_k": [0, 5, 0],
        "cfg": [1.0, 0.0, 0.5],
        "seed": [3, 1, 2],
        "logit_bias": [{"Tom": 3.0}, {5: 1.0}, {}],
        "eos": ["never", "last", "free"],
    }
    together = written_by.generate(prompts, length=12, **own)
    alone = [written_by.generate(p, length=12, **{k: v[i] for k, v in own.items()}) for i, p in enumerate(prompts)]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert together[0].ledger.helpers["unconditional"]["forwards"] == sum(
        o.forwards for o in (together[0], together[2])
    )


def test_options_are_the_settings(written_by, folder: str, capsys) -> None:
    options = "--min-p 0.05 --cfg 0.5 --eos last --repetition-penalty 1.2 --presence-penalty 0.5 --confidence shaped"
    options += " --frequency-penalty 0.25 --temperature 0.9 --logit-bias Tom=4 --logit-bias 9=-1"
    call = ["generate", embedded.PROMPT, "--model", folder, "--length", "12", *options.split()]
    assert main(call) == 0
    tom = written_by.tokenizer.encode("Tom")[0]
    out = written_by.generate(
        embedded.PROMPT, length=12, temperature=0.9, min_p=0.05, cfg=0.5, eos="last", confidence="shaped",
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={tom: 4.0, 9: -1.0},
    )  # fmt: skip
    assert capsys.readouterr().out.strip() == out.text.strip()
