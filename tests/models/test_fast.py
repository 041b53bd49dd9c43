"""The fast path of a processor: what a model keeps and loses on it, what stays off it, and a machine of no help."""

from __future__ import annotations

import copy
import faulthandler
import multiprocessing
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import embedded
from unmask.cli import main
from unmask.errors import UserError
from unmask.models import native
from unmask.models.config import Experts, ModelConfig
from unmask.models.fast import PackedLinear, accelerate, prepacked
from unmask.models.joint import digest
from unmask.models.kv import KVPool
from unmask.models.sight import Sight
from unmask.models.transformer import Transformer

TINY = ModelConfig(61, d_model=32, layers=2, heads=2, ff=48, max_positions=64, qkv_bias=True)
TOKENS = torch.arange(20).view(2, 10)

try:
    native.library("float32", half=False)
    compiled = True
except native.Unavailable:
    compiled = False
needs_kernels = pytest.mark.skipif(not compiled, reason="there are no kernels on this machine")
needs_x86 = pytest.mark.skipif(native.platform.machine().lower() not in ("x86_64", "amd64"), reason="no kernels at all")
needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this torch prepacks nothing",
)


def network(dtype: torch.dtype = torch.float32, config: ModelConfig = TINY) -> Transformer:
    torch.manual_seed(0)  # of the biases
    return Transformer(config).initialise(1, gain=1.5).to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(TOKENS).double()


def near(found: Tensor, right: Tensor, by: float = 1e-5) -> bool:
    return bool((found - right).abs().max() <= by * right.abs().max())


def quietly(make: Callable[[], Transformer]) -> Transformer:
    """What it makes without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


# ---- what a model on the fast path can do ----


@needs_kernels
def test_the_kernels_are_taken_and_off_takes_none():
    made = quietly(lambda: accelerate(network()))
    assert made.native is not None and near(logits(made), logits(network()))
    off = accelerate(network(), compile="off")
    assert off.native is None and torch.equal(logits(off), logits(network()))


@needs_kernels
@pytest.mark.parametrize("weights", ["", "int8"])
def test_a_copy_starts_without(weights):
    made = accelerate(network(), weights=weights)
    other = copy.deepcopy(made)
    assert other.native is None and made.native is not None
    assert torch.equal(logits(other), logits(network()))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert near(logits(made), logits(network()), 0.1 if weights else 1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_kernels_behind(dtype):
    made = accelerate(network()).to(dtype)
    assert made.native is None
    assert torch.equal(logits(made), logits(network().to(dtype)))


@needs_kernels
@pytest.mark.parametrize("weights", ["", "int8"])
def test_gradients_are_those_of_plain_torch(weights):
    found = []
    for model in (accelerate(network(), weights=weights), network()):
        model.requires_grad_(True)
        model(TOKENS).logsumexp(-1).mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["", "int8"])
def test_matrices_that_are_not_kept_leave_memory(weights, tied):
    made = accelerate(network(config=replace(TINY, tied=tied)), weights=weights, keep=False)
    gone = {name for name, p in made.named_parameters() if p.is_meta}
    matrices = {name for name, p in made.named_parameters() if p.dim() == 2 and name.startswith("blocks")}
    assert gone - {"head.weight"} == matrices
    assert near(logits(made), logits(network(config=replace(TINY, tied=tied))), 0.1 if weights else 1e-5)
    with pytest.raises(RuntimeError, match="compile='off'"):
        made(TOKENS)


@needs_kernels
def test_what_is_gone_has_no_digest():
    made, bare = accelerate(network(), keep=False), network()
    with pytest.raises(UserError, match="compile='off'") as told:
        digest(made)
    assert "\n" not in str(told.value)
    assert digest(accelerate(network())) == digest(bare)


@needs_kernels
def test_so_does_an_untied_head():
    assert accelerate(network(), keep=False).get_parameter("head.weight").is_meta


HOW = {"a copy": copy.deepcopy, "float": lambda m: m.float(), "bfloat16": lambda m: m.bfloat16()}


@needs_kernels
@pytest.mark.parametrize("how", HOW)
def test_without_kernels_and_matrices_there_are_no_logits(how):
    made = HOW[how](accelerate(network(), keep=False))
    with pytest.raises(RuntimeError, match="compile='off'"):
        logits(made)


@needs_kernels
def test_a_mask_as_a_tensor_needs_the_matrices():
    made = accelerate(network(), keep=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="compile='off'"):
        made(TOKENS, visible=torch.ones(2, 1, 10, 10, dtype=torch.bool))


@needs_kernels
@pytest.mark.parametrize("how", ["a step", "load_state_dict"])
def test_weights_that_change_are_seen(how):
    made, right = accelerate(network()), network()
    with torch.no_grad():
        for p in right.parameters():
            p.mul_(1.5)
        if how == "a step":
            for p in made.parameters():
                p.mul_(1.5)
        else:
            made.load_state_dict(right.state_dict())
    assert near(logits(made), logits(right))


@needs_kernels
@pytest.mark.parametrize("how", ["a parameter", "load_state_dict"])
def test_weights_that_are_replaced_are_seen(how):
    made, right = accelerate(network()), network()
    if how == "a parameter":
        for model in (made, right):
            model.get_submodule("blocks.0.mlp.down").weight = torch.nn.Parameter(torch.ones(32, 48), False)
    else:
        other = {name: t * 1.5 for name, t in right.state_dict().items()}
        for model in (made, right):
            model.load_state_dict(other, assign=True)
    assert near(logits(made), logits(right))


@needs_kernels
def test_a_mask_as_a_tensor_is_computed_by_torch():
    made, model = accelerate(network()), network()
    visible = torch.ones(10, 10).tril().bool().expand(2, 1, 10, 10)
    with torch.no_grad():
        assert near(made(TOKENS, visible=visible), model(TOKENS, visible=visible))


@needs_kernels
@pytest.mark.parametrize("index", [TOKENS + 60, TOKENS - 5], ids=["beyond", "before"])
@torch.no_grad()
def test_positions_that_are_none(index):
    with pytest.raises(IndexError):
        accelerate(network())(TOKENS, index)


@needs_kernels
@torch.no_grad()
def test_positions_of_all_rows_at_once():
    index = torch.arange(10)[None]
    assert near(accelerate(network())(TOKENS, index), network()(TOKENS, index))


# ---- what a mistaken caller gives them; each in a process of its own, which might not survive ----


def beyond_the_slots(model: Transformer) -> None:
    pool = KVPool(TINY, 1, 10, dtype=torch.float32)
    with pytest.raises(IndexError):
        model(TOKENS, index := torch.arange(10).expand(2, -1), kv=pool.at(torch.tensor([0, 9999]), index, 10))


def beyond_the_length(model: Transformer) -> None:
    pool = KVPool(TINY, 2, 5, dtype=torch.float32)
    with pytest.raises((IndexError, RuntimeError)):
        model(TOKENS, index := torch.arange(50, 60).expand(2, -1), kv=pool.at(torch.tensor([0, 1]), index, 5))


def positions_for_all_rows(model: Transformer) -> None:
    """Torch spreads them over the rows."""
    index, found = torch.arange(10)[None], []
    for made in (model, network()):
        pool = KVPool(TINY, 2, 10, dtype=torch.float32)
        found.append(made(TOKENS, index, kv=pool.at(torch.tensor([1, 0]), index, 10)))
    assert near(*found)


def sight_for_all_rows(model: Transformer) -> None:
    group = torch.arange(10).int()[None]
    assert near(*(made(TOKENS, visible=Sight(group, group)) for made in (model, network())))


def sight_too_short(model: Transformer) -> None:
    group = torch.arange(10).int().expand(2, -1)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(TOKENS, visible=Sight(group, group[:, :4]))


def rotary_odd(model: Transformer) -> None:
    config = replace(TINY, rotary=5)
    assert near(*(made(TOKENS) for made in (accelerate(network(config=config)), network(config=config))))


def pool_of_another_dtype(model: Transformer) -> None:
    """Half as wide: all is written twice as far."""
    pool = KVPool(TINY, 2, 10, dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        model(TOKENS, index := torch.arange(10).expand(2, -1), kv=pool.at(torch.tensor([1, 0]), index, 10))


def narrow_numbers(model: Transformer) -> None:
    """Slots and places in int32, which torch takes."""
    index, found = torch.arange(10).expand(2, -1), []
    for made in (model, network()):
        pool = KVPool(TINY, 2, 10, dtype=torch.float32)
        found.append(made(TOKENS, index, kv=pool.at(torch.tensor([1, 0]).int(), index.int(), 10)))
    assert near(*found)


@torch.no_grad()
def survive(case: Callable[[Transformer], None]) -> None:
    faulthandler.disable()
    case(accelerate(network()))


CALLERS = [
    beyond_the_slots,
    beyond_the_length,
    positions_for_all_rows,
    sight_for_all_rows,
    sight_too_short,
    rotary_odd,
    pool_of_another_dtype,
    narrow_numbers,
]


@needs_kernels
@pytest.mark.parametrize("case", CALLERS)
def test_a_mistaken_caller_harms_no_memory(case):
    process = multiprocessing.get_context("fork").Process(target=survive, args=(case,))
    process.start()
    process.join(30)
    assert process.exitcode == 0


# ---- models that have no kernels ----

SPARSE = replace(TINY, experts=Experts(4, 2, 16))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float64, TINY),
        (torch.float16, TINY),
        (torch.float32, SPARSE),
        (torch.float32, replace(TINY, d_model=30)),
        (torch.float32, replace(TINY, ff=50)),
        (torch.float32, replace(TINY, heads=4, head_dim=5, rotary=4)),
    ],
    ids=["float64", "float16", "experts", "width 30", "ff 50", "heads of 5"],
)
def test_others_stay_as_they_are(dtype, config):
    made = quietly(lambda: accelerate(network(dtype, config), keep=False))
    assert made.native is None
    assert torch.equal(logits(made), logits(network(dtype, config)))
    with pytest.raises(UserError, match=r"int8 weights need the compiled kernels, and .*use float32 or bfloat16"):
        accelerate(network(dtype, config), weights="int8")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compile": "on"}, "compile is auto or off, not 'on'"),
        ({"weights": "int4"}, "rounded to int8, not 'int4'"),
        ({"weights": "int8", "compile": "off"}, "leave compile at auto"),
    ],
)
def test_settings_that_are_none(settings, says):
    with pytest.raises(UserError, match=says):
        accelerate(network(), **settings)


# ---- prepacked products ----


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose oneDNN is faster than our kernels, as far as `accelerate` can tell."""
    monkeypatch.setattr(native, "units", lambda: ["amx", "avx512_bf16", "vnni"])


@needs_onednn
def test_prepacked_products(amx):
    made, model = quietly(lambda: accelerate(network(torch.bfloat16))), network(torch.bfloat16)
    assert made.native is None and isinstance(made.get_submodule("blocks.0.attn.qkv"), PackedLinear)
    assert near(logits(made), logits(model), 0.02)
    assert torch.equal(made(TOKENS), model(TOKENS))  # with gradients: the plain matrices
    assert torch.equal(logits(made.float()), logits(model.float()))


@needs_onednn
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_prepacked_matrices_that_are_not_kept(tied, amx):
    config = replace(TINY, tied=tied)
    made = accelerate(network(torch.bfloat16, config), keep=False)
    assert made.get_parameter("blocks.0.attn.qkv.weight").is_meta
    with pytest.raises(RuntimeError, match="compile='off'"):
        made(TOKENS)
    assert near(logits(made), logits(network(torch.bfloat16, config)), 0.02)


@needs_onednn
def test_a_copy_of_prepacked_products():
    made, model = copy.deepcopy(prepacked(network(torch.bfloat16))), network(torch.bfloat16)
    assert near(logits(made), logits(model), 0.02)


@needs_kernels
@pytest.mark.parametrize("weights", ["", "int8"])
def test_a_processor_without_units_is_told(weights, monkeypatch):
    monkeypatch.setattr(native, "units", list)
    with pytest.warns(UserWarning, match=f"no {weights or 'bfloat16'} units, so float32 may be as fast"):
        made = accelerate(network(torch.bfloat16), weights=weights)
    assert near(logits(made), logits(network()), 0.2)
    assert quietly(lambda: accelerate(network())).native is not None


# ---- a machine that is of no help ----


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One on which nothing was compiled yet."""
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield monkeypatch
    native.library.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def no_command(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", "/nonexistent -O1")
    return "CC=/nonexistent -O1 is not a command"


def no_path(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("PATH", "")
    return r"there is no C compiler \(cc, gcc or clang\)"


def failing(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", script(path / "cc", "echo 'x.c: In function f:' >&2; echo 'x.c:1: error: broken' >&2; exit 1\n"))
    return "could not compile the kernels: x.c:1: error: broken"


def failing_in_other_words(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", script(path / "cc", "echo 'Fehler: kaputt' >&2; echo 'und noch etwas' >&2; exit 1\n"))
    return "could not compile the kernels: Fehler: kaputt"


def no_folder(path: Path, patch: pytest.MonkeyPatch) -> str:
    (path / "file").write_text("")
    patch.setenv("UNMASK_CACHE", str(path / "file" / "kept"))
    return "the kernels could not be kept in"


def nothing_made(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", script(path / "cc", "exit 0\n"))
    return "the kernels could not be kept in"


def no_library(path: Path, patch: pytest.MonkeyPatch) -> str:
    text = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo junk > "$2"; fi; shift; done\n'
    patch.setenv("CC", script(path / "cc", text))
    return "the kernels could not be kept in"


def no_program(path: Path, patch: pytest.MonkeyPatch) -> str:
    (path / "cc").write_bytes(b"\x00\x01")
    (path / "cc").chmod(0o755)
    patch.setenv("CC", str(path / "cc"))
    return "cc"


def no_text(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", script(path / "cc", r"""printf '\377 error\n' >&2; printf '\377\n'; exit 1""" + "\n"))
    return "could not compile the kernels"


def no_quote(path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("CC", "gcc '")
    return "CC"


def other_library(path: Path, patch: pytest.MonkeyPatch) -> str:
    make = f'echo "int x;" | {shlex.join(native.compiler())} -shared -fPIC -xc - -o "$2"'
    text = f'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then {make}; fi; shift; done\n'
    patch.setenv("CC", script(path / "cc", text))
    return "kernels"


def no_home(path: Path, patch: pytest.MonkeyPatch) -> str:
    for name in ("UNMASK_CACHE", "XDG_CACHE_HOME", "HOME"):
        patch.delenv(name, raising=False)
    patch.setattr("pwd.getpwuid", {}.__getitem__)
    return "home"


TROUBLES = [
    no_command,
    no_path,
    failing,
    failing_in_other_words,
    no_folder,
    nothing_made,
    no_library,
    no_program,
    no_text,
    no_quote,
    other_library,
    no_home,
]


@needs_x86
@pytest.mark.parametrize("trouble", TROUBLES)
def test_without_kernels_the_slow_path_is_taken_and_told(trouble, machine, tmp_path):
    says = trouble(tmp_path, machine)
    with pytest.warns(UserWarning, match=f"decoding without compiled kernels, which is slower: .*{says}"):
        made = accelerate(network())
    assert made.native is None and torch.equal(logits(made), logits(network()))
    with pytest.raises(UserError, match=f"int8 weights need the compiled kernels, and .*{says}.*; use float32") as told:
        accelerate(network(), weights="int8")
    assert "\n" not in str(told.value)
    if not any((tmp_path / "kept").glob("*.so")):
        assert not list(tmp_path.glob("kept/*"))  # no draft is left behind


@needs_onednn
@needs_x86
def test_without_a_compiler_bfloat16_is_prepacked(machine):
    machine.setenv("PATH", "")
    with pytest.warns(UserWarning, match="no C compiler"):
        made = accelerate(network(torch.bfloat16))
    assert isinstance(made.get_submodule("blocks.0.mlp.down"), PackedLinear)


@needs_kernels
def test_a_kept_library_that_was_damaged(machine, tmp_path):
    """Whether it is made anew or done without: right results."""
    machine.setenv("CC", script(tmp_path / "cc", f'exec {shlex.join(native.compiler())} "$@" -O0\n'))
    native.library("float32", half=False)
    (kept,) = (tmp_path / "kept").iterdir()
    native.library.cache_clear()
    kept.unlink()  # a new file: this process has the old one open
    kept.write_bytes(b"\x7fELF" + bytes(40))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = accelerate(network())
    assert near(logits(made), logits(network()))
    assert made.native is not None or "the kernels could not be kept" in str(told[0].message)


# ---- the command line ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(embedded.build(tmp_path_factory.mktemp("models") / "dllm"))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(folder: str, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(("generate", embedded.PROMPT, "--model", folder, "--length", "8", *arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_compile_off_on_the_command_line(generate):
    code, out, err = generate("--compile", "off")
    assert (code, err) == (0, "")
    assert generate() == (0, out, "")


@needs_kernels
def test_int8_on_the_command_line(generate):
    code, out, err = generate("--dtype", "int8")
    assert code == 0 and out.strip()
    assert not err or "no int8 units" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compile", "nonsense"), "compile is auto or off, not 'nonsense'"),
        (("--dtype", "int8", "--compile", "off"), "int8 weights need the compiled kernels; leave compile at auto"),
        (("--dtype", "int4"), "unknown dtype 'int4'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says, generate):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "")
    assert says in err and err.count("\n") == 1


@needs_x86
def test_int8_without_a_compiler_on_the_command_line(generate, machine):
    machine.setenv("CC", "/nonexistent")
    code, out, err = generate("--dtype", "int8")
    assert (code, out) == (2, "")
    assert "CC=/nonexistent is not a command; use float32 or bfloat16" in err and err.count("\n") == 1


# ---- memory ----

LONG = """
import resource, torch
from unmask.decode import Canvas
from unmask.denoise import Plain
from unmask.models.config import Layout, ModelConfig
from unmask.models.fast import accelerate
from unmask.models.transformer import Transformer
torch.set_num_threads(1)
L = 8192
config = ModelConfig(61, d_model=32, layers=2, heads=2, ff=48, max_positions=L, layout=Layout("block", 32), mask_id=60)
model = accelerate(Transformer(config).initialise(1).eval().requires_grad_(False))
denoise = Plain(model, slots=1, length=L)
def step(prompt):
    canvas = Canvas.new([[1] * prompt], L - prompt, mask_id=60)
    return denoise(canvas, canvas.valid, canvas.masked).logits.isfinite().any(1).all()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert step(L - 32)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_threads_that_end_hold_no_memory():
    """Each takes 8 MiB for the widest states of 512 tokens."""
    model = accelerate(network(config=replace(TINY, layers=1, ff=2048, max_positions=512)))

    def forward() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            model(torch.zeros(1, 512, dtype=torch.int64))

    def held(threads: int) -> float:
        """MiB of this process after so many more."""
        for _ in range(threads):
            one = threading.Thread(target=forward)
            one.start()
            one.join()
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

    before = held(8)
    assert held(16) - before < 40


@needs_kernels
def test_memory_of_a_long_canvas_grows_with_its_length():
    """8192 cells: a mask takes 64 MiB, the scores of a head 256; all that a forward needs are 20."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False)
    before, after = map(int, done.stdout.split())
    assert (after - before) / 1024 < 32, done.stderr
