"""The picture of `unmask bench gap`: accuracy against tokens a forward, and against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.study.verify_plot import _figure, _write

Line = Mapping[str, Any]


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a summary; UserError if the file cannot be written."""
    batch = summary["rows"][0]["batch"]
    lines = [line for line in summary["rows"] if line["batch"] == batch]
    figure = _figure()(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    front = [line for name in summary["frontier"]["cases"] for line in lines if line["case"] == name]
    _points(left, lines, "tokens_per_forward", "tokens a forward")
    x, y = ([line[key] for line in front] for key in ("tokens_per_forward", "accuracy"))
    left.plot(x, y, linewidth=0.8, color="black", label=f"frontier, AUP {summary['frontier']['aup']:.0f}")
    left.legend(fontsize="small")
    left.set_ylabel("accuracy")
    _points(right, lines, "useful_tok_s", "useful tokens a second")
    right.set_xscale("log")
    _write(figure, path)


def _points(axis: Any, lines: Sequence[Line], along: str, label: str) -> None:
    for role in dict.fromkeys(line["role"] for line in lines):
        own = [line for line in lines if line["role"] == role]
        x, y = ([line[key] for line in own] for key in (along, "accuracy"))
        reach = [[max(0.0, v - line["ci"][0]) for v, line in zip(y, own, strict=True)]]
        reach += [[max(0.0, line["ci"][1] - v) for v, line in zip(y, own, strict=True)]]
        axis.errorbar(x, y, yerr=reach, fmt="o", markersize=4, linewidth=0.6, label=role)
        for line, *at in zip(own, x, y, strict=True):
            axis.annotate(line["case"], at, xytext=(2, 4), textcoords="offset points", fontsize=5, rotation=50)
    axis.set_xlabel(label)
