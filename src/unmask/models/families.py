"""The families: which configuration keys and weight names of published checkpoints mean what in our transformer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig, RopeScaling

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor of `shape` goes: into the rows of one of our parameters, from row `first`."""

    parameter: str
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One published architecture as data.

    `keys`: our size -> its key in config.json, alternatives separated by "|". `fixed`: what the family always is.
    `required`: keys that may only hold one of these values (an absent key is fine). `names`: published weight name ->
    ours, with {} for the layer; `part` in ("q", "k", "v", "gate", "up") marks the pieces of a fused matrix.
    `stops`: ids that end an answer beside those the files name. `mask_id` where config.json does not say.
    """

    name: str
    architecture: str
    model_type: str
    keys: Mapping[str, str]
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    stops: tuple[int, ...] = ()
    mask_id: int = -1


QWEN_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ff": "intermediate_size",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
LLADA_KEYS = {
    "vocab_size": "embedding_size|vocab_size",
    "d_model": "d_model",
    "layers": "n_layers",
    "heads": "n_heads",
    "ff": "mlp_hidden_size",
    "kv_heads": "n_kv_heads",
    "norm_eps": "rms_norm_eps",
    "tied": "weight_tying",
    "max_positions": "max_sequence_length",
    "qkv_bias": "include_qkv_bias",
}
QWEN_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.input_layernorm.weight": "blocks.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blocks.{}.attn.qkv.weight:q",
    "model.layers.{}.self_attn.k_proj.weight": "blocks.{}.attn.qkv.weight:k",
    "model.layers.{}.self_attn.v_proj.weight": "blocks.{}.attn.qkv.weight:v",
    "model.layers.{}.self_attn.q_proj.bias": "blocks.{}.attn.qkv.bias:q",
    "model.layers.{}.self_attn.k_proj.bias": "blocks.{}.attn.qkv.bias:k",
    "model.layers.{}.self_attn.v_proj.bias": "blocks.{}.attn.qkv.bias:v",
    "model.layers.{}.self_attn.o_proj.weight": "blocks.{}.attn.out.weight",
    "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attn.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attn.k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blocks.{}.mlp.gate_up.weight:gate",
    "model.layers.{}.mlp.up_proj.weight": "blocks.{}.mlp.gate_up.weight:up",
    "model.layers.{}.mlp.down_proj.weight": "blocks.{}.mlp.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
LLADA_NAMES = {
    "model.transformer.wte.weight": "embed.weight",
    "model.transformer.blocks.{}.attn_norm.weight": "blocks.{}.attn_norm.weight",
    "model.transformer.blocks.{}.q_proj.weight": "blocks.{}.attn.qkv.weight:q",
    "model.transformer.blocks.{}.k_proj.weight": "blocks.{}.attn.qkv.weight:k",
    "model.transformer.blocks.{}.v_proj.weight": "blocks.{}.attn.qkv.weight:v",
    "model.transformer.blocks.{}.q_proj.bias": "blocks.{}.attn.qkv.bias:q",
    "model.transformer.blocks.{}.k_proj.bias": "blocks.{}.attn.qkv.bias:k",
    "model.transformer.blocks.{}.v_proj.bias": "blocks.{}.attn.qkv.bias:v",
    "model.transformer.blocks.{}.attn_out.weight": "blocks.{}.attn.out.weight",
    "model.transformer.blocks.{}.ff_norm.weight": "blocks.{}.mlp_norm.weight",
    "model.transformer.blocks.{}.ff_proj.weight": "blocks.{}.mlp.gate_up.weight:gate",
    "model.transformer.blocks.{}.up_proj.weight": "blocks.{}.mlp.gate_up.weight:up",
    "model.transformer.blocks.{}.ff_out.weight": "blocks.{}.mlp.down.weight",
    "model.transformer.ln_f.weight": "norm.weight",
    "model.transformer.ff_out.weight": "head.weight",
}
CAUSAL = {"layout": Layout("causal"), "shift": True}
SILU = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
LLADA_SHAPE = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "layer_norm_with_affine": (True, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "clip_qkv": (None,),
    "multi_query_attention": (False, None),
}
FAMILIES = (
    Family(
        name="llada",
        architecture="LLaDAModelLM",
        model_type="llada",
        keys=LLADA_KEYS,
        names=LLADA_NAMES,
        required=LLADA_SHAPE,
        stops=(126081, 126348),
        mask_id=126336,
    ),
    Family(
        name="dream",
        architecture="DreamModel",
        model_type="Dream",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={"shift": True, "qkv_bias": True},
        required=SILU,
        stops=(151643, 151645),
        mask_id=151666,
    ),
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed=CAUSAL,
        required={**SILU, "attention_bias": (False, None), "mlp_bias": (False, None)},
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={**CAUSAL, "qkv_bias": True},
        required=SILU,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={**CAUSAL, "qk_norm": True},
        required={**SILU, "attention_bias": (False, None)},
    ),
)
OWN = "UnmaskTransformer"
IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)$")
HEADS = {"lm_head.weight", "model.transformer.ff_out.weight", "head.weight"}
POSITIVE = {
    *("vocab_size", "d_model", "layers", "heads", "ff", "kv_heads"),
    *("head_dim", "max_positions", "token_count", "original"),
}
NUMBERS = {"rope_theta", "norm_eps", "factor", "low", "high"}
FLAGS = {"qkv_bias", "qk_norm", "tied", "shift"}
LIMITS = {"layers": 4096, "max_positions": 1 << 22}
"""What is built before the weights are compared with it must not exhaust the machine."""
OPTIONAL = {"kv_heads": 0, "head_dim": 0, "tied": False, "qkv_bias": False, "max_positions": 4096, "norm_eps": 1e-6}


def supported() -> str:
    """The architectures that can be loaded, for people."""
    return ", ".join([*(f.architecture for f in FAMILIES), OWN])


def config_of(raw: Json, generation: Json, where: str | Path) -> ModelConfig:
    """Read config.json (`raw`) and generation_config.json into a ModelConfig; UserError for what we cannot run."""
    said = raw.get("architectures") or [
        f.architecture for f in FAMILIES if f.model_type == raw.get("model_type") or f.name == raw.get("model_type")
    ]
    try:
        if OWN in said:
            return own_config(raw)
        family = next((f for f in FAMILIES if f.architecture in said), None)
        if family is not None:
            return published_config(family, raw, generation)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: config.json: {error}") from error
    named = ", ".join(map(str, said)) or raw.get("model_type") or "not named in config.json"
    raise UserError(f"{where}: architecture {named} is not supported; supported are {supported()}")


def own_config(raw: Json) -> ModelConfig:
    """Our own format: the fields of ModelConfig as they are."""
    known = {f.name for f in fields(ModelConfig)}
    values = {k: v for k, v in raw.items() if k != "architectures"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown key {', '.join(unknown)}; a newer version of unmask may have written it")
    for key in ("vocab_size", "d_model", "layers", "heads", "ff"):
        positive(values.get(key), key)
    scaling = values.get("rope_scaling")
    values["layout"] = Layout(**values.get("layout", {}))
    values["rope_scaling"] = None if scaling is None else RopeScaling(**scaling)
    values["eos_ids"] = tuple(values.get("eos_ids", ()))
    return checked(ModelConfig(**values))


def published_config(family: Family, raw: Json, generation: Json) -> ModelConfig:
    """A family's config.json: sizes by its key table, ids by what the files say and the family knows."""
    for key, values in family.required.items():
        if key in raw and raw[key] not in values:
            raise UserError(f"{key} is {raw[key]!r}; {family.architecture} is supported with {values[0]!r} only")
    if raw.get("quantization_config"):
        raise UserError("quantized weights are not supported; use the checkpoint they were made from")
    sizes = {ours: size_of(raw, ours, keys) for ours, keys in family.keys.items()}
    vocabulary = sizes["vocab_size"]
    theta, scaling = rope_of(raw)
    mask = raw.get("mask_token_id")
    mask = family.mask_id if mask is None else mask
    if "layout" not in family.fixed and not 0 <= mask < vocabulary:
        raise UserError(f"mask_token_id {mask} is outside the vocabulary of {vocabulary}")
    ends = [*ids(raw.get("eos_token_id")), *ids(generation.get("eos_token_id")), *family.stops]
    starts = [*ids(raw.get("bos_token_id")), *ids(generation.get("bos_token_id"))]
    return checked(
        ModelConfig(
            **{**sizes, **family.fixed},
            rope_theta=theta,
            rope_scaling=scaling,
            mask_id=mask,
            eos_ids=tuple(dict.fromkeys(i for i in ends if 0 <= i < vocabulary)),
            bos_id=next((i for i in starts if 0 <= i < vocabulary), -1),
            token_count=min(vocabulary, raw.get("vocab_size") or vocabulary),
            family=family.name,
        )
    )


def size_of(raw: Json, ours: str, keys: str) -> Any:
    """One size by its published key (alternatives separated by "|"); optional ones have our default."""
    value = next((raw[k] for k in keys.split("|") if raw.get(k) is not None), None)
    if value is None and ours in OPTIONAL:
        return OPTIONAL[ours]
    if ours in ("tied", "qkv_bias"):
        return bool(value)
    return float(value) if ours == "norm_eps" else positive(value, keys.partition("|")[0])  # type: ignore[arg-type]


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
    for name, value in [(f.name, getattr(part, f.name)) for part in parts_of(config) for f in fields(part)]:
        if name in POSITIVE:
            positive(value, name)
        elif name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf):
            raise UserError(f"{name} must be a positive number, not {value!r}")
        elif name in FLAGS and not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, not {value!r}")
    for name, limit in LIMITS.items():
        if getattr(config, name) > limit:
            raise UserError(f"{name} is {getattr(config, name)}; more than {limit} is not supported")
    if not all(type(i) is int and i < config.vocab_size for i in (config.mask_id, config.bos_id, *config.eos_ids)):
        raise UserError(f"special ids must be integers within the vocabulary of {config.vocab_size}")
    if config.head_dim % 2:
        raise UserError(f"a head of {config.head_dim} dimensions cannot be rotated; it must be even")
    if not config.head_dim * config.heads:
        raise UserError(f"d_model {config.d_model} is too small for {config.heads} heads")
    return config


def parts_of(config: ModelConfig) -> list[ModelConfig | RopeScaling]:
    """The config and the records inside it that hold numbers."""
    return [config] if config.rope_scaling is None else [config, config.rope_scaling]


def places_of(config: ModelConfig, shapes: Mapping[str, Iterable[int]]) -> dict[str, Place]:
    """Every tensor that a checkpoint of this config must hold, by its published name."""
    whole = {name: tuple(shape) for name, shape in shapes.items()}
    family = next((f for f in FAMILIES if f.name == config.family), None)
    if family is None:
        return {name: Place(name, 0, shape) for name, shape in whole.items()}
    found = {}
    for theirs, ours in family.names.items():
        name, _, part = ours.partition(":")
        for layer in range(config.layers) if "{}" in theirs else (0,):
            if (full := name.format(layer)) in whole:
                first, rows = span(config, part, whole[full][0])
                found[theirs.format(layer)] = Place(full, first, (rows, *whole[full][1:]))
    return found


def span(config: ModelConfig, part: str, rows: int) -> tuple[int, int]:
    """(first row, rows) of a piece of a fused parameter of `rows` rows."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    pieces = {"": (0, rows), "q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
    return {**pieces, "gate": (0, config.ff), "up": (config.ff, config.ff)}[part]


def ignored(name: str, config: ModelConfig) -> bool:
    """Stored tensors that carry nothing: rotary tables, and the second copy of the embedding under a tied head."""
    return bool(IGNORED.search(name)) or (config.tied and name in HEADS)
