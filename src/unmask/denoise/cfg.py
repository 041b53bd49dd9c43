"""Classifier-free guidance: away from what the model would write without the prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.decode import Canvas, Cost, Denoiser, Draft
from unmask.denoise.rows import Number, at


@dataclass(frozen=True, eq=False)
class ClassifierFree:
    """Logits un + (scale + 1) (conditional - un), un being those of a canvas whose prompt is masked (LLaDA's generate).

    The prompt is what is given before the row's origin. Scale 0 is no guidance and costs nothing in a row that has it.
    Both sides compute the same cells, so this works under every cache; `blind`, the side without the prompt, needs keys
    and values of its own (unsupervised guidance, Nie et al. 2024, arXiv 2410.18514).
    """

    denoise: Denoiser
    blind: Denoiser
    scale: Number

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, query: Tensor, need: Tensor) -> Draft:
        draft = self.denoise(canvas, query, need)
        wide = torch.promote_types(draft.logits.dtype, torch.float32)
        scale = at(self.scale, canvas.slot, wide).expand(len(canvas), 1)
        asked = query & (scale > 0)
        if not bool(asked.any()):
            return draft
        began = time.perf_counter()
        prompt = canvas.given & (canvas.position < canvas.origin[:, None])
        unprompted = replace(canvas, tokens=canvas.tokens.masked_fill(prompt, canvas.mask_id))
        other = self.blind(unprompted, asked, need)
        cells = other.fresh.flatten()[draft.at].nonzero()[:, 0]
        own, blind = draft.logits.to(wide)[cells], other.logits.to(wide)
        guided = blind + (scale[other.at // need.shape[1]] + 1) * (own - blind)
        guided = guided.masked_fill(own == -torch.inf, -torch.inf)  # or else inf - inf
        logits = draft.logits.to(wide).index_copy(0, cells, guided)
        cost = Cost("unconditional", other.computed, time.perf_counter() - began)
        return replace(draft, logits=logits, top=None, costs=(*draft.costs, *other.costs, cost))
