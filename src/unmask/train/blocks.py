"""Training in blocks: a D2F student of a frozen teacher, or block diffusion from scratch or from any model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.models.config import Grid, Layout, Prompt
from unmask.models.transformer import Transformer
from unmask.train import blockwise, forcing, lora, optim
from unmask.train.batches import Batch
from unmask.train.run import ALONE, Alone, BatchRun, Source


@dataclass(frozen=True)
class BlocksConfig:
    """What decides both kinds of run."""

    steps: int = 4000
    seed: int = 0
    block: int = 8
    rank: int = 0
    """Rank of a LoRA on the attention; 0 trains all weights."""
    alpha: float = 32.0
    muon_lr: float = 0.0005
    adam_lr: float = 0.0002
    decay: float = 0.8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    save_every: int = 500
    keep: tuple[float, ...] = ()
    base: str = ""
    """Digest of the weights it began with: the teacher's, for a student; empty if they were drawn."""
    data: str = ""
    data_digest: str = ""
    """Of the rows of a file that are learned; empty for the embedded tasks."""
    tokens: int = 4608
    """Cells of a batch."""
    longest: int = 512
    """Cells of the longest row of a file that is learned."""
    world_size: int = 1
    """Processes that train it, each on batches of its own; the trainer sets it. Several do not compile."""


@dataclass(frozen=True)
class D2FConfig(BlocksConfig):
    """Everything that decides the run of a student."""

    schedule: forcing.Schedule = "monotone"
    low: float = 0.2
    high: float = 0.7

    @property
    def noise(self) -> forcing.Noise:
        """How blocks are masked."""
        return forcing.Noise(self.schedule, self.low, self.high)


@dataclass(frozen=True)
class BlockConfig(BlocksConfig):
    """Everything that decides a run of block diffusion."""

    grid: Grid = "origin"
    prompt: Prompt = "bidirectional"
    complementary: bool = True
    mask_id: int = -1
    """The mask of a model that has none; -1: its own."""
    scratch: bool = False
    """Weights were drawn by the seed, in the shape of the base."""


class BlocksRun(BatchRun):
    """A model, fp32, that attends in blocks and learns from batches of a source."""

    config: Any
    model: Transformer
    clip = 1.0

    def __init__(
        self, config: BlocksConfig, model: Transformer, source: Source, folder: Path, processes: Alone
    ) -> None:
        alone = processes.world == 1
        config = replace(config, world_size=processes.world, compile=config.compile and alone)
        adapt(config, model)
        model = processes.place(model, getattr(torch, config.dtype))
        super().__init__(config, folder, model, optimizers(config, model), processes=processes)
        self.source = source

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, compiled for each shape, if the run is so."""
        return torch.compile(function, dynamic=False) if self.config.compile else function

    def whole(self) -> Transformer:
        """The model in one piece; in other processes than the first it has no weights."""
        if self.processes.world == 1:
            return self.model
        weights = self.processes.state(self.model, [])["model"]
        with torch.device("meta"):
            model = Transformer(self.model.config)
        adapt(self.config, model)
        model.load_state_dict(weights or model.state_dict(), assign=True)
        return model


class D2FTrainer(BlocksRun):
    """A run of a student over its frozen teacher."""

    config: D2FConfig

    def __init__(
        self, config: D2FConfig, teacher: Transformer, source: Source, folder: Path, *, processes: Alone = ALONE
    ) -> None:
        if teacher.config.layout.kind != "full" or teacher.config.mask_id < 0:
            raise UserError(
                f"a D2F student is distilled from a masked model with full attention, and this one's is "
                f"{teacher.config.layout.kind}; `unmask train block` trains in blocks without a teacher"
            )
        student = in_blocks(teacher, Layout("block", config.block), in_flight=True, share=processes.world > 1)
        super().__init__(config, student, source, folder, processes)
        self.teacher = processes.place(teacher.requires_grad_(False).eval(), getattr(torch, config.dtype))
        self.objective = self.compiled(forcing.forcing)

    def loss(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """Soft cross-entropy of the teacher's tokens, weighted."""
        m = self.model.config
        noisy = forcing.prepare(batch, self.config.noise, m.layout, draw, mask=m.mask_id, eos=m.eos_ids[0])
        given = self.processes.move(noisy.tokens, noisy.weight, noisy.teacher, noisy.student)
        return self.objective(self.model, self.teacher, *given, getattr(torch, self.config.dtype))


class BlockTrainer(BlocksRun):
    """A run of block diffusion."""

    config: BlockConfig

    def __init__(
        self, config: BlockConfig, base: Transformer, source: Source, folder: Path, *, processes: Alone = ALONE
    ) -> None:
        own, layout = base.config.mask_id, Layout("block", config.block, config.grid, config.prompt)
        if own >= 0 and config.mask_id not in (-1, own):
            raise UserError(
                f"this model has a mask of its own, {own}, which {config.mask_id} cannot replace; name none"
            )
        model = in_blocks(base, layout, mask_id=config.mask_id, share=processes.world > 1)
        if model.config.mask_id < 0:
            raise UserError("this model has no mask token; name an id that its texts do not use by --mask-id")
        super().__init__(config, model, source, folder, processes)
        self.objective = self.compiled(blockwise.loss)

    def loss(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """Cross-entropy of the masked tokens, weighted."""
        t = blockwise.prepare(batch, self.model.config, draw, complementary=self.config.complementary)
        given = self.processes.move(t.tokens, t.index, t.source, t.target, t.weight, t.visible)
        return self.objective(self.model, *given, getattr(torch, self.config.dtype))


def in_blocks(
    base: Transformer, layout: Layout, *, mask_id: int = -1, in_flight: bool = False, share: bool = False
) -> Transformer:
    """A copy of a model, fp32, that attends in blocks; `share`: with the tensors of the base, not with copies."""
    mask_id = base.config.mask_id if mask_id < 0 else mask_id
    config = replace(base.config, layout=layout, mask_id=mask_id, in_flight=in_flight)
    with torch.device("meta") if share else nullcontext():
        model = Transformer(config).float()
    model.load_state_dict(base.float().state_dict() if share else base.state_dict(), assign=share)
    return model


def adapt(config: BlocksConfig, model: Transformer) -> None:
    """Add a LoRA to the model, if the run trains one; UserError for a rank that no matrix of the attention has."""
    c = model.config
    if config.rank > (most := min(c.d_model, c.heads * c.head_dim)):
        raise UserError(
            f"a LoRA of rank {config.rank} is no smaller than the matrices it is added to; use less than {most}"
        )
    if config.rank:
        lora.add(model, config.rank, config.alpha, seed=config.seed)


def optimizers(config: BlocksConfig, model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon and AdamW on all weights, or AdamW on the matrices of a LoRA."""
    if not config.rank:
        return optim.build(model, config.muon_lr, config.adam_lr, rows=config.world_size)
    return [optim.adam([p for p in model.parameters() if p.requires_grad], config.adam_lr)]
