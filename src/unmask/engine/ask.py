"""What an engine is asked to write, and what it tells about it while it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from unmask.decode import Canvas, Recipe
from unmask.denoise import Draws
from unmask.denoise.automaton import Automaton, automaton
from unmask.denoise.constrained import check_recipe
from unmask.denoise.dress import check_draws, check_guidance, check_second, layout_of
from unmask.denoise.schema import fits, pattern
from unmask.errors import UserError
from unmask.generate import Model
from unmask.models.config import Layout
from unmask.settings import Settings

Reason = Literal["stop", "length"]
"""Why a row ended: by an end of its own or a stop text, or because its canvas or its steps were used up."""
WORK = 40_000_000
"""What one constrained row may cost a forward: states times classes of tokens times cells, a quarter of a second."""
Pins = tuple[tuple[int, int], ...]
"""(cell of the response, token id): cells that are given."""


@dataclass(frozen=True, eq=False)
class Ask:
    """One response to write: a canvas of one row, checked, with everything its decoding depends on."""

    canvas: Canvas
    recipe: Recipe
    draws: Draws
    end: int
    """The first column behind the response: a suffix stands from here on."""
    layout: Layout
    cfg: float = 0.0
    second: dict[str, Any] = field(default_factory=dict)
    """A guide and a joint sampler, as `Model.second` finds them."""
    stop: tuple[str, ...] = ()
    max_steps: int | None = None
    top: int | None = None
    """Keep the log-probability of each committed token, and those of so many likeliest ones."""
    detail: bool = False
    """Tell of every cell that was decided or drafted, not of the text alone."""
    language: tuple[Automaton, int] | None = None
    """What the response must match, and how many cells that is about."""

    def again(self, seed: int) -> Ask:
        """The same request, drawn with another seed."""
        return replace(self, canvas=replace(self.canvas, seed=torch.full_like(self.canvas.seed, seed)))

    @property
    def cells(self) -> int:
        """All columns of the row: what it takes from a token budget."""
        return self.canvas.tokens.shape[1]

    @property
    def origin(self) -> int:
        """The first column of the response."""
        return int(self.canvas.origin[0])

    @property
    def mixes(self) -> bool:
        """Can it share a forward with any other recipe? Not if its beliefs need networks of their own."""
        return not (self.recipe.beliefs or self.recipe.guided or self.cfg)

    @property
    def key(self) -> tuple[object, ...]:
        """Rows of one key are decoded together. Drafts that a sampler settles are apart from the model's own, whose
        probabilities the kernels find in another order of additions."""
        if self.mixes:
            return (self.layout, self.draws.active)
        second = tuple((name, id(network)) for name, network in self.second.items())
        return (self.layout, self.recipe, repr(self.draws), self.cfg, second)


def ask(
    model: Model,
    prompt: Any,
    settings: Settings,
    *,
    suffix: str = "",
    pins: Pins = (),
    prediction: str | None = None,
    stop: tuple[str, ...] = (),
    max_steps: int | None = None,
    top: int | None = None,
    detail: bool = False,
    matching: Mapping[str, Any] | None = None,
) -> Ask:
    """An Ask for one prompt (a text, a conversation, or ids); UserError for what `Model.generate` would refuse too.

    `pins` are cells of the response that are given. `prediction`: what the response will probably say; its cells are
    decided from the start, and a recipe that revises gives back those that the model doubts. `matching`: what the
    response must match, as OpenAI's `response_format` says it.
    """
    canvas, recipe = model.lay([prompt], settings, suffix=suffix)
    config = model.network.config
    end = canvas.tokens.shape[1] - (len(model.tokenizer.encode(suffix)) if suffix else 0)
    if settings.template is None and not config.autoregressive:
        canvas = pinned(canvas, pins, end, config.token_count)
        canvas = canvas if prediction is None else predicted(canvas, recipe, model.tokenizer.encode(prediction), end)
    elif pins or prediction is not None:
        told = (
            "a template has words of its own" if settings.template else "an autoregressive model writes from the left"
        )
        raise UserError(f"{told}; leave {'pins' if pins else 'prediction'} out")
    draws = settings.draws(recipe, config, model.tokenizer)
    check_draws(draws, recipe, config, 1)
    cfg = settings.cfg
    if not isinstance(cfg, int | float):
        raise UserError("cfg is one number a request")
    if cfg:
        check_guidance(recipe, config)
    language = _language(model, canvas, recipe, end, matching)
    layout, second = layout_of(recipe, config.layout), model.second(recipe, settings)
    check_second(recipe, **second)
    more: dict[str, Any] = {"stop": stop, "max_steps": max_steps, "top": top, "detail": detail}
    return Ask(canvas, recipe, draws, end, layout, cfg=float(cfg), second=second, language=language, **more)


def _language(
    model: Model, canvas: Canvas, recipe: Recipe, end: int, matching: Mapping[str, Any] | None
) -> tuple[Automaton, int] | None:
    """The automaton of a `response_format`; UserError if it cannot be one, or if no text of it fits the canvas."""
    regex = pattern(matching)
    if regex is None:
        return None
    check_recipe(recipe)
    made = automaton(model.tokenizer, regex, eos=canvas.eos, never=(canvas.mask_id,))
    cells = slice(int(canvas.origin[0]), end)
    tokens, masked = canvas.tokens[0, cells].tolist(), canvas.masked[0, cells].tolist()
    fits(made, [None if hole else token for token, hole in zip(tokens, masked, strict=True)])
    if (work := made.next.numel() * sum(masked)) > WORK:
        raise UserError(
            f"this constraint takes {work / WORK:.1f} times the work a forward that is allowed, states times kinds of "
            "token times cells; make it simpler, or max_tokens smaller"
        )
    return made, len(tokens)


def pinned(canvas: Canvas, pins: Pins, end: int, count: int) -> Canvas:
    """The one-row canvas with some cells of its response given; UserError for cells or tokens that are none."""
    origin, mask = int(canvas.origin[0]), canvas.mask_id
    place: dict[int, int] = {}
    for cell, token in pins:
        if not 0 <= cell < end - origin:
            raise UserError(f"pin {cell} is no cell of a response of {end - origin}; cells count from 0")
        if not 0 <= token < count or token == mask:
            raise UserError(f"token {token} of pin {cell} cannot stand in a text of this model")
        if place.get(origin + cell, token) != token:
            raise UserError(f"cell {cell} is pinned twice; give it one token")
        place[origin + cell] = token
    if len(place) >= int(canvas.masked.sum()):
        raise UserError("every cell of the response is pinned; leave one to write")
    if not place:
        return canvas
    column, token = torch.tensor([[*place], [*place.values()]], device=canvas.tokens.device)
    here = torch.zeros_like(canvas.given).index_fill_(1, column, True)
    return replace(
        canvas,
        tokens=canvas.tokens.index_copy(1, column, token[None]),
        given=canvas.given | here,
        region=canvas.region.masked_fill(here, 0),
        decided_at=canvas.decided_at.masked_fill(here, 0),
        score=canvas.score.masked_fill(here, 1),
        revisions=canvas.revisions.masked_fill(here, 0),
    )


def predicted(canvas: Canvas, recipe: Recipe, ids: list[int], end: int) -> Canvas:
    """The one-row canvas with what the response will probably say, in cells that a revising recipe may give back."""
    if recipe.remask is None:
        name = repr(recipe.name or recipe)
        raise UserError(
            f"a prediction is a draft to revise, and recipe {name} never gives a cell back; use recipe 'wino', or pins"
        )
    origin = int(canvas.origin[0])
    ids = [*ids[: end - origin], *([canvas.eos[0]] if canvas.eos else []) * max(0, end - origin - len(ids))]
    text = canvas.tokens.clone()
    text[0, origin : origin + len(ids)] = torch.tensor(ids, device=text.device)
    here = canvas.masked & (canvas.position < origin + len(ids))
    if bool((here == canvas.masked).all()):
        here[0, int(here[0].nonzero()[-1])] = False  # a canvas without an open cell is done before its first forward
    return replace(
        canvas,
        tokens=torch.where(here, text, canvas.tokens),
        decided_at=canvas.decided_at.masked_fill(here, 1),
        score=canvas.score.masked_fill(here, 0.5),
    )


@dataclass(frozen=True)
class Cell:
    """A cell of a response and what stands in it: column counted from the response's first, token, confidence."""

    place: int
    token: int
    score: float


@dataclass(frozen=True)
class Update:
    """What one forward did to one response. `text` is the committed beginning so far, of so many ids; it never changes
    again."""

    step: int
    computed: int
    text: str
    count: int
    changed: tuple[Cell, ...] = ()
    remasked: tuple[int, ...] = ()
    draft: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Done:
    """A finished response and what it cost."""

    text: str
    tokens: tuple[int, ...]
    reason: Reason
    forwards: int
    positions: int
    """Cells run through the model."""
    cache_hits: int
    """Cells attended to through stored keys and values."""
    decided: int
    """Cells that were decided."""
    waited: float
    """Seconds in the queue."""
    seconds: float
    """Seconds from admission to the end."""

    @property
    def tokens_per_forward(self) -> float:
        """Cells decided for each forward."""
        return self.decided / max(1, self.forwards)


Listen = Callable[["Ticket", Update | None], None]
"""Hears of every forward of a request, and once of None when it has ended."""


class Ticket:
    """A request on its way through the engine: `done` when it is finished, `error` when it failed."""

    def __init__(self, asked: Ask, listen: Listen | None = None, *, follow: bool = True) -> None:
        self.ask, self.listen = asked, listen
        self.follow = follow and listen is not None
        """Does the listener want to hear of every forward, or of the end alone?"""
        self.done: Done | None = None
        self.error: Exception | None = None
        self.aborted = False
        self.submitted = time.perf_counter()
        self.started = self.first = 0.0
        """When it was admitted, and when the first cell of its committed beginning was there; 0 before."""
        self.logprobs: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = {}
        """By cell: log-probability of the committed token when it was committed, and the likeliest ones."""
        self.written: tuple[list[int], list[int]] = ([], [])
        """The committed beginning: its ids, and the cell of each. One attribute, since other threads read it."""
        self.text = ""

    @property
    def ids(self) -> list[int]:
        """The ids of the committed beginning."""
        return self.written[0]

    @property
    def ended(self) -> bool:
        """Will nothing more happen to it?"""
        return self.done is not None or self.error is not None or self.aborted
