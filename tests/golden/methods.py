"""Run each published loop on the toy: a function a method, (module, face, prompt, config, seed) -> (canvas, extra)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from golden import published, toy
from unmask.decode.noise import uniform

Config = dict[str, Any]


class Run(Protocol):
    """Decode one prompt [1, P]: the whole canvas [1, P + G] and what else is to be recorded."""

    def __call__(self, module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple: ...


@contextmanager
def our_noise(face: Any, seed: int) -> Iterator[None]:
    """`torch.rand` returns uniform(seed, step, column) meanwhile: step = forwards so far - 1, column = on the canvas.

    A request of one number a masked cell gets the numbers of those columns, any other request those of all columns.
    """

    def rand(*size: Any, **options: Any) -> Tensor:
        shape = tuple(size[0]) if isinstance(size[0], tuple | list | torch.Size) else size
        column = face.masked if len(shape) == 1 else torch.arange(shape[-1])
        numbers = uniform(torch.tensor([[seed]]), torch.tensor([[face.calls - 1]]), column).view(shape)
        assert numbers.unique().numel() == numbers.numel(), "two equal numbers: take another seed"
        return numbers

    with patch.object(torch, "rand", rand):
        yield


def llada(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    with our_noise(face, seed):
        return module.generate(face, prompt, mask_id=toy.MASK, **config), {}


LOOPS = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


def fast_dllm(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """`cache` in the config names the function; `last_index` = forwards in which the factor rule hit its bug."""
    options = dict(config)
    run = getattr(module, LOOPS[options.pop("cache")])
    if not hasattr(module, "get_transfer_index_dynamic"):
        raise SystemExit("fast-dllm: this version has no factor rule; take one of 2025-08-22 or later")
    hits: list[int] = []
    pick = module.get_transfer_index_dynamic

    def watched(logits: Tensor, temperature: float, remasking: str, masked: Tensor, *rest: Any) -> Any:
        score = logits[0].double().softmax(-1).amax(-1)[masked[0]].sort(descending=True).values
        rank = torch.arange(1, len(score) + 1)
        fails = (score < 1 - rest[-1] / (rank + 1)) & (rank > 1)
        if len(score) > 1 and fails[-1] and not fails[:-1].any():
            hits.append(face.calls)
        return pick(logits, temperature, remasking, masked, *rest)

    with patch.object(module, "get_transfer_index_dynamic", watched):
        canvas, forwards = run(face, prompt, mask_id=toy.MASK, **options)
    assert forwards == face.calls
    return canvas, {"last_index": hits} if options.get("factor") is not None else {}


def prophet(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """Constraints and answer start are relative to the prompt's end in the config, absolute for the published loop."""
    options = {k: config[k] for k in ("gen_length", "block_length", "steps", "early_exit_thresholds")}
    pinned = {int(k): v for k, v in config["constraints"].items()}
    start = prompt.shape[1] + config["answer_start"]
    with redirect_stdout(io.StringIO()):
        canvas, data = module.generate(
            face, prompt, mask_id=toy.MASK, constraints=pinned, analyze_gap=True, answer_start_pos=start, **options
        )
    exits = data["exit_info"]["exit_decision_step"]
    region = list(range(start, min(canvas.shape[1], start + 5)))
    pins = [[prompt.shape[1] + k, v] for k, v in pinned.items()]
    return canvas, {"exit": exits, "answer": region, "pinned": pins}


def dream(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    options = SimpleNamespace(
        **config, mask_token_id=toy.MASK, max_length=prompt.shape[1] + config["max_new_tokens"], temperature=0.0,
        top_p=None, top_k=None, alg_temp=None, output_history=False, return_dict_in_generate=False,
    )  # fmt: skip
    with our_noise(face, seed), torch.no_grad():
        canvas = module.DreamGenerationMixin._sample(
            face, prompt, None, options, lambda step, x, logits: x, lambda step, x, logits: logits
        )
    return canvas, {}


def d2f(module: ModuleType, face: Any, prompt: Tensor, config: Config, seed: int) -> tuple:
    """The block loop as a plain function: `self` is a namespace, the hard-coded EOS id becomes the config's."""
    loop = published.with_constant(module.DreamLoRA._generate_block_single, 126081, config["eos_id"])
    own = SimpleNamespace(
        model=face, device=face.device, mask_token_id=toy.MASK, target_dtype=torch.float64, temperature=0.0,
        top_p=None, top_k=None, sampling_strategy=config["sampling_strategy"], max_length=prompt.shape[1] + 64,
        block_size=config["block_size"], max_new_tokens=config["max_new_tokens"], skip_threshold=config["tau_conf"],
        block_add_threshold=config["tau_add"], decoded_token_threshold=config["tau_act"],
        tokenizer=SimpleNamespace(decode=lambda *a, **k: ""),
    )  # fmt: skip
    own._update_block_completion_states = lambda *a: module.DreamLoRA._update_block_completion_states(own, *a)
    cells = loop(own, prompt)
    return torch.cat([prompt, torch.tensor([cells])], 1), {}


@dataclass(frozen=True)
class Method:
    """A trace to make: the loop, the network it runs on and its configurations."""

    name: str
    repo: str
    function: str
    run: Run
    configs: list[Config]
    kind: str = "llada"
    extra: str = ""
    notes: tuple[str, ...] = ()
