"""One run in several processes (`torchrun`): weights, gradients and optimizer states sharded by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as gathered
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from unmask.errors import UserError
from unmask.generate import Model, load
from unmask.models.experts import Router
from unmask.models.transformer import Transformer, rope_tables
from unmask.train.run import Alone

T = TypeVar("T")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says beside WORLD_SIZE."""
PATIENCE = timedelta(hours=2)
"""How long processes wait for the first, which may have a model to download, before they give up."""
WHOLE = gathered.StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = gathered.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SOME = replace(SPREAD, strict=False)
"""What has no gradient (a router's bias) has no optimizer state."""


@contextmanager
def started() -> Iterator[Sharded]:
    """This process among the others, for as long as they last; only process 0 prints, also a UserError."""
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start several processes with torchrun")
    own = Sharded()
    try:
        if own.rank == 0:
            yield own
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield own
    except (UserError, KeyboardInterrupt):
        if own.rank == 0:
            raise
        raise SystemExit(2) from None
    dist.destroy_process_group()


class Sharded(Alone):
    """This process of several, one a GPU (nccl), or on the CPU (gloo) where there is none.

    Of every weight a process holds 1 / `world` in fp32, with its gradient and optimizer state; the weights of one
    block at a time are gathered, in the dtype of the activations. Process 0 alone reads models and checkpoints, and
    holds a model whole, in the memory of its CPU, while it is read and while it is written.
    """

    def __init__(self) -> None:
        cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if cuda and local >= (count := torch.cuda.device_count()):
            raise UserError(f"{count} GPUs take as many processes; give torchrun --nproc-per-node {count}")
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.world,))

    @property
    def told(self) -> str:
        """The machine, in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "one CPU thread"
        return f"{self.world} processes of {name} each"

    def agree(self, question: Callable[[], T]) -> T:
        """Process 0's answer, or its UserError, for all of them."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = question()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def load(self, name: str) -> Model:
        """The model; but in process 0 it has no weights (it is on the meta device) and no tokenizer."""
        held: list[Model] = []

        def read() -> tuple[Any, ...]:
            held.append(found := load(name, compile="off"))
            return found.network.config, found.name, found.directory

        config, name, directory = self.agree(read)
        if held:
            return held[0]
        with torch.device("meta"):
            network = Transformer(config)
        return Model(network.requires_grad_(False).eval(), cast(Any, None), name, directory)

    def place(self, model: Transformer, dtype: torch.dtype) -> Transformer:
        """The model itself, sharded: each block and the rest, computing in `dtype`, with process 0's weights.

        Routers of experts compute in fp32. Of a model that is trained only the inputs of blocks are kept for the
        backward pass, which computes each block once more.
        """
        weights = model.state_dict() if self.rank == 0 else {}
        trained = any(p.requires_grad for p in model.parameters())
        shard = partial(fully_shard, mesh=self.mesh, reshard_after_forward=None if trained else True)
        lower = None if dtype == torch.float32 else dtype
        narrow, wide = (
            MixedPrecisionPolicy(param_dtype=d, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for d in (lower, None)
        )
        model.to("meta")
        for block in model.blocks:
            for router in (m for m in block.modules() if isinstance(m, Router)):
                shard(router, mp_policy=wide)
            if trained:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            shard(block, mp_policy=narrow)
        shard(model, mp_policy=narrow)
        model.to_empty(device=self.device)
        model.cos, model.sin = (table.to(self.device) for table in rope_tables(model.config))
        gathered.set_model_state_dict(model, weights, options=SPREAD)
        return model

    def move(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors where the model is."""
        return tuple(t.to(self.device) for t in tensors)

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def state(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Weights and optimizer states in one piece, in process 0; the others take part and get nothing."""
        return {
            "model": gathered.get_model_state_dict(model, options=WHOLE),
            "optimizers": [gathered.get_optimizer_state_dict(model, o, options=WHOLE) for o in optimizers],
        }

    def restore(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Take `state`, which only process 0 has."""
        gathered.set_model_state_dict(model, state.get("model", {}), options=SPREAD)
        saved = state.get("optimizers", [{}] * len(optimizers))
        for optimizer, own in zip(optimizers, saved, strict=True):
            gathered.set_optimizer_state_dict(model, optimizer, own, options=SOME)
