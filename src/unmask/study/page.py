"""A trace as one HTML page: its ledger, the canvas at every step, and the order in which cells were decided."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from unmask.study.trace import Trace, ledger
from unmask.study.trace_file import as_dict

if TYPE_CHECKING:
    from jinja2 import Template

CONFIDENCE = (
    (0.0, (244, 140, 75)),
    (0.5, (253, 190, 110)),
    (0.8, (255, 240, 175)),
    (0.95, (186, 224, 232)),
    (1.0, (116, 173, 209)),
)
"""From unsure to sure. Black text can be read on every colour, and they survive colour blindness."""
ORDER = ((0.0, (255, 243, 191)), (0.5, (140, 205, 190)), (1.0, (150, 150, 230)))
"""From the first step to the last."""


def page(trace: Trace, against: Trace | None = None) -> str:
    """The page as text: one file without anything to load, whose script plays the trace that it holds as JSON.

    `against`: a second trace, shown beside the first one, step by step.
    """
    traces = [trace] if against is None else [trace, against]
    heads = [_head(t) for t in traces]
    if len(set(heads)) < len(heads):
        heads = [f"{letter}: {head}" for letter, head in zip("AB", heads, strict=True)]
    told = [{"trace": t, "head": head, "facts": facts(t)} for t, head in zip(traces, heads, strict=True)]
    data = {"traces": list(map(as_dict, traces)), "heads": heads, "confidence": CONFIDENCE, "order": ORDER}
    labels = list(dict.fromkeys(label for t in told for label in t["facts"]))
    text = _template().render(title=f"unmask trace: {' and '.join(heads)}", told=told, labels=labels, data=data)
    return text.encode("utf-8", "replace").decode()  # a prompt may hold half of a character


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(resources.files("unmask.study").joinpath("trace.html").read_text(encoding="utf-8"))


def _head(trace: Trace) -> str:
    return f"{', '.join(r.name or r.hash for r in trace.recipes)} on {trace.model or 'a model'}"


def facts(trace: Trace) -> dict[str, str]:
    """What is told at the top of the page: the ledger, and where the trace came from."""
    report = ledger(trace)
    found: dict[str, Any] = {
        "forwards": report.forwards,
        "cells computed": report.positions,
        "cells read from the cache": report.cache_hits,
        "tokens": f"{report.tokens}, of which useful {report.useful_tokens}",
        "tokens per forward": f"{report.tokens_per_forward:.2f}",
        "time": f"{report.seconds * 1e3:.1f} ms, {report.useful_tokens_per_second:.0f} useful tokens/s",
        "exit steps": ", ".join(map(str, report.exit_steps)),
    }
    if report.revised:
        found["given back or rewritten"] = report.revised
    for name, cost in report.helpers.items():
        found[name] = f"{cost['forwards']:.0f} forwards, {cost['positions']:.0f} cells, {cost['seconds'] * 1e3:.1f} ms"
    found["settings"] = ", ".join(f"{k}={v}" for k, v in trace.settings.items()) or "none"
    found["recorded by"] = f"unmask {trace.unmask}"
    return {label: str(value) for label, value in found.items()}
