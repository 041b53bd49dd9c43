"""The embedded models: a small masked dLLM, its autoregressive twin and its block-causal student, with their cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from unmask.errors import UserError, suggest

PAIR = ("dllm", "twin")
"""The embedded pair; the first is the default."""

CHECKPOINTS = ("dllm-10", "dllm-30", "dllm-60")
"""The dLLM after 10, 30 and 60 percent of its last training round: what stopping early does to an unfinished model."""

STUDENT = "d2f"
"""A block-causal student of the dLLM: an exact cache, and several blocks in flight (Discrete Diffusion Forcing)."""

NAMES = (*PAIR, STUDENT, *CHECKPOINTS)
"""Every embedded model."""


def path(name: str = NAMES[0]) -> Path:
    """The directory of an embedded model; UserError for an unknown name, or if the installation lacks its weights."""
    if name not in NAMES:
        raise suggest(name, NAMES, "embedded model")
    found = Path(__file__).parent / name
    if not (found / "config.json").is_file():
        raise UserError(f"the embedded model {name!r} is missing from this installation; reinstall unmask")
    return found


def sampler(name: str = NAMES[0]) -> Path | None:
    """The directory of the joint sampler that was trained for an embedded model, or None."""
    found = Path(__file__).parent / f"{name}-joint"
    return found if (found / "config.json").is_file() else None


def card(name: str = NAMES[0]) -> dict[str, Any]:
    """What is known about an embedded model: how it was trained and how well it does, as measured."""
    file = path(name) / "card.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def length(prompt: str) -> int:
    """How many cells the pair was trained to answer this prompt with: by its task and its number of questions."""
    from unmask.train.batches import BUCKETS

    task = "restaurants" if re.search(r"\w\[", prompt) else "problems"
    items = max(1, len(re.findall(r"\bQ[1-8]\b", prompt)))
    fitting = [b for b in BUCKETS if b.task == task]
    return next((b for b in fitting if max(b.items) >= items), fitting[-1]).response
