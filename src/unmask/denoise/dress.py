"""A model as the denoiser that a recipe asks for: the plain one, and around it what changes its beliefs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.decode import Denoiser, Recipe
from unmask.decode.belief import Blend
from unmask.denoise.guide import Blended, Guided
from unmask.denoise.jointly import Jointly
from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Sampled
from unmask.errors import UserError
from unmask.models.joint import JointSampler
from unmask.models.transformer import Transformer


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn from what the model believes; temperature 0 takes the most likely ones."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    confidence: Literal["raw", "shaped"] = "raw"


def dress(
    model: Transformer,
    recipe: Recipe,
    *,
    slots: int,
    length: int,
    draws: Draws | None = None,
    guide: Transformer | None = None,
    sampler: JointSampler | None = None,
    plain: Plain | None = None,
) -> Denoiser:
    """The denoiser of `recipe` over `model`, for up to `slots` rows of up to `length` cells.

    From the inside out: the model (`plain`, if it is to be watched from outside), what draws its tokens (one by one, or
    by the joint sampler), the guide that judges them, the blend of both. UserError where the recipe needs a network
    that is not given.
    """
    draws, name = draws or Draws(), recipe.name or repr(recipe)
    joint, network = recipe.joint, plain or Plain(model, slots=slots, length=length, cached=recipe.cached)
    if joint and joint.k > 1 and sampler is None:
        raise UserError(f"recipe {name!r} draws {joint.k} tokens a forward, and this model has no joint sampler")
    sampled = Sampled(network, draws.temperature, draws.top_k, draws.top_p, draws.confidence)
    denoise: Denoiser = sampled if draws.temperature else network
    if joint:
        denoise = Jointly(network, sampler, joint, recipe.unmask, sampled.settle)
    if recipe.guided and guide is None:
        raise UserError(f"recipe {name!r} needs a guide, an autoregressive model of the same tokenizer; give `guide`")
    if recipe.guided and guide is not None:
        denoise = Guided(denoise, guide, slots=slots, length=length)
    for belief in recipe.beliefs:
        if isinstance(belief, Blend):
            if draws.temperature:
                raise UserError("a blend takes the likeliest token of the mixture; leave the temperature at 0")
            denoise = Blended(denoise, belief.weight)
    return denoise
