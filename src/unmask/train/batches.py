"""Batches of the embedded pair's tasks: batch number i is a pure function of (seed, i), so training resumes exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.models.config import Layout
from unmask.train import problems, restaurants
from unmask.train.vocabulary import EOS, PAD, SEP


@dataclass(frozen=True)
class Bucket:
    """One fixed shape: which task, how many items a row, prompt and response widths, share of the steps."""

    task: str
    items: tuple[int, ...]
    prompt: int
    response: int
    share: float


BUCKETS = (
    Bucket("problems", (1,), 48, 24, 0.36),
    Bucket("problems", (1, 2, 2), 88, 48, 0.10),
    Bucket("problems", (3, 4, 4), 168, 88, 0.10),
    Bucket("problems", (5, 6, 7, 8, 8), 328, 176, 0.15),
    Bucket("restaurants", (1,), 56, 40, 0.20),
    Bucket("restaurants", (2,), 104, 80, 0.04),
    Bucket("restaurants", (3, 4), 208, 160, 0.03),
    Bucket("restaurants", (6, 7, 8), 416, 304, 0.02),
)


MIXTURES: dict[str, tuple[float, ...]] = {
    "even": tuple(b.share for b in BUCKETS),
    "short": (0.46, 0.10, 0.06, 0.06, 0.26, 0.03, 0.02, 0.01),
    "alone": (0.7, 0.15, 0.1, 0.05, 0.0, 0.0, 0.0, 0.0),
}
"""Shares of the steps by bucket: `short` spends two thirds of the tokens on single problems and single restaurants,
`alone` all of them on problems."""


@dataclass(frozen=True)
class Batch:
    """tokens [B, P + R]: prompt right-aligned at column P, response padded with EOS.

    `valid` is False on the prompt's padding.
    """

    tokens: Tensor
    valid: Tensor
    prompt: int

    @property
    def position(self) -> Tensor:
        """[B, P + R]: absolute position of each cell, counted from the row's first real one."""
        return (self.valid.cumsum(1) - 1).clamp(min=0)

    @property
    def origin(self) -> Tensor:
        """[B]: position at which the response begins."""
        return self.valid[:, : self.prompt].sum(1)

    def blocks(self, layout: Layout) -> Tensor:
        """[B, R]: the block of each response cell in the layout's grid, that of the first one being 0."""
        group = layout.groups(self.position, self.origin)[:, self.prompt :]
        return group - group[:, :1]

    def counted(self, layout: Layout, eos: int) -> Tensor:
        """[B, R] bool: response cells of blocks that do not lie wholly behind the first EOS."""
        block = self.blocks(layout)
        ended = self.tokens[:, self.prompt :] == eos
        first = torch.where(ended.cumsum(1) == 0, block.shape[1], block).amin(1, keepdim=True)
        return block <= first


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], bucket: Bucket) -> Batch:
    """Lay out token ids as a Batch; rows that do not fit are the caller's error."""
    width = bucket.prompt + bucket.response
    tokens = torch.full((len(prompts), width), EOS)
    tokens[:, : bucket.prompt] = PAD
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, bucket.prompt - len(p) - 1 : bucket.prompt] = torch.tensor([*p, SEP])
        tokens[row, bucket.prompt : bucket.prompt + len(r)] = torch.tensor(r)
    return Batch(tokens, tokens != PAD, bucket.prompt)


@dataclass(frozen=True)
class Mixture:
    """The training distribution: every step draws one bucket and fills it with about `tokens` tokens."""

    tokenizer: Tokenizer
    rows: list[restaurants.Restaurant]
    seed: int
    tokens: int = 4608
    buckets: tuple[Bucket, ...] = BUCKETS
    shares: str = "even"
    share: tuple[int, int] = (0, 1)
    """(number of this process, how many there are): each draws batches of its own."""

    @property
    def cells(self) -> tuple[int, int]:
        """(prompt, response): columns of the widest batch there can be."""
        drawn = [b for b, share in zip(self.buckets, MIXTURES[self.shares], strict=True) if share]
        return max(b.prompt for b in drawn), max(b.response for b in drawn)

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        step = step * self.share[1] + self.share[0]
        r = random.Random(f"unmask-batch-{self.seed}-{step}")
        bucket = r.choices(self.buckets, MIXTURES[self.shares])[0]
        count = max(4, self.tokens // (bucket.prompt + bucket.response))
        pairs = self._pairs(bucket, r.randrange(2**60))
        prompts, responses = [], []
        while len(prompts) < count:
            texts = [next(pairs) for _ in range(count)]
            p = self.tokenizer.encode_batch([t[0] for t in texts])
            q = self.tokenizer.encode_batch([t[1] for t in texts])
            fits = [
                (a.ids, b.ids)
                for a, b in zip(p, q, strict=True)
                if len(a.ids) < bucket.prompt and len(b.ids) < bucket.response
            ]
            prompts += [a for a, _ in fits]
            responses += [b for _, b in fits]
        return collate(prompts[:count], responses[:count], bucket)

    def _pairs(self, bucket: Bucket, seed: int) -> Iterator[tuple[str, str]]:
        r = random.Random(seed)
        drawn, told = problems.problems(seed), self._restaurants(r)
        while True:
            k = r.choice(bucket.items)
            yield (problems.worksheet(drawn, k) if bucket.task == "problems" else restaurants.guide(told, k))[:2]

    def _restaurants(self, r: random.Random) -> Iterator[restaurants.Restaurant]:
        while True:
            yield r.choice(self.rows)
