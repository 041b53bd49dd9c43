"""Train a joint sampler on a frozen model's own trajectories (ADJUST, arXiv 2509.22738)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.decode import Canvas, Draft, Recipe, cat, decode
from unmask.denoise import Draws, dress
from unmask.models.joint import JointSampler
from unmask.models.transformer import Transformer
from unmask.train import optim
from unmask.train.run import Run


@dataclass(frozen=True)
class Trajectories:
    """One-token-a-step runs of a model, N rows of L cells, of up to T steps.

    A finished canvas tells its own story: after t steps a cell is undecided if `decided_at` is above t.
    """

    tokens: Tensor
    decided_at: Tensor
    valid: Tensor
    origin: Tensor
    steps: Tensor
    """[N]: forwards of the row."""
    surprise: Tensor
    """[N, T]: how far step t moved what the model believes of the cells still undecided, mean KL in nats."""
    mask_id: int

    def state(self, rows: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [B, L], undecided [B, L]) of `rows` after `step` [B] steps."""
        undecided = (self.decided_at[rows] > step[:, None]) & self.valid[rows]
        return self.tokens[rows].masked_fill(undecided, self.mask_id), undecided


def record(
    base: Transformer,
    canvas: Canvas,
    order: Recipe,
    *,
    temperature: float = 0.0,
    batch: int = 64,
    on_row: Callable[[int], object] = lambda count: None,
) -> Trajectories:
    """The base's own runs from `canvas`, one token a step. `on_row` is told how many rows are done.

    `order` says which token comes next; it takes what `joint(1)` draws.
    """
    (count, width), steps = canvas.tokens.shape, int(canvas.masked.sum(1).max())
    moved, ends = torch.zeros(count, steps), []
    for first in range(0, count, batch):
        part = canvas[first : first + batch]
        part = replace(part, slot=torch.arange(len(part)))
        denoise = dress(base, order, slots=len(part), length=width, draws=Draws(temperature=temperature))
        before = None
        for number, (after, event) in enumerate(decode(denoise, order, part)):
            now = event.draft
            if before is not None:
                moved[first : first + batch, number - 1] = surprise(before, now)
            before, part = now, after
        ends.append(part)
        on_row(len(part))
    end = cat(ends)
    never = torch.where(end.masked, torch.iinfo(torch.int64).max, end.decided_at)
    return Trajectories(end.tokens, never, end.valid, end.origin, end.step, moved, end.mask_id)


def surprise(before: Draft, now: Draft) -> Tensor:
    """[B]: mean over the cells that are fresh in both drafts of KL(now || before) in nats; 0 where there is none."""
    both = before.fresh & now.fresh
    old, new = (d.logits[both.flatten()[d.at]].float().log_softmax(-1) for d in (before, now))
    banned = new == -torch.inf
    apart = (new.exp() * (new - old).masked_fill(banned, 0)).sum(-1)
    cells = torch.zeros(both.shape).masked_scatter(both, apart)
    return cells.sum(1) / both.sum(1).clamp(min=1)


def loss(
    base: Transformer,
    sampler: JointSampler,
    runs: Trajectories,
    rows: Tensor,
    start: Tensor,
    *,
    draws: int,
    hidden_weight: float = 0.0,
) -> Tensor:
    """KL(base at the next state || sampler) in nats, mean over the cells still undecided, after `draws` sampler steps.

    `hidden_weight` adds the distance (smooth L1) of the sampler's hidden states from those of the base at that state.
    Row by row the sampler starts from the base's hidden states at step `start` [B] and is shown the tokens of the
    steps after it. The base is frozen.
    """
    visible = seen_cells(base, runs, rows)
    hidden, target = (read(base, runs, rows, start + d) for d in (0, draws))
    rope = base.rope(hidden.shape[1], None, hidden.dtype)
    for turn in range(1, draws + 1):
        token, open_ = runs.state(rows, start + turn)
        hidden = sampler(base.embed(token).to(hidden.dtype).detach(), hidden, rope, visible)
    at = open_.flatten().nonzero()[:, 0]
    said, wanted = (base.head_of(h.flatten(0, 1)[at]).float().log_softmax(-1) for h in (hidden, target))
    share = (1 / open_.sum(1).clamp(min=1))[:, None].expand_as(open_).flatten()[at]
    distance = (F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1) * share).sum() / len(rows)
    if not hidden_weight:
        return distance
    own = visible.any(2)[:, 0]
    return distance + hidden_weight * F.smooth_l1_loss(hidden[own].float(), target[own].float())


@torch.no_grad()
def read(base: Transformer, runs: Trajectories, rows: Tensor, step: Tensor) -> Tensor:
    """The base's hidden states [B, L, D] from which each cell is predicted after `step` [B] steps."""
    seen: list[Tensor] = []
    visible = _visible(base, runs, rows, runs.valid[rows])
    base(runs.state(rows, step)[0], visible=visible, need=torch.zeros(1, dtype=torch.int64), tap=seen.append)
    return seen[0].roll(1, 1) if base.config.shift else seen[0]


def seen_cells(base: Transformer, runs: Trajectories, rows: Tensor) -> Tensor:
    """[B, 1, L, L] bool: the cells that each cell may look at in the sampler's layer: those with a hidden state."""
    later = torch.arange(runs.tokens.shape[1]) > 0
    return _visible(base, runs, rows, runs.valid[rows] & later if base.config.shift else runs.valid[rows])


def _visible(base: Transformer, runs: Trajectories, rows: Tensor, known: Tensor) -> Tensor:
    """[B, 1, L, L] bool: which of the known cells [B, L] each cell sees, by the base's layout."""
    index = torch.arange(known.shape[1]).expand(len(rows), -1)
    visible = known[:, None, None, :].expand(-1, 1, known.shape[1], -1)
    allowed = base.config.layout.visible(index, index, runs.origin[rows])
    return visible if allowed is None else visible & allowed[:, None]


@dataclass(frozen=True)
class JointConfig:
    """Everything that decides a run."""

    steps: int = 2500
    seed: int = 0
    k: int = 8
    """Tokens a forward to train for: up to k - 1 sampler steps are unrolled."""
    further: float = 0.6
    """Each further unrolled step is this much as likely as the one before (the published code: 0.5)."""
    plain: float = 0.2
    """The share of windows drawn evenly; the others follow `surprise`: nearly all steps change nearly nothing."""
    hidden_weight: float = 0.0
    gain: float = 0.2
    rows: int = 32
    """Rows a step."""
    runs: int = 6144
    """Runs recorded of the first task; of the others a third as many."""
    muon_lr: float = 0.01
    adam_lr: float = 0.003
    decay: float = 0.8
    save_every: int = 500
    keep: tuple[float, ...] = ()
    base: str = ""
    """Digest of the base's weights, which a sampler belongs to."""
    data: str = ""
    """What the trajectories are of."""


class JointTrainer(Run):
    """A run of a joint sampler over a frozen base."""

    config: JointConfig
    model: JointSampler

    def __init__(self, config: JointConfig, base: Transformer, runs: Sequence[Trajectories], folder: Path) -> None:
        model = JointSampler(base.config).initialise(config.seed, gain=config.gain)
        super().__init__(
            config, folder, model, optim.build(model, config.muon_lr, config.adam_lr, within="", decay=0.0)
        )
        self.base, self.runs = base.requires_grad_(False).eval(), runs
        self.chances = [self._chances(data) for data in runs]

    def _chances(self, runs: Trajectories) -> Tensor:
        """[N * T]: how often a window shall hold each step."""
        share = self.config.plain
        inside = (torch.arange(runs.surprise.shape[1]) < runs.steps[:, None] - 1).float().flatten()
        moved = runs.surprise.flatten() * inside + 1e-9
        return share * inside / inside.sum() + (1 - share) * moved / moved.sum()

    def _window(self, data: int, draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """(rows, first steps, draws) of a batch: the drawn step lies anywhere in its window, all rows have as many."""
        c, runs = self.config, self.runs[data]
        draws = int(torch.multinomial(c.further ** torch.arange(max(1, c.k - 1)), 1, generator=draw)) + 1
        at = torch.multinomial(self.chances[data], c.rows, replacement=True, generator=draw)
        rows, step = at // runs.surprise.shape[1], at % runs.surprise.shape[1]
        last = runs.steps[rows] - 1
        draws = min(draws, int(last.min()))
        start = step - (torch.rand(c.rows, generator=draw) * draws).long()
        return rows, start.clamp(min=0).minimum(last - draws), draws

    def train_step(self) -> float:
        """One batch of trajectories of one task, one update; returns the loss in nats a cell."""
        c, draw = self.config, torch.Generator().manual_seed(self.config.seed * 2_000_003 + self.step)
        data = int(torch.multinomial(torch.tensor([float(len(r.tokens)) for r in self.runs]), 1, generator=draw))
        rows, start, draws = self._window(data, draw)
        runs = self.runs[data]
        value = loss(self.base, self.model, runs, rows, start, draws=draws, hidden_weight=c.hidden_weight)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optim.apply(self.optimizers, optim.schedule(self.step, c.steps, decay=c.decay, warmup=50))
        self.step += 1
        self.tokens += c.rows * runs.tokens.shape[1]
        return value.item()
