"""The joint sampler's network: one layer over what was drawn and what the model thought (ADJUST, arXiv 2509.22738)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models.config import ModelConfig
from unmask.models.files import SINGLE, read_json, tensors, write_atomically
from unmask.models.transformer import Block, Linear, Pass, RMSNorm, Transformer


class JointSampler(nn.Module):
    """Hidden states of cells, given tokens drawn since they were computed. The model's embedding and head stay its own.

    z = layer(mix([norm(embedding); norm(hidden)])), hidden' = hidden + norm(z); the layer is the model's kind of block.
    A gain of zero in the last norm gives the hidden states back unchanged.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_norm = RMSNorm(c.d_model, c.norm_eps)
        self.hidden_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mix = Linear(2 * c.d_model, c.d_model, bias=False)
        self.layer = Block(c, 0)
        self.out_norm = RMSNorm(c.d_model, c.norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None = None
    ) -> Tensor:
        """embedded, hidden [B, L, D] of the same cells, visible [B, 1, L, L] bool (None = all) -> hidden [B, L, D]."""
        z = self.mix(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        return hidden + self.out_norm(self.layer(z, Pass(rope, visible=visible)))

    def initialise(self, seed: int, *, gain: float = 0.0) -> JointSampler:
        """Draw the matrices from `seed`; at an output gain of 0 it is the marginal sampler."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.6 / p.shape[1] ** 0.5)
            self.out_norm.weight.fill_(gain)
        return self


def digest(model: nn.Module) -> str:
    """Sixteen hex digits that name a model's weights, as bf16: the same whatever dtype they were loaded in."""
    if any(p.is_meta for p in model.parameters()):
        raise UserError("this model's weights were packed for decoding; load it with compile='off'")
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(p.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


def save_sampler(sampler: JointSampler, directory: str | Path, *, base: str) -> None:
    """Write a folder: weights in bf16, and the digest of the base they were trained on."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in sampler.named_parameters()}
    text = json.dumps({"architectures": ["UnmaskJointSampler"], "base": base}, indent=2) + "\n"
    write_atomically(directory / SINGLE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomically(directory / "config.json", lambda path: Path(path).write_text(text, encoding="utf-8"))


def load_sampler(directory: str | Path, model: Transformer) -> JointSampler:
    """The sampler of a folder, for `model`; UserError if it was trained on another one, or its files are broken."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        told = "give the folder `sampler` that `unmask train joint` wrote"
        raise UserError(f"{directory} is not a joint sampler; {told}")
    raw = read_json(directory / "config.json")
    if raw.get("architectures") != ["UnmaskJointSampler"]:
        raise UserError(f"{directory} holds no joint sampler; `unmask train joint` makes one")
    if raw.get("base") != (own := digest(model)):
        raise UserError(f"{directory} was trained on a model of other weights ({raw.get('base')}, this is {own})")
    if not (directory / SINGLE).is_file():
        raise UserError(f"{directory} lacks {SINGLE}")
    sampler = JointSampler(model.config)
    try:
        sampler.load_state_dict(dict(tensors(directory / SINGLE)))
    except RuntimeError as error:
        raise UserError(f"{directory / SINGLE} does not fit the model: {error}") from None
    weight = model.embed.weight
    return sampler.to(weight.device, weight.dtype).requires_grad_(False).eval()
