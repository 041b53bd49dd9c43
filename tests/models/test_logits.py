"""Law 2 for models: what a published checkpoint computes here equals what its own modelling code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.decode import Canvas
from unmask.models import KVPool, Layout, Loaded, load_checkpoint

CHECKPOINTS = Path(__file__).parents[1] / "golden_models" / "checkpoints"
NAMES = sorted(p.name for p in CHECKPOINTS.iterdir())
SHAPES = {  # layout, shift, qkv bias, qk-norm, stops
    "llada": ("full", False, None, False, (0,)),
    "dream": ("full", True, True, False, (0,)),
    "llama": ("causal", True, False, False, None),
    "qwen2": ("causal", True, True, False, (0,)),
    "qwen3": ("causal", True, False, True, (0,)),
    "diffullama": ("full", True, False, False, (0,)),
    "sdar": ("block", False, False, True, (0,)),
    "fast_dllm_v2": ("block", True, True, False, (0,)),
    "llada2": ("block", False, None, True, (0,)),
    "llada_moe": ("full", False, False, True, (0,)),
}
BLOCKS = {"sdar": 4, "fast_dllm_v2": 32, "llada2": 32}
FAMILY = {"diffullama": "diffullama"}
"""What the files of a checkpoint do not say."""


def load(name: str) -> tuple[Loaded, Tensor, Tensor]:
    golden = load_file(CHECKPOINTS / name / "golden.safetensors")
    family = FAMILY.get(name.partition("-")[0], "")
    return load_checkpoint(CHECKPOINTS / name, dtype="float32", family=family), golden["ids"], golden["logits"]


def whole(loaded: Loaded, ids: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1]).expand_as(ids)
    visible = loaded.model.config.layout.visible(index, index, torch.zeros(len(ids), dtype=torch.int64))
    with torch.inference_mode():
        return loaded.model(ids, visible=None if visible is None else visible[:, None])


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_official_code(name: str) -> None:
    loaded, ids, logits = load(name)
    assert logits.std() > 0.5
    assert error(whole(loaded, ids), logits) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_the_family_is(name: str) -> None:
    loaded, ids, _ = load(name)
    c, family = loaded.model.config, name.partition("-")[0]
    layout, shift, bias, norm, stops = SHAPES[family]
    assert (c.family, c.layout.kind, c.shift, c.qk_norm) == (family, layout, shift, norm)
    if layout == "block":
        assert c.layout == Layout("block", BLOCKS[family], grid="absolute", prompt="blocks")
        assert ids.shape[1] % c.layout.size
    assert bias is None or c.qkv_bias == bias
    assert stops is None or c.eos_ids == stops
    assert c.mask_id == (-1 if c.autoregressive else 5)
    assert c.tied == ("tied" in name)


@pytest.mark.parametrize("name", NAMES)
def test_pool_changes_nothing(name: str) -> None:
    """Causal: cell by cell from the pool. Full: all cells again, over stale keys of other tokens, equals no pool."""
    loaded, ids, _ = load(name)
    c, (rows, width) = loaded.model.config, ids.shape
    pool = KVPool(c, rows + 1, width + 3, dtype=torch.float32)
    slots, index = torch.tensor([2, 0]), torch.arange(width).expand_as(ids)
    expected, got = whole(loaded, ids), []
    pieces = [(i, i + n) for i, n in ((0, 5), *((k, 1) for k in range(5, width)))] if c.autoregressive else [(0, width)]
    with torch.inference_mode():
        loaded.model((ids + 1) % c.vocab_size, index, kv=pool.at(slots, index, width))
        for first, last in pieces:
            at = index[:, first:last]
            visible = c.layout.visible(at, index[:, :last], torch.zeros(rows, dtype=torch.int64))
            view = pool.at(slots, at, last)
            out = loaded.model(ids[:, first:last], at, kv=view, visible=None if visible is None else visible[:, None])
            got.append(out)
    assert error(torch.cat(got, 1), expected) <= 1e-6


def test_head_runs_where_asked() -> None:
    loaded, ids, logits = load("llada-gqa")
    need = torch.tensor([3, 30])
    with torch.inference_mode():
        assert error(loaded.model(ids, need=need), logits.flatten(0, 1)[need]) <= 1e-5


def test_stored_dtype_is_kept_and_inference_is_frozen() -> None:
    loaded = load_checkpoint(CHECKPOINTS / "dream-gqa-sharded")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.cos.dtype == torch.float32
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.name, loaded.tokenizer) == ("dream-gqa-sharded", None)


def test_canvas_of_a_loaded_model_never_commits_its_mask() -> None:
    c = load("llada-gqa")[0].model.config
    assert Canvas.new([[1, 2]], 3, mask_id=c.mask_id, eos=c.eos_ids).tokens[0].tolist() == [1, 2, 5, 5, 5]
