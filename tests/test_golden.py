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

BATCH = 20
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


def sdar(c: dict[str, Any]) -> Recipe:
    shape = {"block": c["block_length"], "denoising_steps": c["denoising_steps"]}
    if c["remasking_strategy"] == "low_confidence_dynamic":
        return recipes.get("sdar", threshold=c["confidence_threshold"], **shape)
    return recipes.get("sdar-static", by="left" if c["remasking_strategy"] == "sequential" else "score", **shape)


def llada2(c: dict[str, Any]) -> Recipe:
    steps = min(c["steps"], c["gen_length"] // c["minimal_topk"])
    return recipes.get("llada2", block=c["block_length"], denoising_steps=steps, threshold=c["threshold"])


def llada21(c: dict[str, Any]) -> Recipe:
    return recipes.get("llada21", block=c["block_length"], threshold=c["threshold"], edit=c["editing_threshold"])


def fast_dllm_v2(c: dict[str, Any]) -> Recipe:
    name = "fast-dllm-v2-cache" if c["use_block_cache"] else "fast-dllm-v2"
    return recipes.get(name, block=c["block_length"], sub=c["small_block_size"], threshold=c["threshold"])


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
    "d2f_dream": d2f,
    "sdar": sdar,
    "sdar_static": sdar,
    "llada2": llada2,
    "llada21": llada21,
    "fast_dllm_v2": fast_dllm_v2,
    "fast_dllm_v2_cache": fast_dllm_v2,
}
SPARED = 8
"""At least so many of 40 prompts of every configuration meet no fault of the published loop."""


def cells(case: Case) -> int:
    """The response's cells: as many as were asked for, or whole absolute blocks."""
    c, start = case.config, len(case.prompt)
    if "small_block_size" in c:
        return (c["gen_length"] // c["block_length"] + start // c["block_length"]) * c["block_length"] - start
    if "eos_id" in c and "block_length" in c:
        return -(-(start + c["gen_length"]) // c["block_length"]) * c["block_length"] - start
    return c.get("gen_length", c.get("max_new_tokens"))


def canvas(cases: list[Case], revisions: int = 0) -> Canvas:
    """The cases as one ragged batch, template tokens pinned and the answer region marked."""
    rows = []
    for case in cases:
        row: list[int | None] = [*case.prompt, *[None] * cells(case)]
        for column, token in case.extra.get("pinned", []):
            row[column] = token
        rows.append(row)
    eos = [cases[0].config["eos_id"]] if cases[0].config.get("eos_id", -1) >= 0 else []
    made = Canvas.of(
        rows,
        origin=[len(c.prompt) for c in cases],
        mask_id=toy.MASK,
        eos=eos,
        seed=[c.seed for c in cases],
        revisions=revisions,
        dtype=torch.float64,
    )
    region = torch.zeros_like(made.region)
    for i, case in enumerate(cases):
        region[i, case.extra.get("answer", [])] = 2
    return replace(made, region=region)


@pytest.mark.parametrize("name", TRACES)
def test_recipe_equals_the_published_code(name: str) -> None:
    trace = traces(name)
    configs = {repr(c.config): c.config for c in trace.cases}
    assert len(trace.cases) >= 40 * len(configs)
    for key, config in configs.items():
        cases = [c for c in trace.cases if repr(c.config) == key and not c.extra.get("struck")]
        assert len(cases) >= SPARED, key
        recipe = TRACES[name](config)
        model = toy.network(trace.meta["toy"]["kind"], config.get("block_size", config.get("block_length", 0)))
        for at in range(0, len(cases), BATCH):
            check(recipe, model, cases[at : at + BATCH])


def check(recipe: Recipe, model: Any, cases: list[Case]) -> None:
    start = canvas(cases, recipe.allowance)
    denoise = Plain(model, slots=len(cases), length=start.tokens.shape[1], cached=recipe.cached)
    ledger, end = Ledger(), start
    for end, event in decode(denoise, recipe, start):
        ledger.update(end, event)
    exits = ledger.report().exit_steps
    for i, case in enumerate(cases):
        ours = end.tokens[i, len(case.prompt) :][: len(case.output)].tolist()
        assert ours == case.output, f"{recipe!r} differs on {case.prompt}"
        assert exits[i] <= case.forwards
