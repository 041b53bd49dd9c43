"""A tiny random network with two faces: `unmask.models.Transformer`, and the call that published loops use.

Both faces run the same weights in float64, so a published loop and our loop may be compared token for token. The mask
token can never be predicted: `Face` returns its logit as -inf, which is what banning the mask id means on our side.
The weights are uniform numbers of numpy's frozen Mersenne twister: the same bits on every platform, in every version,
so that float64 leaves no room for a near tie to fall the other way elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer

VOCAB, MASK = 61, 60
SEED = 11
GAIN = 2.6  # matrices have variance (GAIN^2 / fan-in)
HEAD = 4.5  # the head has variance (HEAD^2 / fan-in): confidences spread over 0.2 .. 0.99
QUIET = 0.1  # the mask token's embedding is this small: what a masked cell predicts depends on its surroundings
CONFIG = ModelConfig(VOCAB, d_model=32, layers=2, heads=2, ff=64, max_positions=256, mask_id=MASK, family="toy")


BLOCKED = {
    "d2f": Layout("block", size=1),
    "d2f-dream": Layout("block", size=1),
    "absolute": Layout("block", size=1, grid="absolute", prompt="blocks"),
    "absolute-shifted": Layout("block", size=1, grid="absolute", prompt="blocks"),
}
"""Block-causal kinds: from the prompt's end on, or in absolute blocks that the prompt has too."""
SHIFTED = ("dream", "d2f-dream", "absolute-shifted")
"""Kinds that predict a cell at the one before it."""


def config(kind: str = "llada", block: int = 0, eos: int | None = None) -> ModelConfig:
    """The toy as `llada` (full attention), `dream` (the same, shifted logits) or one of the block-causal kinds."""
    made = replace(CONFIG, shift=kind in SHIFTED, eos_ids=() if eos is None else (eos,))
    return replace(made, layout=replace(BLOCKED[kind], size=block)) if kind in BLOCKED else made


def network(kind: str = "llada", block: int = 0) -> Transformer:
    """The same random weights for every kind, float64."""
    model = Transformer(config(kind, block)).double().eval().requires_grad_(False)
    draw = np.random.RandomState(SEED)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            gain = HEAD if name.startswith("head") else GAIN
            std = 1.0 if name.startswith("embed") else gain / p.shape[1] ** 0.5
            p.copy_(torch.from_numpy((draw.random_sample(tuple(p.shape)) - 0.5) * 12**0.5 * std))
    model.embed.weight[MASK] *= QUIET
    return model


def describe() -> dict[str, Any]:
    """The toy, for a trace's provenance; `fingerprint` is the logits' absolute sum on one fixed row: it tells drift."""
    row = torch.arange(24)[None] * 7 % VOCAB
    total = network()(row).abs().sum().item()
    shape = {k: getattr(CONFIG, k) for k in ("vocab_size", "d_model", "layers", "heads", "ff", "max_positions")}
    scales = {"seed": SEED, "gain": GAIN, "head": HEAD, "quiet": QUIET}
    return {**shape, **scales, "mask_id": MASK, "dtype": "float64", "fingerprint": round(total, 9)}


@dataclass
class _Cache:
    """Keys and values as published loops hold them: a list of (k, v) [B, H, L, D] a layer; `kv` of our transformer."""

    past: list[tuple[Tensor, Tensor]] | None
    at: Tensor | None  # positions to overwrite; None appends
    keep: int | None  # positions of the result to hand back; None keeps all

    def __post_init__(self) -> None:
        self.present: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.past is not None:
            old_k, old_v = self.past[layer]
            if self.at is None:
                k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            else:
                k, v = old_k.index_copy(2, self.at, k), old_v.index_copy(2, self.at, v)
        self.present.append((k[:, :, : self.keep], v[:, :, : self.keep]))
        return k, v


class Face:
    """What published loops call, batch 1: `model(x, ...).logits`, `.past_key_values`; counts forwards, keeps history.

    `past_key_values` is a list of (k, v) [B, H, L, D] a layer. New positions follow it, or go where `replace_position`
    [1, L] is set; `attention_bias` [1, 1, Q, K] is 0 or -inf; `update_kvcache` positions are handed back.
    """

    device = torch.device("cpu")

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forget the run: call it before each prompt."""
        self.calls = 0
        self.computed = 0  # positions, over all calls
        self.masked: Tensor = torch.zeros(0, dtype=torch.long)  # masked columns of the latest input
        self.seen: dict[int, int] = {}  # column -> the last forward (1, 2, ...) that saw it masked

    def eval(self) -> Face:
        return self

    def __call__(
        self,
        x: Tensor,
        attention_mask: Any = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
        attention_bias: Tensor | None = None,
        update_kvcache: int | None = None,
    ) -> SimpleNamespace:
        past = past_key_values
        start = 0 if past is None else past[0][0].shape[2]
        at = None if replace_position is None else replace_position[0].nonzero()[:, 0]
        index = torch.arange(start, start + x.shape[1]) if at is None else at
        self._record(x, index)
        cache = _Cache(past, at, update_kvcache)
        visible = None if attention_bias is None else attention_bias == 0
        logits = self.model(x, index[None], kv=cache, visible=visible)  # type: ignore[arg-type]
        logits[..., MASK] = -torch.inf
        return SimpleNamespace(logits=logits, past_key_values=cache.present)

    def _record(self, x: Tensor, index: Tensor) -> None:
        self.calls += 1
        self.computed += x.numel()
        self.masked = index[x[0] == MASK]
        for column in self.masked.tolist():
            self.seen[column] = self.calls


class ShiftedFace(Face):
    """Dream's call: `model(x, attention_mask, tok_idx)`. The loop itself shifts the logits."""

    def __call__(self, x: Tensor, attention_mask: Any = None, tok_idx: Tensor | None = None) -> SimpleNamespace:  # type: ignore[override]
        assert attention_mask in (None, "full") and tok_idx is None
        return super().__call__(x)


def born(face: Face, prompt: int, length: int) -> list[int]:
    """The forward (1, 2, ...) after which each generated cell was decided; 0 for a cell that was never masked."""
    return [face.seen.get(column, 0) for column in range(prompt, prompt + length)]
