"""llama.cpp as a contestant: what a user gets from a llama-bench that works, and is told by one that does not."""

import errno
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.bench import llama
from unmask.bench.llama import Contestant, contestant
from unmask.errors import UserError
from unmask.models.config import Experts, Layout, ModelConfig
from unmask.models.transformer import Transformer

SMALL = ModelConfig(96, 64, 2, 4, 128, kv_heads=2, max_positions=128, layout=Layout("causal"), shift=True)
PROMPT = {"n_prompt": 16, "n_gen": 0, "avg_ns": 7, "build_commit": "abc1234"}
TOKENS = {"n_prompt": 0, "n_gen": 64, "avg_ns": 160_000_000, "build_commit": "abc1234"}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go in a test: a folder that can be looked into."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def fake(folder: Path, body: str, *, told: str = "  -n, --n-gen <n>") -> Path:
    """A program that tells `told` when asked for help, and else does `body`, in the language of sh."""
    path = folder / "llama-bench"
    path.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo "{told}" && exit 0\n{body}\n')
    path.chmod(0o755)
    return path


def printing(folder: Path, *rows: object) -> Path:
    """One that prints these rows as llama-bench does, and what it was asked for into `asked`."""
    (folder / "rows.json").write_text(json.dumps(rows))
    return fake(folder, f'echo "$@" > "{folder}/asked"\ncat "{folder}/rows.json"')


def ready(path: Path, **settings: int) -> Contestant:
    """A contestant without a file, which a fake does not read."""
    return Contestant(llama.program(path), **({"threads": 1, "tokens": 64, "depth": 0} | settings))


def refused(call: object, *arguments: object, **settings: object) -> str:
    """The one line of the mistake."""
    assert callable(call)
    with pytest.raises(UserError) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_gives_milliseconds_a_token(tmp_path: Path) -> None:
    with ready(printing(tmp_path, PROMPT, TOKENS)) as run:
        assert run() == pytest.approx(2.5)
        assert run.build == "abc1234"
        asked = (tmp_path / "asked").read_text()
        assert asked.split()[:4] == ["-m", str(run.file), "-o", "json"]
    assert "-t 1 -p 0 -n 64 -r 1" in asked and "-d" not in asked.split()


@given(threads=st.integers(1, 64), tokens=st.integers(1, 512), depth=st.integers(0, 512))
def test_it_is_asked_for_what_is_compared(
    tmp_path_factory: pytest.TempPathFactory, threads: int, tokens: int, depth: int
) -> None:
    folder = tmp_path_factory.mktemp("fake")
    with ready(printing(folder, TOKENS | {"n_gen": tokens}), threads=threads, tokens=tokens, depth=depth) as run:
        assert run() == pytest.approx(160 / tokens)
    words = (folder / "asked").read_text().split()
    option = dict(zip(words[::2], words[1::2], strict=True))
    assert (option["-t"], option["-n"], option.get("-d", "0")) == (str(threads), str(tokens), str(depth))


def test_a_crash_is_told_by_its_last_line(tmp_path: Path) -> None:
    with ready(fake(tmp_path, "echo loading >&2; echo 'failed to load model' >&2; echo >&2; exit 3")) as run:
        said = refused(run)
    assert said.endswith("ended with code 3: failed to load model")
    with ready(fake(tmp_path, "kill -ILL $$")) as run:
        assert "SIGILL: it said nothing" in refused(run)


@pytest.mark.parametrize(
    "rows",
    [[], [PROMPT], [TOKENS | {"avg_ns": 0}], [{"n_gen": 64}], ["n_gen"], [TOKENS | {"avg_ns": "1"}]],
    ids=["nothing", "prompt", "no time", "untimed", "words", "text"],
)
def test_what_is_no_figure_is_refused(tmp_path: Path, rows: list[object]) -> None:
    with ready(printing(tmp_path, *rows)) as run:
        assert "printed no time of 64 tokens" in refused(run)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with ready(fake(tmp_path, "echo '| model | t/s |'")) as run:
        assert "printed no time" in refused(run)


def test_one_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ready(fake(tmp_path, "exec sleep 20")) as run:
        monkeypatch.setattr(llama, "PATIENCE", 0.1)
        assert "did not end" in refused(run)


def test_a_program_is_found_by_path_and_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake(tmp_path, "")
    assert llama.program(path) == llama.program(str(path)) == path
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert llama.program("llama-bench") == path


def test_what_is_no_llama_bench_is_refused(tmp_path: Path) -> None:
    assert "there is no program" in refused(llama.program, tmp_path / "none")
    assert "is a folder" in refused(llama.program, tmp_path)
    assert "is not llama-bench" in refused(llama.program, fake(tmp_path, "", told="llama-cli: a chat"))
    lost = tmp_path / "lost"
    lost.write_text("#!/bin/sh\necho 'libllama.so: cannot open' >&2\nexit 127\n")
    assert "cannot be executed" in refused(llama.program, lost)
    lost.chmod(0o755)
    assert "code 127: libllama.so: cannot open" in refused(llama.program, lost)
    lost.write_bytes(b"\x00\x01\x02\x03")
    assert "cannot run" in refused(llama.program, lost)


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package gguf were installed."""
    monkeypatch.setitem(sys.modules, "gguf", sys)


@pytest.mark.usefixtures("packaged")
def test_a_dtype_or_shape_without_a_file_is_refused(tmp_path: Path, temporary: Path) -> None:
    path = fake(tmp_path, "")
    assert "did you mean 'bfloat16'" in refused(contestant, path, SMALL, dtype="bfloat")
    assert "float64" in refused(contestant, path, SMALL, dtype="float64")
    narrow = ModelConfig(96, 72, 2, 4, 128)
    assert "a row of 72" in refused(contestant, path, narrow, dtype="int8")
    mixed = ModelConfig(96, 64, 2, 4, 128, experts=Experts(4, 2, 32))
    assert "without experts" in refused(contestant, path, mixed, dtype="float32")
    assert not list(temporary.iterdir())


@pytest.mark.usefixtures("packaged")
def test_a_machine_that_cannot_hold_the_file_is_told_before_it_is_written(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake(tmp_path, "")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(llama, "write", full)
    assert "No space left" in refused(contestant, path, SMALL, dtype="float32")
    assert not list(temporary.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 10})())
    assert "TMPDIR" in refused(contestant, path, SMALL, dtype="float32")


@pytest.mark.usefixtures("packaged")
def test_the_file_is_gone_with_the_contestant(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "write", lambda path, *_: path.write_text("a model"))
    path = printing(tmp_path, TOKENS)
    with contestant(path, SMALL, dtype="float32") as run:
        assert run() > 0 and run.file.exists()
    assert not list(temporary.iterdir())
    lost = contestant(path, SMALL, dtype="float32")
    del lost
    assert not list(temporary.iterdir())


def test_without_the_package_it_says_which(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(contestant, fake(tmp_path, ""), SMALL, dtype="float32")
    assert not list(temporary.iterdir())


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Dense decoders of any sizes."""
    kv, groups, head = (draw(st.integers(1, n)) for n in (4, 4, 16))
    width, layers, ff, tokens = (draw(st.integers(1, n)) for n in (96, 4, 96, 200))
    bias, norm, tied = (draw(st.booleans()) for _ in range(3))
    return ModelConfig(
        tokens,
        width,
        layers,
        kv * groups,
        ff,
        kv_heads=kv,
        head_dim=2 * head,
        qkv_bias=bias,
        qk_norm=norm,
        tied=tied,
    )


@given(shapes())
def test_both_have_the_same_number_of_weights(config: ModelConfig) -> None:
    with torch.device("meta"):
        ours = Transformer(config).size
    assert sum(torch.Size(shape).numel() for shape in llama.tensors(config).values()) == ours


@pytest.mark.parametrize("dtype", llama.KINDS)
@pytest.mark.parametrize("norm", [False, True], ids=["llama", "qwen3"])
def test_the_file_has_the_shape(tmp_path: Path, dtype: str, norm: bool) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf, which writes llama.cpp's files, is not installed")
    config = ModelConfig(320, 64, 2, 4, 128, kv_heads=2, qk_norm=norm, qkv_bias=not norm, tied=norm, max_positions=128)
    path = tmp_path / "random.gguf"
    llama.write(path, config, dtype)
    found = gguf.GGUFReader(path)
    laid = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in found.tensors}
    assert laid == llama.tensors(config)
    for tensor in found.tensors:
        assert tensor.tensor_type.name == (llama.KINDS[dtype] if len(tensor.shape) == 2 else "F32")
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if len(tensor.shape) == 2:
            assert values.std().item() == pytest.approx(values.shape[1] ** -0.5, rel=0.1)
        else:
            assert (values == (0 if "bias" in tensor.name else 1)).all()
    name = "qwen3" if norm else "llama"
    sizes = {
        re.sub(r"^\w+?\.", "", key): field.contents() for key, field in found.fields.items() if key.startswith(name)
    }
    assert (sizes["embedding_length"], sizes["block_count"], sizes["vocab_size"]) == (64, 2, 320)
    assert (sizes["attention.head_count"], sizes["attention.head_count_kv"], sizes["context_length"]) == (4, 2, 128)


def test_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf, which writes llama.cpp's files, is not installed")
    for name in "ab":
        llama.write(tmp_path / name, SMALL, "int8")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
