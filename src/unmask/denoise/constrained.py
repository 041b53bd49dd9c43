"""Texts of a formal language from a canvas with holes: cells are drafted together, so that any of them may be kept.

The law: the decided cells of a constrained row always have a completion in the language. They have one at the start
(`fits`). In every draft the tokens of all undecided cells are one path through the automaton that goes through the
decided ones, hence one accepted text. Whichever of them a recipe commits, the rest of that text is a completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.decode import Canvas, Denoiser, Draft, Recipe, noise
from unmask.denoise.automaton import Automaton, automaton
from unmask.denoise.rows import at
from unmask.denoise.sampled import TINY, Draws, Sampled
from unmask.denoise.schema import fits
from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer

FAR = -1e9
"""The weight of a token that a filter or a bias bars: taken only where the language has nothing else."""


@dataclass(frozen=True)
class Constrained:
    """A denoiser whose drafts stay in the language of each constrained row; the other rows are left as they are.

    Tokens on no accepted text are at -inf, so that confidence is about the rest; the drafted ones are the best accepted
    text (Viterbi). With a temperature the same Gumbel noise as in `Sampled` perturbs it (perturb-and-MAP).
    """

    denoise: Denoiser
    automata: Mapping[int, tuple[Automaton, int]]
    """By slot: the language, and of how many cells from the origin on it speaks."""

    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = self.denoise(canvas, query, need)
        slots, done = canvas.slot.tolist(), canvas.done.tolist()
        for row, slot in enumerate(slots):
            if slot in self.automata and not done[row]:
                draft = self._row(canvas, draft, row, *self.automata[slot])
        return draft

    def _row(self, canvas: Canvas, draft: Draft, row: int, language: Automaton, length: int) -> Draft:
        first, width = int(canvas.origin[row]), draft.fresh.shape[1]
        cells = slice(first, first + length)
        open_ = canvas.masked[row, cells].cpu()
        known = (draft.fresh & canvas.masked)[row, cells].cpu()
        place = known.nonzero()[:, 0]
        if not len(place):
            return draft
        flat = row * width + first + place.to(draft.at.device)
        index = torch.searchsorted(draft.at, flat)
        kinds = language.of(draft.logits.shape[1])
        given = language.of(max(draft.logits.shape[1], canvas.mask_id + 1))
        token = canvas.tokens[row, cells].cpu().clamp(0, len(given) - 1)
        sure = torch.where(open_, -1, given[token])
        allowed = between(language, sure)[place][:, kinds].to(draft.logits.device)
        logits = barred(draft.logits[index], allowed)
        shaped = self._perturbed(canvas, row, flat % width, logits).double()
        path = best(language, sure, place, weights(shaped, allowed, kinds))
        mine = (kinds[None] == path[place][:, None]).to(shaped.device)
        chosen = heavy(shaped, mine & allowed).argmax(1)
        return spliced(draft, index, allowed, logits, chosen)

    def _perturbed(self, canvas: Canvas, row: int, column: Tensor, logits: Tensor) -> Tensor:
        """[n, V]: the logits as they are drawn from, with their noise; as they are where nothing is drawn."""
        draws = drawing(self.denoise)
        slot = canvas.slot[row].expand(len(column))
        heat = None if draws is None else at(draws.temperature, slot, logits.dtype)
        if draws is None or heat is None or not bool((heat > 0).any()):
            return logits
        shaped = draws.shape(logits / heat.clamp(min=TINY), slot)
        words = torch.arange(logits.shape[1], device=logits.device)
        return shaped + noise.gumbel(canvas.seed[row], canvas.step[row], column[:, None], words + 1)


def constrain(
    denoise: Denoiser,
    canvas: Canvas,
    recipe: Recipe,
    tokenizer: Tokenizer,
    patterns: Sequence[str | None],
    lengths: Sequence[int],
) -> Denoiser:
    """`denoise`, held to one regex a row (None: none) over so many cells from the row's origin on.

    UserError for a recipe that revises, draws jointly or is guided; for a regex that cannot be used; and where no text
    of the language fits into the row.
    """
    if not any(p is not None for p in patterns):
        return denoise
    check_recipe(recipe)
    found: dict[int, tuple[Automaton, int]] = {}
    for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
        if pattern is None:
            continue
        made = automaton(tokenizer, pattern, eos=canvas.eos, never=(canvas.mask_id,))
        cells = slice(int(canvas.origin[row]), int(canvas.origin[row]) + length)
        tokens, masked = canvas.tokens[row, cells].tolist(), canvas.masked[row, cells].tolist()
        fits(made, [None if hole else t for t, hole in zip(tokens, masked, strict=True)])
        found[int(canvas.slot[row])] = (made, length)
    return Constrained(denoise, found)


def check_recipe(recipe: Recipe) -> None:
    """UserError where a recipe could leave the language."""
    name = repr(recipe.name) if recipe.name else repr(recipe)
    if recipe.remask is not None or recipe.edit is not None:
        raise UserError(f"recipe {name} revises, which could leave the constraint; use one that does not: 'threshold'")
    if recipe.guided or (recipe.joint and recipe.joint.k > 1):
        raise UserError(f"recipe {name} has its tokens chosen by a second network; with a constraint use 'threshold'")


def drawing(denoise: Denoiser) -> Draws | None:
    """What draws the tokens of this denoiser, if anything does."""
    found: Any = denoise
    while not isinstance(found, Sampled) and hasattr(found, "denoise"):
        found = found.denoise
    return found if isinstance(found, Sampled) else None


def between(language: Automaton, sure: Tensor) -> Tensor:
    """[cells, C] bool: the classes of tokens on some accepted text. `sure` [cells]: a decided cell's class, or -1."""
    moves, (states, count) = language.moves, language.next.shape
    cells = len(sure)
    ahead = torch.zeros(cells + 1, states + 1, dtype=torch.bool)
    ahead[cells, :states] = language.final
    for i in range(cells - 1, -1, -1):
        c = int(sure[i])
        ahead[i, :states] = ahead[i + 1][moves].any(1) if c < 0 else ahead[i + 1][moves[:, c]]
    out = torch.zeros(cells, count, dtype=torch.bool)
    here = torch.tensor([language.start])
    for i in range(cells):
        step = moves[here] if int(sure[i]) < 0 else moves[here, sure[i]][:, None]
        good = ahead[i + 1][step]
        if int(sure[i]) < 0:
            out[i] = good.any(0)
        else:
            out[i, sure[i]] = good.any()
        here = step[good].unique()
    return out


def best(language: Automaton, sure: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """[cells] int64: the classes of the best accepted text (Viterbi). `weight` [n, C] of cells `place`; others 0."""
    moves, (states, count) = language.moves, language.next.shape
    cells = len(sure)
    whole = torch.zeros(cells, count, dtype=torch.float64).index_copy(0, place, weight.cpu())
    value = torch.full((cells + 1, states + 1), -torch.inf, dtype=torch.float64)
    value[cells, :states] = torch.where(language.final, 0.0, -torch.inf)
    for i in range(cells - 1, -1, -1):
        c = int(sure[i])
        value[i, :states] = (value[i + 1][moves] + whole[i]).amax(1) if c < 0 else value[i + 1][moves[:, c]]
    if float(value[0, language.start]) == -torch.inf:
        raise UserError("the decided cells fit no text of the constraint; take some of them back")
    path, state = sure.clone(), language.start
    for i in range(cells):
        if int(sure[i]) < 0:
            path[i] = (value[i + 1][moves[state]] + whole[i]).argmax()
        state = int(moves[state, path[i]])
    return path


def weights(shaped: Tensor, allowed: Tensor, kinds: Tensor) -> Tensor:
    """[n, C] float64: the best weight of each class of tokens; -inf where none is allowed."""
    out = shaped.new_full((len(shaped), int(kinds.max()) + 1), -torch.inf)
    return out.scatter_reduce(1, kinds.to(shaped.device).expand_as(shaped), heavy(shaped, allowed), "amax")


def heavy(shaped: Tensor, allowed: Tensor) -> Tensor:
    """[n, V]: finite weights for all tokens that are allowed, -inf for the others."""
    return torch.where(allowed, shaped.clamp(min=FAR), -torch.inf)


def barred(logits: Tensor, allowed: Tensor) -> Tensor:
    """[n, V]: -inf where not allowed; where that leaves nothing, what is allowed is equally likely."""
    out = logits.masked_fill(~allowed, -torch.inf)
    none = (out == -torch.inf).all(1, keepdim=True)
    return torch.where(none & allowed, 0.0, out)


def spliced(draft: Draft, index: Tensor, allowed: Tensor, logits: Tensor, chosen: Tensor) -> Draft:
    """The draft with other logits and tokens in the cells `index`."""
    whole = draft.logits.index_copy(0, index, logits)
    if draft.belief is None and draft.chosen is None and draft.top is not None:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        p = wide.softmax(-1).gather(1, chosen[:, None])[:, 0].to(draft.top[1].dtype)
        top = (draft.top[0].index_copy(0, index, chosen), draft.top[1].index_copy(0, index, p))
        return replace(draft, logits=whole, top=top)
    belief = draft.belief
    if belief is not None:
        belief = belief.index_copy(0, index, barred(belief[index], allowed))
    return replace(draft, logits=whole, chosen=draft.tokens.index_copy(0, index, chosen), belief=belief, top=None)
