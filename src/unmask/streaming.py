"""Showing a response while it is written, to whoever understands transformers' streamers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from unmask.decode import Canvas, Step
from unmask.template import shown


class Streamer(Protocol):
    """What transformers' streamers understand: settled ids, the draft of what follows them, and the end."""

    def put(self, value: Tensor) -> object:
        """Take ids [N] that will not change: first the prompt, then the response from left to right."""

    def end(self) -> object:
        """The response is complete."""


class Streaming:
    """Feeds a streamer from the loop: the settled beginning by `put`, what follows as a draft by `put_draft`.

    In the end also what stands behind holes is put, such as the answer of a probe. Of a template, its words are put and
    no slot's EOS or what is behind it.
    """

    def __init__(self, streamer: Streamer, canvas: Canvas, *, template: bool = False) -> None:
        self.streamer, self.sent, self.template = streamer, int(canvas.origin[0]), template
        self.draft = getattr(streamer, "put_draft", None)
        streamer.put(canvas.tokens[0, : self.sent].cpu())

    def __call__(self, canvas: Canvas, event: Step) -> None:
        """Put what became settled in this step: the text up to its first hole, or all of it when the row is done."""
        own = canvas.valid[0] & ~canvas.given[0]
        stop = min(int(canvas.first(canvas.ended)[0]), int(own.nonzero()[-1])) + 1
        keep, end = (shown(canvas)[0], int(canvas.valid[0].sum())) if self.template else (~canvas.masked[0], stop)
        settled = end if bool(canvas.done[0]) else min(int(canvas.first(canvas.masked)[0]), end)
        settled = max(self.sent, settled)
        ids = canvas.tokens[0, self.sent : settled][keep[self.sent : settled]]
        if len(ids):
            self.streamer.put(ids.cpu())
        self.sent = settled
        if self.draft is not None and settled < end:
            self.draft(_guess(canvas, event)[settled:end].cpu())


def _guess(canvas: Canvas, event: Step) -> Tensor:
    """[L] of the first row: decided tokens, and the drafted ones of undecided cells."""
    return torch.where(canvas.masked & event.draft.fresh, event.draft.token, canvas.tokens)[0]
