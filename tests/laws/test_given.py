"""Law 4: given cells never change, masks are a state and not a token, what is no token is never committed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.common import EOS, MODELLESS, NAMES, PAIRS, Synthetic, dressed, kinds, model, plain, ragged, run, small, words
from unmask.decode import Canvas, Mixed, Recipe, best, everything, filled, step
from unmask.decode.where import Budget
from unmask.denoise import Plain, Sampled


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_given_cells_never_change(name: str, kind: str) -> None:
    recipe, canvas = small(name), ragged()
    before = canvas.tokens.clone()
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    for after, event in seen:
        assert not (event.pick & (canvas.given | ~canvas.valid)).any()
        assert (after.tokens == before)[canvas.given].all()
    assert (end.decided_at[canvas.given] == 0).all() and (end.given == canvas.given).all()
    assert (end.score[canvas.given] == 1).all() and (canvas.tokens == before).all()


MASK = 60


def literal(mask: int) -> Canvas:
    """Prompts and infill tokens with the literal mask id, and some behind the response."""
    rows = [[MASK, 3, MASK, None, None, MASK, None, None, None, MASK], [4, MASK, None, None, None]]
    return Canvas.of(rows, origin=[3, 2], mask_id=mask, seed=[5, 6], dtype=torch.float64)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_literal_mask_in_a_text_is_text(name: str, kind: str) -> None:
    recipe, canvas = small(name), literal(MASK)
    assert canvas.masked.sum(1).tolist() == [5, 3]
    end, seen = run(plain(kind, recipe, canvas), recipe, canvas)
    assert (end.tokens == MASK).nonzero().tolist() == [[0, 0], [0, 2], [0, 5], [0, 9], [1, 1]]
    for after, _ in seen:
        assert not (after.masked & canvas.given).any()


@pytest.mark.parametrize("name", [n for n in MODELLESS if n not in ("ar", "freecache")])
def test_decoding_never_reads_the_mask_id(name: str) -> None:
    """With a denoiser that knows positions only, another mask id changes nothing but the undecided cells."""
    recipe = small(name)
    one, two = (run(dressed(Synthetic(), recipe, c), recipe, c)[0] for c in (literal(MASK), literal(-1)))
    assert torch.equal(one.decided_at, two.decided_at) and torch.equal(one.step, two.step)
    assert torch.equal(one.tokens[~one.masked], two.tokens[~two.masked])


class Loud(torch.nn.Module):
    """A model that wants nothing but the mask and the padded vocabulary."""

    graphs = kernels = None

    def __init__(self, kind: str, forbidden: list[int]) -> None:
        super().__init__()
        self.inner, self.forbidden = model(kind), torch.tensor(forbidden)
        self.config = replace(self.inner.config, token_count=EOS)
        self.embed, self.dtype, self.rope = self.inner.embed, self.inner.dtype, self.inner.rope

    def forward(self, *args, **named):
        return self.inner(*args, **named).index_fill(-1, self.forbidden, 1e9)

    def head_of(self, hidden):
        return self.inner.head_of(hidden).index_fill(-1, self.forbidden, 1e9)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "confidence": "shaped"}])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_no_token_is_never_committed(name: str, kind: str, sampling: dict) -> None:
    recipe, canvas = small(name), ragged()
    loud = Loud(kind, [EOS, 60])  # 60 is the mask, 59 and 60 lie beyond token_count
    width = canvas.tokens.shape[1]
    denoise = Plain(loud, slots=4, length=width, cached=recipe.cached)  # type: ignore[arg-type]
    end, seen = run(dressed(Sampled(denoise, **sampling), recipe, canvas), recipe, canvas)
    written = torch.stack([after.tokens[event.pick].max() for after, event in seen])
    assert written.max() < EOS and not end.masked[end.done & ~end.ended.any(1)].any()


def test_a_mask_inside_the_vocabulary_is_banned_too() -> None:
    loud = Loud("full", [5])
    loud.config = replace(loud.config, mask_id=5)
    canvas = Canvas.new([words(3, 0)], 6, mask_id=5, dtype=torch.float64)
    end, _ = run(Plain(loud, slots=1, length=9), small("threshold"), canvas)  # type: ignore[arg-type]
    assert (end.tokens[0, 3:] != 5).all()


def test_given_cells_are_not_given_back() -> None:
    start = ragged()
    canvas = replace(start, revisions=torch.full_like(start.revisions, 2))
    recipe = Recipe(everything, best(1), remask=everything >> best(2), stop=filled | Budget(9))
    _, seen = run(Synthetic(), recipe, canvas)
    assert any(event.back.any() for _, event in seen)
    for after, event in seen:
        assert not (event.back & canvas.given).any()
        assert (after.tokens == start.tokens)[start.given].all() and (after.revisions >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_done_is_left_alone(name: str) -> None:
    recipe, canvas = small(name), ragged()
    end, _ = run(plain(kinds(name)[0], recipe, canvas), recipe, canvas)
    mixed = Mixed((recipe,), torch.zeros(4, dtype=torch.int64))
    half = replace(canvas, done=torch.tensor([True, False, True, False]))
    after, event = step(plain(kinds(name)[0], recipe, canvas), mixed, half)
    assert not event.computed[half.done].any() and not event.pick[half.done].any()
    assert torch.equal(after.tokens[half.done], canvas.tokens[half.done])
    assert torch.equal(after.step, (~half.done).long()) and end.done.all()
