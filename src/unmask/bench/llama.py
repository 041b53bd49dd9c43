"""llama.cpp beside our autoregressive path: the user's own llama-bench on a random file of the same shape."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from unmask.errors import UserError, suggest

if TYPE_CHECKING:
    from unmask.models.config import ModelConfig

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
"""What llama.cpp calls a file whose matrices are of this dtype; norms and biases stay float32 in all of them."""
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5}
"""Bits a weight; Q8_0 keeps a 16-bit scale for each `RUN` weights of a row."""
RUN = 32
DISTINCT = 256
"""Rows of a random matrix that differ; a larger one repeats them, which costs a product nothing and spares minutes."""
PATIENCE = 1800
"""Seconds after which a run of llama-bench is given up."""


class Contestant:
    """llama-bench on one file, ready to be timed among others: each call is a run of its own.

    The file is removed by `close`, at the end of a `with`, or when the process ends.
    """

    def __init__(self, program: Path, *, threads: int, tokens: int, depth: int) -> None:
        self.program, self.threads, self.tokens, self.depth = program, threads, tokens, depth
        try:
            folder = tempfile.mkdtemp(prefix="unmask-llama-")
        except OSError as error:
            raise UserError(f"cannot write into {tempfile.gettempdir()}: {error.strerror}") from None
        self.file = Path(folder) / "random.gguf"
        self.close = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.build = ""
        """The commit of llama.cpp that ran, once it has."""

    def __call__(self) -> float:
        """Milliseconds per token of `tokens` tokens, one after the other behind `depth`, without loading the file."""
        wanted = {"-t": self.threads, "-p": 0, "-n": self.tokens, "-r": 1, "-ngl": 0, "-d": self.depth or None}
        options = [str(part) for option in wanted.items() if option[1] is not None for part in option]
        done = _run([str(self.program), "-m", str(self.file), "-o", "json", *options])
        if done.returncode:
            raise UserError(f"{self.program} {_ended(done.returncode)}: {_last(done.stderr)}")
        row = _figures(done.stdout, self.tokens)
        if row is None:
            raise UserError(f"{self.program} printed no time of {self.tokens} tokens; is it a llama-bench of today?")
        self.build = str(row.get("build_commit", ""))
        return row["avg_ns"] / self.tokens / 1e6

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def contestant(
    binary: str | Path, config: ModelConfig, *, dtype: str, threads: int = 1, tokens: int = 64, depth: int = 0
) -> Contestant:
    """llama.cpp's contestant: a random file of the shape of `config` in `dtype`, and `binary` to run it, on the CPU.

    `depth`: cells that are there before the first timed token. UserError, with nothing written, for what is no
    llama-bench, a dtype llama.cpp has no file for, a shape it cannot hold, or without the package gguf.
    """
    check(config, dtype)
    made = Contestant(program(binary), threads=threads, tokens=tokens, depth=depth)
    try:
        write(made.file, config, dtype)
    except BaseException as error:
        made.close()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {made.file}: {error.strerror}") from None
        raise
    return made


def check(config: ModelConfig, dtype: str) -> None:
    """UserError if llama.cpp has no file for this shape in this dtype, or this machine cannot write it."""
    if dtype not in KINDS:
        raise suggest(dtype, KINDS, "dtype of llama.cpp")
    if config.experts is not None:
        raise UserError("llama.cpp is compared on dense shapes, without experts")
    shapes = tensors(config).values()
    if dtype == "int8" and (odd := sorted({shape[1] for shape in shapes if len(shape) == 2 and shape[1] % RUN})):
        raise UserError(f"llama.cpp keeps int8 in runs of {RUN} weights, and a row of {odd[0]} is not made of them")
    _gguf()
    size = sum(math.prod(shape) for shape in shapes) * BITS[KINDS[dtype]] / 8
    if size > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        where = f"{tempfile.gettempdir()}, which has {free / 1e9:.1f}"
        raise UserError(f"a file of this shape takes {size / 1e9:.1f} GB of {where}; set TMPDIR to a larger place")


def program(binary: str | Path) -> Path:
    """The program named by a path or found on PATH, which must be llama-bench (UserError)."""
    path = Path(binary).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the program llama-bench in it")
    if path.is_file():
        if not os.access(path, os.X_OK):
            raise UserError(f"{path} cannot be executed; give the path of llama-bench")
        path = path.resolve()
    elif found := shutil.which(path):
        path = Path(found)
    else:
        raise UserError(f"there is no program {path}; build llama.cpp's llama-bench and give its path")
    done = _run([str(path), "--help"])
    if "--n-gen" not in done.stdout + done.stderr:
        said = f": it {_ended(done.returncode)}: {_last(done.stderr)}" if done.returncode else ""
        raise UserError(f"{path} is not llama-bench{said}")
    return path


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """llama.cpp's names of the tensors of a dense decoder, each with its shape, [outputs, inputs] or [width]."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (c.d_model,),
        "attn_q.weight": (q, c.d_model),
        "attn_k.weight": (kv, c.d_model),
        "attn_v.weight": (kv, c.d_model),
        "attn_output.weight": (c.d_model, q),
        "ffn_norm.weight": (c.d_model,),
        "ffn_gate.weight": (c.ff, c.d_model),
        "ffn_up.weight": (c.ff, c.d_model),
        "ffn_down.weight": (c.d_model, c.ff),
    }
    if c.qkv_bias:
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if c.qk_norm:
        layer |= {"attn_q_norm.weight": (c.head_dim,), "attn_k_norm.weight": (c.head_dim,)}
    ends: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (c.vocab_size, c.d_model),
        "output_norm.weight": (c.d_model,),
    }
    if not c.tied:
        ends["output.weight"] = (c.vocab_size, c.d_model)
    return ends | {f"blk.{i}.{name}": shape for i in range(c.layers) for name, shape in layer.items()}


def write(path: Path, config: ModelConfig, dtype: str) -> None:
    """Write a GGUF file of this shape: architecture llama, or qwen3 for norms of queries and keys; the same every time.

    It holds one tensor in memory at a time. Matrices are N(0, 1 / inputs), norms 1, biases 0.
    """
    gguf = _gguf()
    import numpy as np

    writer = gguf.GGUFWriter(path, "qwen3" if config.qk_norm else "llama")
    _describe(writer, config, gguf.LlamaFileType[f"MOSTLY_{KINDS[dtype]}" if dtype != "float32" else "ALL_F32"])
    kinds, laid = gguf.GGMLQuantizationType, tensors(config)
    for name, shape in laid.items():
        kind = kinds[KINDS[dtype] if len(shape) == 2 else "F32"]
        size = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), math.prod(size), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for seed, (name, shape) in enumerate(laid.items()):
            writer.write_tensor_data(
                _matrix(shape, kinds[KINDS[dtype]], seed) if len(shape) == 2 else _vector(name, *shape)
            )
    finally:
        writer.close()


def _describe(writer: Any, config: ModelConfig, kind: int) -> None:
    """What llama.cpp reads of a shape: sizes, no vocabulary but its number of tokens."""
    c = config
    for add, value in (
        (writer.add_context_length, c.max_positions),
        (writer.add_embedding_length, c.d_model),
        (writer.add_block_count, c.layers),
        (writer.add_feed_forward_length, c.ff),
        (writer.add_head_count, c.heads),
        (writer.add_head_count_kv, c.kv_heads),
        (writer.add_key_length, c.head_dim),
        (writer.add_value_length, c.head_dim),
        (writer.add_layer_norm_rms_eps, c.norm_eps),
        (writer.add_rope_freq_base, c.rope_theta),
        (writer.add_vocab_size, c.vocab_size),
        (writer.add_tokenizer_model, "no_vocab"),
        (writer.add_file_type, kind),
    ):
        add(value)


def _matrix(shape: tuple[int, ...], kind: Any, seed: int) -> Any:
    """A random matrix as the file holds it, uint8 [outputs, bytes of a row]."""
    import numpy as np

    rows = np.random.default_rng(seed).standard_normal((min(shape[0], DISTINCT), shape[1]), dtype=np.float32)
    packed = _gguf().quants.quantize(rows / math.sqrt(shape[1]), kind).view(np.uint8)
    return np.resize(packed, (shape[0], packed.shape[1]))


def _vector(name: str, width: int) -> Any:
    import numpy as np

    return np.full(width, 0 if name.endswith("bias") else 1, np.float32).view(np.uint8)


def _gguf() -> Any:
    """The optional package that writes llama.cpp's files (UserError without it)."""
    try:
        return import_module("gguf")
    except ImportError:
        raise UserError("llama.cpp's files need the package gguf: pip install gguf") from None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end; UserError for what the system cannot run, or what does not end."""
    silent = subprocess.DEVNULL
    try:
        return subprocess.run(
            command, stdin=silent, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not end within {PATIENCE} s") from None
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None


def _ended(code: int) -> str:
    """How a program ended that did not end well."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}"


def _last(text: str) -> str:
    """The last line of what a program said, or that it said nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _figures(text: str, tokens: int) -> dict[str, Any] | None:
    """The row of llama-bench's JSON about generating `tokens` tokens, or None."""
    try:
        rows = json.loads(text)
    except ValueError:
        return None
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("n_gen") == tokens:
            took = row.get("avg_ns")
            if isinstance(took, int | float) and took > 0:
                return row
    return None
