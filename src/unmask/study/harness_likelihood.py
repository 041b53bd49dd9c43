"""How likely a text is after another: exactly for autoregressive models, as a lower bound for masked ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.decode.noise import uniform
from unmask.models.sight import Sight
from unmask.models.transformer import Transformer


def _of(model: Transformer, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` [N] by logits [N, V], and the likeliest tokens; the mask and padding have none."""
    c = model.config
    banned = [*range(c.token_count, c.vocab_size), *([c.mask_id] if 0 <= c.mask_id < c.token_count else [])]
    logits = logits.float()
    if banned:
        logits = logits.index_fill(1, torch.tensor(banned, device=logits.device), -torch.inf)
    return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0], logits.argmax(1)


@torch.inference_mode()
def exact(model: Transformer, context: Sequence[int], text: Sequence[int]) -> tuple[float, bool]:
    """ln p(text | context) of an autoregressive model, and whether each token of the text is the likeliest one.

    The context has at least one token.
    """
    assert context and text, "a likelihood needs something before it and something to score"
    device = model.embed.weight.device
    tokens = torch.tensor([[*context, *text]], device=device)
    group = torch.arange(tokens.shape[1], device=device, dtype=torch.int32)[None]
    need = torch.arange(len(context) - 1, tokens.shape[1] - 1, device=device)
    wanted = tokens[0, len(context) :]
    found, best = _of(model, model(tokens, visible=Sight(group, group), need=need), wanted)
    return float(found.sum()), bool((best == wanted).all())


def masks(group: Tensor, *, seed: int, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells to mask, and their weights, both [S, n], for cells in groups [n] and the numbers of samples [S].

    Each group of m cells has 1 to m of them masked, k by a draw that is stratified over the samples, each with the
    weight m / k, which is 1 / t (LLaDA, Nie et al. 2025, equation 6). A draw is a function of seed, sample and cell.
    """
    key, step = torch.tensor([[seed]], device=group.device), sample[:, None]
    cell = torch.arange(len(group), device=group.device)
    same = group[:, None] == group[None, :]
    size = same.sum(1)[None]
    draw = uniform(key, step, cell[None])
    rank = ((draw[:, None, :] < draw[:, :, None]) & same[None]).sum(2)
    level = (_radical(sample)[:, None] + uniform(key, torch.zeros_like(step), group[None], 1)) % 1.0
    count = (level * size).long().clamp(max=size - 1) + 1
    return rank < count, size / count


def _radical(sample: Tensor) -> Tensor:
    """Numbers in [0, 1) that fill it evenly however many are taken: the bits of the sample's number read backwards."""
    found, part, left = torch.zeros(sample.shape, device=sample.device), 0.5, sample.clone()
    while bool(left.any()):
        found, left, part = found + part * (left & 1), left >> 1, part / 2
    return found


@torch.inference_mode()
def elbo(
    model: Transformer, context: Sequence[int], text: Sequence[int], *, samples: int, seed: int = 0, batch: int = 8
) -> float:
    """A lower bound on ln p(text | context) of a masked model, estimated from so many masks, `batch` at a time.

    With full attention that of the text as a whole; in a block-causal model the sum of those of its blocks, each after
    the clean blocks before it (BD3-LM, Arriola et al. 2025, section 3.1). The context has at least one token.
    """
    assert context and text, "a likelihood needs something before it and something to score"
    device = model.embed.weight.device
    clean = torch.tensor([*context, *text], device=device)
    place = torch.arange(len(clean), device=device)
    origin = torch.tensor([len(context)], device=device)
    group = model.config.layout.groups(place, origin)[0]
    numbers = torch.arange(samples, device=device)
    total = 0.0
    for some in numbers.split(batch):
        masked, weight = masks(group[len(context) :], seed=seed, sample=some)
        total += float(_sum(model, clean, group, origin, masked, weight))
    return total / samples


def _sum(model: Transformer, clean: Tensor, group: Tensor, origin: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
    """The weighted log-probabilities of the masked cells [S, n] of the text at the end of `clean` [L], added up."""
    c, rows, length = model.config, len(masked), len(clean)
    hidden = torch.cat([masked.new_zeros(rows, length - masked.shape[1]), masked], 1)
    tokens = clean.expand(rows, -1).masked_fill(hidden, c.mask_id)
    row, cell = hidden.nonzero(as_tuple=True)
    source = cell - int(c.shift)
    if c.layout.kind == "full":
        logits = model(tokens, need=row * length + source)
    else:  # the text stands twice, so that each block sees those before it clean
        place = torch.arange(length, device=clean.device).expand(rows, -1)
        visible = c.layout.duplicated(place[:1], origin).expand(rows, -1, -1)[:, None]
        begins = torch.cat([group.new_ones(1).bool(), group[1:] != group[:-1]])
        source = torch.where(begins[cell] & bool(c.shift), source + length, source)
        both = torch.cat([tokens, clean.expand(rows, -1)], 1)
        logits = model(both, place.repeat(1, 2), visible=visible, need=row * 2 * length + source)
    found, _ = _of(model, logits, clean[cell])
    return (found * weight[masked]).double().sum()
