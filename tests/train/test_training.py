"""Masks, losses, and runs that resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unmask.errors import UserError
from unmask.models.load import load_checkpoint
from unmask.train import loss, optim, vocabulary
from unmask.train.batches import BUCKETS, MIXTURES, Mixture
from unmask.train.export import export
from unmask.train.loop import TrainConfig, Trainer

PROBLEMS = tuple(b if b.task == "problems" else replace(b, task="problems") for b in BUCKETS)


def mixture(tokens: int = 300) -> Mixture:
    return Mixture(vocabulary.build([]), [], 0, tokens, PROBLEMS)


def small(**changes: object) -> TrainConfig:
    base = TrainConfig(
        steps=6, d_model=16, layers=1, heads=2, ff=16, dtype="float32", compile=False, tokens_per_step=300, save_every=2
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def trainer(folder: Path, **changes: object) -> Trainer:
    return Trainer(small(**changes), mixture(), folder)


def test_batches_are_a_function_of_seed_and_step() -> None:
    a, b = mixture().batch(5), mixture().batch(5)
    assert torch.equal(a.tokens, b.tokens)
    assert a.tokens.shape != mixture().batch(6).tokens.shape or not torch.equal(a.tokens, mixture().batch(6).tokens)
    assert all(abs(sum(s) - 1) < 0.02 and len(s) == len(BUCKETS) for s in MIXTURES.values())


@pytest.mark.parametrize("suffix", [0.0, 0.5, 1.0])
def test_masks_touch_only_the_response_and_weights_sum_to_one(suffix: float) -> None:
    batch = mixture(3000).batch(0)
    response = batch.tokens[:, batch.prompt :]
    masked, weight = loss.corrupt(response, torch.Generator().manual_seed(0), suffix=suffix)
    assert masked.any(1).all()
    assert torch.allclose(weight.sum(1), torch.ones(len(weight)))
    assert not weight[~masked].any()
    inputs, _, visible = loss.dllm_inputs(batch, torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, : batch.prompt], batch.tokens[:, : batch.prompt])
    assert not visible[:, :, :, : batch.prompt][
        ~batch.valid[:, None, None, : batch.prompt].expand(-1, 1, visible.shape[2], -1)
    ].any()


def test_uniform_masks_cover_all_rates() -> None:
    response = torch.full((4000, 20), 7)
    masked, _ = loss.corrupt(response, torch.Generator().manual_seed(0), suffix=0.0)
    share = masked.float().mean(1)
    assert abs(share.mean().item() - 0.525) < 0.01  # k is uniform on 1..20
    assert share.min() == 0.05
    assert share.max() == 1


def test_the_twin_sees_no_future() -> None:
    run = trainer(Path("unused"), kind="ar")
    batch = mixture().batch(0)
    inputs, weight, visible = loss.ar_inputs(batch, torch.Generator())
    target = batch.tokens[:, batch.prompt :]
    changed = inputs.clone()
    changed[:, -1] = 9
    early = weight.clone()
    early[:, -1] = 0
    a = loss.loss(run.model, inputs, target, early, visible, torch.float32)
    b = loss.loss(run.model, changed, target, early, visible, torch.float32)
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["dllm", "ar"])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, kind: str) -> None:
    whole = trainer(tmp_path / "whole", kind=kind)
    list(whole.run())
    first = trainer(tmp_path / "parts", kind=kind)
    for _ in range(4):
        first.train_step()
    first.save()
    second = trainer(tmp_path / "parts", kind=kind)
    assert second.resume()
    assert second.step == 4
    list(second.run())
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind="ar", steps=60, muon_lr=0.02, adam_lr=0.01)
    values = [run.train_step() for _ in range(60)]
    assert sum(values[-10:]) < 0.9 * sum(values[:10])


def test_another_setting_is_refused_on_resume(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    run.save()
    with pytest.raises(UserError, match="another muon_lr"):
        trainer(tmp_path, muon_lr=0.5).resume()
    (tmp_path / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        trainer(tmp_path).resume()


def test_progress_checkpoints_and_export(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", keep=(0.5,))
    last = list(run.run(evaluate=lambda model: {"right": 0.25}, evaluate_every=3))[-1]
    assert last.step == last.steps == 6
    assert last.metrics == {"right": 0.25}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "kept-050.pt", "log.jsonl"}
    card = export(tmp_path / "run" / "checkpoint.pt", tmp_path / "out", vocabulary.build([]))
    loaded = load_checkpoint(tmp_path / "out", dtype="float32")
    assert card["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.model.config == run.model.config
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.prompt("Tom has 3 apples .")[-1] == vocabulary.SEP


def test_schedule_warms_up_and_decays_to_zero() -> None:
    factors = [optim.schedule(i, 1000, decay=0.5) for i in range(1000)]
    assert factors[0] == 0.01
    assert factors[400] == 1.0
    assert 0 < factors[-1] < 0.003
