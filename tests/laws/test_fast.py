"""Laws 1 and 3 on a processor's fast path: it decodes what plain torch decodes, and a row alone as in company."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

import embedded
import unmask
from laws import common
from laws.common import PAIRS, plain, ragged, results, run, small
from laws.kernelled import fast, slow
from unmask.decode import Canvas, cat, step
from unmask.models.fast import accelerate
from unmask.models.transformer import Transformer


@lru_cache
def rounded(kind: str) -> Transformer:
    """The same with matrices of 8 bits: other tokens, but the same laws."""
    return accelerate(copy.deepcopy(slow(kind)), weights="int8")


Toys = Callable[[str], Transformer]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[Toys], None]:
    """Which networks the helpers of the law tests take: models and guides."""
    return lambda made: monkeypatch.setattr(common, "model", made)


def end(name: str, kind: str, canvas: Canvas) -> list[Any]:
    recipe = small(name)
    return results(run(plain(kind, recipe, canvas), recipe, canvas)[0])


def alone(name: str, kind: str, canvas: Canvas) -> list[Any]:
    found = []
    for row in range(len(canvas)):
        width = int(canvas.valid[row].sum())
        one = canvas[row : row + 1]
        found += end(name, kind, one._map(lambda _, t, w=width: t if t.dim() == 1 else t[:, :w]))
    return found


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_decodes_what_torch_decodes(name, kind, toys):
    toys(slow)
    right = end(name, kind, ragged())
    toys(fast)
    assert end(name, kind, ragged()) == right == alone(name, kind, ragged())


@pytest.mark.parametrize(("name", "kind"), PAIRS[::6])
def test_joined_mid_flight(name, kind, toys):
    toys(fast)
    recipe, canvas = small(name), ragged()[torch.tensor([1, 3])]
    late = replace(ragged(first=20), slot=torch.tensor([6, 0, 5, 2])).widen(30)
    denoise = plain(kind, recipe, late)
    for _ in range(2):
        canvas, _ = step(denoise, recipe, canvas)
    found, _ = run(denoise, recipe, cat([late, canvas]))
    old, new = alone(name, kind, ragged()), alone(name, kind, ragged(first=20))
    assert results(found) == [*new, old[1], old[3]]


@pytest.mark.parametrize(("name", "kind"), PAIRS[1::6])
def test_a_row_of_an_int8_model_decodes_alone_as_in_company(name, kind, toys):
    toys(rounded)
    order = [2, 0, 3, 1]
    canvas = ragged()[torch.tensor(order)].widen(33)
    separate = alone(name, kind, ragged())
    assert end(name, kind, canvas) == [separate[row] for row in order]


# ---- the embedded models ----

PROMPTS = [
    embedded.PROMPT,
    "Sam has 22 balls . Then he loses half of the balls . Tom brings Sam 4 boxes with 8 balls each . How many balls "
    "does Sam have now ?",
    "Max has 3 eggs . How many eggs does Max have ?",
]


@lru_cache
def loaded(name: str, compile: str) -> unmask.Model:
    return unmask.load(name, compile=compile)


def written(name: str, compile: str, prompts: list[str], **settings: Any) -> list[Any]:
    """Tokens and forwards of each response."""
    if "guide" in settings:
        settings["guide"] = loaded("twin", compile)
    made = loaded(name, compile)
    assert (made.network.native is None) == (compile == "off")
    return [(o.tokens, o.forwards, o.ledger.positions) for o in made.generate(prompts, **settings)]


THOUGHT = "{think:11} #### {answer:1}"
CALLS: list[dict[str, Any]] = [
    {"recipe": "dual"},
    {"recipe": "prophet"},
    {"recipe": "wino"},
    {"recipe": "adjust"},
    {"recipe": "ice", "template": THOUGHT},
    {"recipe": "prefix-quota", "template": "{think} The answer is {answer:5}", "length": 24},
    {"recipe": "guided", "guide": "twin"},
    {"recipe": "blend", "guide": "twin"},
    {"recipe": "threshold + joint(4)", "temperature": 0.7},
    {"recipe": "dual", "cfg": 1.5},
    {"recipe": "threshold", "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"recipe": "dual", "temperature": 0.7, "min_p": 0.05, "confidence": "shaped"},
    {"recipe": "threshold", "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"recipe": "prefix", "logit_bias": {"####": -2.0}, "eos": "never"},
    {"recipe": "threshold", "eos": "last"},
]


@pytest.mark.parametrize("settings", CALLS, ids=str)
def test_the_embedded_model_writes_the_same(settings):
    right = written("dllm", "off", PROMPTS, **settings)
    assert written("dllm", "auto", PROMPTS, **settings) == right


@pytest.mark.parametrize("name", ["twin", "d2f"])
def test_the_other_embedded_models_write_the_same(name):
    assert written(name, "auto", PROMPTS) == written(name, "off", PROMPTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_prompt_is_answered_as_in_a_list(dtype):
    model = unmask.load(dtype=dtype)
    if model.network.native is None:
        pytest.skip("another path is faster here")
    together = [o.tokens for o in model.generate(PROMPTS, recipe="dual")]
    assert [model.generate(p, recipe="dual").tokens for p in PROMPTS] == together
