"""The canvas: a batch of half-written texts as a value. `step` returns a new one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.decode.draft import Draft

T = TypeVar("T")

PADDING = {"tokens": 0, "decided_at": 0, "score": 1.0, "cached_at": -1, "cached_token": -1, "given": True}
"""What a cell behind the end of a row holds; fields not named hold 0 or False."""


@dataclass(frozen=True)
class Canvas:
    """B rows of at most L cells. Every tensor is [B, L] or [B], so a row can be taken out, joined and resumed."""

    tokens: Tensor
    """[B, L] int64: the token, or `mask_id` where undecided."""
    given: Tensor
    """[B, L] bool: prompt, template, infill context; never rewritten."""
    valid: Tensor
    """[B, L] bool: False behind the end of a shorter row."""
    region: Tensor
    """[B, L] int8: 0 none, 1 thinking, 2 answer, further numbers as a caller likes."""
    decided_at: Tensor
    """[B, L] int64: step of the commit; 0 given, -1 undecided. The mask is this state, never a comparison of tokens."""
    score: Tensor
    """[B, L] float: confidence at commit; 1 where given."""
    cached_at: Tensor
    """[B, L] int64: step at which this cell's key and value were computed; -1 never."""
    cached_token: Tensor
    """[B, L] int64: the token they were computed from."""
    revisions: Tensor
    """[B, L] int64: how often the cell may still be given back."""
    origin: Tensor
    """[B] int64: first cell of the response."""
    step: Tensor
    """[B] int64: forwards done for the row."""
    done: Tensor
    """[B] bool."""
    seed: Tensor
    """[B] int64: key of the row's randomness."""
    slot: Tensor
    """[B] int64: the row's place in every resource (K/V pool)."""
    mask_id: int = -1
    eos: tuple[int, ...] = ()
    memo: dict[str, Tensor] = field(default_factory=dict)
    """Batch-first memory of the few rules that cannot derive their state."""

    @staticmethod
    def new(
        prompts: Sequence[Sequence[int]],
        length: int | Sequence[int],
        *,
        mask_id: int,
        eos: Sequence[int] = (),
        seed: int | Sequence[int] = 0,
        revisions: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Canvas:
        """Prompts followed by `length` undecided cells (one number, or one a row)."""
        lengths = [length] * len(prompts) if isinstance(length, int) else list(length)
        rows = [[*p, *[None] * n] for p, n in zip(prompts, lengths, strict=True)]
        origin = [len(p) for p in prompts]
        return Canvas.of(rows, origin=origin, mask_id=mask_id, eos=eos, seed=seed, revisions=revisions, dtype=dtype)

    @staticmethod
    def of(
        rows: Sequence[Sequence[int | None]],
        *,
        origin: Sequence[int],
        mask_id: int,
        eos: Sequence[int] = (),
        seed: int | Sequence[int] = 0,
        revisions: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Canvas:
        """Rows of tokens and holes (None): tokens are given wherever they stand, holes are to be decided."""
        if not rows or not all(None in row for row in rows):
            raise UserError("nothing to write: every row of a canvas needs at least one undecided cell")
        count, width = len(rows), max(map(len, rows))
        grid = torch.tensor([[-1 if t is None else t for t in row] + [0] * (width - len(row)) for row in rows])
        hole = torch.tensor([[t is None for t in row] + [False] * (width - len(row)) for row in rows])
        valid = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        never, zero = torch.full_like(grid, -1), torch.zeros(count, dtype=torch.int64)
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        return Canvas(
            tokens=grid.masked_fill(hole, mask_id),
            given=~hole,
            valid=valid,
            region=torch.zeros_like(grid, dtype=torch.int8),
            decided_at=torch.where(hole, -1, 0),
            score=(~hole).to(dtype),
            cached_at=never,
            cached_token=never,
            revisions=torch.where(hole, revisions, 0),
            origin=torch.tensor(list(origin)),
            step=zero,
            done=zero.bool(),
            seed=torch.tensor(seeds, dtype=torch.int64),
            slot=torch.arange(count),
            mask_id=mask_id,
            eos=tuple(eos),
        )

    def __len__(self) -> int:
        return len(self.done)

    @cached_property
    def masked(self) -> Tensor:
        """[B, L] bool: undecided cells."""
        return self.decided_at < 0

    @cached_property
    def position(self) -> Tensor:
        """[L] int64: column numbers, which are the absolute positions of every row."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @cached_property
    def _width(self) -> Tensor:
        """L, where the columns are."""
        return torch.tensor(self.tokens.shape[1], device=self.tokens.device)

    @cached_property
    def written(self) -> Tensor:
        """[B, L] bool: cells that a step has decided."""
        return self.decided_at > 0

    @cached_property
    def frontier(self) -> Tensor:
        """[B]: the first undecided column; L where there is none."""
        return self.first(self.masked)

    @cached_property
    def dirty(self) -> Tensor:
        """[B, L] bool: decided cells whose cached key and value are missing or were computed from another token."""
        return self.valid & ~self.masked & (self.cached_token != self.tokens)  # -1 where there is none

    @cached_property
    def revocable(self) -> Tensor:
        """[B, L] bool: decided cells that may still be given back."""
        return ~self.given & ~self.masked & (self.revisions > 0)

    @property
    def own(self) -> Tensor:
        """[B, L] bool: the cells of each row that are not given."""
        return self.derive("own", lambda: self.valid & ~self.given, fixed=True)

    @property
    def stretch(self) -> Tensor:
        """[B, L] int64: number of the stretch a cell lies in. A new one begins where given and written cells meet, and
        where one region meets another."""

        def compute() -> Tensor:
            kind = self.region.long() * 2 + self.given
            return F.pad(kind[:, 1:] != kind[:, :-1], (1, 0)).cumsum(1)

        return self.derive("stretch", compute, fixed=True)

    @property
    def _last(self) -> Tensor:
        """[B, L] bool: the last stretch that is written."""

        def compute() -> Tensor:
            return self.own & (self.stretch == self.stretch.masked_fill(~self.own, -1).amax(1, keepdim=True))

        return self.derive("last", compute, fixed=True)

    @cached_property
    def ends(self) -> Tensor:
        """[B, L] bool: decided end-of-sequence cells. Each ends its own stretch."""
        if not self.eos:
            return torch.zeros_like(self.given)
        hit = self.tokens == self.eos[0]
        for token in self.eos[1:]:
            hit = hit | (self.tokens == token)
        return hit & self.written

    @cached_property
    def ended(self) -> Tensor:
        """[B, L] bool: decided end-of-sequence cells that end the response: those of its last stretch."""
        return self.ends & self._last

    @cached_property
    def end(self) -> Tensor:
        """[B]: the first column in which the response has ended; L where it has not."""
        return self.first(self.ended)

    @property
    def behind(self) -> Tensor:
        """[B, L] bool: cells at or behind an end-of-sequence cell of their own stretch."""
        count, stretch = self.ends.cumsum(1), self.stretch
        starts = F.pad(stretch[:, 1:] != stretch[:, :-1], (1, 0), value=True)
        return count > torch.where(starts, count - self.ends.long(), 0).cummax(1).values

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    @cached_property
    def _fixed(self) -> dict[Hashable, Any]:
        return {}

    def derive(self, key: Hashable, compute: Callable[[], T], *, fixed: bool = False) -> T:
        """`compute()`, remembered for the life of this value, so that rules can share what they derive.

        `fixed`: it depends on nothing that a step changes (positions, origins, validity, regions), so that the values
        `advance` makes share it too.
        """
        store = self._fixed if fixed else self._derived
        found = store.get(key)
        if found is None:
            found = store[key] = compute()
        return found

    def _change(self, keep: Iterable[str], **new: Tensor) -> Canvas:
        """`replace(self, **new)`, at a tenth of its cost and keeping the named derived values."""
        here, other = self.__dict__, object.__new__(Canvas)
        other.__dict__.update({name: here[name] for name in (*FIELDS, *keep) if name in here}, **new)
        return other

    def _alike(self, **new: Tensor) -> Canvas:
        """`replace(self, **new)` that keeps all derived values, since none of them depends on what is new."""
        other = object.__new__(Canvas)
        other.__dict__.update(self.__dict__, **new)
        return other

    def first(self, cells: Tensor) -> Tensor:
        """[B]: the first column of `cells` [B, L] in each row; L where there is none."""
        return torch.where(cells, self.position, self._width).amin(1)

    def advance(self, pick: Tensor, back: Tensor | None, draft: Draft, *, edit: Tensor | None = None) -> Canvas:
        """The next canvas: `pick` takes the draft's tokens, `back` is undecided again, the rows' clocks move on.

        `edit`: decided cells that take the draft's tokens. A cell given back or edited has one revision less.
        """
        now = self.step + ~self.done
        spent = [cells for cells in (back, edit) if cells is not None]
        pick = pick if edit is None else pick | edit
        clock = now[:, None]
        new = {
            "tokens": torch.where(pick, draft.token, self.tokens),
            "decided_at": torch.where(pick, clock, self.decided_at),
            "score": torch.where(pick, draft.score.to(self.score.dtype), self.score),
            "cached_at": torch.where(draft.computed, clock, self.cached_at),
            "cached_token": torch.where(draft.computed, self.tokens, self.cached_token),
        }
        if back is not None:
            new["tokens"] = new["tokens"].masked_fill(back, self.mask_id)
            new["decided_at"] = new["decided_at"].masked_fill(back, -1)
        if spent:
            new["revisions"] = self.revisions - sum(cells.long() for cells in spent)
        return self._change(("position", "_width", "_fixed"), step=now, **new)

    def showing(self, tokens: Tensor) -> Canvas:
        """The same canvas with other tokens [B, L] in undecided cells, which stay undecided: what a model reads."""
        return self._alike(tokens=tokens)  # nothing derived reads the token of an undecided cell

    def finish(self, done: Tensor) -> Canvas:
        """Mark rows [B] as done; they stay so."""
        return self._alike(done=self.done | done)

    def __getitem__(self, rows: Tensor | slice) -> Canvas:
        """The rows chosen by an index tensor, a bool mask or a slice."""
        return self._map(lambda _, t: t[rows])

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Canvas:
        tensors = {f.name: change(f.name, v) for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        return replace(self, **tensors, memo={k: change(k, v) for k, v in self.memo.items()})

    def widen(self, width: int) -> Canvas:
        """The same rows with padding up to `width` columns."""
        extra = width - self.tokens.shape[1]

        def pad(name: str, t: Tensor) -> Tensor:
            return t if t.dim() == 1 or name in self.memo else F.pad(t, (0, extra), value=PADDING.get(name, 0))

        return self._map(pad) if extra else self


FIELDS = tuple(f.name for f in fields(Canvas))


def cat(canvases: Sequence[Canvas]) -> Canvas:
    """Stack canvases into one batch; shorter rows are padded. They must agree on mask id, EOS and memo keys."""
    first, width = canvases[0], max(c.tokens.shape[1] for c in canvases)
    assert all((c.mask_id, c.eos, c.memo.keys()) == (first.mask_id, first.eos, first.memo.keys()) for c in canvases)
    wide = [c.widen(width) for c in canvases]
    tensors = {
        f.name: [getattr(c, f.name) for c in wide] for f in fields(first) if torch.is_tensor(getattr(first, f.name))
    }
    memo = {k: torch.cat([c.memo[k] for c in wide]) for k in first.memo}
    return replace(first, **{k: torch.cat(v) for k, v in tensors.items()}, memo=memo)
