"""A model as the denoiser that a recipe asks for: the plain one, and around it what changes its beliefs."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import cast

from unmask.decode import Denoiser, Recipe
from unmask.decode.belief import Blend
from unmask.decode.blocks import After, Settled
from unmask.decode.pick import Confident, Factor
from unmask.denoise.cfg import ClassifierFree
from unmask.denoise.guide import Blended, Guided
from unmask.denoise.jointly import Jointly
from unmask.denoise.penalties import bounded
from unmask.denoise.plain import Plain
from unmask.denoise.probe import probed
from unmask.denoise.rows import Number, each, fits, listed, number
from unmask.denoise.sampled import Draws, Sampled
from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig
from unmask.models.joint import JointSampler
from unmask.models.transformer import Transformer


def dress(
    model: Transformer,
    recipe: Recipe,
    *,
    slots: int,
    length: int,
    draws: Draws | None = None,
    cfg: Number = 0.0,
    guide: Transformer | None = None,
    sampler: JointSampler | None = None,
    plain: Plain | None = None,
) -> Denoiser:
    """The denoiser of `recipe` over `model`, for up to `slots` rows of up to `length` cells.

    From the inside out: the model (`plain`, if it is to be watched from outside), its probe, its guidance away from the
    unprompted (`cfg`, one scale or one a slot), what draws its tokens (one by one, or by the joint sampler), the guide
    that judges them, the blend of both. UserError where the recipe needs a network that is not given, or cannot be
    stacked with these settings.
    """
    draws = draws or Draws()
    scale = each("cfg", cfg, partial(number, "cfg"))
    sizes = {"slots": slots, "length": length, "layout": layout_of(recipe, model.config.layout)}
    joint, network = recipe.joint, probed(plain or Plain(model, cached=recipe.cached, **sizes), recipe)
    fits("cfg", scale, slots)
    check_draws(draws, recipe, model.config, slots)
    check_second(recipe, guide, sampler)
    base: Denoiser = network
    if any(listed(scale)):
        check_guidance(recipe, model.config)
        base = ClassifierFree(base, probed(Plain(model, cached=recipe.cached, **sizes), recipe), scale)
    settings = {f.name: getattr(draws, f.name) for f in fields(Draws)}
    denoise: Denoiser = Sampled(base, **settings) if draws.active else base
    if joint:  # a single draw asks its network for nothing but drafts
        denoise = Jointly(cast(Plain, base), sampler, joint, recipe.unmask, draws.settle)
    if recipe.guided and guide is not None:
        denoise = Guided(denoise, guide, slots=slots, length=length)
    for belief in recipe.beliefs:
        if isinstance(belief, Blend):
            denoise = Blended(denoise, belief.weight)
    return denoise


def layout_of(recipe: Recipe, layout: Layout) -> Layout:
    """Who sees whom under a recipe: a block-causal model attends in the blocks that are opened and cached.

    UserError for blocks that the model cannot attend in: of a size that is no multiple or part of that trained, or
    counted from elsewhere.
    """
    if layout.kind != "block":
        return layout
    units = {r.blocks for r in recipe.query.walk() if isinstance(r, After | Settled)}
    if len(units) > 1:
        told = " and by ".join(sorted(map(repr, units)))
        raise UserError(f"recipe {_name(recipe)} opens or caches by {told}; use one of them")
    for blocks in units:
        if blocks.grid != layout.grid:
            raise UserError(
                f"this model counts its blocks from {layout.grid!r}; use blocks({blocks.size}, grid={layout.grid!r})"
            )
        layout = layout.resized(blocks.size)
    return layout


def _name(recipe: Recipe) -> str:
    return repr(recipe.name) if recipe.name else repr(recipe)


def check_second(recipe: Recipe, guide: Transformer | None, sampler: JointSampler | None) -> None:
    """UserError where the recipe asks a network that is not given."""
    name, joint = _name(recipe), recipe.joint
    if joint and joint.k > 1 and sampler is None:
        raise UserError(f"recipe {name} draws {joint.k} tokens a forward, and this model has no joint sampler")
    if recipe.guided and guide is None:
        raise UserError(f"recipe {name} needs a guide, an autoregressive model of the same tokenizer; give `guide`")


def check_guidance(recipe: Recipe, model: ModelConfig) -> None:
    """UserError where guidance away from the unprompted cannot be had."""
    if model.autoregressive or model.mask_id < 0:
        raise UserError("cfg masks the prompt, and an autoregressive model has no mask; use a masked model, or cfg=0")
    if recipe.joint and recipe.joint.k > 1:
        raise UserError(
            f"recipe {_name(recipe)} draws by a joint sampler, whose logits cfg does not guide; "
            "leave cfg at 0, or draw one token a forward"
        )


def check_draws(draws: Draws, recipe: Recipe, model: ModelConfig, slots: int) -> None:
    """UserError where the settings and the recipe, the model or the number of rows do not go together."""
    draws.check(slots)
    for bias in listed(draws.logit_bias):
        bounded(bias, model.token_count)
    policies = set(listed(draws.eos)) - {"free"}
    if policies and not model.eos_ids:
        raise UserError(f"eos={min(policies)!r} is about a token that this model does not name; leave it out")
    if "last" in policies and not _confident(recipe):
        raise UserError(
            f"eos='last' makes an EOS the least probable token, and recipe {_name(recipe)} does not commit by "
            "probability; use eos='never', or a recipe that does, such as 'threshold' of a masked model"
        )
    if draws.active and any(isinstance(b, Blend) for b in recipe.beliefs):
        raise UserError(
            "a blend takes the likeliest token of the mixture; leave temperature, filters, penalties, logit_bias and "
            "eos out"
        )


def _confident(recipe: Recipe) -> bool:
    """Do all rules that rank or measure cells read probabilities, and is there one?"""
    ways = ["score" for r in recipe.unmask.walk() if isinstance(r, Confident | Factor)]
    ways += [by for r in recipe.unmask.walk() if isinstance(by := getattr(r, "by", None), str)]
    return bool(ways) and set(ways) <= {"score", "margin", "entropy"}
