"""Block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573): noisy blocks over clean earlier ones, one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer
from unmask.train.batches import Batch
from unmask.train.forcing import LEAST


@dataclass(frozen=True)
class Twice:
    """A batch that stands twice, [noisy | clean], N columns in all; of the noisy prompt only what shares a block.

    `index` [B, N]: positions. `source` [B, R]: the column whose logits predict each response cell. `target`, `weight`
    [B, R]. `visible` [B, 1, N, N] bool.
    """

    tokens: Tensor
    index: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    visible: Tensor


def masks(batch: Batch, layout: Layout, draw: torch.Generator, *, eos: int, complementary: bool) -> tuple:
    """(masked, weight), [B, R] each (twice the rows if complementary): a rate t ~ U(0, 1) per block and row.

    A masked cell weighs 1 / t (BD3-LM, eq. 8). `complementary`: every row is seen twice, once with the mask and once
    with its complement, so that each cell is learned once and weighs the same (Fast-dLLM v2, Wu et al. 2025). Blocks
    behind the first EOS weigh nothing.
    """
    block, counted = batch.blocks(layout), batch.counted(layout, eos).float()
    rate = torch.rand(len(block), int(block.max()) + 1, generator=draw).gather(1, block)
    masked = torch.rand(rate.shape, generator=draw) < rate
    if complementary:
        masked = torch.cat([masked, ~masked])
        return masked, masked * counted.repeat(2, 1) / counted.sum()
    return masked, masked * counted / rate.clamp(min=LEAST) / counted.sum()


def prepare(batch: Batch, config: ModelConfig, draw: torch.Generator, *, complementary: bool = True) -> Twice:
    """The batch with its masks, for a model of this layout, mask id and shift."""
    layout, start = config.layout, batch.prompt
    masked, weight = masks(batch, layout, draw, eos=config.eos_ids[0], complementary=complementary)
    if len(masked) > len(batch.tokens):
        batch = Batch(batch.tokens.repeat(2, 1), batch.valid.repeat(2, 1), start)
    size = batch.tokens.shape[1]
    first = start if layout.grid == "origin" else max(0, start - layout.size + 1)
    columns = torch.cat([torch.arange(first, size), torch.arange(size, 2 * size)])
    noisy = torch.cat([batch.tokens[:, :start], batch.tokens[:, start:].masked_fill(masked, config.mask_id)], 1)
    real = torch.cat([batch.valid, batch.valid], 1)[:, None, :]
    allowed = layout.duplicated(batch.position, batch.origin) & real | torch.eye(2 * size, dtype=torch.bool)
    return Twice(
        tokens=torch.cat([noisy, batch.tokens], 1)[:, columns],
        index=batch.position.repeat(1, 2)[:, columns],
        source=sources(batch, layout, first, shift=config.shift),
        target=batch.tokens[:, start:],
        weight=weight,
        visible=allowed[:, columns][:, :, columns][:, None],
    )


def sources(batch: Batch, layout: Layout, first: int, *, shift: bool) -> Tensor:
    """[B, R]: the column that predicts each response cell, where the noisy text begins at its column `first`.

    Where logits are shifted it is the cell before, and for the first cell of a block the clean one: its block is
    complete by then, and stored.
    """
    rows, size = batch.tokens.shape
    cell = torch.arange(batch.prompt, size).expand(rows, -1)
    if not shift:
        return cell - first
    group = layout.groups(batch.position, batch.origin)
    begins = group[:, batch.prompt :] != group[:, batch.prompt - 1 : -1]
    return torch.where(begins, size - first + cell - 1, cell - 1 - first)


def loss(
    model: Transformer,
    tokens: Tensor,
    index: Tensor,
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    visible: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Weighted cross-entropy of the masked cells, summed (the weights are normalised)."""
    rows, size = tokens.shape
    need = (torch.arange(rows, device=source.device)[:, None] * size + source).flatten()
    logits = model(tokens, index, visible=visible, need=need, dtype=dtype).float()
    return (F.cross_entropy(logits, target.flatten(), reduction="none") * weight.flatten()).sum()
