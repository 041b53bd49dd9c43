"""A model as the denoiser that a recipe asks for: the plain one, and around it what changes its beliefs."""

from __future__ import annotations

from unmask.decode import Denoiser, Recipe
from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Sampled
from unmask.models.transformer import Transformer


def dress(model: Transformer, recipe: Recipe, *, slots: int, length: int, sampled: Sampled | None = None) -> Denoiser:
    """The denoiser of `recipe` over `model`, for up to `slots` rows of up to `length` cells.

    From the inside out: the model, guidance (CFG), the joint sampler, what shapes and draws, the guide.
    """
    return Plain(model, slots=slots, length=length, cached=recipe.cached)
