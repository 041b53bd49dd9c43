"""`unmask bench step | decode | ar | batch` on a tiny shape: what it tells, that it counts right, and mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.bench import cases, presets, roofline, suite
from unmask.bench.presets import Preset
from unmask.cli import main
from unmask.models import native
from unmask.models.config import ModelConfig
from unmask.study import machine, results

try:
    native.library("float32", half=False)
    compiled = True
except native.Unavailable:
    compiled = False
needs_kernels = pytest.mark.skipif(not compiled, reason="there are no kernels on this machine")

CONFIG = ModelConfig(64, d_model=32, layers=2, heads=2, ff=48, max_positions=128, mask_id=63)
TINY = Preset("tiny", CONFIG, 8, 32, 8, "for tests")
SHAPES = {
    "tiny": TINY,
    "shifted": replace(TINY, name="shifted", config=replace(CONFIG, shift=True)),
    "grouped": replace(
        TINY, name="grouped", config=replace(CONFIG, heads=4, kv_heads=2, tied=True, qkv_bias=True, shift=True)
    ),
}
TELLS = {
    "step": {"block step", "full forward", "one token"},
    "decode": {"step, of a whole decode"},
    "ar": {"one token", "token, of a whole text"},
    "batch": {"1 blocks", "2 blocks", "4 blocks", "8 blocks", "8 blocks, ragged"},
}
"""What each suite times."""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`unmask bench` in an empty folder, where the tiny shapes are the presets there are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "SHAPES", SHAPES)
    monkeypatch.setattr(roofline, "REPEATS", 1)
    monkeypatch.setattr(roofline.clock, "__defaults__", (1,))
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # it takes longer than all that is timed here
    monkeypatch.setattr(roofline, "machine", lambda: {"read_gb_s": 1.0, "copy_gb_s": 1.0, "dispatch_us": 1.0})
    presets.find.cache_clear()

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(("bench", *arguments))
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    presets.find.cache_clear()


def told(bench: Command, name: str, *more: str) -> dict[str, Any]:
    """What a suite prints with --json."""
    code, out, err = bench(name, "--preset", "tiny", "--quick", "--repeats", "1", "--json", *more)
    assert (code, err) == (0, "")
    return json.loads(out)


# ---- what is told ----


@pytest.mark.parametrize("name", suite.SUITES)
def test_rows_and_the_folder_that_holds_them(name, bench, tmp_path):
    before = torch.get_num_threads()
    found = told(bench, name, "--dtype", "float32", "--compile", "off", "--repeats", "2", "--out", "kept")
    assert found["machine"]["threads"] == 1 and torch.get_num_threads() == before
    (folder,) = (tmp_path / "kept").iterdir()
    assert found["folder"] == str(folder.relative_to(tmp_path)) and folder.name.startswith(f"bench-{name}-")
    run, rows, summary = results.read(folder)
    assert summary["rows"] == found["rows"]
    assert (run["config"]["suite"], run["config"]["presets"]) == (name, ["tiny"])
    own = {(row["what"], row["engine"]): row for row in found["rows"]}
    assert {what for what, _ in own} == TELLS[name] and {engine for _, engine in own} <= {"eager", "reference"}
    assert len(rows) == 2 * len(own)
    for (what, engine), row in own.items():
        times = {r["repeat"]: r["ms"] for r in rows if (r["what"], r["engine"]) == (what, engine)}
        assert sorted(times) == [0, 1]
        assert row["ms"] == pytest.approx(sum(times.values()) / 2) and row["ms"] > 0
        assert row["spread"] == pytest.approx(abs(times[0] - times[1]) / 2)
        assert (row["preset"], row["dtype"]) == ("tiny", "float32")
        assert row["ratio_to_roofline"] == pytest.approx(row["ms"] / row["roofline_ms"])
        base = own.get((what, "reference"))
        assert row["ratio_to_reference"] == (pytest.approx(base["ms"] / row["ms"]) if base else None)
        if name == "batch":
            assert row["rows"] == int(what.split()[0]) and row["throughput_ceiling"] > 0
            assert row["blocks"] == (row["rows"] * (1 + 0.75 + 0.5 + 0.25) / 4 if "ragged" in what else row["rows"])
            assert row["throughput"] == pytest.approx(row["blocks"] * own["1 blocks", engine]["ms"] / row["ms"])
    compared = {what for what, engine in own if engine == "reference"}
    assert compared == (set() if name == "batch" else TELLS[name] - {"token, of a whole text"})


@needs_kernels
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16,int8"])
def test_engines(dtypes, bench):
    """Kernels beside plain torch and the reference; torch has no int8, and its reference is in bfloat16."""
    rows = told(bench, "decode", "--dtype", dtypes)["rows"]
    found = [(row["dtype"], row["engine"]) for row in rows]
    right = {
        "float32": [("float32", e) for e in ("kernels", "eager", "reference")],
        "bfloat16,int8": [
            *(("bfloat16", e) for e in ("kernels", "eager", "reference")),
            ("int8", "kernels"),
            ("bfloat16", "reference"),
        ],
    }
    assert found == right[dtypes]
    assert all(row["ratio_to_reference"] > 0 for row in rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_all_engines_write_the_same(shape, bench):
    code, out, _ = bench("decode", "--preset", shape, "--dtype", "float32", "--quick", "--repeats", "1", "--json")
    rows = json.loads(out)["rows"]
    ours = [row for row in rows if row["engine"] != "reference"]
    assert code == 0 and len(ours) == 1 + compiled == len(rows) - 1
    for row in ours:
        assert row["equal_tokens"] == 1.0
        assert row["forwards"] == row["reference_forwards"] == TINY.length // cases.PER_STEP


def test_tokens_that_differ_are_counted():
    kept = {"eager": ([1, 2, 3, 4], 2), "reference": ([1, 9, 3, 9], 3)}
    assert suite.agreement(kept, "eager") == {"forwards": 2, "reference_forwards": 3, "equal_tokens": 0.5}


def test_several_presets_and_the_table(bench, tmp_path):
    code, out, err = bench("decode", "--preset", "tiny,shifted", "--dtype", "float32", "--compile", "off", "--quick")
    assert code == 0 and not err.strip()
    for word in ("tiny", "shifted", "step, of a whole decode", "eager", "reference", "roofline", "100.0%"):
        assert word in out
    assert "kernels" not in out
    (folder,) = (tmp_path / "results").iterdir()
    assert f"results/{folder.name}" in out


# ---- how it is timed ----


def test_cases_are_interleaved():
    """A round that warms up, then one case after the other in every round; a case that times itself is called once."""
    repeats, seen = 2, list[int]()
    pair = [cases.Case(str(i), "eager", lambda i=i: seen.append(i)) for i in range(2)]
    own = cases.Case("2", "eager", lambda: seen.append(2) or 7.0)
    ticks: list[None] = []
    times = cases.timed([*pair, own], repeats, seed=0, told=lambda: ticks.append(None))
    assert [len(t) for t in times] == [repeats] * 3 and times[2] == [7.0] * repeats
    assert len(ticks) == 3 * (repeats + 1)
    rounds = [seen[i : i + 5] for i in range(0, len(seen), 5)]
    assert len(rounds) == repeats + 1 and all(sorted(r) == [0, 0, 1, 1, 2] for r in rounds)


def test_spread():
    assert cases.spread([3.0]) == (3.0, 0.0)
    assert cases.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0)


def test_a_step_may_be_taken_again():
    """Timed twice, a step decides the same: it is a function of the canvas."""
    model = presets.build(CONFIG, "float32", compile="off")
    recipe = cases.schedule(TINY)
    denoise, inside = cases.entered(model, recipe, cases.canvas_of(model, cases.prompts(TINY), TINY.length))
    first, second = (cases.step(denoise, recipe, cases.fresh(inside))[0].tokens for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, inside.tokens)


def test_prompts_have_no_special_tokens():
    for config in (CONFIG, replace(CONFIG, eos_ids=(3, 40)), replace(CONFIG, token_count=50, mask_id=5)):
        for text in cases.prompts(replace(TINY, config=config), 3):
            assert len(text) == TINY.prompt
            assert not {config.mask_id, *config.eos_ids} & set(text) and max(text) < config.token_count


# ---- mistakes ----

MISTAKES = {
    "preset": (("--preset", "tinny"), "unknown preset 'tinny'"),
    "one of two presets": (("--preset", "tiny,large"), "unknown preset 'large'"),
    "no preset": (("--preset", " , "), "--preset is names joined by commas"),
    "dtype": (("--dtype", "float23"), "float23.*float32"),
    "a dtype we have elsewhere": (("--dtype", "float16"), "float16"),
    "no threads": (("--threads", "0"), "threads must be from 1"),
    "threads": (("--threads", "100000"), "threads must be from 1 to the"),
    "repeats": (("--repeats", "0"), "repeats must be at least 1, not 0"),
    "fewer repeats": (("--quick", "--repeats", "-1"), "repeats must be at least 1, not -1"),
    "compile": (("--compile", "on"), "compile is auto or off, not 'on'"),
    "int8 without kernels": (("--dtype", "int8", "--compile", "off"), "leave compile at auto"),
    "out": (("--out", "file/kept"), "cannot write into file/kept"),
    "plot": (("--plot", "picture.txt"), "picture.txt"),
}


def failed(bench: Command, tmp_path: Path, *arguments: str) -> str:
    """The line it ends with; it prints nothing else, and writes nothing."""
    (tmp_path / "file").write_text("")
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    return err


@pytest.mark.parametrize("name", suite.SUITES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, name, bench, tmp_path):
    arguments, says = MISTAKES[mistake]
    base = ("--preset", "tiny", "--dtype", "float32")
    assert re.search(says, failed(bench, tmp_path, name, *base, *arguments))


def test_more_threads_than_cores(bench, tmp_path):
    cores = machine.cores()
    err = failed(bench, tmp_path, "step", "--preset", "tiny", "--threads", str(cores + 1))
    assert f"threads must be from 1 to the {cores} of this machine, not {cores + 1}" in err


@pytest.mark.parametrize("more", [("--lengths", "64"), ("--models", "dllm"), ("--items", "5"), ("--block", "8")])
def test_decode_is_about_presets_or_models(more, bench, tmp_path):
    err = failed(bench, tmp_path, "decode", "--preset", "tiny", *more)
    assert f"--preset is about a preset, and {more[0]} about models" in err


@pytest.mark.parametrize("name", suite.SUITES)
def test_too_little_memory(name, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "free", lambda device: 1000)
    err = failed(bench, tmp_path, name, "--preset", "tiny", "--dtype", "float32")
    assert "use a smaller preset" in err


def test_memory_that_runs_out_leaves_nothing(bench, tmp_path, monkeypatch):
    def none(*_: object) -> float:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(cases, "timed", lambda *_, **__: none())
    (tmp_path / "kept").mkdir()
    code, out, err = bench("decode", "--preset", "tiny", "--dtype", "float32", "--json", "--out", "kept")
    assert (code, out) == (2, "") and "use a smaller preset" in err and err.count("\n") == 1
    assert not list((tmp_path / "kept").iterdir())


def test_no_llama_bench(bench, tmp_path):
    failed(bench, tmp_path, "ar", "--preset", "tiny", "--dtype", "float32", "--llama-bench", "nowhere", "--json")


# ---- a machine without a compiler ----


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler, and nothing that one has made."""
    monkeypatch.setenv("CC", "/nonexistent")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.filterwarnings("ignore:decoding without compiled kernels")
def test_torch_is_not_called_kernels(bench, bare):
    rows = told(bench, "decode", "--dtype", "float32")["rows"]
    assert not [row for row in rows if row["engine"] == "kernels"]


def test_int8_without_a_compiler(bench, bare, tmp_path):
    err = failed(bench, tmp_path, "step", "--preset", "tiny", "--dtype", "int8", "--json")
    assert "CC=/nonexistent is not a command" in err
