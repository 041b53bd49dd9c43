"""The embedded pair's training: batch i, one step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer
from unmask.train import loss as objective
from unmask.train import optim
from unmask.train.batches import Batch, Mixture
from unmask.train.run import BatchRun, read_state
from unmask.train.vocabulary import EOS, MASK

Kind = Literal["dllm", "ar"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The defaults are those of the embedded pair."""

    kind: Kind = "dllm"
    steps: int = 30000
    seed: int = 0
    muon_lr: float = 0.003
    adam_lr: float = 0.001
    decay: float = 0.7
    tokens_per_step: int = 4608
    mixture: Literal["even", "short"] = "even"
    d_model: int = 192
    layers: int = 6
    heads: int = 3
    ff: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    save_every: int = 500
    keep: tuple[float, ...] = ()
    """Fractions of the run at which a checkpoint is kept for good."""

    def model(self, token_count: int) -> ModelConfig:
        """The network, with its embedding padded to a multiple of 32 rows."""
        return ModelConfig(
            vocab_size=-(-token_count // 32) * 32,
            d_model=self.d_model,
            layers=self.layers,
            heads=self.heads,
            ff=self.ff,
            max_positions=1024,
            layout=Layout("causal" if self.kind == "ar" else "full"),
            shift=True,
            mask_id=-1 if self.kind == "ar" else MASK,
            eos_ids=(EOS,),
            token_count=token_count,
        )


class Trainer(BatchRun):
    """A run of the embedded pair."""

    config: TrainConfig
    model: Transformer

    def __init__(self, config: TrainConfig, mixture: Mixture, folder: Path) -> None:
        model = Transformer(config.model(mixture.tokenizer.get_vocab_size())).initialise(config.seed)
        super().__init__(config, folder, model, optim.build(model, config.muon_lr, config.adam_lr))
        self.source = replace(mixture, seed=config.seed, tokens=config.tokens_per_step, shares=config.mixture)
        self.prepare = objective.ar_inputs if config.kind == "ar" else objective.dllm_inputs
        self.objective = torch.compile(objective.loss, dynamic=False) if config.compile else objective.loss

    def start_from(self, path: Path) -> None:
        """Take the weights of another run's checkpoint; its tokens are counted as seen."""
        state = read_state(path)
        self.model.load_state_dict(state["model"])
        self.inherited = state["tokens"] + state["inherited"]
        self.history = [
            *state["history"],
            {"config": state["config"], "steps": state["step"], "tokens": state["tokens"]},
        ]

    def loss(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """Nats a cell."""
        inputs, weight, visible = self.prepare(batch, draw)
        target = batch.tokens[:, batch.prompt :]
        return self.objective(self.model, inputs, target, weight, visible, getattr(torch, self.config.dtype))
