"""Law 3 on the kernels: caches that change nothing change nothing there, and one row decodes as in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from laws import common
from laws.common import BLOCK, CAUSAL, OPEN, PAIRS, line, plain, ragged, results, revisable, run, small
from laws.kernelled import fast, slow
from unmask import recipes
from unmask.decode import Blocks, Canvas, Every, Recipe, best, confident, dirty, everything, masked

b = Blocks(BLOCK)
surest = confident(0.6) | best(1)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys of the law tests are those on the kernels."""
    monkeypatch.setattr(common, "model", fast)


def ends(kind: str, recipe: Recipe, canvas: Canvas, *, cached: bool | None = None) -> list[Any]:
    return results(run(plain(kind, recipe, canvas, cached=cached), recipe, canvas)[0])


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("name", [n for n in OPEN if not small(n).cached][::3])
def test_computing_everything_is_no_cache(name, kind, kernels):
    recipe, canvas = small(name), ragged()
    assert ends(kind, recipe, canvas, cached=True) == ends(kind, recipe, canvas, cached=False)


@pytest.mark.parametrize("kind", ["full", "shifted"])
@pytest.mark.parametrize("query", [b, b.onward, masked | dirty, masked], ids=repr)
def test_a_cache_refreshed_at_every_step_is_no_cache(query, kind, kernels):
    canvas = ragged()
    uncached = ends(kind, Recipe(everything, b >> surest), canvas)
    assert ends(kind, Recipe(query | everything.when(Every(1)), b >> surest), canvas, cached=True) == uncached


SERIAL = [
    (name, kind)
    for name, kinds in CAUSAL.items()
    for kind in kinds
    if name != "fast-dllm-v2-cache" and "grid" in recipes.entry(name).defaults
]


@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.parametrize(("name", "kind"), SERIAL)
def test_block_after_block_the_cache_is_exact(name, kind, infill, kernels):
    canvas = revisable(ragged(infill=infill), 3)
    cached = small(name, **({"grid": "absolute"} if kind.startswith("absolute") else {}))
    assert ends(kind, cached, canvas) == ends(kind, replace(cached, query=everything), canvas, cached=False)


def test_a_causal_cache_is_exact(kernels):
    cached, canvas = small("ar"), ragged(infill=False)
    assert ends("causal", cached, canvas) == ends("causal", replace(cached, query=everything), canvas, cached=False)


@pytest.mark.parametrize("name", ["prefix", "dual", "dkv"])
def test_approximate_caches_are_seen_to_differ(name, kernels):
    """Else nothing is proved."""
    assert ends("full", small(name), ragged()) != ends("full", small("threshold"), ragged())


@pytest.mark.parametrize("prompt", [1, 6])
@pytest.mark.parametrize(("name", "kind"), PAIRS[::2])
def test_one_row_decodes_what_torch_decodes(name, kind, prompt, monkeypatch):
    recipe, canvas = small(name), line(prompt, 13, seed=prompt)
    monkeypatch.setattr(common, "model", slow)
    right = ends(kind, recipe, canvas)
    monkeypatch.setattr(common, "model", fast)
    assert ends(kind, recipe, canvas) == right
    assert all(torch.tensor(row[0]).ge(0).all() for row in right)
