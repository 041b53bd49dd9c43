"""Read the recorded traces: `traces(name)` -> Trace(meta, cases)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "traces"


@dataclass(frozen=True)
class Case:
    """One prompt decoded by a published loop at batch 1."""

    prompt: list[int]
    config: dict[str, Any]  # the published loop's own parameter names
    output: list[int]  # the generated cells, without the prompt
    forwards: int  # the published loop spent so many
    computed: int  # positions over all those forwards
    born: list[int]  # the forward (1, 2, ...) that decided each cell of `output`; 0 = pinned from the start
    seed: int  # of the noise, where the method draws any
    extra: dict[str, Any] = field(default_factory=dict)  # of this method, explained in the trace's meta["extra"]


@dataclass(frozen=True)
class Trace:
    """All runs of one published loop, with where they come from."""

    meta: dict[str, Any]
    cases: list[Case]


def names() -> list[str]:
    """The recorded traces."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def traces(name: str) -> Trace:
    """Load one trace by its file name without the ending."""
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    prompts, configs, seeds = data["prompts"], data["configs"], data["seeds"]
    cases = [
        Case(prompts[p], configs[c], output, forwards, computed, born, seeds[p], extra)
        for p, c, forwards, computed, output, born, extra in data["cases"]
    ]
    return Trace(data["meta"], cases)
