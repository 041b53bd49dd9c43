"""What a model is, as data: sizes, attention layout, logit shift and special ids."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from unmask.errors import UserError

Kind = Literal["full", "causal", "block"]
Grid = Literal["absolute", "origin"]
Prompt = Literal["bidirectional", "blocks"]
Router = Literal["softmax", "sigmoid"]
KINDS, GRIDS, PROMPTS, ROUTERS = get_args(Kind), get_args(Grid), get_args(Prompt), get_args(Router)


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
                raise ValueError(f"a layout has no {value!r:.80}; known are {', '.join(known)}")
        if type(self.size) is not int:
            raise ValueError(f"the size of a layout's blocks must be a whole number, not {self.size!r:.80}")
        if self.kind == "block" and self.size < 1:
            raise ValueError(f"a block layout needs a size of at least 1, not {self.size}")

    def groups(self, position: Tensor, origin: Tensor) -> Tensor:
        """Group numbers [B, L] for positions [B, L] (or [L]) and row origins [B]."""
        position = position.expand(len(origin), -1)
        if self.kind != "block":
            return position if self.kind == "causal" else torch.zeros_like(position)
        start = origin[:, None] if self.grid == "origin" else origin.new_zeros(len(origin), 1)
        group = (position - start).div(self.size, rounding_mode="floor")
        return torch.where(position < origin[:, None], -1, group) if self.prompt == "bidirectional" else group

    def visible(self, query: Tensor, key: Tensor, origin: Tensor) -> Tensor | None:
        """Which keys a query may see, [B, Q, K] bool, for positions query [B, Q] and key [B, K]; None means all."""
        if self.kind == "full":
            return None
        return self.groups(key, origin)[:, None, :] <= self.groups(query, origin)[:, :, None]

    def duplicated(self, position: Tensor, origin: Tensor) -> Tensor:
        """Who sees whom, [B, 2L, 2L] bool, where a text stands twice, [noisy | clean], at positions [B, L].

        A noisy cell sees the noisy cells of its own group and the clean ones of earlier groups; a clean cell sees the
        clean cells that `visible` names (BD3-LM, Arriola et al. 2025, section 3.1; also SDAR and Fast-dLLM v2).
        """
        group = self.groups(position, origin)
        own, other = group[:, :, None], group[:, None, :]
        noisy = torch.cat([other == own, other < own], 2)
        return torch.cat([noisy, torch.cat([torch.zeros_like(noisy[..., : group.shape[1]]), other <= own], 2)], 1)

    def resized(self, size: int) -> Layout:
        """The same layout in blocks of `size` cells, which may be a multiple or a part of those trained (UserError)."""
        if self.kind != "block" or size == self.size:
            return self
        if size % self.size and self.size % size:
            raise UserError(
                f"this model attends in blocks of {self.size} cells; a block may be a multiple or a part of that, not "
                f"{size}"
            )
        return replace(self, size=size)


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
class Experts:
    """A mixture of `count` experts of width `ff` in place of the MLP of every layer but the first `dense`.

    A token goes through the `top` experts of the highest score, which weigh in with their scores, made to sum to 1 if
    `normalise`, times `scale`. `bias`: a number per expert that is added for the choice alone. With `groups` of equally
    many experts, only those of the `top_groups` groups are chosen among whose two best scores have the largest sum
    (DeepSeek-V3, 2024). `shared`: width of an expert that every token goes through as well; 0 is none.
    """

    count: int
    top: int
    ff: int
    shared: int = 0
    dense: int = 0
    router: Router = "softmax"
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    normalise: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(f"there is no router {self.router!r}; known are {', '.join(ROUTERS)}")
        if min(self.count, self.top, self.ff, self.groups, self.top_groups) < 1 or min(self.shared, self.dense) < 0:
            raise ValueError("the numbers of experts, groups and their widths must be positive")
        if self.count % self.groups or (self.groups > 1 and self.count < 2 * self.groups):
            raise ValueError(f"{self.count} experts do not make {self.groups} groups of at least two")
        if self.top_groups > self.groups or self.top > self.count // self.groups * self.top_groups:
            raise ValueError(
                f"{self.top} experts of {self.top_groups} groups cannot be chosen among {self.count} in {self.groups}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer and the conventions its weights were trained with.

    `vocab_size` counts embedding rows; ids from `token_count` upwards are padding and never generated.
    `shift`: the logits that predict position i are read at position i - 1 (Dream and every AR model).
    `rotary`: how many dimensions of a head are rotated, the first ones; 0 is all.
    `in_flight`: trained on noisy earlier blocks, so that several may be written at once (D2F); other models that attend
    in blocks saw them decided.
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
    rotary: int = 0
    experts: Experts | None = None
    in_flight: bool = False

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
