"""What a model is, as data: sizes, attention layout, logit shift and special ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Kind = Literal["full", "causal", "block"]
Grid = Literal["absolute", "origin"]
Prompt = Literal["bidirectional", "blocks"]
KINDS, GRIDS, PROMPTS = get_args(Kind), get_args(Grid), get_args(Prompt)


@dataclass(frozen=True)
class Layout:
    """Who sees whom. Every position has a group number; a query sees the keys whose group is not later than its own.

    `full`: one group (bidirectional). `causal`: the group is the position. `block`: groups of `size` cells counted from
    position 0 (`grid="absolute"`) or from the row's origin (`grid="origin"`, the prompt being one group before them
    unless `prompt="blocks"`).
    """

    kind: Kind = "full"
    size: int = 0
    grid: Grid = "origin"
    prompt: Prompt = "bidirectional"

    def __post_init__(self) -> None:
        for value, known in ((self.kind, KINDS), (self.grid, GRIDS), (self.prompt, PROMPTS)):
            if value not in known:
                raise ValueError(f"a layout has no {value!r}; known are {', '.join(known)}")
        if self.kind == "block" and self.size < 1:
            raise ValueError(f"a block layout needs a size of at least 1, not {self.size}")

    def groups(self, position: Tensor, origin: Tensor) -> Tensor:
        """Group numbers [B, L] for positions [B, L] (or [L]) and row origins [B]; `kind="full"` has no groups."""
        if self.kind == "causal":
            return position.expand(len(origin), -1)
        start = origin[:, None] if self.grid == "origin" else origin.new_zeros(len(origin), 1)
        group = (position - start).div(self.size, rounding_mode="floor")
        return group.clamp(min=-1) if self.prompt == "bidirectional" else group

    def visible(self, query: Tensor, key: Tensor, origin: Tensor) -> Tensor | None:
        """Which keys a query may see, [B, Q, K] bool, for positions query [B, Q] and key [B, K]; None means all."""
        if self.kind == "full":
            return None
        return self.groups(key, origin)[:, None, :] <= self.groups(query, origin)[:, :, None]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary scaling: waves longer than `original / low` positions are slowed by `factor`, those shorter than
    `original / high` are kept, and between the two the rate is interpolated (Llama 3 herd of models, 2024).
    """

    factor: float
    low: float
    high: float
    original: int

    def apply(self, frequency: Tensor) -> Tensor:
        """Scaled angular frequencies, of the shape given."""
        turns = frequency * (self.original / (2 * math.pi))
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer and the conventions its weights were trained with.

    `vocab_size` counts embedding rows; ids from `token_count` upwards are padding and never generated.
    `shift`: the logits that predict position i are read at position i - 1 (Dream and every AR model).
    """

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    ff: int
    kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    max_positions: int = 4096
    layout: Layout = Layout()
    shift: bool = False
    mask_id: int = -1
    eos_ids: tuple[int, ...] = ()
    bos_id: int = -1
    token_count: int = 0
    family: str = "unmask"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name, default in (
            ("kv_heads", self.heads),
            ("head_dim", self.d_model // self.heads),
            ("token_count", self.vocab_size),
        ):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def autoregressive(self) -> bool:
        """True for a causal model, which decodes left to right and has no mask token."""
        return self.layout.kind == "causal"
