"""The picture of `unmask bench decode`: accuracy against speed at each length, and the cost of a useful token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.study.levers_plot import reach, scatter
from unmask.study.verify_plot import _figure, _write


def draw(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the picture of the summary's cases; UserError if the file cannot be written."""
    by_length, sheets = ([one for one in lines if one["sheet"] == kind] for kind in (False, True))
    lengths = sorted({one["cells"] for one in by_length})
    figure = _figure()(figsize=(12, 5.5 * (len(lengths) + 1)), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[len(lengths), 1])
    for axis, cells in zip(upper.subplots(len(lengths), squeeze=False)[:, 0], lengths, strict=True):
        scatter(axis, [one for one in by_length if one["cells"] == cells], group="model", name="way")
        axis.set_title(f"{cells} cells", fontsize="small")
    left, right = lower.subplots(1, 2)
    _costs(left, by_length, "cells", "cells of the canvas, one problem")
    _costs(right, sheets, "useful_tokens", "useful tokens of a response: worksheets")
    figure.suptitle(title)
    _write(figure, path)


def _costs(axis: Any, lines: Sequence[dict[str, Any]], along: str, label: str) -> None:
    """Milliseconds a useful token, a line for each way of each model, the sweep aside."""
    told = [one for one in lines if one["milliseconds_per_token"]["value"] is not None and not one["swept"]]
    for model, way in dict.fromkeys((one["model"], one["way"]) for one in told):
        own = [one for one in told if (one["model"], one["way"]) == (model, way)]
        x = [one[along]["value"] if isinstance(one[along], dict) else one[along] for one in own]
        costs = [one["milliseconds_per_token"] for one in own]
        y = [cost["value"] for cost in costs]
        axis.errorbar(x, y, yerr=reach(costs), marker="o", markersize=3, linewidth=0.7, label=f"{model} {way}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("ms a useful token")
    if told:
        axis.legend(fontsize="x-small")
