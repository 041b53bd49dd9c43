"""What published checkpoints call things: keys of config.json, weight names, and the families that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unmask.models.config import Layout


@dataclass(frozen=True)
class Family:
    """One published architecture as data.

    `architecture`: its name in config.json, alternatives separated by "|". `keys`: our size -> its key in config.json,
    alternatives separated by "|". `experts`: the same for a mixture of experts, factors separated by "*", and what is
    always so in `routing`. `fixed`: what the family always is. `block`: the key of the attention's block size and its
    value where the key is absent (0: it must be there). `required`: keys that may only hold one of these values (an
    absent key is fine). `names`: published weight name -> ours, with {} for the layer and a second {} for the expert;
    what follows a colon marks the piece of a fused matrix. `stops`: ids that end an answer beside those the files name.
    `mask_id` where config.json does not say, nor, if `mask_named`, the tokenizer's files.
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
    mask_named: bool = False
    block: tuple[str, int] | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    routing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Its names in config.json."""
        return tuple(self.architecture.split("|"))


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
LLADA2_KEYS = {**QWEN_KEYS, "qkv_bias": "use_qkv_bias", "rotary": "partial_rotary_factor"}
LLADA_MOE_KEYS = {
    **{ours: key for ours, key in QWEN_KEYS.items() if ours != "head_dim"},
    "ff": "dense_intermediate_size|expert_intermediate_size",
    "qk_norm": "qk_layernorm",
    "rotary": "partial_rotary_factor",
}
LLADA2_EXPERTS = {
    "count": "num_experts",
    "top": "num_experts_per_tok",
    "ff": "moe_intermediate_size",
    "shared": "num_shared_experts*moe_intermediate_size",
    "dense": "first_k_dense_replace",
    "groups": "n_group",
    "top_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
LLADA_MOE_EXPERTS = {
    "count": "num_experts",
    "top": "num_experts_per_tok",
    "ff": "expert_intermediate_size",
    "shared": "shared_expert_intermediate_size",
    "dense": "moe_layer_freq",
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
EXPERT_NAMES = {
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": "blocks.{}.mlp.experts.gate_up.weight:expert_gate",
    "model.layers.{}.mlp.experts.{}.up_proj.weight": "blocks.{}.mlp.experts.gate_up.weight:expert_up",
    "model.layers.{}.mlp.experts.{}.down_proj.weight": "blocks.{}.mlp.experts.down.weight:expert_down",
    "model.layers.{}.mlp.gate.weight": "blocks.{}.mlp.router.weight",
}
LLADA_MOE_NAMES = {
    **QWEN_NAMES,
    **EXPERT_NAMES,
    "model.layers.{}.shared_expert.gate_proj.weight": "blocks.{}.mlp.shared.gate_up.weight:gate",
    "model.layers.{}.shared_expert.up_proj.weight": "blocks.{}.mlp.shared.gate_up.weight:up",
    "model.layers.{}.shared_expert.down_proj.weight": "blocks.{}.mlp.shared.down.weight",
}
LLADA2_NAMES = {
    **{theirs: ours for theirs, ours in QWEN_NAMES.items() if "self_attn" not in theirs and "embed" not in theirs},
    **EXPERT_NAMES,
    "model.word_embeddings.weight": "embed.weight",
    "model.layers.{}.attention.query_key_value.weight": "blocks.{}.attn.qkv.weight",
    "model.layers.{}.attention.query_key_value.bias": "blocks.{}.attn.qkv.bias",
    "model.layers.{}.attention.dense.weight": "blocks.{}.attn.out.weight",
    "model.layers.{}.attention.query_layernorm.weight": "blocks.{}.attn.q_norm.weight",
    "model.layers.{}.attention.key_layernorm.weight": "blocks.{}.attn.k_norm.weight",
    "model.layers.{}.mlp.gate.expert_bias": "blocks.{}.mlp.router.bias",
    "model.layers.{}.mlp.shared_experts.gate_proj.weight": "blocks.{}.mlp.shared.gate_up.weight:gate",
    "model.layers.{}.mlp.shared_experts.up_proj.weight": "blocks.{}.mlp.shared.gate_up.weight:up",
    "model.layers.{}.mlp.shared_experts.down_proj.weight": "blocks.{}.mlp.shared.down.weight",
}
CAUSAL = {"layout": Layout("causal"), "shift": True}
SILU = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
LLAMA = {**SILU, "attention_bias": (False, None), "mlp_bias": (False, None)}
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
        required=LLAMA,
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
    Family(
        name="diffullama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={"shift": True},
        required=LLAMA,
        mask_id=811,
        mask_named=True,
    ),
    Family(
        name="sdar",
        architecture="SDARForCausalLM",
        model_type="sdar",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={"qk_norm": True},
        required={**SILU, "attention_bias": (False, None)},
        stops=(151643, 151645),
        mask_id=151669,
        block=("block_size", 0),
    ),
    Family(
        name="fast_dllm_v2",
        architecture="Fast_dLLM_QwenForCausalLM",
        model_type="Fast_dLLM_Qwen",
        keys=QWEN_KEYS,
        names=QWEN_NAMES,
        fixed={"shift": True, "qkv_bias": True},
        required=SILU,
        stops=(151645,),
        mask_id=151665,
        block=("bd_size", 0),
    ),
    Family(
        name="llada2",
        architecture="LLaDA2MoeModelLM",
        model_type="llada2_moe",
        keys=LLADA2_KEYS,
        names=LLADA2_NAMES,
        fixed={"qk_norm": True},
        required={
            **SILU,
            "use_qk_norm": (True,),
            "use_bias": (False, None),
            "norm_head": (False, None),
            "score_function": ("sigmoid", None),
            "moe_router_enable_expert_bias": (True, None),
        },
        stops=(156892,),
        mask_id=156895,
        block=("block_size", 32),
        experts=LLADA2_EXPERTS,
        routing={"router": "sigmoid", "bias": True, "normalise": True},
    ),
    Family(
        name="llada_moe",
        architecture="LLaDAMoEModelLM|LLaDAMoEModel",
        model_type="llada",
        keys=LLADA_MOE_KEYS,
        names=LLADA_MOE_NAMES,
        required={
            **SILU,
            "attention_bias": (False, None),
            "clip_qkv": (None,),
            "moe_router_score_function": ("softmax", None),
            "moe_router_enable_expert_bias": (False, None),
        },
        stops=(156892,),
        mask_id=156895,
        experts=LLADA_MOE_EXPERTS,
        routing={"router": "softmax"},
    ),
)
