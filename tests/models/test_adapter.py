"""LoRA adapters: what a published one computes, the base it was made for, and what it says when that is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmask
from unmask import zoo
from unmask.errors import UserError
from unmask.models import Layout, ModelConfig, Transformer, load_checkpoint, save_checkpoint
from unmask.models.adapter import save_adapter
from unmask.models.joint import digest

FOLDER = Path(__file__).parents[1] / "golden_models"
GOLDEN, CHECKPOINTS = FOLDER / "adapters", FOLDER / "checkpoints"
BASES = {"d2f_llada": ("llada-gqa", "LLaDA-8B-Instruct"), "d2f_dream": ("dream-gqa-sharded", "Dream-v0-Base-7B")}
BLOCK = Layout("block", 8)


@pytest.fixture
def placed(tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint in a directory of that name."""
    return lambda name, called: Path(shutil.copytree(CHECKPOINTS / name, tmp_path / called))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pairs(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    stored = load_file(directory / "adapter_model.safetensors")
    change(stored)
    save_file(stored, directory / "adapter_model.safetensors")


def run(model: Transformer, ids: Tensor, origin: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1]).expand_as(ids)
    visible = model.config.layout.visible(index, index, origin)
    with torch.inference_mode():
        return model(ids, visible=None if visible is None else visible[:, None])


def refused(*parts: str, **how: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(**how)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", BASES)
def test_logits_equal_the_official_code(name: str, placed: Callable[..., Path]) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    base = placed(*BASES[name])
    model = load_checkpoint(GOLDEN / name, base=base, dtype="float32").model
    found = run(model, golden["ids"], golden["origin"])
    assert (found - golden["logits"]).norm() <= 1e-5 * golden["logits"].norm()
    plain = load_checkpoint(base).model.config
    assert model.config == replace(plain, layout=Layout("block", 16, "origin", "bidirectional"), in_flight=True)
    assert (model.config.shift, model.config.mask_id) == (name == "d2f_dream", 5)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_merged_in_fp32_and_rounded_once(dtype: str, placed: Callable[..., Path]) -> None:
    base = placed(*BASES["d2f_llada"])
    loaded = load_checkpoint(GOLDEN / "d2f_llada", base=base, dtype=dtype)
    stored, low = load_file(base / "model.safetensors"), load_file(GOLDEN / "d2f_llada" / "adapter_model.safetensors")
    name = "model.transformer.blocks.1.k_proj"
    a, b = (low[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    expected = (stored[f"{name}.weight"].float() + 8 / 4 * b @ a).to(loaded.model.dtype)
    config = loaded.model.config
    assert loaded.model.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    assert torch.equal(loaded.model.blocks[1].attn.qkv.weight[32 : 32 + 16], expected)  # type: ignore[union-attr]
    assert (config.heads * config.head_dim, loaded.model.cos.dtype, loaded.name) == (32, torch.float32, "d2f_llada")
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("called", ["LLaDA-8B-Base", "LLaDA-1.5", "llada"])
def test_the_wrong_base_is_refused(called: str, placed: Callable[..., Path]) -> None:
    """Its shapes fit, and it would decode: 20 points worse."""
    parts = ["made for 'GSAI-ML/LLaDA-8B-Instruct'", "not known to be that model", called, "called 'LLaDA-8B-Instruct'"]
    refused(*parts, source=GOLDEN / "d2f_llada", base=placed("llada-gqa", called))


def test_what_makes_a_base_known(placed: Callable[..., Path], tmp_path: Path) -> None:
    """Its directory, a link to it, `_name_or_path` in its config.json, or its place in a hub cache."""
    load: Callable[[Path], Any] = lambda base: load_checkpoint(GOLDEN / "d2f_llada", base=base)  # noqa: E731
    there = placed("llada-gqa", "x/weights")
    (tmp_path / "llada-8b-instruct").symlink_to(there)
    load(tmp_path / "llada-8b-instruct")
    path = there / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"}))
    load(there)
    load(placed("llada-gqa", "models--GSAI-ML--LLaDA-8B-Instruct/snapshots/08b83a6"))


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"SJTU/D2F_LLaDA_Lora": GOLDEN / "d2f_llada", "GSAI-ML/LLaDA-8B-Instruct": CHECKPOINTS / "llada-gqa"}
    here["GSAI-ML/LLaDA-8B-Base"] = CHECKPOINTS / "llada-sharded"
    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(allow_patterns)
        return str(here[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load_checkpoint("SJTU/D2F_LLaDA_Lora")
    assert (loaded.name, loaded.model.config.layout.size) == ("SJTU/D2F_LLaDA_Lora", 16)
    assert asked == list(here)[:2]
    refused("GSAI-ML/LLaDA-8B-Instruct", source="SJTU/D2F_LLaDA_Lora", base="GSAI-ML/LLaDA-8B-Base")


@pytest.mark.parametrize("name", ["/data1/models/LLaDA-8B-Instruct", "llada"])
def test_a_base_that_is_not_here_is_asked_for(name: str, copy: Callable[[str], Path]) -> None:
    """Published adapters name the directory of the machine they were trained on."""
    directory = copy("d2f_llada")
    edit(directory, base_model_name_or_path=name)
    refused("is an adapter of", name, "give that model as base", source=directory)


def test_a_base_of_another_family(placed: Callable[..., Path]) -> None:
    base = placed("dream-gqa-sharded", "LLaDA-8B-Instruct")
    path = (
        "d2f_llada/adapter_model.safetensors holds base_model.model.model.transformer.blocks.0.attn_out.lora_A.weight"
    )
    refused(path, "adapts nothing that its base has (dream)", source=GOLDEN / "d2f_llada", base=base)


def test_a_base_of_other_shapes(placed: Callable[..., Path]) -> None:
    base = placed("llada-sharded", "LLaDA-8B-Instruct")
    parts = ["blocks.0.k_proj.lora_B.weight has shape (16, 4), expected (32, 4)", "adapter_model.safetensors"]
    refused(*parts, source=GOLDEN / "d2f_llada", base=base)


def test_blocks_of_another_size(placed: Callable[..., Path], copy: Callable[[str], Path]) -> None:
    base = placed(*BASES["d2f_llada"])
    for block, size in ((None, 16), (16, 16), (32, 32), (48, 48), (8, 8)):
        assert load_checkpoint(GOLDEN / "d2f_llada", base=base, block=block).model.config.layout == Layout(
            "block", size
        )
    refused("blocks of 16 cells", "not 24", source=GOLDEN / "d2f_llada", base=base, block=24)


def test_an_adapter_of_unknown_attention_is_asked_about(placed: Callable[..., Path], tmp_path: Path) -> None:
    base, directory = placed(*BASES["d2f_llada"]), Path(shutil.copytree(GOLDEN / "d2f_llada", tmp_path / "lora"))
    refused("adapter_config.json does not say", "block=16", "block=0", source=directory, base=base)
    layouts = [load_checkpoint(directory, base=base, block=block).model.config.layout for block in (0, 16)]
    assert layouts == [Layout(), Layout("block", 16)]


OURS = {"base_digest": "", "layout": {"kind": "block", "size": 8}}
WRONG: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "half a pair": (
        lambda d: pairs(d, lambda w: w.pop("base_model.model.model.transformer.blocks.1.q_proj.lora_B.weight")),
        ["adapter_model.safetensors lacks model.transformer.blocks.1.q_proj.lora_B"],
    ),
    "a layer too few": (
        lambda d: pairs(d, lambda w: [w.pop(n) for n in list(w) if "blocks.1." in n]),
        ["lacks model.transformer.blocks.1.q_proj.lora_A", "and more"],
    ),
    "nothing": (lambda d: pairs(d, lambda w: w.clear()), ["adapter_model.safetensors lacks"]),
    "a layer too many": (
        lambda d: pairs(
            d,
            lambda w: w.update({"base_model.model.model.transformer.blocks.2.q_proj.lora_A.weight": torch.ones(4, 32)}),
        ),
        ["holds base_model.model.model.transformer.blocks.2.q_proj.lora_A.weight", "adapts nothing"],
    ),
    "a norm": (
        lambda d: pairs(d, lambda w: w.update({"base_model.model.model.transformer.ln_f.weight": torch.ones(32)})),
        ["holds base_model.model.model.transformer.ln_f.weight"],
    ),
    "another rank": (lambda d: edit(d, r=8), ["lora_A.weight has shape (4, 32), expected (8, 32)"]),
    "no rank": (lambda d: edit(d, r=None), ["adapter_config.json: r is missing"]),
    "no alpha": (lambda d: edit(d, lora_alpha="x"), ["lora_alpha must be a positive number, not 'x'"]),
    "no base": (lambda d: edit(d, base_model_name_or_path=None), ["base_model_name_or_path is missing"]),
    "another method": (lambda d: edit(d, peft_type="IA3"), ["peft_type is 'IA3'; supported is 'LORA' only"]),
    "magnitudes": (lambda d: edit(d, use_dora=True), ["use_dora is True; supported is False only"]),
    "biases": (lambda d: edit(d, bias="all"), ["bias is 'all'; supported is 'none' only"]),
    "whole modules": (lambda d: edit(d, modules_to_save=["norm"]), ["modules_to_save is ['norm']"]),
    "strange layout": (lambda d: edit(d, unmask={"base_digest": "", "layout": {"kind": "round"}}), ["no 'round'"]),
    "half of ours": (
        lambda d: edit(d, unmask={"layout": {}}),
        ["adapter_config.json: the record `unmask` lacks base_"],
    ),
    "ours without layout": (
        lambda d: edit(d, unmask={"base_digest": "0"}),
        ["the record `unmask` lacks layout; write"],
    ),
    "nothing of ours": (lambda d: edit(d, unmask=["layout"]), ["lacks layout and base_digest; write the adapter anew"]),
    "a mask that is none": (lambda d: edit(d, unmask={**OURS, "mask_id": "x"}), ["mask_id must be the id of a token"]),
    "a mask too high": (
        lambda d: edit(d, unmask={**OURS, "mask_id": 1 << 20}),
        ["mask_id is 1048576, and the base has"],
    ),
    "a pickle": (
        lambda d: [(d / "adapter_model.safetensors").unlink(), (d / "adapter_model.bin").write_bytes(b"")],
        ["has no adapter_model.safetensors; adapter_model.bin is not read, because a pickle can run code"],
    ),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:5000]),
        ["adapter_model.safetensors is corrupted or truncated"],
    ),
    "integers": (
        lambda d: pairs(d, lambda w: w.update({n: t.to(torch.int8) for n, t in w.items()})),
        ["is stored as I8"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_files_end_in_one_line(case: str, copy: Callable[[str], Path], placed: Callable[..., Path]) -> None:
    directory, base = copy("d2f_llada"), placed(*BASES["d2f_llada"])
    spoil, expected = WRONG[case]
    spoil(directory)
    refused(*expected, source=directory, base=base)


def test_any_value_of_any_key(copy: Callable[[str], Path], placed: Callable[..., Path]) -> None:
    directory, base = copy("d2f_llada"), placed(*BASES["d2f_llada"])
    said = json.loads((directory / "adapter_config.json").read_text())
    keys = ["peft_type", "r", "lora_alpha", "base_model_name_or_path", "target_modules", "use_rslora", "bias", "unmask"]
    for key in keys:
        for value in [None, True, -1, 0, 1.5, "x", [], ["x"], {}, {"a": 1}, float("nan"), float("inf")]:
            (directory / "adapter_config.json").write_text(json.dumps({**said, key: value}))
            try:
                load_checkpoint(directory, base=base)
            except UserError as error:
                assert "\n" not in str(error)


def test_rank_stabilised_scale(copy: Callable[[str], Path], placed: Callable[..., Path]) -> None:
    """alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)."""
    directory, base = copy("d2f_llada"), placed(*BASES["d2f_llada"])
    before = load_checkpoint(directory, base=base, dtype="float32").model
    edit(directory, use_rslora=True, lora_alpha=4)
    after = load_checkpoint(directory, base=base, dtype="float32").model
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_only_an_adapter_has_a_base(placed: Callable[..., Path]) -> None:
    base = placed("llada-gqa", "m")
    refused("is no adapter (it has no adapter_config.json); leave base out", source=base, base=base)


def drawn(model: Transformer, *, rank: int = 2) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random pairs on q, k, v and the output of every layer."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    found = {}
    for layer in range(c.layers):
        for name, piece, rows, width in (
            *(("qkv", piece, n, c.d_model) for piece, n in (("q", q), ("k", kv), ("v", kv))),
            ("out", "", c.d_model, q),
        ):
            shapes = ((rank, width), (rows, rank))
            halves = tuple(torch.randn(shape, generator=generator) for shape in shapes)
            found[f"blocks.{layer}.attn.{name}.weight", piece] = halves
    return found


@pytest.mark.parametrize("name", ["own", "llada-gqa", "dream-gqa-sharded", "sdar-gqa", "llada2-mini-2.1", "qwen3-gqa"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    """In the names of any family, of the base they were trained on and no other, with the attention they know."""
    source = CHECKPOINTS / name
    if name == "own":
        own = ModelConfig(96, 32, 2, 4, 48, kv_heads=2, shift=True, mask_id=2)
        save_checkpoint(Transformer(own).initialise(0), source := tmp_path / "own", dtype=torch.float32)
    base = load_checkpoint(source, dtype="float32").model
    low, c = drawn(base), base.config
    told = {"alpha": 3.0, "base": str(source), "digest": digest(base), "layout": BLOCK, "mask_id": 7}
    save_adapter(tmp_path / "a", c, low, **told)
    merged = load_checkpoint(tmp_path / "a", dtype="float32").model
    assert merged.config == replace(c, layout=BLOCK, mask_id=7)
    save_adapter(tmp_path / "flying", c, low, **told, in_flight=True)
    assert load_checkpoint(tmp_path / "flying").model.config == replace(c, layout=BLOCK, in_flight=True, mask_id=7)
    said = json.loads((tmp_path / "flying" / "adapter_config.json").read_text())
    said["unmask"]["in_flight"] = "yes"
    (tmp_path / "flying" / "adapter_config.json").write_text(json.dumps(said))
    refused("in_flight must be true or false, not 'yes'", source=tmp_path / "flying")
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    first = {"q": 0, "k": q, "v": q + kv, "": 0}
    weights = {key: p.clone() for key, p in base.named_parameters()}
    for (key, piece), (a, b) in low.items():
        weights[key][first[piece] : first[piece] + len(b)] += 1.5 * b @ a
    for key, p in merged.named_parameters():
        torch.testing.assert_close(p, weights[key])
    assert load_checkpoint(tmp_path / "a", block=16).model.config.layout.size == 16
    save_adapter(tmp_path / "b", c, low, **{**told, "digest": "0" * 16})
    refused("was made for a base of other weights (0000000000000000)", digest(base), source=tmp_path / "b")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["unmask"]["block"]) == ("LORA", 2, 8)


def test_an_adapter_in_blocks_has_a_mask(tmp_path: Path) -> None:
    """Its own, else that of its base; without either nothing is read, and without blocks none is needed."""
    masks = {}
    for own, theirs in ((-1, 2), (5, 2), (5, -1)):
        model = Transformer(ModelConfig(96, 32, 2, 4, 48, mask_id=theirs)).initialise(0)
        save_checkpoint(model, tmp_path / "base")
        told = {"alpha": 2.0, "base": "../base", "digest": digest(model), "mask_id": own}
        save_adapter(tmp_path / "a", model.config, drawn(model), layout=BLOCK, **told)
        masks[own, theirs] = load_checkpoint(tmp_path / "a").model.config.mask_id
    assert list(masks.values()) == [2, 5, 5]
    save_adapter(tmp_path / "a", model.config, drawn(model), layout=BLOCK, **{**told, "mask_id": -1})
    refused("names no mask and its base has none", source=tmp_path / "a")
    edit(tmp_path / "a", unmask={"base_digest": told["digest"], "layout": {"kind": "block", "size": 8}})  # as once
    refused("names no mask and its base has none", source=tmp_path / "a")
    save_adapter(tmp_path / "a", model.config, drawn(model), layout=Layout(), **{**told, "mask_id": -1})
    assert load_checkpoint(tmp_path / "a").model.config.mask_id == -1


def test_one_weight_of_the_base_more_is_another_base(tmp_path: Path) -> None:
    """Fine-tuning a base by one number is told by its digest, wherever it lies."""
    model = Transformer(ModelConfig(96, 32, 2, 4, 48, mask_id=2)).initialise(0)
    save_checkpoint(model, tmp_path / "base")
    told = {"alpha": 2.0, "base": "../base", "digest": digest(model), "layout": BLOCK}
    save_adapter(tmp_path / "a", model.config, drawn(model), **told)
    assert load_checkpoint(tmp_path / "a").model.config.layout == BLOCK
    with torch.no_grad():
        model.norm.weight[3] += 0.1
    save_checkpoint(model, tmp_path / "base")
    refused("other weights", source=tmp_path / "a")


def test_an_adapter_of_the_embedded_model(tmp_path: Path) -> None:
    plain = load_checkpoint(zoo.path(), dtype="float32").model
    low = {key: (a, 0 * b) for key, (a, b) in drawn(plain).items()}
    save_adapter(tmp_path / "a", plain.config, low, alpha=2.0, base="dllm", digest=digest(plain), layout=BLOCK)
    model = unmask.load(tmp_path / "a")
    assert model.network.config.layout == BLOCK
    assert all(torch.equal(p, q) for p, q in zip(model.network.parameters(), plain.parameters(), strict=True))
    with pytest.raises(UserError, match="other weights"):
        unmask.load(tmp_path / "a", base="dllm-60")
    assert unmask.load(tmp_path / "a", base="dllm", block=4).network.config.layout.size == 4
