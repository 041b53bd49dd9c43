"""The two objectives of the embedded pair, on one batch layout and one network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.transformer import Transformer
from unmask.train.batches import Batch
from unmask.train.vocabulary import EOS, MASK

PAD_WEIGHT = 0.2
"""Weight of the EOS cells behind the first one: they are many and easy."""

FAR_WEIGHT = 0.3
"""Weight of the masked cells behind the active window of a suffix-shaped mask: they are guesses about a guess."""


def corrupt(response: Tensor, generator: torch.Generator, *, suffix: float = 0.6) -> tuple[Tensor, Tensor]:
    """Draw masks for responses [B, R]: (masked bool [B, R], weight [B, R] whose rows sum to 1).

    A share `suffix` of the rows is shaped like semi-autoregressive decoding: clean up to a random cut, a window of 0-32
    cells masked at a random rate, everything later masked. The others are uniform: a rate t ~ U(0, 1) per row, at least
    one cell (Nie et al. 2025, eq. 3, stratified in t).
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    (rows, width), cell = response.shape, torch.arange(response.shape[1])
    rate = (torch.arange(rows) + uniform(1)) / rows
    rate = rate[torch.randperm(rows, generator=generator)][:, None]
    rank = uniform(rows, width).argsort(1).argsort(1)
    masked = rank < (rate * width).long().clamp(0, width - 1) + 1
    length = (response != EOS).sum(1, keepdim=True) + 1
    cut = (uniform(rows, 1) * length).long()
    far = cell >= cut + (uniform(rows, 1) * 33).long()
    window = (cell >= cut) & ~far & (uniform(rows, width) < uniform(rows, 1))
    shaped = uniform(rows, 1) < suffix
    masked = torch.where(shaped, far | window | (cell == cut), masked)
    weight = masked.float() * torch.where(shaped & far & (cell != cut), FAR_WEIGHT, 1.0)
    weight = weight * torch.where(cell >= length, PAD_WEIGHT, 1.0)
    return masked, weight / weight.sum(1, keepdim=True).clamp(min=1e-6)


def dllm_inputs(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(input tokens [B, S], weights [B, R], visible [B, 1, S, S]) of the masked objective; prompts are never masked."""
    response = batch.tokens[:, batch.prompt :]
    masked, weight = corrupt(response, generator)
    noisy = torch.cat([batch.tokens[:, : batch.prompt], response.masked_fill(masked, MASK)], 1)
    size = batch.tokens.shape[1]
    return noisy, weight, batch.valid[:, None, None, :].expand(-1, 1, size, size).contiguous()


def ar_inputs(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same triple for next-token prediction: clean input, every response cell up to the first EOS, causal mask."""
    response = batch.tokens[:, batch.prompt :]
    weight = ((response == EOS).cumsum(1) <= 1).float()
    size = batch.tokens.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    sees = batch.valid[:, None, None, :] & causal | torch.eye(size, dtype=torch.bool)
    return batch.tokens, weight / weight.sum(1, keepdim=True), sees


def loss(
    model: Transformer, inputs: Tensor, target: Tensor, weight: Tensor, visible: Tensor, dtype: torch.dtype
) -> Tensor:
    """Weighted cross-entropy of the response, mean over rows: target, weight [B, R], logits read where `shift` says."""
    (rows, size), width = inputs.shape, target.shape[1]
    first = size - width - int(model.config.shift)
    need = (torch.arange(rows)[:, None] * size + torch.arange(first, first + width)).flatten()
    logits = model(inputs, visible=visible, need=need, dtype=dtype).float()
    cell = F.cross_entropy(logits, target.flatten(), reduction="none")
    return (cell * weight.flatten()).sum() / rows
