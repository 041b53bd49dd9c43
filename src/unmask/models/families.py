"""Configurations of checkpoints, read by the tables of the families, and where each stored tensor goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from math import inf, prod
from pathlib import Path
from typing import Any, TypeVar

from unmask.errors import UserError, suggest
from unmask.models.config import Experts, Layout, ModelConfig, RopeScaling
from unmask.models.tables import FAMILIES, Family

Json = Mapping[str, Any]
Part = TypeVar("Part", Layout, RopeScaling, Experts)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor of `shape` goes: into the rows of one of our parameters, from row `first`."""

    parameter: str
    first: int
    shape: tuple[int, ...]


OWN = "UnmaskTransformer"
IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)$")
HEADS = {"lm_head.weight", "model.transformer.ff_out.weight", "head.weight"}
POSITIVE = {
    *("vocab_size", "d_model", "layers", "heads", "ff", "kv_heads"),
    *("head_dim", "max_positions", "token_count", "original"),
    *("count", "top", "groups", "top_groups"),
}
COUNTS = {"rotary", "shared", "dense", "size"}
NUMBERS = {"rope_theta", "norm_eps", "factor", "low", "high", "scale"}
FLAGS = {"qkv_bias", "qk_norm", "tied", "shift", "bias", "normalise", "in_flight"}
LIMITS = {"layers": 4096, "max_positions": 1 << 22, "count": 4096, "size": 1 << 22}
"""What is built before the weights are compared with it must not exhaust the machine."""
OPTIONAL = {
    **{"kv_heads": 0, "head_dim": 0, "max_positions": 4096, "norm_eps": 1e-6},
    **{"tied": False, "qkv_bias": False, "qk_norm": False},
    **{"shared": 0, "dense": 0, "groups": 1, "top_groups": 1, "scale": 1.0},
}


def supported() -> str:
    """The architectures that can be loaded, for people."""
    return ", ".join(dict.fromkeys([*(name for f in FAMILIES for name in f.architectures), OWN]))


def config_of(raw: Json, generation: Json, where: str | Path, *, family: str = "", block: int = 0) -> ModelConfig:
    """Read config.json (`raw`) and generation_config.json into a ModelConfig; UserError for what we cannot run.

    `family`: which of the families that share an architecture it is; the first if empty. `block`: size of the
    attention's blocks, for a model that attends in blocks: that trained, a multiple or a part of it.
    """
    if family and family not in (known := [f.name for f in FAMILIES]):
        raise suggest(family, known, "family")
    try:
        said = raw.get("architectures") or guessed(raw)
        fitting = [f for f in FAMILIES if set(f.architectures) & set(said) and family in ("", f.name)]
        if OWN in said and not family:
            return resized(own_config(raw), block)
        if fitting:
            return resized(published_config(fitting[0], raw, generation, block), block)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: config.json: {error}") from error
    named = ", ".join(map(str, said)) or raw.get("model_type") or "not named in config.json"
    if family:
        raise UserError(f"{where}: architecture {named} is not of family {family!r}; leave family out")
    raise UserError(f"{where}: architecture {named} is not supported; supported are {supported()}")


def guessed(raw: Json) -> list[str]:
    """Architectures of the families of a `model_type`, the one first that most of the keys belong to."""
    fitting = [f for f in FAMILIES if raw.get("model_type") in (f.model_type, f.name)]
    lacking = {f.name: sum(not any(k in raw for k in keys.split("|")) for keys in f.keys.values()) for f in fitting}
    return [name for f in sorted(fitting, key=lambda f: lacking[f.name])[:1] for name in f.architectures]


def resized(config: ModelConfig, block: int) -> ModelConfig:
    """The config with its attention's blocks of another size (0: as they are)."""
    if not block:
        return config
    positive(block, "block")
    if config.layout.kind != "block":
        raise UserError(f"this model's attention is {config.layout.kind}, not in blocks; leave block out")
    return replace(config, layout=config.layout.resized(block))


def own_config(raw: Json) -> ModelConfig:
    """Our own format: the fields of ModelConfig as they are."""
    known = {f.name for f in fields(ModelConfig)}
    values = {k: v for k, v in raw.items() if k != "architectures"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown key {', '.join(unknown)}; a newer version of unmask may have written it")
    for key in ("vocab_size", "d_model", "layers", "heads", "ff"):
        positive(values.get(key), key)
    scaling, experts = values.get("rope_scaling"), values.get("experts")
    values["layout"] = part_of(Layout, values.get("layout", {}), "layout")
    values["rope_scaling"] = None if scaling is None else part_of(RopeScaling, scaling, "rope_scaling")
    values["experts"] = None if experts is None else part_of(Experts, experts, "experts")
    values["eos_ids"] = tuple(values.get("eos_ids", ()))
    return checked(ModelConfig(**values))


def part_of(kind: type[Part], said: Any, key: str) -> Part:
    """A record inside a configuration; UserError, with its `key`, for what is none, and for an unknown key in it."""
    if not isinstance(said, Mapping):
        raise UserError(f"{key} must be an object, not {said!r:.80}")
    if unknown := sorted(set(said) - {f.name for f in fields(kind)}):
        raise UserError(f"unknown key {', '.join(unknown)} in {key}; a newer version of unmask may have written it")
    if absent := [f.name for f in fields(kind) if f.default is MISSING and f.name not in said]:
        raise UserError(f"{key} lacks {', '.join(absent)}")
    return kind(**said)


def published_config(family: Family, raw: Json, generation: Json, block: int = 0) -> ModelConfig:
    """A family's config.json: sizes by its key table, ids by what the files say and the family knows."""
    for key, values in family.required.items():
        if key in raw and raw[key] not in values:
            raise UserError(f"{key} is {raw[key]!r}; {family.architectures[0]} is supported with {values[0]!r} only")
    if raw.get("quantization_config"):
        raise UserError("quantized weights are not supported; use the checkpoint they were made from")
    sizes = {ours: size_of(raw, ours, keys) for ours, keys in family.keys.items() if ours != "rotary"}
    vocabulary = sizes["vocab_size"]
    theta, scaling = rope_of(raw)
    mask = raw.get("mask_token_id")
    mask = family.mask_id if mask is None else mask
    if "layout" not in family.fixed and not 0 <= mask < vocabulary:
        raise UserError(f"mask_token_id {mask} is outside the vocabulary of {vocabulary}")
    ends = [*ids(raw.get("eos_token_id")), *ids(generation.get("eos_token_id")), *family.stops]
    starts = [*ids(raw.get("bos_token_id")), *ids(generation.get("bos_token_id"))]
    config = ModelConfig(
        **{**sizes, **family.fixed},
        rope_theta=theta,
        rope_scaling=scaling,
        experts=experts_of(family, raw),
        mask_id=mask,
        eos_ids=tuple(dict.fromkeys(i for i in ends if 0 <= i < vocabulary)),
        bos_id=next((i for i in starts if 0 <= i < vocabulary), -1),
        token_count=min(vocabulary, raw.get("vocab_size") or vocabulary),
        family=family.name,
    )
    rotary = rotary_of(raw, family, config.head_dim)
    return checked(replace(config, rotary=rotary, layout=layout_of(raw, family, block) or config.layout))


def layout_of(raw: Json, family: Family, block: int) -> Layout | None:
    """The layout of a family that attends in blocks, counted from position 0, the prompt being in blocks as well."""
    if family.block is None:
        return None
    key, default = family.block
    size = default or block if raw.get(key) is None else positive(raw[key], key)
    if not size:
        raise UserError(f"{key}, the size of the attention's blocks, is missing; give it as block")
    return Layout("block", size, grid="absolute", prompt="blocks")


def rotary_of(raw: Json, family: Family, head_dim: int) -> int:
    """How many dimensions of a head are rotated; 0 is all."""
    share = raw.get(family.keys.get("rotary", ""))
    if share is None or share == 1:
        return 0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"{family.keys['rotary']} must be a number above 0 and at most 1, not {share!r}")
    return int(head_dim * share)


def experts_of(family: Family, raw: Json) -> Experts | None:
    """The mixture of experts, for a family that has one."""
    if not family.experts:
        return None
    found = {ours: size_of(raw, ours, keys) for ours, keys in family.experts.items()}
    fixed = dict(family.routing)
    if "normalise" in fixed:
        fixed["normalise"] = found["top"] > 1
    return Experts(**found, **fixed)


def size_of(raw: Json, ours: str, keys: str) -> Any:
    """One size by its published key (alternatives separated by "|", factors by "*"); optional ones have a default."""
    key = keys.partition("|")[0]
    found = [k for k in keys.split("|") if all(raw.get(part) is not None for part in k.split("*"))]
    if not found and ours in OPTIONAL:
        return OPTIONAL[ours]
    values: list[Any] = [raw[part] for part in found[0].split("*")] if found else [None]
    if ours in FLAGS:
        return bool(values[0])
    if ours in NUMBERS:
        return float(values[0])
    if ours == "dense" and isinstance(values[0], list):
        return leading(values[0], key)
    if ours in COUNTS and 0 in values:
        return 0
    return prod(positive(value, key) for value in values)


def leading(kinds: list[Any], key: str) -> int:
    """How many layers are dense, from a list of 0 (dense) and 1 (experts) a layer; they must be the first ones."""
    count = kinds.index(1) if 1 in kinds else len(kinds)
    if kinds != [0] * count + [1] * (len(kinds) - count):
        raise UserError(f"{key} is {kinds!r:.80}; dense layers are supported before all layers of experts only")
    return count


def positive(value: Any, key: str) -> int:
    """A size as a positive integer, or UserError with its key."""
    if value is None:
        raise UserError(f"{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} must be a positive integer, not {value!r}")
    return value


def rope_of(raw: Json) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which newer files have."""
    said = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(said.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rope scaling {kind!r} is not supported; supported are default and llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if absent := [k for k in keys if k not in said]:
        raise UserError(f"rope scaling llama3 lacks {', '.join(absent)}")
    factor, low, high, original = (said[k] for k in keys)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def ids(value: Any) -> list[int]:
    """Token ids that a configuration gives as a number, a list or nothing."""
    return [] if value is None else [int(i) for i in value] if isinstance(value, list) else [int(value)]


def checked(config: ModelConfig) -> ModelConfig:
    """The config, if a transformer can be built of it; UserError otherwise."""
    for part in parts_of(config):
        for f in fields(part):
            check_number(f.name, getattr(part, f.name))
    if not all(type(i) is int and i < config.vocab_size for i in (config.mask_id, config.bos_id, *config.eos_ids)):
        raise UserError(f"special ids must be integers within the vocabulary of {config.vocab_size}")
    if config.head_dim % 2 or config.rotary % 2 or config.rotary > config.head_dim:
        some = f"{config.rotary} of " if config.rotary else ""
        raise UserError(f"a head cannot be rotated in {some}{config.head_dim} dimensions; they must be even and fit")
    if not config.head_dim * config.heads:
        raise UserError(f"d_model {config.d_model} is too small for {config.heads} heads")
    return config


def check_number(name: str, value: Any) -> None:
    """UserError if a field of this name cannot hold the value."""
    if name in POSITIVE:
        positive(value, name)
    elif name in COUNTS and (type(value) is not int or value < 0):
        raise UserError(f"{name} must be an integer of at least 0, not {value!r}")
    elif name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf):
        raise UserError(f"{name} must be a positive number, not {value!r}")
    elif name in FLAGS and not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    if name in LIMITS and value > LIMITS[name]:
        raise UserError(f"{name} is {value}; more than {LIMITS[name]} is not supported")


def parts_of(config: ModelConfig) -> list[ModelConfig | Layout | RopeScaling | Experts]:
    """The config and the records inside it that hold numbers."""
    return [part for part in (config, config.layout, config.rope_scaling, config.experts) if part is not None]


def places_of(config: ModelConfig, shapes: Mapping[str, Iterable[int]]) -> dict[str, Place]:
    """Every tensor that a checkpoint of this config must hold, by its published name."""
    whole = {name: tuple(shape) for name, shape in shapes.items()}
    family = next((f for f in FAMILIES if f.name == config.family), None)
    if family is None:
        return {name: Place(name, 0, shape) for name, shape in whole.items()}
    found = {}
    for theirs, ours in family.names.items():
        name, _, part = ours.partition(":")
        experts = range(config.experts.count) if config.experts and theirs.count("{}") == 2 else (0,)
        for layer in range(config.layers) if "{}" in theirs else (0,):
            if (full := name.format(layer)) in whole:
                for expert in experts:
                    first, rows = span(config, part, whole[full][0], expert)
                    found[theirs.format(layer, expert)] = Place(full, first, (rows, *whole[full][1:]))
    return found


def span(config: ModelConfig, part: str, rows: int, expert: int = 0) -> tuple[int, int]:
    """(first row, rows) of a piece of a fused parameter of `rows` rows."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    pieces = {"": (0, rows), "q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
    pieces |= {"gate": (0, rows // 2), "up": (rows // 2, rows // 2)}
    if config.experts is not None:
        ff, width = config.experts.ff, config.d_model
        pieces |= {"expert_gate": (2 * expert * ff, ff), "expert_up": ((2 * expert + 1) * ff, ff)}
        pieces["expert_down"] = (expert * width, width)
    return pieces[part]


def ignored(name: str, config: ModelConfig) -> bool:
    """Stored tensors that carry nothing: rotary tables, and the second copy of the embedding under a tied head."""
    return bool(IGNORED.search(name)) or (config.tied and name in HEADS)
