"""How wrong is a cache: each step's beliefs, keys and values against a forward that computes everything anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import recipes, zoo
from unmask.decode import Canvas, Draft, Recipe, decode, useful
from unmask.denoise import Plain, dress
from unmask.denoise.dress import layout_of
from unmask.errors import UserError
from unmask.generate import ASKS, Model
from unmask.models.config import Layout
from unmask.models.joint import JointSampler
from unmask.models.kv import KVPool
from unmask.models.transformer import Transformer
from unmask.settings import Settings

Row = dict[str, Any]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest |delta logit| that counts as rounding. Two exact computations of one logit, packed otherwise, differ: on the
embedded pair by 2e-5 in float32, 0.02 in float16 and 0.13 in bfloat16."""
COSINES = ("key_cosine", "value_cosine")
COUNTS = ("compared", "computed", "attended", "stale", "missing")
"""Cells: whose logits were compared, run through the model, attended to, of these not computed, and out of reach."""
CACHES = {
    "full": ("dual", "prefix", "freecache", "freecache-lag", "dkv"),
    "block": ("d2f", "freecache", "freecache-lag"),
    "causal": ("ar",),
}
"""The recipes with a cache that are compared where none is named, by the model's attention."""
BLOCK = 8
"""Cells of a block on the embedded pair, whose answers are short; elsewhere blocks are as `generate` makes them."""
ROWS = 8
"""Prompts decoded together."""


class Recomputed(Plain):
    """The model without its cache: what a row attends to is computed anew in every forward, whatever the query is.

    The draft names the cells that `Plain` would have computed and holds their logits only, so that a recipe does with
    it what it does with the approximate one: they differ in the numbers alone. In a model that attends in blocks, cells
    that no forward has computed yet are unseen here too: a recipe opens a block when it likes.
    """

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        """The exact draft of the cells that (query, need) ask for."""
        compute, fresh = self._reach(query, need)
        seen = canvas.valid
        if self.layout.kind == "block":
            seen = seen & (compute | (canvas.cached_at >= 0))
        whole = seen & compute.any(1)[:, None]
        return replace(super().__call__(canvas, whole, fresh), computed=compute)


class Watched(Plain):
    """A denoiser that compares each of its drafts, keys and values with exact ones; `rows` is what it found."""

    def __init__(
        self, model: Transformer, *, slots: int, length: int, cached: bool = True, layout: Layout | None = None
    ) -> None:
        super().__init__(model, slots=slots, length=length, cached=cached, layout=layout)
        self.exact = Recomputed(model, slots=slots, length=length, layout=layout)
        self.rows: list[Row] = []
        """For each row of each step, as `compare` makes them."""

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        """The approximate draft, unchanged."""
        draft = super().__call__(canvas, query, need)
        exact = self.exact(canvas, query, need)
        assert self.exact.pool is not None
        self.rows += compare(canvas, (draft, exact), (self.pool, self.exact.pool), self.layout)
        return draft


def compare(
    canvas: Canvas, drafts: tuple[Draft, Draft], pools: tuple[KVPool | None, KVPool], layout: Layout
) -> list[Row]:
    """One step, a record for each row that was computed: the approximate against the exact draft and K/V pool.

    `row` is the row's slot, `step` counts from 1. Cosines are lists, one number a layer, over the stale cells; those
    that end in `_known` are over all cells attended to. None stands where there is nothing to compare.
    """
    draft, exact = drafts
    attended, missing = reached(canvas, draft.computed, layout)
    stale = attended & ~draft.computed
    found = apart(draft, exact)
    owner = draft.at // draft.fresh.shape[1]
    rows = []
    for row in draft.computed.any(1).nonzero()[:, 0].tolist():
        own, slot = owner == row, int(canvas.slot[row])
        counts = {"computed": draft.computed, "attended": attended, "stale": stale, "missing": missing}
        age = (canvas.step[row] + 1 - canvas.cached_at[row])[stale[row]]
        rows.append(
            {
                "row": slot,
                "step": int(canvas.step[row]) + 1,
                "compared": int(own.sum()),
                **{name: spread(value[own]) for name, (value, spread) in found.items()},
                **{name: int(cells[row].sum()) for name, cells in counts.items()},
                "stale_age": _mean(age.double()),
                **kept(pools, slot, stale[row], attended[row]),
            }
        )
    return rows


def reached(canvas: Canvas, computed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """([B, L] cells that the computed ones attend to, [B, L] cells they would attend to, were their key there)."""
    known = canvas.valid & (computed | (canvas.cached_at >= 0))
    seen = canvas.valid & computed.any(1)[:, None]
    if layout.kind != "full":
        group = layout.groups(canvas.position, canvas.origin)
        lowest = torch.iinfo(group.dtype).min
        seen = seen & (group <= group.masked_fill(~computed, lowest).amax(1, keepdim=True))
    return seen & known, seen & ~known


def apart(draft: Draft, exact: Draft) -> dict[str, tuple[Tensor, Callable[[Tensor], float | None]]]:
    """By name: a number [N] for each fresh cell, and how the numbers of several cells become one.

    What must never be generated (-inf in both) is left out.
    """
    wide = torch.promote_types(draft.logits.dtype, torch.float32)
    ours, theirs = draft.logits.to(wide), exact.logits.to(wide)
    barred = (ours == -torch.inf) & (theirs == -torch.inf)
    delta = (ours - theirs).abs().masked_fill(barred, 0)
    delta = delta.masked_fill(delta.isnan(), torch.inf)  # a broken number agrees with none
    moved = (draft.score - exact.probability_of(draft.token)).flatten()[draft.at].abs()
    return {
        "max_delta_logit": (delta.amax(1), _max),
        "mean_delta_logit": (delta.sum(1) / (~barred).sum(1), _mean),
        "token_agreement": ((draft.tokens == exact.tokens).double(), _mean),
        "max_delta_probability": (moved, _max),
    }


def kept(pools: tuple[KVPool | None, KVPool], slot: int, stale: Tensor, attended: Tensor) -> Row:
    """Cosines of a row's stored keys and values with the exact ones: the heads of a cell are one vector."""
    cells = attended.nonzero()[:, 0]
    approximate, exact = pools
    found: Row = {}
    if approximate is None:
        return {f"{name}{end}": None for end in ("", "_min", "_known") for name in COSINES}
    wide = torch.promote_types(exact.data.dtype, torch.float32)
    ours, theirs = (p.data[:, :, slot].to(wide)[..., cells, :].transpose(2, 3).flatten(3) for p in (approximate, exact))
    cosine = F.cosine_similarity(ours, theirs, dim=-1).clamp(max=1)  # [layers, 2, cells]
    old = cosine[..., stale[cells]]
    for name, part, known in zip(COSINES, old.unbind(1), cosine.unbind(1), strict=True):
        there = part.shape[1] > 0
        found[name] = part.mean(1).tolist() if there else None
        found[f"{name}_min"] = part.amin(1).tolist() if there else None
        found[f"{name}_known"] = known.mean(1).tolist()
    return found


def _max(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def verify(
    network: Transformer,
    recipe: Recipe,
    canvas: Canvas,
    *,
    guide: Transformer | None = None,
    sampler: JointSampler | None = None,
    on_step: Callable[[Canvas], object] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Decode with the cache and, step by step beside it, without: (a record for each row and step, one for each row).

    The exact run asks for the same cells and differs in that no key or value is kept.
    """
    size: dict[str, Any] = {"slots": int(canvas.slot.max()) + 1, "length": canvas.tokens.shape[1]}
    layout = layout_of(recipe, network.config.layout)
    watched = Watched(network, **size, cached=recipe.cached, layout=layout)
    plains = (watched, Recomputed(network, **size, cached=False, layout=layout))
    runs = [
        decode(dress(network, recipe, **size, guide=guide, sampler=sampler, plain=plain), recipe, canvas)
        for plain in plains
    ]
    ours = theirs = canvas
    parted = torch.zeros_like(canvas.step)
    for number, (mine, exact) in enumerate(zip_longest(*runs), 1):
        ours, theirs = mine[0] if mine else ours, exact[0] if exact else theirs
        differ = ((ours.tokens != theirs.tokens) | (ours.masked != theirs.masked)).any(1)
        parted = torch.where(differ & (parted == 0), number, parted)
        if on_step:
            on_step(ours)
    return watched.rows, ends(ours, theirs, parted)


def ends(ours: Canvas, theirs: Canvas, parted: Tensor) -> list[Row]:
    """For each row: how the text of the approximate run agrees with the exact one's.

    `text_cells` counts the cells before the first EOS of either run, `text_equal` those of them that hold the same
    token in both; `cells` and `cells_equal` count the whole response. `parted` [B]: the first step that differed, or 0.
    """
    same = (ours.tokens == theirs.tokens) & (ours.masked == theirs.masked)
    mine, exact = useful(ours), useful(theirs)
    response = ours.valid & ~ours.given
    counts = {
        "text_cells": mine | exact,
        "text_equal": mine & exact & same,
        "cells": response,
        "cells_equal": response & same,
    }
    return [
        {
            "row": int(ours.slot[row]),
            "parted_at": int(parted[row]) or None,
            "forwards": int(ours.step[row]),
            "exact_forwards": int(theirs.step[row]),
            **{name: int(cells[row].sum()) for name, cells in counts.items()},
            "tokens": ours.tokens[row][mine[row]].tolist(),
            "exact_tokens": theirs.tokens[row][exact[row]].tolist(),
        }
        for row in range(len(ours))
    ]


def pooled(rows: Sequence[Row]) -> Row:
    """One record of many: maxima and sums; means are over cells, whatever row they are from."""
    total = {name: sum(r[name] for r in rows) for name in COUNTS}
    most = {f"max_delta_{what}": max(r[f"max_delta_{what}"] for r in rows) for what in ("logit", "probability")}
    lowest = {f"{name}_min": _lowest([r[f"{name}_min"] for r in rows]) for name in COSINES}
    return {
        "rows": len(rows),
        **total,
        **most,
        **{name: _weighted(rows, name, "compared") for name in ("mean_delta_logit", "token_agreement")},
        "stale_share": total["stale"] / max(1, total["attended"]),
        **{name: _weighted(rows, name, "stale") for name in ("stale_age", *COSINES)},
        **lowest,
        **{f"{name}_known": _weighted(rows, f"{name}_known", "attended") for name in COSINES},
        "by_construction": not total["stale"] and not total["missing"],
    }


def _weighted(rows: Sequence[Row], name: str, weight: str) -> Any:
    """The mean of numbers or of lists of numbers; None where no row has any."""
    there = [r for r in rows if r[name] is not None and r[weight]]
    if not there:
        return None
    weights = torch.tensor([r[weight] for r in there], dtype=torch.float64)
    return (weights / weights.sum() @ torch.tensor([r[name] for r in there], dtype=torch.float64)).tolist()


def _lowest(lists: Sequence[list[float] | None]) -> list[float] | None:
    there = [values for values in lists if values is not None]
    return [min(column) for column in zip(*there, strict=True)] if there else None


def summarise(rows: Sequence[Row], last: Sequence[Row], *, cached: bool, tolerance: float) -> Row:
    """The verdict on a recipe and what it rests on, from the records of `verify`."""
    whole = pooled(rows)
    sums = {k: sum(e[k] for e in last) for k in ("text_cells", "text_equal", "cells", "cells_equal")}
    exact = whole["max_delta_logit"] <= tolerance
    parted = [e["parted_at"] for e in last if e["parted_at"]]
    steps = sorted({r["step"] for r in rows})
    return {
        "verdict": "exact" if exact else "approximate",
        "why": _why(whole, cached=cached, exact=exact, tolerance=tolerance),
        **{k: v for k, v in whole.items() if k != "rows"},
        "text_agreement": sums["text_equal"] / sums["text_cells"] if sums["text_cells"] else 1.0,
        "cell_agreement": sums["cells_equal"] / max(1, sums["cells"]),
        "texts_parted": len(parted),
        "parted_at": min(parted, default=None),
        "forwards": sum(e["forwards"] for e in last) / len(last),
        "exact_forwards": sum(e["exact_forwards"] for e in last) / len(last),
        "steps": [{"step": n, **pooled([r for r in rows if r["step"] == n])} for n in steps],
    }


def _why(whole: Row, *, cached: bool, exact: bool, tolerance: float) -> str:
    if exact and not cached:
        return "no cache: exact by definition"
    if exact and whole["by_construction"]:
        return "nothing was reused: exact by construction"
    return f"{'every' if exact else 'some'} |delta logit| {'<=' if exact else '>'} {tolerance:g}"


@dataclass(frozen=True, eq=False)
class Case:
    """A recipe, checked against the model, and the canvases it will be verified on."""

    name: str
    recipe: Recipe
    canvases: tuple[Canvas, ...]
    guide: Transformer | None
    sampler: JointSampler | None = None

    @property
    def holes(self) -> int:
        """Cells to decide."""
        return sum(int(canvas.masked.sum()) for canvas in self.canvases)


def prepare(model: Model, names: Sequence[str], prompts: Sequence[str], settings: Settings) -> list[Case]:
    """Everything that is checked before anything is computed; UserError for what cannot be decoded.

    `names` are recipes (names, TOML files, expressions; none: the caches in `CACHES`), `settings` holds length,
    block and template of all, and the guide and the sampler of those that ask them; one that none asks is an error.
    """
    cases: list[Case] = []
    asked: set[str] = set()
    for name in names or CACHES[model.network.config.layout.kind]:
        own = replace(settings, recipe=name)
        if settings.block is None and name in recipes.entries():
            own = replace(own, block=_block(model, name, max(model.length(p, own) for p in prompts)))
        recipe = model.recipe(prompts, own)
        drawing = recipe.joint is not None and recipe.joint.k > 1
        asked |= {"guide"} if recipe.guided else set()
        asked |= {"sampler"} if drawing else set()
        own = replace(own, recipe=recipe, block=None)
        own = replace(own, guide=own.guide if recipe.guided else None, sampler=own.sampler if drawing else None)
        parts = range(0, len(prompts), ROWS)
        jobs = [model.prepare(prompts[at : at + ROWS], own, offset=at) for at in parts]
        cases.append(Case(name, recipe, tuple(job.canvas for job in jobs), **model.second(recipe, own)))
    for name, use in ASKS.items():
        if getattr(settings, name) is not None and name not in asked:
            raise UserError(f"none of the recipes asks a {name}; leave {name} out, or use {use}")
    return cases


def _block(model: Model, name: str, length: int) -> int | None:
    """The block of a recipe where none is asked for; None leaves it to `generate`."""
    layout = model.network.config.layout
    size = layout.size or (BLOCK if model.directory.parent == zoo.path().parent else None)
    return min(size, length) if size and "block" in recipes.entry(name).defaults else None


def measure(
    model: Model, case: Case, *, on_row: Callable[[Row], object], on_cells: Callable[[int], object] = int
) -> Row:
    """Verify one recipe on all its canvases: its summary, with a record for each prompt in `texts`.

    `on_row` is given each record of a prompt and a step, `on_cells` the number of cells decided so far.
    """
    rows: list[Row] = []
    last: list[Row] = []
    before = 0
    for number, canvas in enumerate(case.canvases):
        holes = int(canvas.masked.sum())

        def told(now: Canvas, goal: int = before + holes) -> None:
            on_cells(goal - int(now.masked.sum()))

        second = {"guide": case.guide, "sampler": case.sampler}
        found = verify(model.network, case.recipe, canvas, **second, on_step=told)
        steps, final = (_numbered(records, number * ROWS) for records in found)
        rows, last, before = rows + steps, last + final, before + holes
        for record in steps:
            on_row({"recipe": case.name, **record})
    texts = [
        {**e, "text": model.tokenizer.decode(e["tokens"]), "exact_text": model.tokenizer.decode(e["exact_tokens"])}
        for e in last
    ]
    summary = summarise(rows, last, cached=case.recipe.cached, tolerance=TOLERANCE[model.network.dtype])
    named = {"recipe": case.name, "expression": repr(case.recipe), "hash": case.recipe.hash}
    return {**named, **summary, "texts": texts}


def _numbered(records: Sequence[Row], first: int) -> list[Row]:
    """The same records, with the number of the prompt for that of the row."""
    return [{"prompt": first + r["row"], **{k: v for k, v in r.items() if k != "row"}} for r in records]
