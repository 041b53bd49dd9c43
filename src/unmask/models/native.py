"""The C kernels: compiled once by the machine's compiler, kept on disk, and called without a copy."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "kernels"
KINDS = ("float32", "bfloat16", "int8")
PANEL = 32
"""Outputs of a panel of weights, as in kernels/products.h."""
FLAGS = "-O3 -march=native -std=gnu11 -fno-math-errno -fno-trapping-math -shared -fPIC"
OPENMP = "-fopenmp"


class Unavailable(Exception):
    """Why there are no kernels on this machine; `told` if that is worth a warning."""

    def __init__(self, reason: str, *, told: bool = True) -> None:
        super().__init__(reason)
        self.told = told


class Packed(Structure):
    """A weight matrix in panels."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("n", c_long),
        ("k", c_long),
    )


class Shape(Structure):
    """What all blocks of a model share."""

    _fields_ = (
        *((name, c_long) for name in ("width", "heads", "kv_heads", "head", "half", "ff", "positions", "threads")),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Layer(Structure):
    """The weights of one block."""

    _fields_ = (
        *((name, c_void_p) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Packed) for name in ("qkv", "out", "gate_up", "down")),
    )


class Pass(Structure):
    """What one forward computes: rows of tokens, where they stand, and what they see."""

    _fields_ = (
        ("rows", c_long),
        ("tokens", c_long),
        *((name, c_void_p) for name in ("start", "position", "place", "base", "length", "group_at")),
        ("head_stride", c_long),
        ("cell_stride", c_long),
        ("numbers", c_long),
        ("cells", c_long),
        ("query_group", c_void_p),
        ("key_group", c_void_p),
    )


def folder() -> Path:
    """Where compiled kernels are kept: UNMASK_CACHE, or `unmask` below XDG_CACHE_HOME or ~/.cache. Unavailable where
    nobody has a home."""
    if own := os.environ.get("UNMASK_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
    except RuntimeError:
        raise Unavailable("there is no home folder to keep the kernels in; set UNMASK_CACHE") from None


def units() -> list[str]:
    """What this processor multiplies with: of "amx", "avx512_bf16" and "vnni" those it has."""
    able = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported", "vnni": "_is_vnni_supported"}
    return [name for name, ask in able.items() if getattr(torch.cpu, ask, bool)()]


def compiler() -> list[str]:
    """The command of the C compiler: CC, or the first of cc, gcc and clang. Unavailable where there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise Unavailable(f"CC={os.environ['CC']} is not a command: {error}") from None
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    told = f"CC={os.environ['CC']} is not a command" if named else "there is no C compiler (cc, gcc or clang)"
    raise Unavailable(told)


def _processor() -> str:
    """What `-march=native` depends on: the processor's name and abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def _run(call: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler. Unavailable if the system cannot, or it does not end."""
    try:
        return subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{call[0]} cannot be run: {error}") from None


def _compile(command: list[str], defines: list[str], target: Path) -> None:
    """Write a library; with OpenMP if it can be had. Unavailable, with the compiler's first word."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as draft:
        made = Path(draft) / "kernels.so"
        said = ""
        for more in ([OPENMP], []):
            call = [*command, *shlex.split(FLAGS), *more, *defines, "-o", str(made), str(SOURCES / "block.c"), "-lm"]
            done = _run(call)
            if done.returncode == 0:
                os.replace(made, target)
                return
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise Unavailable(f"{command[0]} could not compile the kernels: {said}")


@lru_cache
def library(kind: str, *, half: bool) -> ctypes.CDLL:
    """The kernels of a kind of weights, with keys and values in bfloat16 (`half`) or float32.

    Compiled if no earlier call did on this machine. Unavailable, with the reason.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise Unavailable(f"the kernels are written for x86-64 processors, not {platform.machine()}")
    command, defines = compiler(), [f"-DKIND={KINDS.index(kind)}", f"-DHALF={int(half)}"]
    version = _run([*command, "--version"]).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    text = "\n".join([*sources, version, FLAGS, _processor(), *defines])
    target = folder() / f"kernels-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _compile(command, defines, target)
        return _declared(ctypes.CDLL(str(target)))
    except OSError as error:
        raise Unavailable(f"the kernels could not be kept in {target.parent}: {error}") from None
    except AttributeError:
        raise Unavailable(f"{target} does not hold the kernels; remove it") from None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library, knowing what its functions take."""
    run = [POINTER(Shape), POINTER(Layer), c_long, POINTER(Pass), c_void_p, c_void_p, c_void_p, c_long]
    found.blocks.argtypes = run
    found.linear.argtypes = [POINTER(Packed), c_void_p, c_long, c_void_p, c_int]
    found.norm.argtypes = [c_void_p, c_void_p, c_float, c_long, c_long, c_void_p]
    found.top.argtypes = [c_void_p, c_long, c_long, c_void_p, c_void_p]
    found.norm.restype = found.top.restype = None
    return found


def panels(weight: Tensor, step: int) -> Tensor:
    """[N, K] -> [N / 32, K / step, 32, step], padded with zeros."""
    n, k = weight.shape
    wide = weight.new_zeros(-(-n // PANEL) * PANEL, k)
    wide[:n] = weight
    return wide.view(-1, PANEL, k // step, step).transpose(1, 2).contiguous()


def pointer(t: Tensor | None) -> int | None:
    """The address of a tensor's numbers."""
    return None if t is None else t.data_ptr()


class Arena:
    """One stretch of memory for all matrices of a model, in large pages if there are any: a token reads all of it.

    A step of one token over 58 MB of weights takes 1.8 ms so, and 2.2 ms where each matrix lies somewhere.
    """

    def __init__(self, size: int) -> None:
        size = max(size, mmap.PAGESIZE)
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory = mmap.mmap(-1, size)
        else:  # private, since shared memory has no large pages
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes, self._used = torch.frombuffer(self._memory, dtype=torch.uint8), 0

    @staticmethod
    def room(shape: torch.Size, kind: str) -> int:
        """How many bytes a matrix takes."""
        n, k = shape
        return -(-n // PANEL) * PANEL * k * {"float32": 4, "bfloat16": 2, "int8": 1}[kind]

    def take(self, t: Tensor) -> Tensor:
        """The same numbers in here."""
        size = t.numel() * t.element_size()
        place = self._bytes[self._used : self._used + size].view(t.dtype).view(t.shape)
        self._used += size
        return place.copy_(t)


class Weight:
    """A matrix [N, K] as the kernels take it, and the tensors that it points into."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, arena: Arena) -> None:
        self.n, self.k = weight.shape
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.scale = self.offset = None
        if kind == "int8":
            wide = weight.detach().float()
            scale = wide.abs().amax(1).clamp(min=1e-30) / 127
            whole = (wide / scale[:, None]).round().to(torch.int8)
            self.data = arena.take(panels(whole, 4))
            pad = -self.n % PANEL
            self.scale = torch.nn.functional.pad(scale, (0, pad))
            self.offset = torch.nn.functional.pad(whole.float().sum(1) * 128, (0, pad))
        else:
            dtype = getattr(torch, kind)
            self.data = arena.take(panels(weight.detach().to(dtype), 2 if dtype == torch.bfloat16 else 1))
        tensors = (self.data, self.scale, self.offset, self.bias)
        self.packed = Packed(*(pointer(t) for t in tensors), self.n, self.k)
