"""Make tiny random checkpoints of the families that attend in blocks or mix experts, of DiffuLLaMA, and D2F adapters.

    python tests/golden_models/make_block_logits.py --sdar CLONE --fast-dllm-v2 CLONE --dllm CLONE --d2f CLONE
    python tests/golden_models/make_block_logits.py --diffullama CLONE

The first line needs transformers 4.57 and peft, the second transformers 4.44. README.md names the repositories. What
is given is made; nothing of any repository is part of this project, and the results are data.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from make_logits import HERE, SHARED, VOCAB, draw, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LENGTH, PROMPT = 45, 7
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_scaling": None, "use_sliding_window": False}
SDAR: dict[str, dict[str, Any]] = {
    "sdar-gqa": {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6},
    "sdar-tied-sharded": {"num_key_value_heads": 4, "head_dim": 8, "rope_theta": 1e4, "tie_word_embeddings": True},
}
FAST_DLLM_V2: dict[str, dict[str, Any]] = {
    "fast_dllm_v2-gqa-sharded": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "fast_dllm_v2-tied": {"num_key_value_heads": 1, "rope_theta": 1e4, "tie_word_embeddings": True},
}
LLADA2_KEYS: dict[str, Any] = {  # the keys of the published config.json, with tiny sizes
    **SHARED,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 20,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 12,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 6e5,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
LLADA2: dict[str, tuple[str, dict[str, Any]]] = {
    "llada2-mini-sharded": ("llada2", {}),
    "llada2-mini-2.1": ("llada21", {"rope_theta": 1e4}),
    "llada2-bias": (
        "llada2",
        {"use_qkv_bias": True, "first_k_dense_replace": 0, "num_shared_experts": 2, "n_group": 1, "topk_group": 1},
    ),
}
LLADA_MOE_KEYS: dict[str, Any] = {  # the keys of the published config.json, with tiny sizes
    **{key: value for key, value in SHARED.items() if key != "intermediate_size"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "dense_intermediate_size": 40,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llada",
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 5e4,
    "routed_scaling_factor": 1.0,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}
LLADA_MOE: dict[str, dict[str, Any]] = {
    "llada_moe-mha": {},
    "llada_moe-dense-shared-sharded": {"moe_layer_freq": [0, 1], "shared_expert_intermediate_size": 16},
}
D2F: dict[str, tuple[str, str, list[str]]] = {  # name -> the base here, its published name, what is adapted
    "d2f_llada": ("llada-gqa", "GSAI-ML/LLaDA-8B-Instruct", ["q_proj", "k_proj", "v_proj", "attn_out"]),
    "d2f_dream": ("dream-gqa-sharded", "Dream-org/Dream-v0-Base-7B", ["q_proj", "k_proj", "v_proj", "o_proj"]),
}


def stand_in(name: str, **contents: Any) -> None:
    """A module of that name that holds what a published file imports and does not need on a CPU."""
    module = ModuleType(name)
    vars(module).update(contents, __spec__=ModuleSpec(name, None), __path__=[])
    sys.modules[name] = module


def imported(folder: Path, file: str) -> ModuleType:
    """A module of a folder, which need not be a package."""
    name = f"published_{abs(hash(str(folder)))}"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules.setdefault(name, package)
    return importlib.import_module(f"{name}.{file}")


def function(path: Path, name: str) -> Callable[..., Any]:
    """One function of a file whose imports cannot be had here."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(path), "exec"), space)
    return space[name]


def ids_of(name: str) -> Tensor:
    """Token ids [2, 45]."""
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(len(name)))


def record(name: str, config: dict[str, Any], model: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
    """Write the checkpoint and golden.safetensors: ids [2, 45] and the official fp32 logits [2, 45, V]."""
    directory = HERE / "checkpoints" / name
    write(directory, config, model, 2 if name.endswith("sharded") else 1)
    biases = {k: v for k, v in model.state_dict().items() if k.endswith("expert_bias")}
    for path in directory.glob("model*.safetensors") if biases else ():  # published in fp32
        stored = load_file(path)
        save_file({**stored, **{k: v for k, v in biases.items() if k in stored}}, path, metadata={"format": "pt"})
    ids = ids_of(name)
    with torch.no_grad():
        found = logits(ids).float().contiguous()
    save_file({"ids": ids, "logits": found}, directory / "golden.safetensors")


def staircase(block: int) -> Tensor:
    """The mask that the published `generate` of SDAR and LLaDA2 makes: [45, 45] of 0 and 1."""
    blocks = -(-LENGTH // block)
    whole = torch.tril(torch.ones(blocks, blocks)).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return whole[:LENGTH, :LENGTH]


def make_sdar(clone: Path) -> dict[str, Any]:
    """SDAR, called as its generate.py calls it; the kernels its file imports are replaced by what they compute."""

    def rms_norm_fn(x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        stand_in(name)
    stand_in("flash_attn.ops.triton.layer_norm", rms_norm_fn=rms_norm_fn)
    if not hasattr(transformers.utils, "LossKwargs"):
        transformers.utils.LossKwargs = transformers.utils.TransformersKwargs
    folder = clone / "training" / "model" / "SDAR-4B-Chat"
    package = imported(folder, "configuration_sdar").__name__.rpartition(".")[0]
    stand_in(f"{package}.fused_linear_diffusion_cross_entropy", FusedLinearDiffusionCrossEntropyLoss=None)
    module, config = imported(folder, "modeling_sdar"), imported(folder, "configuration_sdar")
    for seed, (name, special) in enumerate(SDAR.items()):
        fixed = {"attention_bias": False, "block_size": 4, "mask_token_id": 5, "fuse_cross_entropy": True}
        said = {**SHARED, **QWEN, **fixed, "max_window_layers": 36, "sliding_window": None, **special}
        model = module.SDARForCausalLM(config.SDARConfig(**said)).eval()
        draw(model, 300 + seed)
        model.tie_weights()
        mask = staircase(4)[None]
        named = {"architectures": ["SDARForCausalLM"], **said, "model_type": "sdar", "torch_dtype": "bfloat16"}
        record(name, named, model, lambda ids, m=model, a=mask: m(ids, attention_mask=a, use_cache=False).logits)
    return {"files": ["training/model/SDAR-4B-Chat/modeling_sdar.py", "generate.py (the mask)"]}


def make_fast_dllm_v2(clone: Path) -> dict[str, Any]:
    """Fast-dLLM v2, which makes its own mask."""
    folder = clone / "FastDLLM_inferencing" / "Fast_dLLM_v2_7B"
    module, config = imported(folder, "modeling"), imported(folder, "configuration")
    for seed, (name, special) in enumerate(FAST_DLLM_V2.items()):
        fixed = {"bd_size": 32, "conplemenrary_mask": True, "max_window_layers": 28, "sliding_window": None}
        said = {**SHARED, **QWEN, **fixed, "attention_dropout": 0.0, "pad_token_id": 0, **special}
        model = module.Fast_dLLM_QwenForCausalLM(config.Fast_dLLM_QwenConfig(**said)).eval()
        draw(model, 400 + seed)
        model.tie_weights()
        named = {"architectures": ["Fast_dLLM_QwenForCausalLM"], **said, "model_type": "Fast_dLLM_Qwen"}
        named |= {"layer_types": ["full_attention"] * said["num_hidden_layers"], "mask_token_id": 5}
        record(name, {**named, "torch_dtype": "bfloat16"}, model, lambda ids, m=model: m(ids, use_cache=False).logits)
    note = "a copy of the model repository Efficient-Large-Model/Fast_dLLM_v2_7B; its changes are to `generate` alone"
    return {"files": ["FastDLLM_inferencing/Fast_dLLM_v2_7B/modeling.py"], "note": note}


def make_dllm(clone: Path) -> dict[str, Any]:
    """LLaDA2.0 and 2.1, with the mask of their `generate`, and LLaDA-MoE, which attends to all."""
    pipelines = clone / "dllm" / "pipelines"
    for seed, (name, (kind, special)) in enumerate(LLADA2.items()):
        folder = pipelines / kind / "models"
        module, config = (imported(folder, f"{part}_{kind}_moe") for part in ("modeling", "configuration"))
        said = {**LLADA2_KEYS, "pad_token_id": 0, **special}
        built = config.LLaDA2MoeConfig(**{k: v for k, v in said.items() if k != "model_type"})
        model = module.LLaDA2MoeModelLM(built).eval()
        draw(model, 500 + seed)
        generator = torch.Generator().manual_seed(550 + seed)
        for key, bias in model.named_buffers():
            if key.endswith("expert_bias"):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
        mask = staircase(32)[None, None].log()
        named = {"architectures": ["LLaDA2MoeModelLM"], **said, "mask_token_id": 5, "torch_dtype": "bfloat16"}
        record(name, named, model, lambda ids, m=model, a=mask: m(ids, attention_mask=a.expand(2, -1, -1, -1)).logits)
    folder = pipelines / "llada" / "models"
    module, config = (imported(folder, f"{part}_lladamoe") for part in ("modeling", "configuration"))
    for seed, (name, special) in enumerate(LLADA_MOE.items()):
        said = {**LLADA_MOE_KEYS, "pad_token_id": 0, **special}
        built = config.LLaDAMoEConfig(**{k: v for k, v in said.items() if k != "model_type"})
        model = module.LLaDAMoEModelLM(built).eval()
        draw(model, 600 + seed)
        named = {"architectures": ["LLaDAMoEModel"], **said, "mask_token_id": 5, "torch_dtype": "bfloat16"}
        record(name, named, model, lambda ids, m=model: m(ids, use_cache=False).logits)
    files = ["llada2/models/modeling_llada2_moe.py", "llada21/models/modeling_llada21_moe.py"]
    return {
        "files": [f"dllm/pipelines/{f}" for f in (*files, "llada/models/modeling_lladamoe.py")],
        "note": "copies, by the authors of dllm, of inclusionAI's model repositories LLaDA2.0-mini, LLaDA2.1-mini and "
        "LLaDA-MoE-7B-A1B-Instruct, which could not be fetched themselves",
    }


def make_diffullama(clone: Path) -> dict[str, Any]:
    """DiffuLLaMA: a Llama whose attention mask is replaced, in the repository's own wrapper."""
    sys.path.insert(0, str(clone))
    model_py = importlib.import_module("model")
    said = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None}
    said |= {**SHARED, "num_key_value_heads": 4, "attention_bias": False, "mlp_bias": False}
    config = transformers.LlamaConfig(**said, attn_implementation="eager")
    llama = transformers.LlamaForCausalLM(config).eval()
    draw(llama, 700)
    named = {"architectures": ["LlamaForCausalLM"], **said, "model_type": "llama", "mask_token_id": 5}
    state = llama.state_dict()

    class Whole(nn.Module):
        """The checkpoint, before the wrapper takes the model apart."""

        def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
            return {k: v.clone() for k, v in state.items()}

    whole = Whole()
    wrapper = model_py.DiscreteDiffusionModel(llama, config, range(VOCAB), "cpu").eval()

    def logits(ids: Tensor) -> Tensor:
        mask = model_py.get_anneal_attn_mask(LENGTH, len(ids), torch.float32, "cpu", 1.0)
        return wrapper(ids, attention_mask=mask)

    record("diffullama-mha", {**named, "torch_dtype": "bfloat16"}, whole, logits)
    return {"files": ["model.py", "attention_patch.py"]}


def make_d2f(clone: Path) -> dict[str, Any]:
    """D2F: the models and the mask of its evaluation, with an adapter that peft wrote and applies."""
    import peft

    sys.path.insert(0, str(clone / "D2F-eval"))
    full = function(clone / "D2F-eval" / "eval_llada.py", "create_full_block_attention_mask")
    mask = full(PROMPT, LENGTH, 16, device="cpu", dtype=torch.float32)
    for seed, (name, (base, published, modules)) in enumerate(D2F.items()):
        source, directory = HERE / "checkpoints" / base, HERE / "adapters" / name
        said = json.loads((source / "config.json").read_text())
        if name == "d2f_llada":
            module = importlib.import_module("model_cache.llada.modeling_llada")
            config = module.LLaDAConfig(**{**said, "init_device": "cpu"})
            model = module.LLaDAModelLM(config, init_params=True)
        else:
            module = importlib.import_module("model_cache.dream.model_dream")
            model = module.DreamModel(module.DreamConfig(**said, attn_implementation="sdpa"))
        stored = {k: v.float() for path in source.glob("model*.safetensors") for k, v in load_file(path).items()}
        model.load_state_dict(stored)
        model.name_or_path = published
        settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=modules)
        model = peft.get_peft_model(model.eval(), settings).eval()
        generator = torch.Generator().manual_seed(800 + seed)
        for key, p in sorted(model.named_parameters()):
            if "lora_" in key:
                p.data = 0.3 * torch.randn(p.shape, generator=generator)
        model.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        ids = ids_of(name)
        with torch.no_grad():
            given = {"attention_bias": mask} if name == "d2f_llada" else {"attention_mask": mask.expand(2, -1, -1, -1)}
            found = model(ids, **given, use_cache=False).logits.float().contiguous()
        golden = {"ids": ids, "logits": found, "origin": torch.tensor([PROMPT, PROMPT])}
        save_file(golden, directory / "golden.safetensors")
    files = ["llada/modeling_llada.py", "dream/model_dream.py"]
    return {
        "files": [*(f"D2F-eval/model_cache/{f}" for f in files), "D2F-eval/eval_llada.py (the mask)"],
        "peft": peft.__version__,
    }


MAKERS = {
    "sdar": (make_sdar, "https://github.com/JetAstra/SDAR"),
    "fast_dllm_v2": (make_fast_dllm_v2, "https://github.com/Satgoy152/DualDiffusion"),
    "dllm": (make_dllm, "https://github.com/ZHZisZZ/dllm"),
    "diffullama": (make_diffullama, "https://github.com/HKUNLP/DiffuLLaMA"),
    "d2f": (make_d2f, "https://github.com/zhijie-group/Discrete-Diffusion-Forcing"),
}
TITLES = {"dllm": "llada2, llada_moe"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, url) in MAKERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help=f"clone of {url}")
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    for name, (make, url) in MAKERS.items():
        if given[name] is None:
            continue
        clone = given[name].resolve()
        head = subprocess.run(
            ["git", "-C", str(clone), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
        told = {"repository": url, "commit": head.stdout.strip(), **make(clone)}
        told |= {"script": "tests/golden_models/make_block_logits.py", "date": date.today().isoformat()}
        told |= {"transformers": transformers.__version__, "torch": torch.__version__}
        meta = json.loads((HERE / "provenance.json").read_text())
        meta[TITLES.get(name, name)] = told
        (HERE / "provenance.json").write_text(json.dumps(meta, indent=2) + "\n")


if __name__ == "__main__":
    main()
