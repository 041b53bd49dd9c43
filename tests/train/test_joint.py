"""The joint sampler on joints with closed forms, its objective, and runs that resume."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from closed_form import ClosedForm, outside
from unmask.decode import Canvas, Recipe, decode, drawn, everything
from unmask.decode.belief import Joint
from unmask.denoise import Draws, dress
from unmask.errors import UserError
from unmask.models.joint import JointSampler, digest
from unmask.train.joint import JointConfig, JointTrainer, Trajectories, loss, record

CASES = {"parity": (8, 2), "copy": (4, 5)}
MARGINAL = {"parity": {2: 0.5, 4: 0.5, 8: 0.5}, "copy": {2: 1 - 1 / 5, 4: 1 - 1 / 125}}
ORDER = Recipe(everything, drawn, beliefs=(Joint(1, by="random"),))


def blank(kind: str, rows: int, *, first: int = 0) -> Canvas:
    cells, words = CASES[kind]
    return Canvas.new([[]] * rows, cells, mask_id=words, seed=list(range(first, first + rows)))


@lru_cache
def runs(kind: str) -> tuple[ClosedForm, Trajectories]:
    base: Any = ClosedForm(kind, CASES[kind][1]).requires_grad_(False)
    return base, record(base, blank(kind, 1024), ORDER, temperature=1.0, batch=1024)


@lru_cache
def trained(kind: str) -> JointSampler:
    base, data = runs(kind)
    torch.set_num_threads(1)
    steps = {"parity": 600, "copy": 150}[kind]
    shape = {
        "gain": 1.0,
        "hidden_weight": 10.0,
        "further": 0.5,
        "rows": 64,
        "adam_lr": 0.01,
        "decay": 0.4,
        "plain": 1.0,
    }
    config = JointConfig(steps=steps, k=CASES[kind][0], **shape)
    trainer = JointTrainer(config, base, [data], Path("unused"))  # type: ignore[arg-type]
    for _ in range(steps):
        trainer.train_step()
    return trainer.model.eval()


def sampled(kind: str, sampler: JointSampler | None, k: int, rows: int = 4000) -> torch.Tensor:
    base: Any = runs(kind)[0]
    canvas, recipe = blank(kind, rows, first=10_000), Recipe(everything, drawn, beliefs=(Joint(k),))
    denoise = dress(
        base, recipe, slots=rows, length=canvas.tokens.shape[1], sampler=sampler, draws=Draws(temperature=1.0)
    )
    end = list(decode(denoise, recipe, canvas))[-1][0]
    assert int(end.step.max()) == -(-CASES[kind][0] // k)
    return end.tokens


@pytest.mark.parametrize(("kind", "k"), [("parity", 2), ("parity", 4), ("parity", 8), ("copy", 2), ("copy", 4)])
def test_the_sampler_comes_below_a_quarter_of_the_marginals_error(kind: str, k: int) -> None:
    base, _ = runs(kind)
    marginal = outside(kind, sampled(kind, JointSampler(base.config).initialise(0), k))
    assert marginal == pytest.approx(MARGINAL[kind][k], abs=0.03)
    assert outside(kind, sampled(kind, trained(kind), k)) < marginal / 4
    assert outside(kind, sampled(kind, None, 1)) < 1e-3  # one at a time is exact


def test_every_text_of_the_joint_is_as_likely() -> None:
    found = sampled("copy", trained("copy"), 4)
    counts = torch.bincount(found[(found == found[:, :1]).all(1)][:, 0], minlength=5)
    assert (counts / counts.sum() - 0.2).abs().max() < 0.03


def test_the_base_is_left_alone_and_the_loss_falls() -> None:
    base, data = runs("copy")
    before, config = digest(base), JointConfig(steps=40, rows=64, k=4)
    trainer = JointTrainer(config, base, [data], Path("unused"))  # type: ignore[arg-type]
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert digest(base) == before
    assert all(p.grad is None for p in base.parameters())


def test_a_sampler_that_is_right_has_nothing_to_learn() -> None:
    """Where every word is already known, what is drawn changes no belief, and the marginal sampler is exact."""
    base, data = runs("copy")
    sampler = JointSampler(base.config).initialise(0)
    rows, start = torch.arange(32), torch.full((32,), 1)
    known = loss(base, sampler, data, rows, start, draws=1)  # type: ignore[arg-type]
    known.backward()
    assert known.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in sampler.parameters())
    unknown = loss(base, sampler, data, rows, torch.zeros(32, dtype=torch.int64), draws=1)  # type: ignore[arg-type]
    assert unknown.item() > 1.0


def test_the_objective_by_hand() -> None:
    """KL(base at the next state || sampler), over undecided cells, summed over words: ln 5 for copies drawn blindly."""
    base, data = runs("copy")
    sampler = JointSampler(base.config).initialise(0)
    value = loss(base, sampler, data, torch.arange(8), torch.zeros(8, dtype=torch.int64), draws=2)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-3)


def test_a_run_resumes_where_it_stood(tmp_path: Path) -> None:
    base: Any = runs("copy")[0]
    data, config = [runs("copy")[1]], JointConfig(steps=12, rows=16, k=4, save_every=6)
    whole = JointTrainer(config, base, data, tmp_path / "whole")
    assert [p.step for p in whole.run()] == [12]
    part = JointTrainer(replace(config, steps=12), base, data, tmp_path / "part")
    for _ in range(6):
        part.train_step()
    part.save()
    again = JointTrainer(config, base, data, tmp_path / "part")
    assert again.resume() and again.step == 6
    list(again.run())
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(UserError, match="another k"):
        JointTrainer(replace(config, k=2), base, data, tmp_path / "part").resume()


def test_the_command_trains_resumes_and_leaves_a_sampler_that_is_used(tmp_path: Path, capsys: Any) -> None:
    import unmask
    from unmask.cli import main

    run = ["train", "joint", "--out", str(tmp_path / "run"), "--runs", "8", "--k", "3"]
    assert main([*run, "--steps", "2"]) == 0
    assert "recording" in capsys.readouterr().err
    assert main([*run, "--steps", "3"]) == 0
    told = capsys.readouterr()
    assert "resumed at step 2" in told.out and "recording" not in told.err
    kept = (tmp_path / "run" / "runs.pt").read_bytes()
    (tmp_path / "run" / "runs.pt").write_bytes(kept[:100])
    assert main([*run, "--steps", "3"]) == 2 and "delete it" in capsys.readouterr().err
    (tmp_path / "run" / "runs.pt").write_bytes(kept)
    model, folder = unmask.load(), tmp_path / "run" / "sampler"
    answer = model.generate("Anna has 5 apples .", recipe="joint(3)", block=8, sampler=folder)
    assert answer.ledger.helpers["joint sampler"]["forwards"] > 0
    assert main([*run[:-1], "4"]) == 2 and "another k" in capsys.readouterr().err
    assert main(["train", "joint", "--model", "twin"]) == 2 and "autoregressive" in capsys.readouterr().err
    assert main(["train", "joint", "--k", "1"]) == 2 and "at least 2" in capsys.readouterr().err
