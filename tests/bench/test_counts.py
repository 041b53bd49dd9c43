"""What the suite counts: cells of ragged rows, tokens of a response, models in memory, what a roofline sums."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.bench import cases, presets, roofline, suite
from unmask.bench.presets import Preset
from unmask.bench.reference import Reference
from unmask.cli import main
from unmask.models.config import ModelConfig

CONFIG = ModelConfig(64, d_model=32, layers=2, heads=2, ff=48, max_positions=128, mask_id=63)
TINY = Preset("tiny", CONFIG, 8, 32, 8, "for tests")
SHIFTED = replace(TINY, config=replace(CONFIG, shift=True))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny shape as the one preset, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "find", lambda _: TINY)
    return tmp_path


@pytest.mark.parametrize("preset", [TINY, SHIFTED], ids=["aligned", "shifted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_a_step_queries_the_cells_it_is_counted_for(ragged, preset, monkeypatch):
    seen: list[Any] = []
    whole = cases.step

    def spied(denoise: Any, recipe: Any, canvas: Any) -> Any:
        def call(canvas: Any, query: torch.Tensor, need: torch.Tensor) -> Any:
            seen.append(query.sum(-1).tolist())
            return denoise(canvas, query, need)

        return whole(call, recipe, canvas)

    case = cases.together(preset, presets.build(preset.config, "float32", compile="off"), "eager", 8, ragged=ragged)
    monkeypatch.setattr(cases, "step", spied)
    with torch.inference_mode():
        case.run()
    assert seen == [case.facts["widths"]]
    assert len(set(case.facts["widths"])) == (4 if ragged else 1)


def test_the_prompt_is_not_among_equal_tokens():
    kept: dict[str, Any] = {}
    model = presets.build(CONFIG, "float32", compile="off")
    with torch.inference_mode():
        cases.whole(TINY, model, "eager", kept).run()
        cases.plain_whole(TINY, model, kept).run()
    assert [len(tokens) for tokens, _ in kept.values()] == [TINY.length, TINY.length]


@pytest.mark.parametrize("name", suite.SUITES)
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_all_models_that_are_there_at_once_are_counted(compile, name, monkeypatch):
    made: Counter[str] = Counter()

    def built(config: ModelConfig, dtype: str, *, compile: str = "auto") -> Any:
        made["kernels" if compile == "auto" else "plain"] += 1
        return presets.build(config, dtype, compile="off")

    monkeypatch.setattr(cases, "build", built)
    plan = suite.Plan(name, ("tiny",), ("float32",), compile=compile)
    with torch.inference_mode():
        list(suite.contestants(plan, TINY, "float32"))
    assert made == {kind: count for kind, count in suite.alive(plan).items() if count}


def test_the_reference_has_the_weights_themselves():
    model = presets.build(CONFIG, "float32", compile="off")
    for block, matrices, _, gate_up in Reference(model).parts:
        for part, whole in ((matrices, block.attn.qkv), (gate_up, block.mlp.gate_up)):
            assert {w.untyped_storage().data_ptr() for w in part} == {whole.weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("preset", ["8b", "dream-7b"])
def test_a_large_shape_is_refused_where_its_models_do_not_fit(preset, monkeypatch, tmp_path, capsys):
    """One copy of the weights would fit, and all that a suite holds at once do not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "free", lambda device: 40_000_000_000)
    monkeypatch.setattr(suite, "measure", lambda *_, **__: pytest.fail("it was about to be made"))
    assert main(("bench", "step", "--preset", preset, "--dtype", "bfloat16")) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "40 are free" in err and not list(tmp_path.iterdir())


def torch_is_short(*_: object, **__: object) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def system_is_short(*_: object, **__: object) -> None:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("fails", [torch_is_short, system_is_short])
def test_memory_that_runs_out_is_one_line_and_leaves_nothing(fails, tiny, monkeypatch, capsys):
    monkeypatch.setattr(cases, "timed", fails)
    code = main(("bench", "batch", "--preset", "tiny", "--dtype", "float32", "--compile", "off", "--json"))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and "out of memory" in err
    assert not list((tiny / "results").iterdir())


def test_what_is_no_lack_of_memory_is_not_called_so(tiny, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cases, "timed", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        suite.main(suite.Plan("batch", ("tiny",), ("float32",), compile="off"), json=True)


def test_a_roofline_is_that_of_the_queries_there_are(monkeypatch):
    def products(c: ModelConfig, m: int, dtype: str, *, need: int) -> dict[str, float | str]:
        return {"ms": 1000.0 * m + 100_000.0 * need}

    monkeypatch.setattr(roofline, "products", products)
    monkeypatch.setattr(roofline, "attention", lambda c, queries, keys, dtype: queries * keys)
    found = roofline.forward(CONFIG, [(3, 10), (2, 9), (3, 10)], "float32", need=7)
    assert found["attention_ms"] == 3 * 10 + 2 * 9 + 3 * 10 and found["ms"] == 708_000 + 78


def test_int8_is_measured_by_more_than_our_own_kernels(monkeypatch):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no int8 products on this machine")
    names = [name for name, _ in roofline.ways([(2, 32, 32, 1)], "int8")]
    assert "fbgemm" in names


def test_json_is_told_alone(tiny, capsys):
    """A line of torch's on the way would spoil what a program reads."""
    assert main(("bench", "ar", "--preset", "tiny", "--dtype", "float32", "--compile", "off", "--quick", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] and not err
