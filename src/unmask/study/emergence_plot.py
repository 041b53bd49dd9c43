"""The picture of `unmask bench emergence`: when answers stay right, exits against truncation, and what a gap means."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from unmask.study.emergence_show import ORDERS
from unmask.study.verify_plot import _figure, _write

Line = Mapping[str, Any]
STYLES = {"truncation": "k--", "prophet": "o-", "sched": "s-", "ice": "^-"}


def draw(summary: Line, path: Path) -> None:
    """Write the picture, two rows a model; UserError if the file cannot be written."""
    models = list(dict.fromkeys(line["model"] for line in summary["exits"]))
    figure = _figure()(figsize=(13, 6.4 * len(models)), layout="constrained")
    axes = figure.subplots(2 * len(models), 3, squeeze=False)
    for row, (model, suffix) in enumerate((m, s) for m in models for s in (False, True)):
        own = {
            key: [line for line in summary[key] if line["model"] == model and line["suffix"] == suffix]
            for key in ("emergence", "curves", "calibration")
        }
        title = f"{model}, {'with' if suffix else 'without'} suffix"
        _emergence(axes[row][0], own["emergence"])
        _exits(axes[row][1], own["curves"])
        _calibration(axes[row][2], own["calibration"][0])
        axes[row][0].set_title(title)
    _write(figure, path)


def _emergence(axis: Any, lines: list[Line]) -> None:
    """Share of finally correct samples that are first right, and stay right, by a share of the steps."""
    for line in (one for one in lines if one["samples"] == "finally correct" and one["n"]):
        for key, style in (("first", "--"), ("stays", "-")):
            counts = line[key]["histogram"]
            y = [0.0, *(count / line["n"] for count in accumulate(counts))]
            x = [n / len(counts) for n in range(len(counts) + 1)]
            axis.plot(x, y, style, color="C0" if line["order"] == "score" else "C1", label=_name(line, key))
    axis.set_xlabel("share of the steps")
    axis.set_ylabel("of finally correct samples")
    axis.legend(fontsize="x-small")


def _name(line: Line, key: str) -> str:
    return f"{ORDERS[line['order']]}, {'first right' if key == 'first' else 'stays right'}"


def _exits(axis: Any, lines: list[Line]) -> None:
    """Accuracy against forwards, at every threshold."""
    for line in lines:
        points = sorted(line["points"], key=lambda point: point["nfe"])
        x, y = ([point[key] for point in points] for key in ("nfe", "accuracy"))
        axis.plot(x, y, STYLES[line["exit"]], markersize=3, linewidth=1, label=line["exit"])
    axis.set_xlabel("forwards a problem")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize="x-small")


def _calibration(axis: Any, line: Line) -> None:
    """Shares by the mean gap of a bin."""
    for key, name in (("same", "is the final answer"), ("right", "is right")):
        axis.plot([one["gap"] for one in line["bins"]], [one[key] for one in line["bins"]], "o-", label=name)
    axis.set_xlabel("mean logit gap of the answer")
    axis.set_ylabel("share of would-be answers")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize="x-small")
