"""Training in blocks: noise, masks, losses, what is learned from what, adapters, runs that resume exactly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedded
import unmask
from golden import toy
from unmask.cli import main
from unmask.decode import Canvas
from unmask.denoise import Plain
from unmask.errors import UserError
from unmask.models.config import Layout
from unmask.models.transformer import Transformer
from unmask.train import blockwise, forcing, lora, texts
from unmask.train.batches import Batch
from unmask.train.blocks import BlockConfig, BlocksRun, BlockTrainer, D2FConfig, D2FTrainer, in_blocks
from unmask.train.texts import Texts, lay_out

EOS = 9
LAYOUTS = {
    "origin": Layout("block", 4),
    "absolute": Layout("block", 4, "absolute", "blocks"),
    "blocks": Layout("block", 4, "origin", "blocks"),
}
ROWS = [((1, 2, 3, 4, 5), (6, 7, 8, 7, 6, 5, EOS)), ((3, 3), (4, 5, 6, 7, 8, 3, 4, 6, EOS)), ((8,), (4, 4, 6, EOS))]
BATCH = lay_out(ROWS, EOS, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(layout: Layout, *, shift: bool = False) -> Transformer:
    """The toy's weights, float64, with another layout."""
    base = toy.network("dream" if shift else "llada")
    config = replace(base.config, layout=layout, eos_ids=(EOS,))
    model = Transformer(config).double()
    model.load_state_dict(base.state_dict())
    return model


# Noise


@given(st.integers(1, 9), st.integers(0, 999))
def test_noise_never_falls_from_block_to_block(blocks: int, seed: int) -> None:
    for schedule in ("monotone", "ramp"):
        rates = forcing.Noise(schedule).rates(50, blocks, seeded(seed))  # type: ignore[arg-type]
        assert (rates.diff(dim=1) >= 0).all()
        assert (rates >= 0).all()
        assert (rates <= 1).all()
    published = forcing.Noise("monotone", 0.2, 0.7).rates(50, blocks, seeded(seed))
    assert published.min() >= 0.2
    assert published.max() <= 0.7 + 1e-6


def test_a_ramp_goes_from_clean_blocks_to_blocks_of_masks_and_random_rates_fall_too() -> None:
    ramp = forcing.Noise("ramp").rates(400, 4, seeded())
    assert ((ramp[:, 0] == 0) & (ramp[:, -1] == 1)).any()
    assert ((ramp > 0) & (ramp < 1)).float().mean() > 0.2
    assert (forcing.Noise("random").rates(400, 4, seeded()).diff(dim=1) < 0).any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_only_the_response_is_masked_and_blocks_behind_the_end_do_not_count(layout: Layout) -> None:
    noise = forcing.Noise("monotone", 0.5, 0.9)
    made = forcing.prepare(BATCH, noise, layout, seeded(), mask=toy.MASK, eos=EOS)
    masked = made.tokens == toy.MASK
    assert not masked[:, : BATCH.prompt].any()
    assert torch.equal(made.tokens[~masked], BATCH.tokens[~masked])
    response, block = BATCH.tokens[:, BATCH.prompt :], BATCH.blocks(layout)
    for row in range(len(response)):
        end = response[row].tolist().index(EOS)
        counted = block[row] <= block[row, end]
        assert not made.weight[row][~counted].any()
        assert torch.equal(made.weight[row] > 0, counted & masked[row, BATCH.prompt :])


def test_a_masked_cell_weighs_one_over_the_rate_of_its_block() -> None:
    layout, draw = Layout("block", 4), seeded(3)
    made = forcing.prepare(BATCH, forcing.Noise("monotone"), layout, draw, mask=toy.MASK, eos=EOS)
    rate = forcing.Noise("monotone").rates(3, 3, seeded(3)).repeat_interleave(4, 1)
    count = (made.weight > 0).sum()
    assert torch.allclose(made.weight, (made.weight > 0) / rate / count)


# Losses


def test_a_student_of_one_block_that_is_its_teacher_learns_nothing() -> None:
    """Without a prompt, one block is full attention (with one, its cells would see the response in the teacher)."""
    batch = Batch(BATCH.tokens[:, BATCH.prompt :], BATCH.valid[:, BATCH.prompt :], 0)
    teacher, student = net(Layout()), net(Layout("block", 12))
    for layout, still in ((Layout("block", 12), True), (Layout("block", 4), False)):
        made = forcing.prepare(batch, forcing.Noise(), layout, seeded(), mask=toy.MASK, eos=EOS)
        student.zero_grad()
        student.requires_grad_()
        forcing.loss(student, teacher, made, torch.float64).backward()
        largest = max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)
        assert largest < 1e-4 if still else largest > 1e-2


def test_the_loss_is_the_soft_cross_entropy_of_the_teacher() -> None:
    layout = Layout("block", 4)
    teacher, student = net(Layout(), shift=True), net(layout, shift=True).requires_grad_()
    made = forcing.prepare(BATCH, forcing.Noise(), layout, seeded(), mask=toy.MASK, eos=EOS)
    found = forcing.loss(student, teacher, made, torch.float64)
    told = teacher(made.tokens, visible=made.teacher).log_softmax(-1)
    own = student(made.tokens, visible=made.student).log_softmax(-1)
    total = torch.tensor(0.0, dtype=torch.float64)
    for row, cell in (made.weight > 0).nonzero().tolist():
        at = BATCH.prompt + cell - 1
        total = total - made.weight[row, cell] * (told[row, at].exp() * own[row, at]).sum()
    assert torch.allclose(found.double(), total, rtol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_block_diffusion_learns_in_the_states_it_is_decoded_in(layout: Layout, shift: bool) -> None:
    """Logits of [noisy | clean] equal those of a canvas whose earlier blocks are decided, and whose block is noisy."""
    model = net(layout, shift=shift)
    made = blockwise.prepare(BATCH, model.config, seeded(1), complementary=False)
    with torch.no_grad():  # with gradients, attention is computed in fp32
        logits = model(made.tokens, made.index, visible=made.visible)
    block = BATCH.blocks(layout)
    compared = 0
    for row, (prompt, _) in enumerate(ROWS):
        response = BATCH.tokens[row, BATCH.prompt :].tolist()
        first = made.tokens.shape[1] - BATCH.tokens.shape[1] - len(response)
        noisy = made.tokens[row, first : first + len(response)].tolist()
        for number in block[row].unique().tolist():
            own = (block[row] == number).tolist()
            cells: list[int | None] = [*prompt]
            for c, here in enumerate(own):
                earlier = int(block[row, c]) < number
                cells.append(response[c] if earlier or (here and noisy[c] != toy.MASK) else None)
            if not any(here and noisy[c] == toy.MASK for c, here in enumerate(own)):
                continue
            canvas = Canvas.of([cells], origin=[len(prompt)], mask_id=toy.MASK, dtype=torch.float64)
            denoise = Plain(model, slots=1, length=len(cells), cached=False)
            draft = denoise(canvas, canvas.valid, canvas.masked)
            wanted = torch.tensor([[False] * len(prompt) + [h and noisy[c] == toy.MASK for c, h in enumerate(own)]])
            there = draft.logits[(wanted & draft.fresh)[draft.fresh]]
            at = made.source[row][wanted[0, len(prompt) :]]
            mine = logits[row, at].index_fill(1, torch.tensor([toy.MASK]), -torch.inf)
            assert torch.allclose(mine, there, atol=1e-9)
            compared += 1
    assert compared > 4


def test_complementary_masks_show_every_cell_once() -> None:
    layout = Layout("block", 4)
    masked, weight = blockwise.masks(BATCH, layout, seeded(), eos=EOS, complementary=True)
    one, other = masked.chunk(2)
    assert torch.equal(one, ~other)
    both = weight[:3] + weight[3:]
    assert torch.allclose(both, BATCH.counted(layout, EOS) / BATCH.counted(layout, EOS).sum())
    assert torch.allclose(weight.sum(), torch.tensor(1.0))


def test_weights_of_block_diffusion_are_one_on_average() -> None:
    batch = Batch(BATCH.tokens.repeat(700, 1), BATCH.valid.repeat(700, 1), BATCH.prompt)
    _, weight = blockwise.masks(batch, Layout("block", 4), seeded(), eos=EOS, complementary=False)
    mean = weight.sum() * 1.0
    assert 0.9 < float(mean) < 1.1


# Adapters


def test_an_adapter_begins_as_nothing_learns_alone_and_merges_into_the_same_model() -> None:
    base = net(Layout("block", 4)).float()
    model = in_blocks(base, base.config.layout)
    learned = lora.add(model, 2, 4.0)
    assert {id(p) for p in learned} == {id(p) for p in model.parameters() if p.requires_grad}
    tokens, before = BATCH.tokens[:, BATCH.prompt :], None
    before = base(tokens)
    assert torch.equal(model(tokens), before)
    with torch.no_grad():
        for p in learned:
            p.add_(torch.randn(p.shape, generator=seeded()) * 0.1)
    moved = model(tokens)
    assert not torch.allclose(moved, before)
    kept = lora.pairs(model)
    merged = lora.merge(model)
    assert torch.allclose(merged(tokens), moved, atol=1e-5)
    assert set(dict(merged.named_parameters())) == set(dict(base.named_parameters()))
    q = base.config.heads * base.config.head_dim
    a, b = kept["blocks.0.attn.qkv.weight", "q"]
    grown = base.blocks[0].attn.qkv.weight[:q] + 2 * b @ a  # type: ignore[union-attr, index]
    assert torch.allclose(merged.blocks[0].attn.qkv.weight[:q], grown, atol=1e-6)  # type: ignore[union-attr, index]


# Runs


def runs(folder: Path, kind: str, **changes: Any) -> Any:
    """A small run of either kind on the rows above."""
    source = Texts(tuple(ROWS), EOS, unit=4, tokens=40)
    shape = {"steps": 6, "block": 4, "dtype": "float32", "compile": False, "save_every": 2, **changes}
    if kind == "d2f":
        return D2FTrainer(D2FConfig(**shape), net(Layout()).float(), source, folder)
    return BlockTrainer(BlockConfig(**shape), net(Layout("causal"), shift=True).float(), source, folder)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["d2f", "block"])
def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path, kind: str, rank: int) -> None:
    whole = runs(tmp_path / "a", kind, rank=rank)
    list(whole.run())
    first = runs(tmp_path / "b", kind, rank=rank)
    for _ in range(3):
        first.train_step()
    first.save()
    second = runs(tmp_path / "b", kind, rank=rank)
    assert second.resume()
    list(second.run())
    weights = second.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in whole.model.state_dict().items())
    with pytest.raises(UserError, match="another rank"):
        runs(tmp_path / "b", kind, rank=4).resume()


@pytest.mark.parametrize("kind", ["d2f", "block"])
def test_a_run_learns(tmp_path: Path, kind: str) -> None:
    run = runs(tmp_path, kind, steps=60, adam_lr=0.003, muon_lr=0.003)
    losses = [run.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_what_cannot_be_a_teacher_or_has_no_mask_is_refused(tmp_path: Path) -> None:
    source = Texts(tuple(ROWS), EOS)
    with pytest.raises(UserError, match="distilled from a masked model with full attention, and this one's is causal"):
        D2FTrainer(D2FConfig(), net(Layout("causal")), source, tmp_path)
    bare = net(Layout("causal"))
    bare.config = replace(bare.config, mask_id=-1)
    with pytest.raises(UserError, match="no mask token; name an id"):
        BlockTrainer(BlockConfig(), bare, source, tmp_path)
    with pytest.raises(UserError, match=f"a mask of its own, {toy.MASK}, which 4 cannot replace"):
        BlockTrainer(BlockConfig(mask_id=4), net(Layout("causal")), source, tmp_path)


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C raises, as it does in a terminal: a test run in the background would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Ctrl-C comes in the middle of this step of every run, `times` times."""
    loss: dict[type, Any] = {kind: kind.loss for kind in (D2FTrainer, BlockTrainer)}

    def pressed(self: BlocksRun, batch: Batch, draw: torch.Generator) -> torch.Tensor:
        for _ in range(times if self.step == step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return loss[type(self)](self, batch, draw)

    for kind in loss:
        monkeypatch.setattr(kind, "loss", pressed)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("kind", ["d2f", "block"])
def test_a_run_that_ctrl_c_ends_is_resumed_where_it_ended(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs(tmp_path / "a", kind)
    list(whole.run())
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        list(runs(tmp_path / "b", kind).run())
    assert signal.getsignal(signal.SIGINT) == before
    again = runs(tmp_path / "b", kind)
    assert again.resume()
    assert again.step == 3
    list(again.run())
    weights = again.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in whole.model.state_dict().items())


@pytest.mark.usefixtures("listening")
def test_nothing_is_saved_of_half_a_step_or_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, times, saved in ((3, 2, 2), (0, 2, 0), (0, 1, 1)):
        folder = tmp_path / f"{step}-{times}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted(patch, step, times)
            list(runs(folder, "block").run())
        again = runs(folder, "block")
        assert again.resume() == bool(saved)
        assert again.step == saved


@pytest.mark.parametrize("changed", [{"tokens": 80}, {"longest": 99}, {"data_digest": "1"}, {"scratch": True}])
def test_a_checkpoint_is_of_the_same_texts_and_an_old_one_of_the_defaults(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    (name,) = changed
    run = runs(tmp_path, "block")
    run.train_step()
    run.save()
    with pytest.raises(UserError, match=f"another {name};"):
        runs(tmp_path, "block", **changed).resume()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["config"][name]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert runs(tmp_path, "block").resume()
    with pytest.raises(UserError, match=f"another {name};"):
        runs(tmp_path, "block", **changed).resume()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = runs(tmp_path, "block")
    run.save()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["norm.weight"] = torch.ones(5)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="a model of another shape"):
        run.resume()


# Texts


def test_texts_come_in_shuffled_epochs_shared_out_over_processes() -> None:
    pairs = tuple(((n,), (n, EOS)) for n in range(10, 20))
    alone = Texts(pairs, EOS, tokens=6)
    seen = [int(t) for step in range(5) for t in alone.batch(step).tokens[:, 0]]
    assert sorted(seen) == list(range(10, 20))
    assert seen != list(range(10, 20))
    two = [Texts(pairs, EOS, tokens=6, share=(rank, 2)) for rank in (0, 1)]
    assert torch.equal(two[1].batch(1).tokens, alone.batch(3).tokens)
    assert torch.equal(two[0].batch(2).tokens, alone.batch(4).tokens)


def test_a_file_of_texts_is_read_or_refused_with_its_line(tmp_path: Path) -> None:
    model = unmask.load(embedded.build(tmp_path / "m"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Tom has 5 eggs", "response": "5 - 1 = 4"}\n\n{"prompt": "Tom", "response": "1"}\n')
    found = texts.read(path, model, eos=1, longest=12)
    assert [pair[1][-1] for pair in found.pairs] == [1] * len(found.pairs)
    assert len(found.pairs) == 2
    assert list(found.pairs[1][0]) == model.encode("Tom")
    for text, told in (
        ('{"prompt": "a"}\n', 'line 1: expected {"prompt"'),
        ('{"prompt": "a", "response": 3}\n', "line 1: prompt and response must be texts"),
        ("{\n", "line 1: expected"),
        ("\n", "no row that fits into 12 cells"),
        (
            '{"prompt": "Tom", "response": "1"}\n{"prompt": " ", "response": "1"}\n',
            "rows.jsonl line 2: the prompt is empty",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=told.replace("{", r"\{")):
            texts.read(path, model, eos=1, longest=12)
    path.write_text('{"prompt": "Tom", "response": "1"}\n{"prompt": "Tom", "response": "%s"}\n' % ("1 + " * 30 + "1"))
    assert texts.read(path, model, eos=1, longest=12).left_out == 1
    assert texts.read(path, model, eos=1, longest=99).left_out == 0
    with pytest.raises(UserError, match="cannot read"):
        texts.read(tmp_path / "none.jsonl", model, eos=1, longest=12)


# The command


def rows(folder: Path, *, longest: int = 1) -> Path:
    """A file of short texts, and one as long as is said."""
    told = [(f"Tom has {n}", f"{n} + 1") for n in range(9)] + [("Tom has 1", " + ".join(["1"] * longest))]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in told))
    return folder / "rows.jsonl"


SHORT = ["--steps", "2", "--block", "4", "--tokens", "40", "--no-compile", "--dtype", "float32"]


@pytest.mark.parametrize("layout", [Layout("causal"), Layout()], ids=["autoregressive", "masked"])
def test_an_adapter_of_either_base_is_the_model_beside_it(
    layout: Layout, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, out = embedded.build(tmp_path / "base", layout=layout), tmp_path / "run"
    named = ["--mask-id", "2"] if layout.kind == "causal" else []
    given = ["--data", str(rows(tmp_path)), "--rank", "2", "--adam-lr", "0.05", "--out", str(out), *named, *SHORT]
    assert main(["train", "block", "--base", str(base), *given]) == 0
    model, adapter = (
        unmask.load(out / name, base=b, dtype="bfloat16") for name, b in (("model", None), ("adapter", base))
    )
    assert adapter.network.config == model.network.config
    assert adapter.network.config.mask_id == 2
    ids = torch.tensor([[5, 6, 7, 2, 2]])
    assert torch.equal(adapter.network(ids), model.network(ids))
    assert not torch.equal(adapter.network(ids), unmask.load(base).network(ids))
    for prompt in ("Tom has 3", "Tom has <mask>"):
        assert adapter.encode(prompt) == model.encode(prompt)
        assert adapter.generate(prompt, length=8).text == model.generate(prompt, length=8).text
    capfd.readouterr()


def test_a_model_from_scratch_has_no_base(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(embedded.build(tmp_path / "base", layout=Layout("causal")))
    given = ["train", "block", "--base", base, "--data", str(rows(tmp_path)), "--out", str(tmp_path / "run")]
    given += ["--mask-id", "2", *SHORT]
    assert main([*given, "--scratch"]) == 0
    card = json.loads((tmp_path / "run" / "model" / "card.json").read_text())
    assert card["base"] == "none"
    assert (card["trained"]["config"]["base"], card["trained"]["config"]["scratch"]) == ("", True)
    assert main([*given, "--scratch"]) == 0
    assert "resumed at step 2" in capfd.readouterr().out
    assert main(given) == 2
    assert "another base, scratch;" in capfd.readouterr().err


def test_a_resumed_run_has_the_same_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(embedded.build(tmp_path / "base"))
    given = [
        "train",
        "d2f",
        "--teacher",
        base,
        "--data",
        str(rows(tmp_path, longest=9)),
        "--out",
        str(tmp_path / "run"),
    ]
    given += [*SHORT, "--longest", "12"]
    assert main(given) == 0
    assert "1 rows of" in (told := capfd.readouterr().out)
    assert "longer than 12 cells (--longest) and left out" in told
    rows(tmp_path, longest=8)  # left out as well: what is learned is the same
    assert main(given) == 0
    assert "resumed" in capfd.readouterr().out
    rows(tmp_path).write_text((tmp_path / "rows.jsonl").read_text().replace("Tom has 3", "Tom has 4"))
    for more, told in (
        (["--longest", "12"], "another data, data_digest;"),
        (["--tokens", "80"], "data_digest, tokens"),
        (["--longest", "30"], "data_digest, longest"),
    ):
        assert main([*given, *more]) == 2
        assert told in capfd.readouterr().err


@pytest.mark.usefixtures("listening")
def test_ctrl_c_in_a_command_leaves_a_checkpoint_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, 1)
    given = ["--teacher", str(embedded.build(tmp_path / "base")), "--data", str(rows(tmp_path)), *SHORT]
    assert main(["train", "d2f", *given, "--steps", "9", "--out", str(tmp_path / "run")]) == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "run" / "model").exists()


def test_accuracy_on_the_embedded_tasks_is_not_measured_on_other_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("unmask.cli.train_blocks.follow", lambda run, measure, every: asked.append((measure, every)))
    for kind in ("d2f", "block"):
        for more, measured in (([], True), (["--data", str(rows(tmp_path))], False), (["--eval-every", "0"], False)):
            given = ["train", kind, *SHORT, *more, "--out", str(tmp_path / f"{kind}{len(asked)}")]
            assert main(given) == 0
            assert bool(asked[-1][0]) == measured


@pytest.mark.parametrize("kind", ["d2f", "block"])
def test_what_does_not_fit_into_the_positions_is_told_before_a_step(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts and responses are padded apart: 40 cells may hold the longest row, but not every batch."""
    base, data = str(embedded.build(tmp_path / "base", positions=40)), tmp_path / "data.jsonl"
    told = [("Tom has " * 9 + "5", "1 + 1"), ("Tom", " + ".join(["1"] * 12))]
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in told))
    given = ["train", kind, "--teacher" if kind == "d2f" else "--base", base, *SHORT, "--out", str(tmp_path / "run")]
    for more, part in (
        (["--data", str(data)], "make batches of"),
        (["--data", str(rows(tmp_path)), "--block", "64"], "in blocks of 64 make batches of"),
    ):
        assert main([*given, *more]) == 2
        error = capfd.readouterr().err
        assert part in error
        assert "has 40 positions; lower --block, or" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main([*given, "--data", str(data), "--longest", "25"]) == 0


@pytest.mark.parametrize("place", ["file", "file/below", "run"])
def test_a_folder_that_cannot_be_written_is_told_before_a_step(
    place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "nowhere")
    assert main(["train", "d2f", "--out", str(tmp_path / place), "--teacher", "no such model"]) == 2
    error = capfd.readouterr().err
    assert "cannot write the folder" in error
    assert error.count("\n") == 1


def test_both_commands_train_from_a_file_and_write_a_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tom has {n}", "response": f"{n} + 1"}) + "\n" for n in range(9)))
    teacher = str(embedded.build(tmp_path / "teacher"))
    common = ["--data", str(data), "--steps", "2", "--block", "4", "--tokens", "40", "--no-compile"]
    common += ["--dtype", "float32"]
    out = tmp_path / "d2f"
    assert main(["train", "d2f", "--teacher", teacher, "--out", str(out), "--rank", "2", *common]) == 0
    student = unmask.load(out / "model")
    assert student.network.config.layout == Layout("block", 4)
    card = json.loads((out / "model" / "card.json").read_text())
    assert (card["kind"], card["trained"]["steps_done"]) == ("D2F student", 2)
    assert student.generate("Tom has 3", length=8).forwards > 0
    again = unmask.load(out / "adapter", base=teacher)
    ids = torch.tensor([[5, 6, 7, 2, 2]])
    assert again.network.config == student.network.config and student.network.config.in_flight
    assert torch.allclose(again.network(ids), student.network(ids), atol=0.05)
    twin = str(embedded.build(tmp_path / "twin", layout=Layout("causal")))
    grids = ["--grid", "absolute", "--prompt", "blocks", "--mask-id", "2"]
    assert main(["train", "block", "--base", twin, "--out", str(tmp_path / "block"), *grids, *common]) == 0
    config = unmask.load(tmp_path / "block" / "model").network.config
    assert config.layout == LAYOUTS["absolute"] and not config.in_flight
    capfd.readouterr()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["d2f", "--schedule", "ramps"], "did you mean 'ramp'"),
        (["d2f", "--low", "0.8", "--high", "0.2"], "rates with 0 <= low < high <= 1"),
        (["d2f", "--block", "0"], "--block must be at least 1, not 0"),
        (["d2f", "--teacher", "twin"], "full attention, and this one's is causal"),
        (["d2f", "--dtype", "float8"], "dtype"),
        (["d2f", "--muon-lr", "nan"], "--muon-lr must be a number of at least 0, not nan"),
        (["d2f", "--adam-lr", "-1"], "--adam-lr must be a number of at least 0, not -1"),
        (["block", "--adam-lr", "inf"], "--adam-lr must be a number of at least 0, not inf"),
        (["d2f", "--alpha", "0"], "--alpha must be a number of more than 0, not 0"),
        (["d2f", "--alpha", "inf"], "--alpha must be a number of more than 0, not inf"),
        (
            ["d2f", "--keep", "0.5", "--keep", "1.5"],
            "--keep is a fraction of the run, more than 0 and at most 1, not 1.5",
        ),
        (["block", "--keep", "nan"], "--keep is a fraction of the run"),
        (["d2f", "--block", "900"], "responses of 176 cells in blocks of 900 make batches of"),
        (["block", "--scratch", "--rank", "4"], "--rank trains a LoRA, and the weights of --scratch"),
        (["block", "--base", "dllm", "--mask-id", "7"], "has a mask of its own, 2, which 7 cannot replace"),
        (["block", "--grid", "middle"], "grid"),
        (["block", "--mask-id", "1"], "begins or ends a text in this model"),
        (["d2f", "--rank", "99999"], "a LoRA of rank 99999 is no smaller than the matrices"),
        (["block", "--mask-id", "100000"], "--mask-id must be a token of the vocabulary"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), "--steps", "1"]) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
