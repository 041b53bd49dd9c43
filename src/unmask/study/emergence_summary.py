"""What rows of `unmask bench emergence` say: when answers emerge, what exits are worth, and what a gap means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unmask.decode import Cosine, Level, Staged
from unmask.decode.early import Schedule
from unmask.study.paired import LEVEL, Bootstrap, verdict

Row = dict[str, Any]
Numbers = NDArray[np.float64]
MARKS = (0.25, 0.5, 0.75)
"""Shares of the steps by which answers are counted."""
BINS = 10
"""Of a histogram over the steps."""
GAPS = (0.0, 0.5, 1.0, 1.5, *map(float, range(2, 14)))
"""Edges of the bins of a mean logit gap; the last is open."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""Factors to the published thresholds of a logit gap, which do not carry over from one model to another."""
FLAT = (*map(float, range(2, 15)), 16.0)
"""Thresholds of a logit gap that stay the same over all steps."""
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
RULE = (
    "an exit beats static truncation if the whole 95% interval of its accuracy minus that of truncation at the same "
    "mean NFE, paired by problem, is above 0, for the same number of steps in all problems and for the same share of "
    "each one's steps; its threshold is the cheapest within the margin of full decoding on validation problems, or "
    "else the most accurate"
)


@lru_cache(maxsize=4096)
def _levels(threshold: Schedule, steps: int) -> Numbers:
    """[steps]: the threshold at each step."""
    return threshold(torch.arange(1, steps + 1).double() / steps).numpy()


@dataclass(frozen=True)
class Exit:
    """An early exit: what it watches, in which order it refines, and the thresholds that are tried."""

    name: str
    watches: str
    order: str
    thresholds: tuple[Schedule, ...]

    def step(self, row: Row, threshold: Schedule) -> int:
        """The step at which it exits: the first that reaches the threshold of its progress, or else the last."""
        sure = np.array(row[self.watches]) >= _levels(threshold, row["steps"])
        return int(sure.argmax()) + 1 if sure.any() else row["steps"]


EXITS = (
    Exit(
        "prophet",
        "gap",
        "score",
        (*(Staged(7.5 * k, 5.0 * k, 2.5 * k) for k in SCALES), *(Staged(v, v, v) for v in FLAT)),
    ),
    Exit("sched", "whole", "score", (*(Cosine(7.5 * k, 2.5 * k) for k in SCALES), *(Cosine(v, v) for v in FLAT))),
    Exit("ice", "peak", "ice", tuple(map(Level, TAUS))),
)


def emergence(rows: Sequence[Row]) -> Row:
    """Shares of samples whose answer is first right, and stays right, by 25, 50 and 75% of their steps."""
    found: Row = {"n": len(rows), "accuracy": float(np.mean([r["correct"] for r in rows])) if rows else None}
    for key in ("first", "stays"):
        at = np.array([np.inf if r[key] is None else r[key] / r["steps"] for r in rows])
        inside = at[np.isfinite(at)]
        counts = np.histogram(np.ceil(inside * BINS - 1e-9) - 0.5, bins=BINS, range=(0, BINS))[0]
        found[key] = {
            "by": {f"{mark:.0%}": float(np.mean(at <= mark + 1e-9)) if len(at) else None for mark in MARKS},
            "mean": float(inside.mean()) if len(inside) else None,
            "never": int(len(at) - len(inside)),
            "histogram": counts.tolist(),
        }
    return found


def right_at(rows: Sequence[Row], steps: Numbers) -> Numbers:
    """[n]: how often each is right when cut off at a real number of steps, mixed between those around it."""
    low = np.floor(steps).astype(int)
    part = steps - low
    pairs = [(r["right"][n - 1], r["right"][min(n, r["steps"] - 1)]) for r, n in zip(rows, low, strict=True)]
    before, after = np.array(pairs, dtype=float).T
    return (1 - part) * before + part * after


def ladder(rows: Sequence[Row], kind: str) -> Numbers:
    """[levels, n]: the steps of each problem under static truncations, from one step to all; linear in between.

    `kind`: "steps", the same number for all that have so many, or "share", the same share of each one's own.
    """
    total = np.array([row["steps"] for row in rows], dtype=float)
    most = total.max()
    if kind == "steps":
        return np.minimum(np.arange(1, most + 1)[:, None], total)
    shares = np.unique([k / n for n in np.unique(total) for k in range(1, int(n) + 1)])
    return np.clip(shares[:, None] * total, 1, total)


def truncated(rows: Sequence[Row], kind: str, steps: Numbers, boot: Bootstrap) -> Numbers:
    """[1 + draws]: accuracy of the truncation whose mean steps are those of `steps` [n], in every resample its own."""
    cuts = ladder(rows, kind)
    right = np.array([right_at(rows, cut) for cut in cuts])
    wanted, means, rights = (boot.weights @ each.T / len(rows) for each in (steps, cuts, right))
    return np.array([np.interp(*one) for one in zip(wanted, means, rights, strict=True)])


def outcome(rows: Sequence[Row], rule: Exit, threshold: Schedule) -> tuple[Numbers, Numbers]:
    """[n] each: the forwards that an exit takes, and is its answer right."""
    at = [rule.step(row, threshold) for row in rows]
    return np.array(at, dtype=float), np.array([r["right"][n - 1] for r, n in zip(rows, at, strict=True)], dtype=float)


def choose(rows: Sequence[Row], full: float, rule: Exit, margin: float) -> Schedule:
    """The cheapest threshold that is right within `margin` of full decoding on these rows, else the most accurate."""
    found = []
    for threshold in rule.thresholds:
        steps, right = outcome(rows, rule, threshold)
        found.append((threshold, steps.mean(), right.mean()))
    good = [one for one in found if one[2] >= full - margin - 1e-9]
    return min(good, key=lambda one: one[1])[0] if good else min(found, key=lambda one: (-one[2], one[1]))[0]


def _judged(steps: Numbers, right: Numbers, base: Sequence[Row], boot: Bootstrap) -> Row:
    """An exit against both kinds of truncation at equal mean NFE."""
    against, own = {}, boot.weights @ right / len(right)
    for kind in ("steps", "share"):
        other = truncated(base, kind, steps, boot)
        found = boot.estimate(own - other)
        against[kind] = {"accuracy": float(other[0]), "delta": found, "verdict": verdict(found, 0)}
    return against


def exit_line(rule: Exit, rows: Sequence[Row], base: Sequence[Row], threshold: Schedule, boot: Bootstrap) -> Row:
    """One exit at its chosen threshold, over the problems that are reported on."""
    steps, right = outcome(rows, rule, threshold)
    full = np.array([row["correct"] for row in base], dtype=float)
    against = _judged(steps, right, base, boot)
    total = float(np.mean([row["steps"] for row in base]))
    verdicts = [one["verdict"] for one in against.values()]
    words = {("above", "above"): "beats truncation", ("below", "below"): "worse than truncation"}
    return {
        "exit": rule.name,
        "threshold": repr(threshold),
        "nfe": float(steps.mean()),
        "steps": total,
        "saved": total / float(steps.mean()),
        "accuracy": boot.estimate(boot.weights @ right / len(right)),
        "full": float(full.mean()),
        "over_full": boot.estimate(boot.weights @ (right - full) / len(right)),
        "truncation": against,
        "beats": verdicts == ["above", "above"],
        "words": words.get((verdicts[0], verdicts[1]), "not shown to beat truncation"),
    }


def curve(rule: Exit, rows: Sequence[Row]) -> list[Row]:
    """Accuracy against NFE at every threshold."""
    points = [(threshold, *outcome(rows, rule, threshold)) for threshold in rule.thresholds]
    return [{"threshold": repr(t), "nfe": float(n.mean()), "accuracy": float(r.mean())} for t, n, r in points]


def truncations(rows: Sequence[Row]) -> list[Row]:
    """Accuracy of a static truncation at every number of steps."""
    total = np.array([r["steps"] for r in rows], dtype=float)
    found = [np.minimum(total, n) for n in range(1, int(total.max()) + 1)]
    return [{"nfe": float(n.mean()), "accuracy": float(right_at(rows, n).mean())} for n in found]


def calibration(rows: Sequence[Row]) -> list[Row]:
    """By bin of the mean logit gap at a step: how often the would-be answer is the final one, and right."""
    gap, same, right = (np.array([v for r in rows for v in r[key]], dtype=float) for key in ("gap", "same", "right"))
    place = np.digitize(gap, GAPS) - 1
    found = []
    for n, low in enumerate(GAPS):
        here = place == n
        if here.any():
            means = {key: float(v[here].mean()) for key, v in (("gap", gap), ("same", same), ("right", right))}
            found.append(
                {"low": low, "high": GAPS[n + 1] if n + 1 < len(GAPS) else None, "n": int(here.sum()), **means}
            )
    return found


def _taken(rows: Sequence[Row], stage: str, model: str, suffix: bool, order: str) -> list[Row]:
    asked = {"stage": stage, "model": model, "suffix": suffix, "order": order}
    return sorted((r for r in rows if all(r[k] == v for k, v in asked.items())), key=lambda r: r["item"])


def summarise(rows: Sequence[Row], models: Sequence[str], *, margin: float, draws: int, seed: int) -> Row:
    """Emergence in the grid, exits against truncation, curves and calibration, by model; and the verdict."""
    taken = partial(_taken, rows)
    found: Row = {"emergence": [], "exits": [], "curves": [], "calibration": []}
    for model in models:
        for suffix in (False, True):
            where = {"model": model, "suffix": suffix}
            for order in ("score", "random"):
                own = taken("test", model, suffix, order)
                finally_right = [row for row in own if row["correct"]]
                for samples, part in (("all", own), ("finally correct", finally_right)):
                    found["emergence"].append({**where, "order": order, "samples": samples, **emergence(part)})
            base, before = (taken(stage, model, suffix, "score") for stage in ("test", "validation"))
            boot, full = Bootstrap(len(base), draws=draws, seed=seed), float(np.mean([r["correct"] for r in before]))
            for rule in EXITS if suffix else EXITS[:2]:
                tried, own = (taken(stage, model, suffix, rule.order) for stage in ("validation", "test"))
                threshold = choose(tried, full, rule, margin)
                found["exits"].append({**where, **exit_line(rule, own, base, threshold, boot)})
                found["curves"].append({**where, "exit": rule.name, "points": curve(rule, own)})
            found["curves"].append({**where, "exit": "truncation", "points": truncations(base)})
            found["calibration"].append({**where, "bins": calibration(base)})
    told = {"draws": draws, "level": LEVEL, "seed": seed}
    return {**found, "verdict": concluded(found["exits"], models), "bootstrap": told}


def concluded(exits: Sequence[Row], models: Sequence[str]) -> Row:
    """Is the claim proven on the first model: does Prophet beat static truncation, without words before the answer
    and with them; and what it saves on every model, within the margin or not."""
    prophet = [line for line in exits if line["exit"] == "prophet"]
    first: dict[str, Mapping[str, Any]] = {
        "suffix" if line["suffix"] else "no suffix": line for line in prophet if line["model"] == models[0]
    }
    return {
        "model": models[0],
        "proven": {where: line["beats"] for where, line in first.items()},
        "words": {where: line["words"] for where, line in first.items()},
        "by_model": [
            {key: line[key] for key in ("model", "suffix", "saved", "full", "over_full", "beats")} for line in prophet
        ],
        "rule": RULE,
    }
