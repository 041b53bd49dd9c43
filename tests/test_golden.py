"""Law 2: each published recipe equals the published code token for token at temperature 0, in no more forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from golden import toy
from golden.load import Case, traces
from unmask import recipes
from unmask.decode import Canvas, Ledger, Recipe, decode
from unmask.denoise import Plain

BATCH = 8
CONFIDENCE = {"maskgit_plus": "score", "topk_margin": "margin", "entropy": "entropy"}


def llada(c: dict[str, Any]) -> Recipe:
    by = "random" if c["remasking"] == "random" else "score"
    return recipes.get("llada", block=c["block_length"], steps=c["steps"], by=by)


def dream(c: dict[str, Any]) -> Recipe:
    if c["alg"] == "origin":
        return recipes.get("dream-origin", steps=c["steps"], eps=c["eps"])
    return recipes.get("dream", steps=c["steps"], eps=c["eps"], by=CONFIDENCE[c["alg"]])


def fast_dllm(c: dict[str, Any]) -> Recipe:
    names = {
        "none": ("threshold", "factor", "llada"),
        "prefix": ("prefix", "prefix-factor", "prefix-quota"),
        "dual": ("dual", "dual-factor", "dual-quota"),
    }
    threshold, factor, quota = names[c["cache"]]
    if "threshold" in c:
        return recipes.get(threshold, block=c["block_length"], threshold=c["threshold"])
    if "factor" in c:
        return recipes.get(factor, block=c["block_length"], factor=c["factor"], lenient=True)
    return recipes.get(quota, block=c["block_length"], steps=c["steps"])


def prophet(c: dict[str, Any]) -> Recipe:
    level = c["early_exit_thresholds"]
    levels = {"high": level["early"], "middle": level["mid"], "low": level["late"]}
    return recipes.get("prophet", block=c["block_length"], steps=c["steps"], **levels)


def d2f(c: dict[str, Any]) -> Recipe:
    return recipes.get("d2f", block=c["block_size"], add=c["tau_add"], act=c["tau_act"], threshold=c["tau_conf"])


TRACES: dict[str, Callable[[dict[str, Any]], Recipe]] = {
    "llada_low_confidence": llada,
    "llada_random": llada,
    "dream_origin": dream,
    "dream_maskgit_plus": dream,
    "dream_topk_margin": dream,
    "dream_entropy": dream,
    "fast_dllm_none": fast_dllm,
    "fast_dllm_prefix": fast_dllm,
    "fast_dllm_dual": fast_dllm,
    "prophet": prophet,
    "d2f": d2f,
}


def canvas(cases: list[Case]) -> Canvas:
    """The cases as one ragged batch, template tokens pinned and the answer region marked."""
    length = cases[0].config.get("gen_length", cases[0].config.get("max_new_tokens"))
    rows = []
    for case in cases:
        row: list[int | None] = [*case.prompt, *[None] * length]
        for column, token in case.extra.get("pinned", []):
            row[column] = token
        rows.append(row)
    eos = [cases[0].config["eos_id"]] if "eos_id" in cases[0].config else []
    made = Canvas.of(
        rows,
        origin=[len(c.prompt) for c in cases],
        mask_id=toy.MASK,
        eos=eos,
        seed=[c.seed for c in cases],
        dtype=torch.float64,
    )
    region = torch.zeros_like(made.region)
    for i, case in enumerate(cases):
        region[i, case.extra.get("answer", [])] = 2
    return replace(made, region=region)


@pytest.mark.parametrize("name", TRACES)
def test_recipe_equals_the_published_code(name: str) -> None:
    trace = traces(name)
    kind = "dream" if name.startswith("dream") else "d2f" if name == "d2f" else "llada"
    configs = {repr(c.config): c.config for c in trace.cases}
    assert len(trace.cases) >= 40 * len(configs)
    for key, config in configs.items():
        cases = [c for c in trace.cases if repr(c.config) == key]
        recipe = TRACES[name](config)
        model = toy.network(kind, config.get("block_size", 0))
        for at in range(0, len(cases), BATCH):
            check(recipe, model, cases[at : at + BATCH])


def check(recipe: Recipe, model: Any, cases: list[Case]) -> None:
    start = canvas(cases)
    denoise = Plain(model, slots=len(cases), length=start.tokens.shape[1], cached=recipe.cached)
    ledger, end = Ledger(), start
    for end, event in decode(denoise, recipe, start):
        ledger.update(end, event)
    for i, case in enumerate(cases):
        ours = end.tokens[i, len(case.prompt) :][: len(case.output)].tolist()
        assert ours == case.output, f"{recipe!r} differs on {case.prompt}"
        assert ledger.report().exit_steps[i] <= case.forwards
