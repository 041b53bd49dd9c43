"""What config.json of the published checkpoints means: layout, shift, mask and stops of every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models

from unmask.errors import UserError
from unmask.models import Experts, Layout, ModelConfig, load_checkpoint
from unmask.models.families import config_of

GOLDEN = Path(__file__).parents[1] / "golden_models" / "checkpoints"
QWEN = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e6, "max_position_embeddings": 32768}
SDAR = {
    **QWEN,
    **{"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4, "mask_token_id": 151669},
    **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "eos_token_id": 151643},
}
FAST_DLLM_V2 = {
    **QWEN,
    **{"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 32},
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "conplemenrary_mask": True},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "eos_token_id": 151645},
}
LLADA2 = {
    **QWEN,
    **{"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "rope_theta": 600000, "head_dim": 128},
    **{"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20, "first_k_dense_replace": 1},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 157184, "pad_token_id": 156892},
    **{"num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 512},
    **{"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5, "use_bias": False},
}
LLADA_MOE = {
    **QWEN,
    **{"architectures": ["LLaDAMoEModel"], "model_type": "llada", "qk_layernorm": True, "moe_layer_freq": [1] * 16},
    **{"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16},
    **{"num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "partial_rotary_factor": 1},
    **{"vocab_size": 157184, "eos_token_id": 156892, "shared_expert_intermediate_size": None},
}
LLAMA = {
    **QWEN,
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "eos_token_id": 2},
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
FULL, CAUSAL = Layout(), Layout("causal")
FACTS: dict[str, tuple[dict[str, Any], Layout, bool, int, tuple[int, ...]]] = {  # layout, shift, mask, stops
    "sdar": (SDAR, Layout("block", 4, "absolute", "blocks"), False, 151669, (151643, 151645)),
    "fast_dllm_v2": (FAST_DLLM_V2, Layout("block", 32, "absolute", "blocks"), True, 151665, (151645,)),
    "llada2": (LLADA2, Layout("block", 32, "absolute", "blocks"), False, 156895, (156892,)),
    "llada_moe": (LLADA_MOE, FULL, False, 156895, (156892,)),
    "diffullama": (LLAMA, FULL, True, 811, (2,)),
    "llama": (LLAMA, CAUSAL, True, -1, (2,)),
}


def read(raw: dict[str, Any], **how: Any) -> ModelConfig:
    return config_of(raw, {}, "here", **how)


@pytest.mark.parametrize("family", FACTS)
def test_layout_shift_mask_and_stops(family: str) -> None:
    raw, layout, shift, mask, stops = FACTS[family]
    c = read(raw, family=family)
    assert (c.family, c.layout, c.shift, c.mask_id, c.eos_ids) == (family, layout, shift, mask, stops)


def test_experts_of_the_published_sizes() -> None:
    c = read(LLADA2)
    routed = {"groups": 8, "top_groups": 4, "router": "sigmoid", "bias": True, "normalise": True, "scale": 2.5}
    assert c.experts == Experts(256, 8, 512, shared=512, dense=1, **routed)
    assert (c.rotary, c.head_dim, c.ff, c.qk_norm) == (64, 128, 5120, True)
    c = read(LLADA_MOE)
    assert c.experts == Experts(64, 8, 1024)
    assert (c.rotary, c.head_dim, c.qk_norm) == (0, 128, True)


@pytest.mark.parametrize("family", FACTS)
def test_model_type_alone_tells_the_family(family: str) -> None:
    """Dense LLaDA and LLaDA-MoE have the same one; the keys tell them apart. A Llama is not DiffuLLaMA unless told."""
    raw = {key: value for key, value in FACTS[family][0].items() if key != "architectures"}
    assert read(raw).family == family.replace("diffullama", "llama")
    dense = json.loads((GOLDEN / "llada-gqa" / "config.json").read_text())
    assert read({key: value for key, value in dense.items() if key != "architectures"}).family == "llada"


@pytest.mark.parametrize(("block", "size"), [(0, 4), (4, 4), (2, 2), (12, 12)])
def test_block_of_the_attention(block: int, size: int) -> None:
    assert read(SDAR, block=block).layout.size == size


@pytest.mark.parametrize(
    ("raw", "how", "expected"),
    [
        (SDAR, {"block": 6}, "blocks of 4 cells.*not 6"),
        (SDAR, {"block": -1}, "block must be a positive integer"),
        (LLADA_MOE, {"block": 8}, "attention is full, not in blocks; leave block out"),
        (SDAR, {"family": "diffullama"}, "SDARForCausalLM is not of family 'diffullama'; leave family out"),
        (LLAMA, {"family": "difullama"}, "did you mean 'diffullama'"),
    ],
)
def test_what_cannot_be_asked_of_a_model(raw: dict[str, Any], how: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read(raw, **how)


def test_a_block_size_that_no_file_says_is_given() -> None:
    raw = {key: value for key, value in SDAR.items() if key != "block_size"}
    with pytest.raises(UserError, match="block_size, the size of the attention's blocks, is missing; give it as block"):
        read(raw)
    assert read(raw, block=4) == read(SDAR)


def masked(directory: Path, mask: str | None) -> Path:
    """A copy of the tiny Llama with a tokenizer of words, whose mask token is `mask`."""
    shutil.copytree(GOLDEN / "diffullama-mha", directory)
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token_id"}))
    inner = Inner(models.WordLevel({f"w{i}": i for i in range(96)}, "w0"))
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask} if mask else {}))
    return directory


def test_a_llama_with_a_mask_token_is_asked_about(tmp_path: Path) -> None:
    """DiffuLLaMA's files are a Llama's; its tokenizer names the mask, and decoding it as a Llama would be nonsense."""
    directory = masked(tmp_path / "m", "w7")
    with pytest.raises(UserError, match=r"may be of family 'diffullama'.*or 'llama'.*give family"):
        load_checkpoint(directory)
    assert load_checkpoint(directory, family="llama").model.config.autoregressive
    c = load_checkpoint(directory, family="diffullama").model.config
    assert (c.mask_id, c.layout, c.shift) == (7, FULL, True)


def test_a_llama_without_one_is_a_llama(tmp_path: Path) -> None:
    assert load_checkpoint(masked(tmp_path / "m", None)).model.config.autoregressive
