"""What is recorded: every trace with its configurations, in the published loops' own parameter names."""

from __future__ import annotations

from typing import Any

from golden import serial
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

NEVER = -1
"""No token's id: nothing ends a text."""


def _sdar(strategy: str, rows: list[tuple[int, int, int, int]], **more: Any) -> list[Config]:
    """Configurations from (gen_length, block_length, denoising_steps, eos_id)."""
    names = ("gen_length", "block_length", "denoising_steps", "eos_id")
    return [{**dict(zip(names, row, strict=True)), "remasking_strategy": strategy, **more} for row in rows]


SDAR = [
    *_sdar("low_confidence_dynamic", [(32, 4, 4, 8), (30, 8, 8, NEVER)], confidence_threshold=0.85),
    *_sdar("low_confidence_dynamic", [(30, 8, 6, 27), (32, 4, 2, NEVER)], confidence_threshold=0.98),
]
SDAR_STATIC = [
    *_sdar("low_confidence_static", [(32, 4, 4, NEVER), (32, 8, 4, 44), (32, 8, 3, 27)]),
    *_sdar("sequential", [(32, 4, 2, NEVER), (30, 8, 3, 8)]),
]


def _llada2(rows: list[tuple[int, int, float, int]], **more: Any) -> list[Config]:
    """Configurations from (gen_length, block_length, threshold, eos_id)."""
    names = ("gen_length", "block_length", "threshold", "eos_id")
    return [{**dict(zip(names, row, strict=True)), **more} for row in rows]


LLADA2 = [
    *_llada2([(32, 8, 0.95, NEVER), (30, 16, 0.6, 8)], steps=16, eos_early_stop=False, minimal_topk=1),
    *_llada2([(32, 8, 0.8, 27), (48, 16, 0.7, 44)], steps=6, eos_early_stop=True, minimal_topk=1),
    *_llada2([(30, 8, 0.9, NEVER)], steps=32, eos_early_stop=False, minimal_topk=10),
]
LLADA21 = [
    *_llada2([(32, 8, 0.7, NEVER), (30, 8, 0.95, 8)], editing_threshold=0.9, max_post_steps=16, eos_early_stop=False),
    *_llada2([(32, 8, 0.5, 27), (32, 16, 0.5, 44)], editing_threshold=0.7, max_post_steps=16, eos_early_stop=True),
]


def _v2(cache: bool, rows: list[tuple[int, int, int, float, int]]) -> list[Config]:
    """Configurations from (gen_length, block_length, small_block_size, threshold, eos_id)."""
    names = ("gen_length", "block_length", "small_block_size", "threshold", "eos_id")
    return [{**dict(zip(names, row, strict=True)), "use_block_cache": cache} for row in rows]


V2 = [(32, 8, 4, 0.9, NEVER), (48, 16, 4, 0.6, 8), (32, 16, 8, 0.8, 27), (32, 8, 8, 0.6, 44)]

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
CUT = ("the response is recorded up to its first end of sequence, that included",)
STRUCK = (
    "struck: the forwards that overwrote decided cells of the block, prompt cells among them",
    "struck: the forwards at which a block had been run max_post_steps times over when full (LLaDA2.1); [0] where the "
    "prompt holds the end of sequence that the early stop looks for (LLaDA2.0)",
    "struck: [0] where the prompt is exactly one block, which the loop does not read",
)
SDAR_NOTES = (
    *CUT,
    "tokens are drawn and there is no temperature 0: torch.multinomial returned the likeliest token",
    "the last block is filled up beyond gen_length",
)
V2_NOTES = (
    *CUT,
    "born is 0 for a cell that the pass storing the block before it decided, as for cells never masked",
    "a response that ends in the block its prompt begins in fails at len(None), which was taken as 0",
    "gen_length is rounded down to whole blocks, counted from the last boundary in the prompt",
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
    Method(
        "d2f_dream", "d2f-dream", "DreamLoRA._generate_block_single", serial.d2f_dream, D2F, "d2f-dream",
        notes=D2F_NOTES[1:],
    ),
    *(
        Method(name, "sdar", "block_diffusion_generate", serial.sdar, configs, "absolute", STRUCK[0], SDAR_NOTES)
        for name, configs in (("sdar", SDAR), ("sdar_static", SDAR_STATIC))
    ),
    Method("llada2", "llada2", "LLaDA2MoeModelLM.generate", serial.llada2, LLADA2, "absolute", STRUCK[1], CUT),
    Method("llada21", "llada21", "LLaDA2MoeModelLM.generate", serial.llada2, LLADA21, "absolute", STRUCK[1], CUT),
    *(
        Method(
            name, "fast-dllm-v2", "Fast_dLLM_QwenForCausalLM.batch_sample", serial.fast_dllm_v2, _v2(cache, V2),
            "absolute-shifted", STRUCK[2], V2_NOTES,
        )
        for name, cache in (("fast_dllm_v2", False), ("fast_dllm_v2_cache", True))
    ),
]  # fmt: skip
