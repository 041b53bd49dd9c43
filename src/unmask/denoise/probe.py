"""A probe over a transformer: its anchor is read, its answer predicted, and nothing of it is kept."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from unmask.decode import Canvas, Cost, Draft, Recipe
from unmask.decode.probe import Probing, probes, respelled
from unmask.denoise.plain import Plain
from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig
from unmask.models.transformer import Transformer


@dataclass(eq=False)
class Probed:
    """`Plain` over the canvas with the anchor in place: the draft's `aside` are the cells of the probe.

    They are no part of `computed`, so that the cache state does not follow: their keys are never attended to later. In
    the anchor the draft is certain of it, and the first cell of the answer is neither an EOS nor a word of the anchor.
    What the probe cost is told as a helper's; it has no time of its own, since it rides in the forwards of the text.
    """

    plain: Plain
    probe: Probing

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        place, tokens = self.probe.laid(canvas)
        size = len(self.probe.ids)
        cells = query & (place >= 0)
        anchor, first = cells & (place < size), cells & (place == size)
        draft = self.plain(canvas.showing(torch.where(anchor, tokens, canvas.tokens)), query, need)
        known, begun = (part.flatten()[draft.at].nonzero()[:, 0] for part in (anchor, first))
        draft.logits[known] = -torch.inf
        draft.logits[known, tokens.flatten()[draft.at[known]]] = 0
        banned = [t for t in (*canvas.eos, *self.probe.ids) if t < draft.logits.shape[1]]
        draft.logits[begun[:, None], banned] = -torch.inf
        aside = draft.computed & cells
        costs = (*draft.costs, Cost("probe", aside, 0.0)) if bool(aside.any()) else draft.costs
        return replace(draft, computed=draft.computed & ~aside, aside=aside, costs=costs, top=None)

    @property
    def model(self) -> Transformer:
        """The network."""
        return self.plain.model

    @property
    def layout(self) -> Layout:
        """Who sees whom."""
        return self.plain.layout

    def keep_hidden(self) -> None:
        """Keep the last hidden states from now on."""
        self.plain.keep_hidden()

    def hidden(self, canvas: Canvas, draft: Draft) -> tuple[Tensor, Tensor]:
        """As of `Plain`, those of the probe included."""
        aside = draft.aside
        return self.plain.hidden(canvas, draft if aside is None else replace(draft, computed=draft.computed | aside))


def probed(plain: Plain, recipe: Recipe) -> Plain:
    """`plain`, with the recipe's probe around it if it has one; UserError for an anchor that this model cannot have."""
    for probe in probes(recipe.walk()):
        _check(probe, plain.config)
        return cast(Plain, Probed(plain, probe))
    return plain


def spelled(recipe: Recipe, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str]) -> Recipe:
    """The recipe with the anchor of its probe as token ids; UserError for words that the vocabulary does not have."""
    texts = {probe.anchor for probe in probes(recipe.walk()) if isinstance(probe.anchor, str)}
    if not texts:
        return recipe
    found = {text: _ids(text, encode, decode) for text in texts}
    try:
        return recipe.rebuilt(partial(respelled, ids=found))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(error) from None


def _ids(text: str, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str]) -> tuple[int, ...]:
    ids = list(map(int, encode(text)))
    if not ids or _bare(back := decode(ids)) != _bare(text):
        told = f"reads {back!r:.80}" if ids else "has no tokens"
        raise UserError(f"the anchor {text!r:.80} {told} in this model's vocabulary; use words that it knows")
    return tuple(ids)


def _bare(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text)).casefold()


def _check(probe: Probing, model: ModelConfig) -> None:
    """UserError for an anchor of tokens that are none of the text's, or over attention in which all sees the probe."""
    if model.layout.kind != "block":
        raise UserError(
            f"a probe needs block-causal attention: with {model.layout.kind} attention the text would see it; "
            "use prophet or ice, or a block-causal model"
        )
    special = {model.mask_id, *model.eos_ids}
    if wrong := [t for t in probe.ids if not 0 <= t < model.token_count or t in special]:
        told = "a mask or an end" if wrong[0] in special else f"none of its tokens 0 to {model.token_count - 1}"
        raise UserError(f"the anchor of a probe holds token {wrong[0]}, which is {told} in this model; use others")
