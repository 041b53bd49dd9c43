"""Training in several processes: as one process on all their batches, resumable, told once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import embedded
import unmask
from unmask.cli import main
from unmask.models.joint import digest
from unmask.train import lora, optim, problems, texts
from unmask.train.blocks import BlockConfig, BlocksRun, BlockTrainer, D2FConfig, D2FTrainer
from unmask.train.run import read_state

RUNS = {"d2f": ["--teacher"], "d2f --rank 4": ["--teacher"], "block": ["--base"]}
"""The commands, and the option that names the model."""
SIZES = "--steps 4 --tokens 200 --dtype float32 --keep 0.5".split()
ALONE = """
import sys
import unmask.train.blocks, unmask.train.export
from unmask.cli import main
assert "torch.distributed.fsdp" not in sys.modules  # later torch's optimizers import it, without our asking
assert main(sys.argv[1:]) == 0
assert not {"unmask.train.sharded", "torch.distributed.checkpoint.state_dict"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts, and with the runs that were asked for."""
    folder = tmp_path_factory.mktemp("sharded")
    embedded.build(folder / "teacher")
    drawn = problems.problems(5)
    rows = (problems.worksheet(drawn, 1)[:2] for _ in range(24))
    lines = (json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows)
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def arguments(place: Path, command: str, out: str, *more: str) -> list[str]:
    model = [*RUNS[command], str(place / "teacher")]
    return [*command.split(), *model, "--data", str(place / "data.jsonl"), "--out", str(place / out), *SIZES, *more]


def torchrun(*given: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unmask"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*start, "train", *given], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """A function of a command: the folder of its run by two processes, and what they printed."""
    done: dict[str, tuple[Path, str]] = {}

    def train(command: str) -> tuple[Path, str]:
        if command not in done:
            out = command.replace(" ", "")
            ended = torchrun(*arguments(place, command, out))
            assert ended.returncode == 0, ended.stderr
            done[command] = place / out, ended.stdout
        return done[command]

    return train


def alone(place: Path, saved: dict[str, Any]) -> BlocksRun:
    """The same run, as one process begins it."""
    loaded = unmask.load(str(place / "teacher"))
    eos = loaded.network.config.eos_ids[0]
    source = texts.read(place / "data.jsonl", loaded, eos=eos, longest=512, unit=saved["block"], tokens=200, seed=0)
    kind, config = (D2FTrainer, D2FConfig) if "schedule" in saved else (BlockTrainer, BlockConfig)
    return kind(config(**saved), loaded.network, source, place / "unused")


def step_on_both(run: BlocksRun) -> None:
    """An update by the mean of the gradients of two processes' batches."""
    for rank in (0, 1):
        batch = replace(run.source, share=(rank, 2)).batch(run.step)  # type: ignore[type-var]
        draw = torch.Generator().manual_seed(run.config.seed * 2_000_003 + 2 * run.step + rank)
        (run.loss(batch, draw) / 2).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), run.clip)
    optim.apply(run.optimizers, optim.schedule(run.step, run.config.steps, decay=run.config.decay))
    run.step += 1


def apart(a: torch.Tensor, b: torch.Tensor, size: torch.Tensor) -> float:
    return float((a - b).norm() / size.norm())


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_two_processes_train_as_one_does_on_their_batches(trained: Any, place: Path, command: str) -> None:
    folder, _ = trained(command)
    saved = read_state(folder / "checkpoint.pt")
    assert saved["config"]["world_size"] == 2
    run = alone(place, saved["config"])
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    while run.step < saved["step"]:
        step_on_both(run)
    after = run.model.state_dict()
    assert list(after) == list(saved["model"])
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    frozen = [name for name in after if name not in moved]
    assert moved == [n for n, p in run.model.named_parameters() if p.requires_grad]
    assert all(torch.equal(after[name], saved["model"][name]) for name in frozen)
    momentum = {} if "--rank" in command else saved["optimizers"][0]["state"]
    for name in moved:
        rounding = 0.15 if name in momentum else 1e-3  # Muon's iterations are in bf16, and amplify what is small
        assert apart(after[name], saved["model"][name], after[name] - before[name]) < rounding, name
    own = {name: run.optimizers[0].state[p] for name, p in run.model.named_parameters() if name in momentum}
    assert len(own) == len(momentum)
    for name, state in own.items():
        expected = state["momentum_buffer"]
        assert apart(expected, momentum[name]["momentum_buffer"], expected) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_the_model_is_written_in_one_piece(trained: Any, place: Path, command: str) -> None:
    folder, _ = trained(command)
    run = alone(place, read_state(folder / "checkpoint.pt")["config"])
    run.model.load_state_dict(read_state(folder / "checkpoint.pt")["model"])
    if "--rank" in command:
        lora.merge(run.model)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    written = unmask.load(str(folder / "model"))
    assert digest(written.network) == digest(run.model)
    assert written.network.config.layout.kind == "block"
    assert "2 processes" in json.loads((folder / "model" / "card.json").read_text())["trained"]["machine"]


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(trained: Any, place: Path) -> None:
    folder, _ = trained("d2f")
    (place / "resumed").mkdir()
    shutil.copyfile(folder / "kept-050.pt", place / "resumed" / "checkpoint.pt")
    ended = torchrun(*arguments(place, "d2f", "resumed"))
    assert "resumed at step 2" in ended.stdout, ended.stderr
    one, other = (read_state(f / "checkpoint.pt") for f in (folder, place / "resumed"))
    assert all(torch.equal(one["model"][name], value) for name, value in other["model"].items())
    assert (one["step"], one["tokens"]) == (other["step"], other["tokens"])


@pytest.mark.slow
def test_one_process_speaks(trained: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, told = trained("d2f")
    assert len(told.splitlines()) == 4, told
    assert "not compiled" in told
    assert [row["step"] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())] == [4]
    changed = (folder / "checkpoint.pt").stat().st_mtime_ns
    ended = torchrun(*arguments(place, "d2f", "d2f", "--seed", "1"))
    assert ended.returncode
    mistakes = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(mistakes) == 1, ended.stderr
    assert "another seed;" in mistakes[0]
    assert main(["train", *arguments(place, "d2f", "d2f", "--no-compile")]) == 2
    assert "another world_size;" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == changed


def test_one_process_imports_nothing_of_many(place: Path) -> None:
    given = arguments(place, "d2f", "single", "--steps", "1", "--no-compile")
    start = [sys.executable, "-c", ALONE, "train", *given]
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    ended = subprocess.run(start, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr


def test_processes_that_torchrun_did_not_start_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", *arguments(place, "block", "refused")]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (place / "refused").exists()


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_muon_takes_matrices_of_which_every_process_has_a_row(rows: int) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 8)])})
    muon, adam = optim.build(model, 0.1, 0.1, rows=rows)
    matrices, others = (([p for g in o.param_groups for p in g["params"]]) for o in (muon, adam))
    assert [len(p) for p in matrices] == [n for n in (4, 8) if n >= rows]
    assert len(matrices) + len(others) == 4
