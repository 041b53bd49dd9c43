"""Make tiny random checkpoints in published layouts and record what the official modelling code computes with them.

    python tests/golden_models/make_logits.py --fast-dllm CLONE

needs transformers 4.57 and a clone of https://github.com/NVlabs/Fast-dLLM, which carries LLaDA's and Dream's own
modelling files. Nothing of either is part of this project; the results are data.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
VOCAB, WIDTH, DEPTH, FF = 96, 32, 2, 48
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FF,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "eos_token_id": [0, 3]}),
    "llama-tied-llama3": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "qwen2-gqa": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 1e6}),
    "qwen2-tied-sharded": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-gqa": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6}),
    "qwen3-tied-sharded": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}),
}
DREAM: dict[str, dict[str, Any]] = {
    "dream-gqa-sharded": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "dream-mha-tied": {"num_key_value_heads": 4, "rope_theta": 1e4, "tie_word_embeddings": True},
}
LLADA: dict[str, dict[str, Any]] = {
    "llada-sharded": {"n_kv_heads": 4},
    "llada-gqa": {"n_kv_heads": 2, "rope_theta": 1e4},
    "llada-bias-tied": {"n_kv_heads": 4, "include_qkv_bias": True, "weight_tying": True},
}
LLADA_KEYS: dict[str, Any] = {  # the keys of the published config.json, with tiny sizes
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": 0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 5,
    "max_sequence_length": 128,
    "mlp_hidden_size": FF,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_layers": DEPTH,
    "pad_token_id": 0,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5e5,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}


def draw(model: torch.nn.Module, seed: int) -> None:
    """Random weights that bf16 holds exactly: no zero bias, no unit norm, logits that differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(dict(model.named_parameters()).items()):
        noise = torch.randn(p.shape, generator=generator)
        value = 1 + 0.3 * noise if p.dim() == 1 and name.endswith("weight") else 0.3 * noise
        p.data = value.bfloat16().float()


def write(directory: Path, config: dict[str, Any], model: torch.nn.Module, shards: int) -> None:
    """config.json and bf16 weights as they are published: one file, or shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tied = config.get("tie_word_embeddings", False)
    weights = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if "rotary" not in k}
    weights = {k: v for k, v in weights.items() if not (tied and k == "lm_head.weight")}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, table = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({n: weights[n] for n in part}, directory / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def record(name: str, config: dict[str, Any], model: torch.nn.Module) -> None:
    """Write the checkpoint and golden.safetensors: ids [2, 21] and the official fp32 logits [2, 21, V]."""
    directory = HERE / "checkpoints" / name
    write(directory, config, model, 2 if name.endswith("sharded") else 1)
    ids = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float().contiguous()
    save_file({"ids": ids, "logits": logits}, directory / "golden.safetensors")


def greedy(model: Any, prompts: Iterable[list[int]], new: int) -> list[list[int]]:
    """What `generate` appends to each prompt, greedily, with its K/V cache, one prompt at a time."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            use_cache=True,
            pad_token_id=0,
        )
        out.append(whole[0, len(prompt) :].tolist())
    return out


def make_transformers() -> dict[str, Any]:
    """The AR families, and what they generate."""
    generator = torch.Generator().manual_seed(7)
    sizes = [3 + i % 18 for i in range(40)]
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in sizes]
    outputs = {}
    for seed, (name, (family, special)) in enumerate(TRANSFORMERS.items()):
        config = getattr(transformers, f"{family}Config")(**{**SHARED, **special}, attn_implementation="eager")
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        draw(model, seed)
        model.tie_weights()
        said = {"architectures": [f"{family}ForCausalLM"], **config.to_diff_dict(), "model_type": config.model_type}
        record(name, {**said, "dtype": "bfloat16"}, model)
        outputs[name] = greedy(model, prompts, 24)
    return {"max_new_tokens": 24, "prompts": prompts, "outputs": outputs}


def imported(clone: Path, family: str) -> ModuleType:
    """The modelling module of a family in the clone."""
    name = f"published_{family}"
    package = ModuleType(name)
    package.__path__ = [str(clone / family / "model")]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.modeling_{family}")


def make_published(clone: Path) -> None:
    """LLaDA and Dream by the files in the clone."""
    dream, llada = imported(clone, "dream"), imported(clone, "llada")
    for seed, (name, special) in enumerate(DREAM.items()):
        said = {**SHARED, "rms_norm_eps": 1e-6, "rope_scaling": None, "mask_token_id": 5, "pad_token_id": 0, **special}
        model = dream.DreamModel(dream.DreamConfig(**said)).eval()
        draw(model, 100 + seed)
        model.tie_weights()
        fixed = {"hidden_act": "silu", "model_type": "Dream", "use_sliding_window": False, "torch_dtype": "bfloat16"}
        record(name, {"architectures": ["DreamModel"], **said, **fixed}, model)
    for seed, (name, special) in enumerate(LLADA.items()):
        said = {**LLADA_KEYS, **special}
        built = llada.LLaDAConfig(**{k: v for k, v in said.items() if k != "model_type"} | {"init_device": "cpu"})
        model = llada.LLaDAModelLM(built, init_params=True).eval()
        draw(model, 200 + seed)
        record(name, {"architectures": ["LLaDAModelLM"], **said}, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast-dllm", type=Path, required=True, help="clone of NVlabs/Fast-dLLM")
    clone = parser.parse_args().fast_dllm.resolve()
    torch.set_num_threads(1)
    traces = make_transformers()
    make_published(clone)
    commit = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    files = ["dream/model/modeling_dream.py", "llada/model/modeling_llada.py"]
    meta = {
        "script": "tests/golden_models/make_logits.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "llama, qwen2, qwen3": "transformers, eager attention, fp32",
        "dream, llada": {
            "repository": "https://github.com/NVlabs/Fast-dLLM",
            "commit": commit.stdout.strip(),
            "files": files,
            "note": "derived from the model repositories Dream-org/Dream-v0-Instruct-7B and GSAI-ML/LLaDA-8B-Base",
        },
    }
    (HERE / "provenance.json").write_text(json.dumps(meta, indent=2) + "\n")
    (HERE / "ar_greedy.json").write_text(json.dumps(traces) + "\n")


if __name__ == "__main__":
    main()
