"""The picture of `unmask verify`: |delta logit| by step, and how far stale keys and values have drifted, by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from unmask.errors import UserError

FORMATS = (".png", ".svg")
SIDES = {"key_cosine": "keys", "value_cosine": "values"}


def check(path: Path) -> None:
    """UserError, before anything is computed, for a picture of a kind that is not drawn, or without matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"a plot is a {' or '.join(f[1:] for f in FORMATS)} file, not {path.name!r}")
    _figure()


def draw(found: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the picture of summaries, as `verify.measure` makes them; UserError if the file cannot be written."""
    cached = [f for f in found if f["key_cosine"] is not None]
    figure = _figure()(figsize=(9, 3.2 + 2.1 * len(cached)), layout="constrained")
    axes = figure.subplots(1 + len(cached), 2, squeeze=False, height_ratios=[3.2, *[2.1] * len(cached)])
    for axis, key, name in zip(axes[0], ("max_delta_logit", "mean_delta_logit"), ("largest", "mean"), strict=True):
        _lines(axis, found, key)
        axis.set_ylabel(f"{name} |Δ logit|")
    axes[0][0].legend(fontsize="small")
    lowest = min((v for f in cached for side in SIDES for s in f["steps"] for v in s[side] or ()), default=0.0)
    for row, one in zip(axes[1:], cached, strict=True):
        for axis, side in zip(row, SIDES, strict=True):
            image = _heat(axis, one["steps"], side, lowest)
            axis.set_title(f"{one['recipe']}: stale {SIDES[side]}", fontsize="small")
        figure.colorbar(image, ax=list(row), label="cosine with the exact")
    figure.suptitle(title)
    _write(figure, path)


def _figure() -> Any:
    """Matplotlib's class of that name, which draws without a display; UserError where it is not installed."""
    try:
        return import_module("matplotlib.figure").Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install 'unmask[bench]'") from None


def _lines(axis: Any, found: Sequence[dict[str, Any]], key: str) -> None:
    for one in found:
        axis.plot([s["step"] for s in one["steps"]], [s[key] for s in one["steps"]], marker=".", label=one["recipe"])
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _heat(axis: Any, steps: Sequence[dict[str, Any]], side: str, lowest: float) -> Any:
    """Layers by steps; a step at which nothing was stale stays white."""
    layers = max(len(s[side] or ()) for s in steps)
    grid = [[math.nan if s[side] is None else s[side][layer] for s in steps] for layer in range(layers)]
    across = (steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5)
    image = axis.imshow(
        grid, aspect="auto", origin="lower", vmin=lowest, vmax=1, extent=(*across, -0.5, layers - 0.5), cmap="viridis"
    )
    axis.set_xlabel("step")
    axis.set_ylabel("layer")
    for side_axis in (axis.xaxis, axis.yaxis):
        side_axis.get_major_locator().set_params(integer=True)
    return image


def _write(figure: Any, path: Path) -> None:
    """The whole file or none."""
    whole = io.BytesIO()
    figure.savefig(whole, format=path.suffix[1:].lower(), dpi=150)
    try:
        path.write_bytes(whole.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
