"""The recorder: a consumer of the loop's events that makes a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy
import torch
from torch import Tensor

from unmask.decode import Canvas, Mixed, Recipe, Step, useful
from unmask.study.trace import Event, Helped, Move, Named, Row, Trace, Written, ranges

if TYPE_CHECKING:
    from unmask.generate import Message, Model
    from unmask.settings import Settings


class Words(Protocol):
    """What a recorder asks of a tokenizer."""

    def piece(self, id: int) -> str:
        """One cell as it is displayed."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """A text."""
        ...


def record(
    model: Model,
    prompts: Sequence[str | Sequence[Message]],
    settings: Settings,
    *,
    suffix: str = "",
    drafts: bool = False,
) -> Trace:
    """Decode a text for each prompt, in one batch, and write down how. UserError as in `model.generate`."""
    job = model.prepare(prompts, settings, suffix=suffix)
    said = {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default}
    recorder = Recorder(
        job.canvas,
        job.recipe,
        tokenizer=model.tokenizer,
        model=model.name,
        settings=_plain({**said, **({"suffix": suffix} if suffix else {})}),
        drafts=drafts,
    )
    outputs = model.run(job, on_step=recorder)
    told = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
    return recorder.trace(prompts=told, texts=[output.text for output in outputs])


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it: models and recipes by name."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "name", "") or str(value)


class Recorder:
    """Made with the first canvas, called with every (canvas, step) in order; `trace` is what has been recorded.

    `drafts`: keep what the model believed of undecided cells too. The time between two calls counts as the later one's
    step.
    """

    def __init__(
        self,
        canvas: Canvas,
        recipe: Recipe | Mixed,
        *,
        tokenizer: Words | None = None,
        model: str = "",
        settings: Mapping[str, Any] | None = None,
        drafts: bool = False,
    ) -> None:
        self.first = self.last = canvas
        self.recipe, self.tokenizer, self.model, self.drafts = recipe, tokenizer, model, drafts
        self.settings, self.events = dict(settings or {}), list[Event]()
        self._since = time.perf_counter()

    def __call__(self, canvas: Canvas, event: Step) -> None:
        """Write one step down."""
        seconds, draft = round(time.perf_counter() - self._since, 6), event.draft
        cells = {"computed": event.computed, "fresh": draft.fresh, "pick": event.pick}
        cells |= {k: v for k in ("back", "edit") if (v := getattr(event, k)) is not None}
        values = {"tokens": canvas.tokens, "score": canvas.score}
        if self.drafts:
            cells["drafts"] = canvas.masked & draft.fresh
            values |= {"token": draft.token, "belief": draft.score}
        here = {name: t.cpu() for name, t in {**cells, **values}.items()}
        live = (~self.last.done).tolist()
        moves = [_move({k: t[row] for k, t in here.items()}) if live[row] else None for row in range(len(live))]
        done = (canvas.done & ~self.last.done).nonzero()[:, 0].tolist()
        costs = [Helped(c.name, tuple(map(ranges, c.computed.cpu())), round(c.seconds, 6)) for c in draft.costs]
        self.events.append(Event(seconds, tuple(moves), tuple(done), tuple(costs)))
        self.last, self._since = canvas, time.perf_counter()

    def trace(self, *, prompts: Sequence[str] = (), texts: Sequence[str] = ()) -> Trace:
        """What has been recorded so far; `prompts` and `texts` as they read, where that is more than their tokens."""
        canvas, mixed = self.first, self.recipe if isinstance(self.recipe, Mixed) else None
        recipes = [self.recipe] if isinstance(self.recipe, Recipe) else self.recipe.recipes
        which = [0] * len(canvas) if mixed is None else mixed.which[canvas.slot].tolist()
        found = Trace(
            model=self.model,
            recipes=tuple(Named(r.name, r.hash, repr(r), r.to_toml()) for r in recipes),
            settings=self.settings,
            mask_id=canvas.mask_id,
            eos=tuple(canvas.eos),
            dtype=str(canvas.score.dtype).removeprefix("torch."),
            width=canvas.tokens.shape[1],
            pieces={},
            rows=tuple(self._row(row, which[row], prompts, texts) for row in range(len(canvas))),
            steps=tuple(self.events),
        )
        new = found.start()
        tensors = {f.name: t.cpu() for f in fields(canvas) if torch.is_tensor(t := getattr(canvas, f.name))}
        state = {name: t.tolist() for name, t in tensors.items() if not torch.equal(t, getattr(new, name))}
        found = replace(found, state=state)
        return replace(found, pieces={t: self._piece(t) for t in sorted(found.occurring)})

    def _row(self, row: int, recipe: int, prompts: Sequence[str], texts: Sequence[str]) -> Row:
        first, last = self.first[row : row + 1], self.last[row : row + 1]
        own, origin = first.valid, int(first.origin)
        given = zip(first.tokens[own].tolist(), first.given[own].tolist(), strict=True)
        tokens = tuple(t if kept else None for t, kept in given)
        prompt = prompts[row] if row < len(prompts) else ""
        prompt = prompt or self._text([t for t in tokens[:origin] if t is not None])
        text = texts[row] if row < len(texts) else self._text(last.tokens[useful(last)].tolist())
        return Row(prompt, text, origin, int(first.seed), int(first.slot), recipe, tokens)

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def _piece(self, id: int) -> str:
        return str(id) if self.tokenizer is None else self.tokenizer.piece(id)


def _move(here: dict[str, Tensor]) -> Move:
    """One row's part of a step, from its cells and values [L]."""

    def written(name: str, tokens: str = "tokens", scores: str = "score") -> Written | None:
        if name not in here:
            return None
        cells = here[name].nonzero()[:, 0]
        values = here[scores][cells]
        short = [_rounded(v) if name == "drafts" else _short(v, values.dtype) for v in values.tolist()]
        return Written(tuple(cells.tolist()), tuple(here[tokens][cells].tolist()), tuple(short))

    pick, edit, drafts = written("pick"), written("edit"), written("drafts", "token", "belief")
    assert pick is not None
    back = tuple(here["back"].nonzero()[:, 0].tolist()) if "back" in here else None
    return Move(ranges(here["computed"]), ranges(here["fresh"]), pick, back, edit, drafts)


def _short(value: float, dtype: torch.dtype) -> float | None:
    """The shortest number that is `value` in this type; None for what is no number."""
    if not math.isfinite(value):
        return None
    near = float(str(numpy.float32(value))) if dtype == torch.float32 else value
    return near if numpy.float32(near) == numpy.float32(value) else value


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
