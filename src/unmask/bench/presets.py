"""Shapes to measure, with random weights: what a step costs depends on nothing else."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from unmask.errors import UserError, suggest
from unmask.models.config import Layout, ModelConfig
from unmask.models.fast import KEPT, accelerate, split
from unmask.models.transformer import Transformer

REAL = {"float32": 4, "bfloat16": 2, "int8": 2}
"""Bytes a weight as torch holds it: int8 is packed from bfloat16."""
PACKED = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes a weight as the kernels hold it."""
REST = 1e9
"""Bytes of everything that is no weight: torch, activations, what the memory's rate is read from."""


@dataclass(frozen=True)
class Preset:
    """A masked model's shape, and the text it is measured on: cells of the prompt, of the response and of a block."""

    name: str
    config: ModelConfig
    prompt: int
    length: int
    block: int
    about: str

    @property
    def cells(self) -> int:
        """Of the whole canvas."""
        return self.prompt + self.length

    @property
    def twin(self) -> ModelConfig:
        """The autoregressive model of the same shape."""
        return replace(self.config, layout=Layout("causal"), shift=True, mask_id=-1)


def _shape(vocab: int, d: int, layers: int, heads: int, ff: int, **rest: bool | int | float) -> ModelConfig:
    return ModelConfig(vocab, d, layers, heads, ff, mask_id=vocab - 1, max_positions=4096, **rest)  # type: ignore[arg-type]


SHAPES = {
    "31m": Preset("31m", _shape(4096, 512, 8, 8, 1536), 64, 192, 32, "31.5 million weights"),
    "0.5b": Preset(
        "0.5b",
        _shape(151936, 896, 24, 14, 4864, kv_heads=2, tied=True, qkv_bias=True),
        64,
        192,
        32,
        "the shape of Qwen2.5-0.5B",
    ),
    "8b": Preset("8b", _shape(126464, 4096, 32, 32, 12288), 256, 256, 32, "the shape of LLaDA-8B; for a GPU"),
    "dream-7b": Preset(
        "dream-7b",
        _shape(152064, 3584, 28, 28, 18944, kv_heads=4, qkv_bias=True, shift=True),
        256,
        256,
        32,
        "the shape of Dream-7B; for a GPU",
    ),
}
NAMES = ("embedded", *SHAPES)


@lru_cache
def find(name: str) -> Preset:
    """A preset by its name; UserError that suggests the nearest."""
    if name == "embedded":
        from unmask import zoo
        from unmask.models.load import plan

        config = plan(Path(zoo.path("dllm")), 0, "").config
        return Preset(name, config, 32, 64, 8, "the models that ship with the package")
    if name not in SHAPES:
        raise suggest(name, NAMES, "preset")
    return SHAPES[name]


def weights(config: ModelConfig) -> int:
    """How many weights a model of this shape has."""
    with torch.device("meta"):
        return Transformer(config).size


def free(device: str) -> int:
    """Bytes of memory that can be had; a large number where nobody knows."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62


def room(preset: Preset, dtype: str, *, kernels: int, plain: int) -> float:
    """Bytes that so many models on the kernels and in plain torch take at once, with what making one more takes."""
    count = weights(preset.config)
    packed = REAL[dtype] * (count <= KEPT) + PACKED[dtype]
    return REST + 1.1 * count * (kernels * packed + plain * REAL[dtype] + max(packed, REAL[dtype]))


def fits(preset: Preset, need: float, device: str) -> None:
    """UserError, before anything is allocated, for a shape that takes more bytes than there are."""
    if need > (have := free(device)):
        raise UserError(
            f"preset {preset.name} takes about {need / 1e9:.0f} GB, and {have / 1e9:.0f} are free on {device}; "
            "use a smaller preset, or a machine with more memory"
        )


def build(config: ModelConfig, dtype: str, *, compile: str = "auto", device: str = "cpu", seed: int = 0) -> Transformer:
    """A model of this shape with random weights, on its fast path, or in plain torch (`compile="off"`)."""
    dtype, rounded = split(dtype)
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        model = Transformer(config).to(kind)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    from unmask.models.transformer import rope_tables

    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(0, 0.02 if name.startswith("embed") else p.shape[1] ** -0.5, generator=generator)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    gc.collect()
    return accelerate(model, compile=compile, weights=rounded, keep=model.size <= KEPT)
