"""What is recorded: every trace with its configurations, in the published loops' own parameter names."""

from __future__ import annotations

from typing import Any

from golden.methods import LOOPS, Config, Method, d2f, dream, fast_dllm, llada, prophet


def _grid(rows: list[tuple[int, int, int]], **more: Any) -> list[Config]:
    """Configurations from (gen_length, block_length, steps)."""
    return [{"gen_length": g, "block_length": b, "steps": s, **more} for g, b, s in rows]


LLADA = [(32, 8, 32), (32, 8, 12), (32, 16, 16), (48, 16, 15), (32, 32, 10)]
FAST = [(32, 8, 32), (48, 16, 48)]
QUOTA = [(32, 8, 16), (48, 16, 15)]
RULES = [{"threshold": 0.9}, {"threshold": 0.6}, {"factor": 1.0}, {"factor": 2.5}]


def _fast(cache: str) -> list[Config]:
    rules = [config for rule in RULES for config in _grid(FAST, cache=cache, **rule)]
    return rules + _grid(QUOTA, cache=cache)


def _prophet(gen: int, block: int, steps: int, pins: dict[str, int], early: float, mid: float, late: float) -> Config:
    start = max(map(int, pins)) + 2
    gates = {"early": early, "mid": mid, "late": late}
    shape = {"gen_length": gen, "block_length": block, "steps": steps}
    return {**shape, "constraints": pins, "answer_start": start, "early_exit_thresholds": gates}


NEAR, FAR, EDGE = {"20": 3, "21": 14, "22": 15}, {"30": 9, "31": 26, "32": 5}, {"40": 35, "41": 8, "43": 9}
PROPHET = [
    _prophet(32, 8, 32, NEAR, 3.2, 2.4, 1.6),
    _prophet(32, 8, 16, NEAR, 2.6, 2.0, 1.4),
    _prophet(48, 16, 48, FAR, 3.0, 2.2, 1.8),
    _prophet(48, 16, 24, FAR, 2.4, 2.4, 2.4),
    _prophet(48, 8, 48, EDGE, 3.6, 3.0, 2.4),
    _prophet(32, 16, 32, NEAR, 99.0, 99.0, 99.0),
]


def _dream(alg: str) -> list[Config]:
    shapes = ((32, 32), (32, 16), (32, 10), (32, 48), (48, 20))
    return [{"max_new_tokens": n, "steps": s, "eps": 1e-3, "alg": alg} for n, s in shapes]


D2F = [
    {
        **{"max_new_tokens": 48, "block_size": size, "eos_id": eos, "sampling_strategy": "default"},
        **{"tau_add": add, "tau_act": act, "tau_conf": conf},
    }
    for size in (8, 16)
    for add, act, conf, eos in ((0.1, 0.95, 0.9, 8), (0.5, 0.75, 0.7, 27), (0.9, 0.95, 0.5, 44))
]

FAST_EXTRA = (
    "last_index (factor only): the forwards (1, 2, ...) in which the rule's first failing token was the last masked "
    "one; the published code then commits that token too, the rule as published in the paper does not"
)
FAST_NOTES = (
    "threshold: commits conf >= threshold and the most confident one; softmax in float64",
    "factor: first n with c_n < 1 - factor / (n + 1) stops, n - 1 are committed; a stop at the last masked token "
    "commits all of them (see extra)",
    "steps matters for the quota configurations and, in the dual-cache loop, as a cap on the forwards of a block: "
    "with a threshold or factor the traces use steps = gen_length, so that the cap is never reached",
)
PROPHET_EXTRA = (
    "exit: the global step (1, 2, ...) whose logits filled everything, null if none; answer: canvas columns of the "
    "gap; pinned: [canvas column, token]"
)
PROPHET_NOTES = (
    "quotas of a block count the masks left after pinning: a block with fewer masks than steps spends its last steps "
    "without a commit, and these count as steps and are checked for the exit like the others",
)
NOISE = "torch.rand was replaced by unmask.decode.noise.uniform(seed, step, column): step = forwards before this one"
DREAM_NOTES = ("transfers n = int(float32(masks) * (1 - s / t)) with float32 timesteps: a step may transfer nothing",)
D2F_NOTES = (
    "the end-of-sequence id is hard-coded (126081) in the published method: its compiled constant became eos_id",
    "the output is shorter than max_new_tokens where no further block was appended after EOS",
)

METHODS = [
    Method("llada_low_confidence", "llada", "generate", llada, _grid(LLADA, remasking="low_confidence")),
    Method("llada_random", "llada", "generate", llada, _grid(LLADA, remasking="random"), notes=(NOISE,)),
    *(
        Method(f"fast_dllm_{cache}", "fast-dllm", loop, fast_dllm, _fast(cache), extra=FAST_EXTRA, notes=FAST_NOTES)
        for cache, loop in LOOPS.items()
    ),
    Method("prophet", "prophet", "generate", prophet, PROPHET, extra=PROPHET_EXTRA, notes=PROPHET_NOTES),
    *(
        Method(f"dream_{alg}", "dream", "DreamGenerationMixin._sample", dream, _dream(alg), "dream", notes=DREAM_NOTES)
        for alg in ("maskgit_plus", "topk_margin", "entropy")
    ),
    Method(
        "dream_origin", "dream", "DreamGenerationMixin._sample", dream, _dream("origin"), "dream",
        notes=(NOISE + "; one number a masked cell",),
    ),
    Method("d2f", "d2f", "DreamLoRA._generate_block_single", d2f, D2F, "d2f", notes=D2F_NOTES),
]  # fmt: skip
