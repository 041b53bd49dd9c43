"""Run the published loops of block-causal models on the toy: SDAR, LLaDA2, Fast-dLLM v2, and D2F on Dream.

`extra["struck"]` of SDAR, LLaDA2.1 and Fast-dLLM v2 names the forwards in which a known fault of the published loop
changed what it wrote; the README of this folder says which. Responses are recorded up to their first end of sequence.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from golden import toy

Config = dict[str, Any]
Pairs = list[tuple[Tensor, Tensor]]


def ended(canvas: Tensor, prompt: Tensor, config: Config, length: int) -> Tensor:
    """The canvas [1, L] up to the response's first end of sequence, or to `length` cells of it."""
    start = prompt.shape[1]
    hit = (canvas[0, start : start + length] == config["eos_id"]).nonzero()
    return canvas[:, : start + (int(hit[0]) + 1 if len(hit) else length)]


def whole(prompt: Tensor, config: Config) -> int:
    """The response's cells where its last block is filled up, the blocks being absolute."""
    size, start = config["block_length"], prompt.shape[1]
    return -(-(start + config["gen_length"]) // size) * size - start


def bias(seen: Tensor) -> Tensor:
    """0 where a key is seen, else -inf: [1, 1, Q, K]."""
    return torch.zeros(1, 1, *seen.shape[-2:], dtype=torch.float64).masked_fill(~seen.bool(), -torch.inf)


class Store:
    """What SDAR keeps keys and values in."""

    def __init__(self) -> None:
        self.pairs: Pairs | None = None


def sdar(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """It draws its tokens and has no temperature 0: `torch.multinomial` returns the likeliest one meanwhile."""
    latest: list[Any] = [None, torch.zeros(0)]
    struck: list[int] = []

    class Model:
        device = face.device
        eval = staticmethod(lambda: None)

        def __call__(
            self, x: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Store, **how: Any
        ) -> Any:
            start, before = int(position_ids[0, 0]), latest[1]
            if latest[0] == start and ((before != toy.MASK) & (x != before)).any():
                struck.append(face.calls)
            latest[:] = [start, x.clone()]
            out = face(x, past_key_values=past_key_values.pairs, attention_bias=bias(attention_mask[0]))
            if how["store_kv"]:
                past_key_values.pairs = out.past_key_values
            return out

    names = ("gen_length", "block_length", "denoising_steps", "remasking_strategy", "confidence_threshold")
    options = {name: config[name] for name in names if name in config}
    with (
        patch.object(module, "DynamicCache", Store),
        patch.object(torch, "multinomial", lambda p, num_samples: p.argmax(-1, keepdim=True)),
    ):
        canvas = module.block_diffusion_generate(
            Model(), {"input_ids": prompt}, toy.MASK, stopping_criteria_idx=[config["eos_id"]], **options
        )
    canvas = torch.cat([prompt, canvas[:, prompt.shape[1] :]], 1)  # a fault of the loop may have written over it
    return ended(canvas, prompt, config, whole(prompt, config)), {"struck": struck}


def llada2(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """`generate` as a plain function. Struck where a block was left for its number of passes alone (LLaDA2.1), or where
    the early stop (LLaDA2.0) took an end of sequence in the prompt for the response's.
    """
    struck = [0] if "steps" in config and config["eos_early_stop"] and config["eos_id"] in prompt[0] else []
    full: dict[int, int] = {}
    most = config.get("max_post_steps")

    def forward(x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        out = face(x, attention_bias=attention_mask)
        if most and not (x == toy.MASK).any():
            full[x.shape[1]] = full.get(x.shape[1], 0) + 1
            if full[x.shape[1]] == most:
                struck.append(face.calls)
        return out

    model = module.LLaDA2MoeModelLM
    own = SimpleNamespace(device=face.device, forward=forward, _get_num_transfer_tokens=model._get_num_transfer_tokens)
    own._sample_with_temperature_topk_topp = lambda *a, **k: model._sample_with_temperature_topk_topp(own, *a, **k)
    cells = model.generate(own, inputs=prompt, mask_id=toy.MASK, **config)
    return torch.cat([prompt, cells], 1), {"struck": struck}


class Kept:
    """What Fast-dLLM v2 keeps keys and values in."""

    def __init__(self, pairs: Pairs) -> None:
        self.key_cache, self.value_cache = [k for k, _ in pairs], [v for _, v in pairs]

    def __len__(self) -> int:
        return len(self.key_cache)

    def pairs(self) -> Pairs:
        return list(zip(self.key_cache, self.value_cache, strict=True))


def fast_dllm_v2_model(face: Any, size: int) -> Callable[..., Any]:
    """The call of its modelling code: blocks over stored ones, a cache of the block, part of it overwritten."""

    def forward(
        input_ids: Tensor,
        past_key_values: Kept | None = None,
        update_past_key_values: bool = False,
        block_past_key_values: Pairs | None = None,
        replace_position: int | None = None,
        **how: Any,
    ) -> Any:
        past = past_key_values.pairs() if past_key_values is not None else None
        start = past[0][0].shape[2] if past else 0
        if block_past_key_values is None:
            block = torch.arange(input_ids.shape[1]) // size
            seen = None if past else bias(block[:, None] >= block[None])
            out = face(input_ids, past_key_values=past, attention_bias=seen)
            block_past_key_values = [(k[:, :, start:].clone(), v[:, :, start:].clone()) for k, v in out.past_key_values]
        else:
            known = [
                (torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in _joined(past, block_past_key_values)
            ]
            assert replace_position is not None
            place = torch.zeros(1, known[0][0].shape[2], dtype=torch.bool)
            place[:, start + replace_position : start + replace_position + input_ids.shape[1]] = True
            out = face(input_ids, past_key_values=known, replace_position=place)
            for (k, v), (new_k, new_v) in zip(block_past_key_values, out.past_key_values, strict=True):
                k.copy_(new_k[:, :, start:])
                v.copy_(new_v[:, :, start:])
        stored = Kept(out.past_key_values) if update_past_key_values else past_key_values
        return SimpleNamespace(logits=out.logits, past_key_values=stored, block_past_key_values=block_past_key_values)

    return forward


def _joined(past: Pairs | None, block: Pairs) -> list[Any]:
    empty = [(k[:, :, :0], v[:, :, :0]) for k, v in block]
    return list(zip(past or empty, block, strict=True))


def likeliest(logits: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """What the modelling code does at temperature 0: (token, probabilities)."""
    return logits.argmax(-1), logits.softmax(-1)


def fast_dllm_v2(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """`batch_sample` of one row; a prompt of exactly one block is not read by it and counts as struck."""
    size, start = config["block_length"], prompt.shape[1]
    own = SimpleNamespace(device=face.device, forward=fast_dllm_v2_model(face, size), sample_with_top_p=likeliest)

    def length(value: Any) -> int:
        return 0 if value is None else builtins.len(value)

    with patch.object(module, "len", length, create=True):
        rows = module.Fast_dLLM_QwenForCausalLM.batch_sample(
            own, prompt, SimpleNamespace(pad_token_id=0), size, config["gen_length"], config["small_block_size"],
            start, torch.tensor([start]), mask_id=toy.MASK, threshold=config["threshold"], stop_token=config["eos_id"],
            use_block_cache=config["use_block_cache"],
        )  # fmt: skip
    count = (config["gen_length"] // size + start // size) * size - start
    return ended(rows[0][None], prompt, config, count), {"struck": [0] if start == size else []}


class Past(list):
    """Keys and values that know their length."""

    def get_seq_length(self) -> int:
        return self[0][0].shape[2]


class Text(list):
    """Tokens where D2F's evaluation expects their text; it keeps what stands before the end of sequence."""

    def split(self, _: str) -> list[Text]:
        return [self]


def d2f_dream(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """The block loop as a plain function: `self` is a namespace whose tokenizer hands the tokens on."""

    def model(x: Tensor, attention_mask: Tensor, past_key_values: Past | None, update_kvcache: int, **how: Any) -> Any:
        keep = update_kvcache + (past_key_values.get_seq_length() if past_key_values else 0)
        out = face(x, past_key_values=past_key_values, attention_bias=attention_mask, update_kvcache=keep)
        return SimpleNamespace(logits=out.logits, past_key_values=Past(out.past_key_values))

    model.eval = lambda: None  # type: ignore[attr-defined]
    own = SimpleNamespace(
        model=model, device=face.device, mask_token_id=toy.MASK, target_dtype=torch.float64, temperature=0.0,
        top_p=None, top_k=None, sampling_strategy=config["sampling_strategy"], max_length=prompt.shape[1] + 64,
        block_size=config["block_size"], max_new_tokens=config["max_new_tokens"], skip_threshold=config["tau_conf"],
        block_add_threshold=config["tau_add"], decoded_token_threshold=config["tau_act"], total_generated_tokens=0,
        tokenizer=SimpleNamespace(decode=Text, eos_token="", eos_token_id=config["eos_id"]),
    )  # fmt: skip
    for name in ("_update_block_completion_states", "_shift_logits", "_count_non_eos_tokens_before_truncation"):
        setattr(own, name, getattr(module.DreamLoRA, name).__get__(own))
    cells = module.DreamLoRA._generate_block_single(own, prompt)
    return torch.cat([prompt, torch.tensor([list(cells)])], 1), {}
