"""Checkpoints: our own format, and one clear line for whatever is wrong with somebody's files."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Inner
from tokenizers import models

from unmask.errors import UserError
from unmask.models import Layout, ModelConfig, RopeScaling, Transformer, load_checkpoint, save_checkpoint
from unmask.models.families import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden_models" / "checkpoints"
CONFIG = ModelConfig(96, 32, 2, 4, 48, kv_heads=2, mask_id=2, eos_ids=(1, 3), layout=Layout("block", 4), token_count=90)


def edit(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir()))
def test_a_published_model_keeps_its_family_in_our_own_format(tmp_path: Path, name: str) -> None:
    """As `unmask train d2f` writes the student of a published teacher."""
    model = load_checkpoint(GOLDEN / name).model
    save_checkpoint(model, tmp_path)
    again = load_checkpoint(tmp_path).model
    assert again.config == model.config
    own = again.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, in_flight=True),
        replace(CONFIG, tied=True, qkv_bias=True, qk_norm=True, layout=Layout(), shift=True),
        replace(CONFIG, layout=Layout("causal"), mask_id=-1, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_format_round_trips(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    model = Transformer(config).initialise(3).to(dtype)
    save_checkpoint(model, tmp_path / "new" / "place", dtype=dtype)
    loaded = load_checkpoint(tmp_path / "new" / "place")
    assert loaded.model.config == config
    assert loaded.model.dtype == dtype
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert loaded.model.cos.equal(Transformer(config).cos)


def test_saving_over_a_checkpoint_leaves_only_two_files(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_checkpoint(Transformer(CONFIG).initialise(seed), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(Transformer(CONFIG).initialise(0), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.models.load.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(Transformer(CONFIG).initialise(1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


WRONG: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "no config": ("llama-gqa", lambda d: (d / "config.json").unlink(), ["config.json does not exist"]),
    "broken config": ("llama-gqa", lambda d: (d / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "config is a list": ("llama-gqa", lambda d: (d / "config.json").write_text("[]"), ["does not hold a JSON object"]),
    "no weights": ("llama-gqa", lambda d: (d / "model.safetensors").unlink(), ["no model.safetensors"]),
    "pickle": (
        "llama-gqa",
        lambda d: [(d / "model.safetensors").unlink(), (d / "pytorch_model.bin").write_bytes(pickle.dumps({}))],
        ["pytorch_model.bin is not read", "pickle"],
    ),
    "truncated": ("llama-gqa", lambda d: truncate(d / "model.safetensors", 0.6), ["model.safetensors is corrupted"]),
    "empty": ("llama-gqa", lambda d: truncate(d / "model.safetensors", 0), ["model.safetensors is corrupted"]),
    "garbage": (
        "llama-gqa",
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 4096),
        ["model.safetensors is corrupted or truncated"],
    ),
    "truncated shard": (
        "qwen2-tied-sharded",
        lambda d: truncate(d / "model-00002-of-00002.safetensors", 0.9),
        ["model-00002-of-00002.safetensors is corrupted"],
    ),
    "missing shard": (
        "qwen2-tied-sharded",
        lambda d: (d / "model-00001-of-00002.safetensors").unlink(),
        ["model-00001-of-00002.safetensors is missing"],
    ),
    "shard elsewhere": (
        "qwen2-tied-sharded",
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        ["'../a.safetensors'", "not a safetensors file beside it"],
    ),
    "a shard of another cut": (
        "sdar-tied-sharded",
        lambda d: shutil.copy(GOLDEN / "sdar-gqa" / "model.safetensors", d / "model-00002-of-00002.safetensors"),
        ["model-00002-of-00002.safetensors holds model.embed_tokens.weight, which an earlier shard holds as well"],
    ),
    "a shard of another model": (
        "llada2-mini-sharded",
        lambda d: shutil.copy(
            GOLDEN / "llada_moe-dense-shared-sharded" / "model-00002-of-00002.safetensors",
            d / "model-00002-of-00002.safetensors",
        ),
        ["model-00002-of-00002.safetensors holds model.layers.1.mlp.experts.2.down_proj.weight", "earlier shard"],
    ),
    "empty index": (
        "qwen2-tied-sharded",
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        ["has no weight_map"],
    ),
    "missing tensor": (
        "llama-gqa",
        lambda d: weights(d, lambda w: w.pop("model.layers.1.self_attn.k_proj.weight")),
        ["lacks model.layers.1.self_attn.k_proj.weight"],
    ),
    "many missing": (
        "llada-gqa",
        lambda d: weights(d, lambda w: [w.pop(n) for n in list(w) if "blocks.1" in n]),
        ["lacks model.transformer.blocks.1.", "and 6 more tensors"],
    ),
    "unexpected tensor": (
        "llama-gqa",
        lambda d: weights(d, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        ["model.layers.0.self_attn.q_proj.bias", "does not have"],
    ),
    "wrong shape": (
        "dream-mha-tied",
        lambda d: weights(d, lambda w: w.update({"model.norm.weight": torch.zeros(7)})),
        ["model.norm.weight has shape (7,), expected (32,)"],
    ),
    "wrong piece": (
        "llama-gqa",
        lambda d: weights(d, lambda w: w.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 32)})),
        ["k_proj.weight has shape (32, 32), expected (16, 32)"],
    ),
    "unsupported": (
        "llama-gqa",
        lambda d: edit(d, architectures=["MambaForCausalLM"]),
        ["MambaForCausalLM is not supported", *(name for f in FAMILIES for name in f.architectures)],
    ),
    "mixture of experts with the dense type": (
        "llada-gqa",
        lambda d: edit(d, architectures=["LLaDAMoEModelLM"]),
        ["config.json: hidden_size is missing"],
    ),
    "no block size": ("sdar-gqa", lambda d: edit(d, block_size=None), ["config.json: block_size", "give it as block"]),
    "no block at all": (
        "fast_dllm_v2-tied",
        lambda d: edit(d, bd_size=0),
        ["bd_size must be a positive integer, not 0"],
    ),
    "unknown router": (
        "llada2-mini-2.1",
        lambda d: edit(d, score_function="tanh"),
        ["score_function is 'tanh'; LLaDA2MoeModelLM is supported with 'sigmoid' only"],
    ),
    "biased router": (
        "llada_moe-mha",
        lambda d: edit(d, moe_router_enable_expert_bias=True),
        ["moe_router_enable_expert_bias is True", "with False only"],
    ),
    "dense layers among sparse ones": (
        "llada_moe-mha",
        lambda d: edit(d, moe_layer_freq=[1, 0]),
        ["moe_layer_freq is [1, 0]", "before all layers of experts only"],
    ),
    "more experts than there are": (
        "llada_moe-mha",
        lambda d: edit(d, num_experts_per_tok=9),
        ["config.json: 9 experts", "cannot be chosen among 8"],
    ),
    "groups that do not fit": (
        "llada2-mini-2.1",
        lambda d: edit(d, n_group=3),
        ["16 experts do not make 3 groups"],
    ),
    "one expert fewer": (
        "llada_moe-mha",
        lambda d: edit(d, num_experts=7),
        ["mlp.gate.weight has shape (8, 32), expected (7, 32)"],
    ),
    "a missing expert": (
        "llada2-mini-2.1",
        lambda d: weights(d, lambda w: w.pop("model.layers.2.mlp.experts.13.up_proj.weight")),
        ["model.safetensors lacks model.layers.2.mlp.experts.13.up_proj.weight"],
    ),
    "no expert bias": (
        "llada2-mini-2.1",
        lambda d: weights(d, lambda w: w.pop("model.layers.1.mlp.gate.expert_bias")),
        ["lacks model.layers.1.mlp.gate.expert_bias"],
    ),
    "experts of another width": (
        "llada2-mini-2.1",
        lambda d: edit(d, moe_intermediate_size=13),
        ["experts.0.down_proj.weight has shape (32, 12), expected (32, 13)"],
    ),
    "a strange share of rotation": (
        "llada2-mini-2.1",
        lambda d: edit(d, partial_rotary_factor=1.5),
        ["partial_rotary_factor must be a number above 0 and at most 1, not 1.5"],
    ),
    "an odd part of a head": (
        "llada2-mini-2.1",
        lambda d: edit(d, partial_rotary_factor=0.45),
        ["a head cannot be rotated in 7 of 16 dimensions"],
    ),
    "no architecture": ("llama-gqa", lambda d: edit(d, architectures=None, model_type=None), ["not named in"]),
    "missing key": ("llama-gqa", lambda d: edit(d, hidden_size=None), ["hidden_size is missing"]),
    "silly size": ("llama-gqa", lambda d: edit(d, hidden_size=-4), ["hidden_size must be a positive integer, not -4"]),
    "text for a size": ("llama-gqa", lambda d: edit(d, num_hidden_layers="two"), ["positive integer, not 'two'"]),
    "uneven heads": ("llama-gqa", lambda d: edit(d, num_key_value_heads=3), ["4 heads cannot share 3"]),
    "rope scaling": (
        "qwen2-gqa",
        lambda d: edit(d, rope_scaling={"type": "yarn", "factor": 4.0}),
        ["rope scaling 'yarn' is not supported"],
    ),
    "half a llama3": ("llama-gqa", lambda d: edit(d, rope_scaling={"rope_type": "llama3"}), ["lacks factor"]),
    "attention bias": ("llama-gqa", lambda d: edit(d, attention_bias=True), ["attention_bias is True"]),
    "other activation": ("llada-gqa", lambda d: edit(d, activation_type="gelu"), ["activation_type is 'gelu'"]),
    "no mask token": ("dream-mha-tied", lambda d: edit(d, mask_token_id=None), ["151666 is outside the vocabulary"]),
    "quantized": ("qwen2-gqa", lambda d: edit(d, quantization_config={"bits": 4}), ["quantized weights are not"]),
    "foreign tokenizer": (
        "llama-gqa",
        lambda d: Inner(models.WordLevel({f"w{i}": i for i in range(99)}, "w0")).save(str(d / "tokenizer.json")),
        ["the tokenizer has 99 tokens, the model only 96"],
    ),
    "broken tokenizer": (
        "llama-gqa",
        lambda d: (d / "tokenizer.json").write_text('{"model": 1}'),
        ["tokenizer.json is not a tokenizer"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_files_end_in_one_line(case: str, copy: Callable[[str], Path]) -> None:
    name, spoil, expected = WRONG[case]
    directory = copy(name)
    spoil(directory)
    with pytest.raises(UserError) as caught:
        load_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("key", ["layers", "vocab_size"])
def test_own_config_with_a_hole(tmp_path: Path, key: str) -> None:
    save_checkpoint(Transformer(CONFIG), tmp_path)
    edit(tmp_path, **{key: None})
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": 2.5}, "the size of a layout's blocks must be a whole number, not 2.5"),
        ({"size": True}, "must be a whole number, not True"),
        ({"size": "8"}, "must be a whole number, not '8'"),
        ({"size": None}, "must be a whole number, not None"),
        ({"size": 0}, "a block layout needs a size of at least 1, not 0"),
        ({"kind": "full", "size": -8}, "size must be an integer of at least 0, not -8"),
        ({"size": 1 << 70}, "more than 4194304 is not supported"),
        ({"kind": "blocks"}, "a layout has no 'blocks'; known are full, causal, block"),
        ({"grid": ["origin"]}, "known are absolute, origin"),
        ({"wings": 2}, "unknown key wings in layout"),
    ],
)
def test_own_config_with_a_broken_layout(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    save_checkpoint(Transformer(CONFIG), tmp_path)
    edit(tmp_path, layout={"kind": "block", "size": 4, **changes})
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layout": []}, r"layout must be an object, not \[\]"),
        ({"rope_scaling": 4.0}, "rope_scaling must be an object, not 4.0"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling lacks low, high, original"),
        ({"experts": {"number": 4}}, "unknown key number in experts"),
        ({"in_flight": "yes"}, "in_flight must be true or false, not 'yes'"),
        ({"in_flight": 1}, "in_flight must be true or false, not 1"),
    ],
)
def test_own_config_with_a_broken_part(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    save_checkpoint(Transformer(CONFIG), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=told):
        load_checkpoint(tmp_path)


def test_own_config_of_before_in_flight_is_written_block_by_block(tmp_path: Path) -> None:
    save_checkpoint(Transformer(replace(CONFIG, in_flight=True)), tmp_path)
    edit(tmp_path, in_flight=None)
    assert not load_checkpoint(tmp_path).model.config.in_flight


def test_own_config_of_a_later_version(tmp_path: Path) -> None:
    save_checkpoint(Transformer(CONFIG), tmp_path)
    edit(tmp_path, wings=2)
    with pytest.raises(UserError, match="unknown key wings"):
        load_checkpoint(tmp_path)


def test_what_is_harmless_is_ignored(copy: Callable[[str], Path]) -> None:
    directory = copy("dream-mha-tied")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": torch.zeros(96, 32)}
    weights(directory, lambda w: w.update(extra))
    plain = load_checkpoint(GOLDEN / "dream-mha-tied").model.state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in load_checkpoint(directory).model.state_dict().items())


def test_newer_rope_parameters(copy: Callable[[str], Path]) -> None:
    directory = copy("llama-tied-llama3")
    before = load_checkpoint(directory).model
    said = json.loads((directory / "config.json").read_text())
    edit(directory, rope_theta=None, rope_scaling=None, rope_parameters={**said["rope_scaling"], "rope_theta": 1e4})
    after = load_checkpoint(directory).model
    assert before.config == after.config
    edit(directory, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert load_checkpoint(directory).model.config.rope_theta == 5e5


def test_generation_config_adds_stops(copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2-gqa")
    (directory / "generation_config.json").write_text('{"eos_token_id": [9, 0], "bos_token_id": 4}')
    assert load_checkpoint(directory).model.config.eos_ids == (0, 9)


def test_null_mask_in_generation_config_is_no_mask(copy: Callable[[str], Path]) -> None:
    directory = copy("dream-mha-tied")
    (directory / "generation_config.json").write_text('{"mask_token_id": null}')
    assert load_checkpoint(directory).model.config.mask_id == 5


@pytest.mark.parametrize("dtype", ["float32", "torch.bfloat16", torch.float64])
def test_dtype_asked_for(dtype: str | torch.dtype) -> None:
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    assert load_checkpoint(GOLDEN / "llada-gqa", dtype=dtype).model.dtype == expected


def test_padded_vocabulary_is_not_counted(copy: Callable[[str], Path]) -> None:
    directory = copy("llada-gqa")
    Inner(models.WordLevel({f"w{i}": i for i in range(80)}, "w0")).save(str(directory / "tokenizer.json"))
    assert load_checkpoint(directory).model.config.token_count == 80


def test_unknown_dtype() -> None:
    with pytest.raises(UserError, match=r"unknown dtype 'int4'.*bfloat16"):
        load_checkpoint(GOLDEN / "llada-gqa", dtype="int4")


@pytest.mark.parametrize("source", ["no/such/place", "nowhere", "", "/no/such/directory", "a b/c"])
def test_neither_directory_nor_hub_id(source: str) -> None:
    if not source:
        with pytest.raises(UserError):
            load_checkpoint(source)
        return
    with pytest.raises(UserError, match="no directory"):
        load_checkpoint(source)


def test_a_file_is_no_checkpoint() -> None:
    with pytest.raises(UserError, match="is a file"):
        load_checkpoint(GOLDEN / "llada-gqa" / "model.safetensors")


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a directory here nor in the local hub cache"):
        load_checkpoint("nobody/nothing")


def test_hub_takes_no_code_and_no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(GOLDEN / "llada-gqa")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load_checkpoint("GSAI-ML/LLaDA-8B-Base")
    assert (loaded.name, asked["name"]) == ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Base")
    assert not any(p.endswith(("*", ".py", ".bin", ".pt")) for p in asked["patterns"])
