"""Law 8: noise depends on (row seed, step, position, draw) alone; company, restart and tracing change no sample."""

from __future__ import annotations

import pytest
import torch

from laws.common import plain, ragged, result, results, run, small
from unmask.decode import decode, noise
from unmask.denoise import Draws, Sampled

N = 20_000
t = torch.tensor


@pytest.mark.parametrize(
    ("counters", "value"),
    [
        ((0, 0, 0, 0), 0.12964564561843872),
        ((1, 2, 3, 4), 0.833447277545929),
        ((-1, 0, 7, 1), 0.040333449840545654),
        ((2**62, 99, 511, 12345), 0.06075567007064819),
    ],
)
def test_the_numbers_stay_the_same(counters: tuple[int, ...], value: float) -> None:
    seed, step, position, draw = counters
    assert noise.uniform(t(seed), t(step), t(position), draw).item() == value


def along(axis: int, fixed: int = 3) -> torch.Tensor:
    counters = [torch.full((N,), fixed) for _ in range(4)]
    counters[axis] = torch.arange(N)
    return noise.uniform(*counters)


@pytest.mark.parametrize("axis", range(4))
def test_uniform_along_every_counter(axis: int) -> None:
    u = along(axis).sort().values.double()
    grid = torch.arange(1, N + 1) / N
    assert (u - grid).abs().max() < 1.63 / N**0.5  # Kolmogorov-Smirnov, 1%
    assert u.min() > 0 and u.max() < 1


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs().item()


@pytest.mark.parametrize("axis", range(4))
def test_neighbouring_counters_are_independent(axis: int) -> None:
    u = along(axis)
    for lag in (1, 2, 64):
        assert correlation(u[lag:], u[:-lag]) < 4 / N**0.5
    for other in range(axis):
        assert correlation(u, along(other)) < 4 / N**0.5
    assert correlation(u, along(axis, 4)) < 4 / N**0.5


def test_counters_do_not_stand_for_each_other() -> None:
    swapped = [
        noise.uniform(*(t(c) for c in order)) for order in ((1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4), (4, 2, 3, 1))
    ]
    assert len({u.item() for u in swapped}) == 4


def test_the_ends_are_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = t(0)
    for extreme in (0, -1):  # all bits clear, all bits set
        monkeypatch.setattr(noise, "_mix", lambda z, e=extreme: torch.full_like(z, e))
        u = noise.uniform(zero, zero, zero)
        assert 0 < u.item() < 1 and noise.gumbel(zero, zero, zero).isfinite()


def test_gumbel_samples_the_softmax() -> None:
    logits = t([0.0, 1.0, 2.0, -torch.inf])
    g = noise.gumbel(torch.arange(N)[:, None], t(0), t(0), torch.arange(4) + 1)
    share = torch.bincount((logits + g).argmax(1), minlength=4) / N
    assert (share - logits.softmax(0)).abs().max() < 0.02


SETTINGS = [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "confidence": "shaped"}]


def sampled(kind: str, name: str, canvas, settings: dict) -> Sampled:
    return Sampled(plain(kind, small(name), canvas), **settings)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), [("llada", "full"), ("dual", "shifted"), ("d2f", "block"), ("ar", "causal")])
def test_a_sample_does_not_know_its_company(name: str, kind: str, settings: dict) -> None:
    recipe, canvas = small(name), ragged(infill=False)
    whole, seen = run(sampled(kind, name, canvas, settings), recipe, canvas)
    greedy, _ = run(plain(kind, recipe, canvas), recipe, canvas)
    assert results(whole) != results(greedy)
    for row in range(len(canvas)):
        one = canvas[row : row + 1]
        alone, _ = run(sampled(kind, name, one, settings), recipe, one)
        assert result(alone, 0) == result(whole, row)
    again, _ = run(sampled(kind, name, canvas, settings), recipe, canvas)
    assert results(again) == results(whole) and len(seen) > 2


@pytest.mark.parametrize(("name", "kind"), [("llada", "full"), ("dual", "shifted"), ("d2f", "block"), ("ar", "causal")])
def test_a_sample_survives_a_restart(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged(infill=False)
    whole, _ = run(sampled(kind, name, canvas, SETTINGS[0]), recipe, canvas)
    denoise = sampled(kind, name, canvas, SETTINGS[0])
    loop = decode(denoise, recipe, canvas)
    half = [next(loop)[0] for _ in range(3)][-1]
    for row in (3, 0):
        one = half[torch.tensor([row])]
        assert not one.done.any()
        assert result(run(denoise, recipe, one)[0], 0) == result(whole, row)


def test_seeds_tell_rows_apart() -> None:
    one = ragged(infill=False)[torch.tensor([0, 0])]
    recipe, denoise = small("llada"), sampled("full", "llada", one, SETTINGS[0])
    same, _ = run(denoise, recipe, one)
    assert same.tokens[0].tolist() == same.tokens[1].tolist()
    other, _ = run(denoise, recipe, one._map(lambda name, v: t([1, 2]) if name == "seed" else v))
    assert other.tokens[0].tolist() != other.tokens[1].tolist()


def test_settings_narrow_the_choice() -> None:
    logits = t([[1.0, 3.0, 2.0]])
    assert Draws(top_k=2).shape(logits).tolist() == [[-torch.inf, 3.0, 2.0]]
    assert Draws(top_p=1e-9).shape(logits).isfinite().tolist() == [[False, True, False]]
    assert Draws(min_p=0.3).shape(logits).tolist() == [[-torch.inf, 3.0, 2.0]]
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            Draws(**wrong)  # type: ignore[arg-type]
