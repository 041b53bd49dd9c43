"""The picture of `unmask bench levers`: accuracy against speed, both with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.study.verify_plot import _figure, _write, check

__all__ = ["check", "draw", "reach", "scatter"]


def draw(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the picture of the summary's cases, coloured by group; UserError if the file cannot be written."""
    figure = _figure()(figsize=(12, 7), layout="constrained")
    scatter(figure.subplots(), lines, group="group", name="case")
    figure.suptitle(title)
    _write(figure, path)


def scatter(axis: Any, lines: Sequence[dict[str, Any]], *, group: str, name: str) -> None:
    """Accuracy against useful tokens a second, coloured and named by what a line has under these keys."""
    told = [one for one in lines if one["useful_tokens_per_second"]["value"] is not None]
    for part in dict.fromkeys(one[group] for one in told):
        own = [one for one in told if one[group] == part]
        x, y = ([one[key] for one in own] for key in ("useful_tokens_per_second", "accuracy"))
        values = [[point["value"] for point in side] for side in (x, y)]
        bars = {f"{side}err": reach(points) for side, points in (("x", x), ("y", y))}
        axis.errorbar(*values, **bars, fmt="o", markersize=4, linewidth=0.7, label=part)
        for one, *at in zip(own, *values, strict=True):
            axis.annotate(one[name], at, xytext=(2, 4), textcoords="offset points", fontsize=6, rotation=60)
    axis.set_xscale("log")
    axis.set_xlabel("useful tokens a second")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize="small", loc="lower left")


def reach(found: Sequence[dict[str, float]]) -> list[list[float]]:
    """How far each interval reaches down and up from its value."""
    ends = [(max(0.0, one["value"] - one["low"]), max(0.0, one["high"] - one["value"])) for one in found]
    return [list(side) for side in zip(*ends, strict=True)]
