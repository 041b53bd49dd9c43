"""Discrete Diffusion Forcing (Wang et al. 2025, arXiv 2508.09192): a block-causal student, a bidirectional teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.config import Layout
from unmask.models.transformer import Transformer
from unmask.train.batches import Batch

Schedule = Literal["monotone", "ramp", "random"]
LEAST = 0.1
"""Cells of a block masked at a lower rate than this weigh as much as at this one."""


@dataclass(frozen=True)
class Noise:
    """How much of each block is masked.

    `monotone`: the first block's rate is drawn from [low, high), each further one adds a random part of what is left,
    evenly shared (as published, with low 0.2 and high 0.7). `ramp`: clean blocks, a slope of random length from 0 to 1,
    blocks of masks: what a pipeline meets, from one block in flight to all. `random`: independent rates, the ablation.
    """

    schedule: Schedule = "monotone"
    low: float = 0.2
    high: float = 0.7
    longest: float = 4.0
    """Blocks of the longest slope of a ramp."""

    def rates(self, rows: int, blocks: int, draw: torch.Generator) -> Tensor:
        """[rows, blocks] in [0, 1]; never falling along a row, but for `random`."""
        uniform = torch.rand(rows, blocks, generator=draw)
        if self.schedule == "random":
            return self.low + (self.high - self.low) * uniform
        if self.schedule == "ramp":
            start = torch.rand(rows, 1, generator=draw) * (blocks + 1) - 1
            slope = torch.rand(rows, 1, generator=draw) * self.longest
            return ((torch.arange(blocks) - start) / slope.clamp(min=1e-3)).clamp(0, 1)
        first = self.low + (self.high - self.low) * uniform[:, :1]
        more = uniform[:, 1:] * (self.high - first) / max(1, blocks - 1)
        return torch.cat([first, first + more.cumsum(1)], 1).clamp(max=1)


@dataclass(frozen=True)
class Noisy:
    """One batch, seen by both: tokens [B, S] with masks, weight [B, R] of the response's cells, and who sees whom."""

    tokens: Tensor
    weight: Tensor
    teacher: Tensor
    student: Tensor
    """[B, 1, S, S] bool each."""


def prepare(batch: Batch, noise: Noise, layout: Layout, draw: torch.Generator, *, mask: int, eos: int) -> Noisy:
    """Mask the response block by block and say what each masked cell weighs; prompts stay clean.

    A masked cell weighs 1 / rate of its block, divided by the number of all masked cells, so that the weighted sum is
    the published mean. A block that lies behind the first EOS has no weight.
    """
    response, block = batch.tokens[:, batch.prompt :], batch.blocks(layout)
    rate = noise.rates(len(block), int(block.max()) + 1, draw).gather(1, block)
    masked = torch.rand(rate.shape, generator=draw) < rate
    counted = masked & batch.counted(layout, eos)
    weight = counted / rate.clamp(min=LEAST) / counted.sum().clamp(min=1)
    noisy = torch.cat([batch.tokens[:, : batch.prompt], response.masked_fill(masked, mask)], 1)
    return Noisy(noisy, weight, *visible(batch, layout))


def visible(batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Who sees whom, [B, 1, S, S] bool each: every real cell (teacher), and those that the layout lets see (student).

    A cell of the padding sees itself, so that no row of a softmax is empty.
    """
    size = batch.tokens.shape[1]
    all_real = batch.valid[:, None, None, :].expand(-1, 1, size, size)
    allowed = layout.visible(batch.position, batch.position, batch.origin)
    assert allowed is not None, "a student attends in blocks"
    return all_real, all_real & allowed[:, None] | torch.eye(size, dtype=torch.bool)


def loss(student: Transformer, teacher: Transformer, noisy: Noisy, dtype: torch.dtype) -> Tensor:
    """Forward KL from teacher to student over the masked cells, up to the teacher's entropy, weighted (the published
    code; the paper's eq. 3 prints the other direction).
    """
    return forcing(student, teacher, noisy.tokens, noisy.weight, noisy.teacher, noisy.student, dtype)


def forcing(
    student: Transformer,
    teacher: Transformer,
    tokens: Tensor,
    weight: Tensor,
    all_real: Tensor,
    allowed: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The same of plain tensors, as `torch.compile` takes them."""
    (rows, size), width = tokens.shape, weight.shape[1]
    first = size - width - int(student.config.shift)
    row, cell = torch.arange(rows, device=tokens.device), torch.arange(first, first + width, device=tokens.device)
    need = (row[:, None] * size + cell).flatten()
    with torch.no_grad():
        target = teacher(tokens, visible=all_real, need=need, dtype=dtype).float().softmax(-1)
    logits = student(tokens, visible=allowed, need=need, dtype=dtype).float()
    return (F.cross_entropy(logits, target, reduction="none") * weight.flatten()).sum()
