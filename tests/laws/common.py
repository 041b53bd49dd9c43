"""What the law tests share: small recipes, toy models, ragged canvases, and denoisers whose beliefs are synthetic."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from golden import toy
from unmask import recipes
from unmask.decode import Canvas, Draft, Recipe, Step, decode, noise
from unmask.decode.belief import Blend
from unmask.decode.probe import probes
from unmask.denoise import Plain, Sampled
from unmask.denoise.guide import Blended, Guided
from unmask.denoise.jointly import Jointly
from unmask.denoise.probe import Probed
from unmask.models.config import Layout, ModelConfig
from unmask.models.joint import JointSampler
from unmask.models.transformer import Transformer

EOS = 59
BLOCK = 4
SMALL: dict[str, Any] = {
    "block": BLOCK,
    "steps": 8,
    "threshold": 0.6,
    "factor": 1.5,
    "gamma": 0.5,
    "add": 0.25,
    "act": 0.75,
    "refresh": 3,
    "high": 4.0,
    "middle": 3.0,
    "low": 2.0,
    "tau": 0.5,
    "denoising_steps": 3,
    "sub": 2,
}
NAMES = tuple(recipes.entries())
CAUSAL = {
    "ar": ("causal",),
    "d2f": ("block", "block-shifted"),
    "sdar": ("absolute",),
    "sdar-static": ("absolute",),
    "llada2": ("absolute",),
    "llada21": ("absolute",),
    "fast-dllm-v2": ("absolute-shifted",),
    "fast-dllm-v2-cache": ("absolute-shifted",),
}
"""The models of the recipes that are not for full attention."""
OPEN = tuple(n for n in NAMES if n not in CAUSAL and "beliefs" not in tomllib.loads(recipes.entry(n).text)["recipe"])
"""Recipes for models with full attention, of whatever beliefs: they can stand side by side in one batch."""


def small(name: str, **settings: Any) -> Recipe:
    """The recipe `name` at toy sizes."""
    defaults = recipes.entry(name).defaults
    return recipes.get(name, **{**{k: v for k, v in SMALL.items() if k in defaults}, **settings})


TOYS = {
    "full": "llada",
    "shifted": "dream",
    "causal": "dream",
    "block": "d2f",
    "block-shifted": "d2f-dream",
    "absolute": "absolute",
    "absolute-shifted": "absolute-shifted",
}
"""Attention: full, causal, in blocks of BLOCK cells from the prompt's end on, or in absolute ones. Logits are shifted
where the name says so, and in the causal one."""


@lru_cache
def model(kind: str) -> Transformer:
    """The toy of one of the TOYS, float64."""
    net = toy.network(TOYS[kind], BLOCK)
    if kind == "causal":
        net.config = replace(net.config, layout=Layout("causal"))
    return net


def kinds(name: str) -> tuple[str, ...]:
    """The models a recipe is for."""
    return CAUSAL.get(name, ("full", "shifted"))


MODELLESS = tuple(n for n in NAMES if small(n).joint is None)
"""Recipes that can decode with any denoiser; a joint sampler reads the hidden states of a network."""
PAIRS = [(name, kind) for name in NAMES for kind in kinds(name)]


def words(count: int, seed: int) -> list[int]:
    """Tokens that are neither the mask nor an EOS."""
    draw = noise.uniform(torch.tensor(seed), torch.tensor(0), torch.arange(count))
    return (draw * EOS).long().tolist()


def ragged(*, infill: bool = True, eos: bool = True, first: int = 0) -> Canvas:
    """Four rows of unequal prompts and responses, each with an answer region; `infill`: tokens among holes."""
    shapes = [(3, 12), (7, 5), (1, 10), (5, 16)]
    rows: list[list[int | None]] = [[*words(p, first + i), *[None] * n] for i, (p, n) in enumerate(shapes)]
    if infill:
        rows[0][6:8] = words(2, 50)
        rows[3][9], rows[3][-1] = words(2, 51)
    made = Canvas.of(
        rows,
        origin=[p for p, _ in shapes],
        mask_id=toy.MASK,
        eos=[EOS, 7] if eos else [],
        seed=[100 + first + i for i in range(4)],
        dtype=torch.float64,
    )
    end = made.valid.sum(1, keepdim=True)
    return replace(made, region=(made.valid & (made.position >= end - 3)).to(torch.int8) * 2)


def revisable(canvas: Canvas, times: int) -> Canvas:
    """The same canvas, each cell of which may be revised so often."""
    return replace(canvas, revisions=torch.where(canvas.given, 0, times) * canvas.valid)


def run(denoise: Any, recipe: Any, canvas: Canvas) -> tuple[Canvas, list[tuple[Canvas, Step]]]:
    """The last canvas and all that was yielded; a run that does not end fails."""
    seen = []
    for pair in decode(denoise, recipe, canvas):
        seen.append(pair)
        assert len(seen) <= 4 * canvas.tokens.shape[1], "no end in sight"
    return seen[-1][0] if seen else canvas, seen


@lru_cache
def sampler(config: ModelConfig) -> JointSampler:
    """A random joint sampler for the toy of this config, float64, that is not the marginal one."""
    net = JointSampler(config).initialise(5).double().eval().requires_grad_(False)
    net.out_norm.weight.fill_(0.7)
    return net


def dressed(denoise: Any, recipe: Any, canvas: Canvas, *, slots: int = 8) -> Any:
    """`denoise` with what the recipe (or any recipe of a mixture) needs around it, made of toys."""
    made = getattr(recipe, "recipes", (recipe,))
    for probe in probes(rule for belief in getattr(recipe, "beliefs", ()) for rule in belief.walk()):
        denoise = Probed(denoise, probe)
    if joint := getattr(recipe, "joint", None):
        inner = denoise.denoise if isinstance(denoise, Sampled) else denoise
        settle = denoise.settle if isinstance(denoise, Sampled) else lambda _, draft: draft
        denoise = Jointly(inner, sampler(inner.model.config), joint, recipe.unmask, settle)
    if any(r.guided for r in made):
        denoise = Guided(denoise, model("causal"), slots=slots, length=canvas.tokens.shape[1])
    for belief in getattr(recipe, "beliefs", ()):
        if isinstance(belief, Blend):
            denoise = Blended(denoise, belief.weight)
    return denoise


def plain(kind: str, recipe: Any, canvas: Canvas, *, slots: int = 8, cached: bool | None = None) -> Any:
    """A denoiser over the toy, wide enough for `canvas`, dressed as the recipe needs it."""
    keep = recipe.cached if cached is None else cached
    inner = Plain(model(kind), slots=slots, length=canvas.tokens.shape[1], cached=keep)
    return dressed(inner, recipe, canvas, slots=slots)


def result(canvas: Canvas, row: int) -> tuple[list[int], list[int], int]:
    """What must not depend on company: tokens, steps of decision, forwards."""
    own = canvas.valid[row]
    return canvas.tokens[row, own].tolist(), canvas.decided_at[row, own].tolist(), int(canvas.step[row])


def results(canvas: Canvas) -> list[tuple[list[int], list[int], int]]:
    return [result(canvas, row) for row in range(len(canvas))]


@dataclass(frozen=True)
class Synthetic:
    """Beliefs drawn from the row's seed, the cell and (if `moving`) the step: a model that changes its mind at will."""

    count: int = 8
    scale: float = 12.0
    moving: bool = True

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        fresh = query & need
        row, column = fresh.nonzero().T
        clock = canvas.step[row] if self.moving else torch.zeros_like(row)
        draw = torch.arange(self.count) + 1
        u = noise.uniform(canvas.seed[row, None] + 1_000_003, clock[:, None], column[:, None], draw)
        return Draft(query, fresh, u.double() * self.scale)


@dataclass(frozen=True)
class Scripted:
    """The same tokens whatever the canvas, each `gap` logits ahead of all others."""

    tokens: tuple[int, ...]
    gap: float | Callable[[int], float] = 20.0
    count: int = 64

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        fresh = query & need
        column = fresh.nonzero()[:, 1]
        logits = torch.zeros(len(column), self.count, dtype=torch.float64)
        gaps = [self.gap(c) if callable(self.gap) else self.gap for c in column.tolist()]
        logits[torch.arange(len(column)), torch.tensor(self.tokens)[column]] = torch.tensor(gaps, dtype=torch.float64)
        return Draft(query, fresh, logits)


def line(prompt: int, length: int, *, seed: int = 0, **more: Any) -> Canvas:
    """One row: a prompt and a response."""
    return Canvas.new([words(prompt, seed)], length, mask_id=toy.MASK, seed=seed, dtype=torch.float64, **more)
