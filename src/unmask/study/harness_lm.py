"""A model as lm-eval asks for it: answers by any recipe, likelihoods exact or as a lower bound. Needs lm-eval."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from unmask.errors import UserError, suggest
from unmask.settings import Settings, choose
from unmask.study.evaluate import respond
from unmask.study.harness import NOTHING, Row, Writer, named
from unmask.study.harness_likelihood import elbo, exact
from unmask.study.harness_tasks import cut

_LM: Any = import_module("lm_eval.api.model").LM if find_spec("lm_eval") else object


class Harness(_LM):
    """`lm_eval.api.model.LM` over a `Writer`; what each request cost is in `costs` by (task, document)."""

    def __init__(
        self, writer: Writer, *, samples: int = 32, seed: int = 0, sized: bool = True, show: bool = False
    ) -> None:
        super().__init__()
        self.writer, self.samples, self.seed, self.show = writer, samples, seed, show
        self.network, self.tokenizer = writer.model.network, writer.model.tokenizer
        self.sized = sized
        """Does a request's max_gen_toks set the length of its response?"""
        self.costs: dict[tuple[str, int], Row] = {}
        self.asked = False
        """Has anything been asked yet?"""

    @property
    def elbo(self) -> bool:
        """Are likelihoods lower bounds?"""
        return not self.network.config.autoregressive

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The output of each request's recipe, cut at its stop strings once it is finished."""
        self.asked, found = True, []
        if any(_draws(request.args[1]) for request in requests):
            warnings.warn("the task asks for drawn tokens; the likeliest are taken", stacklevel=2)
        for some, cells, at in self._track(self._batches(requests), "writing"):
            settings = self.writer.settings if cells is None else replace(self.writer.settings, length=cells)
            writer = replace(self.writer, settings=settings)
            fitted = [self.fit(request.args[0], writer) for request in some]
            for request, text, row in zip(some, fitted, writer.answers(fitted, offset=at), strict=True):
                lost = {"truncated": len(request.args[0]) - len(text)} if text != request.args[0] else {}
                self._spend(request, {**row, **lost, **({} if cells is None else {"cells": cells})})
                until = request.args[1].get("until") or []
                found.append(cut(row["output"], [until] if isinstance(until, str) else list(until)))
        return found

    def cells(self, context: str, wanted: int | None) -> int | None:
        """Cells of a response for a request's max_gen_toks, or None for the model's own; capped by its positions."""
        if not self.sized or wanted is None or wanted < 1:
            return None
        try:
            room = self.network.config.max_positions - len(self.writer.model.encode(context))
        except UserError:  # the answer will say what is wrong with the context
            room = 0
        return min(int(wanted), room) if room > 0 else None

    def _batches(self, requests: Sequence[Any]) -> list[tuple[list[Any], int | None, int]]:
        """Requests in their order, with the cells of their responses and the number of the first."""
        sized = [(one, self.cells(one.args[0], one.args[1].get("max_gen_toks"))) for one in requests]
        found, at = [], 0
        for cells, group in groupby(sized, key=lambda pair: pair[1]):
            alike = [one for one, _ in group]
            for begin in range(0, len(alike), self.writer.batch):
                found.append((alike[begin : begin + self.writer.batch], cells, at + begin))
            at += len(alike)
        return found

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """ln p(continuation | context), or its lower bound, and whether the model would write the continuation.

        A masked model would write it if its default recipe, at the continuation's length, does. A context without room
        loses its beginning (`truncated` tokens); a continuation that has none is refused: -inf, and the row's `error`.
        """
        self.asked, found = True, []
        for request in self._track(requests, "scoring"):
            context, text = request.args
            head, tail = self.pair(context, text)
            room = self.network.config.max_positions - len(tail)
            if not tail or room < 1:
                reason = "has no tokens in this model's vocabulary" if not tail else f"has {len(tail)} tokens"
                limit = self.network.config.max_positions
                self._spend(request, {**NOTHING, "error": f"not scored: {text!r:.60} {reason} (positions: {limit})"})
                found.append((-math.inf, False))
                continue
            if len(head) > room:
                self._spend(request, {**NOTHING, "truncated": len(head) - room})
                head = head[-room:]
            score = self._score(head, tail, request)
            found.append(score if not self.elbo else (score[0], self._writes(head, tail)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p(text) after the token that begins or ends a text, or its lower bound; long texts window by window."""
        self.asked, found, utils = True, [], import_module("lm_eval.utils")
        most = self.network.config.max_positions - 1
        for request in self._track(requests, "scoring"):
            ids = self.tokenizer.encode(request.args[0])
            windows = utils.get_rolling_token_windows(ids, self._prefix(), most, 1)
            pairs = [utils.make_disjoint_window(window) for window in windows]
            found.append(sum(self._score(list(head), list(tail), request)[0] for head, tail in pairs))
        return found

    def fit(self, context: str, writer: Writer | None = None) -> str:
        """The context without as much of its beginning as has no room, as lm-eval's own models do."""
        low, high, fault = 0, len(context), (writer or self.writer).fault
        if not fault(context) or not context.strip():
            return context
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (low, middle) if not fault(context[middle:]) else (middle, high)
        return context[high:] if high < len(context) else context

    def _track(self, items: Iterable[Any], told: str) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        todo = list(items)
        return track(todo, told, console=Console(stderr=True), transient=True, disable=not self.show)

    def _prefix(self) -> int:
        """The token that stands before a text with nothing before it."""
        c = self.network.config
        return next((i for i in (self.tokenizer.bos_id, c.bos_id, *c.eos_ids) if i is not None and i >= 0), 0)

    def pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, as it is and without a chat template, and of its continuation, split where it begins."""
        head, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + text)
        tail = whole[len(head) :] if whole[: len(head)] == head else self.tokenizer.encode(text)
        return list(head) or [self._prefix()], list(tail)

    def _score(self, head: list[int], tail: list[int], request: Any) -> tuple[float, bool]:
        cells = len(head) + len(tail)
        if not self.elbo:
            self._spend(request, {**NOTHING, "forwards": 1, "positions": cells})
            return exact(self.network, head, tail)
        self._spend(request, {**NOTHING, "forwards": self.samples, "positions": self.samples * cells})
        given = {"samples": self.samples, "seed": self.seed, "batch": self.writer.batch}
        return elbo(self.network, head, tail, **given), False

    def _writes(self, head: list[int], tail: list[int]) -> bool:
        recipe = choose(Settings(), self.network.config, len(tail))
        canvas, _ = respond(self.network, recipe, [head], len(tail))
        return canvas.tokens[0, len(head) :].tolist() == tail

    def _spend(self, request: Any, row: Row) -> None:
        spent = self.costs.setdefault((request.task_name, request.doc_id), dict(NOTHING))
        for name in NOTHING:
            spent[name] = max(spent[name], row[name]) if name == "together" else spent[name] + row[name]
        spent |= {name: row[name] for name in ("error", "helper_forwards", "truncated", "cells") if name in row}


def _draws(settings: dict[str, Any]) -> bool:
    return bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0


def manager(folder: Path | None, names: Sequence[str], known: Iterable[str] = ()) -> Any:
    """lm-eval's list of tasks and those of a folder; UserError for a name that is in neither, nor `known`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    made = import_module("lm_eval.tasks").TaskManager(include_path=str(folder) if folder else None)
    there = {*made.all_tasks, *known}
    for name in names:
        if name not in there:
            told = str(suggest(name, there, "task")).split(" Known:")[0].rstrip(".;")
            raise UserError(f"{told} (`lm-eval ls tasks` lists lm-eval's, --task-folder adds a folder of yours)")
    return made


def evaluated(harness: Harness, names: Sequence[str], tasks: Any, *, limit: int | None, shots: int | None) -> Row:
    """lm-eval's results of some tasks; UserError where their data cannot be had."""
    run: Callable[..., Any] = import_module("lm_eval.evaluator").simple_evaluate
    said = {"random_seed": harness.seed, "numpy_random_seed": harness.seed, "fewshot_random_seed": harness.seed}
    try:
        found = run(model=harness, tasks=list(names), task_manager=tasks, limit=limit, num_fewshot=shots, **said)
    except Exception as error:
        if harness.asked or isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot prepare {', '.join(names)}: {type(error).__name__}: {str(error)[:300]}; the data of lm-eval's "
            f"tasks comes from the hub, that of a task in --task-folder from where its file says"
        ) from None
    assert found is not None
    return found


def rows(found: Row, harness: Harness) -> Iterator[Row]:
    """A row for each document of lm-eval's results, whatever number of filters it was read by."""
    for task, samples in found["samples"].items():
        documents: dict[int, list[Row]] = {}
        for sample in samples:
            documents.setdefault(sample["doc_id"], []).append(sample)
        for number, seen in sorted(documents.items()):
            scores = {
                one.get("filter", "none"): {m: one[m] for m in one.get("metrics", []) if m in one} for one in seen
            }
            asked = (
                [next(iter(a.values())) for a in seen[0]["arguments"].values()]
                if isinstance(seen[0]["arguments"], dict)
                else [a[0] for a in seen[0]["arguments"]]
            )
            first = next(iter(next(iter(scores.values())).values()), 0)
            yield {
                "task": task,
                "item": number,
                "prompt_id": named(str(asked[0])),
                "output": finite(_said(seen[0]["resps"])),
                **harness.costs.get((task, number), NOTHING),
                "gold": seen[0]["target"],
                "scores": finite(scores),
                "correct": first if isinstance(first, int | float) else None,
                **_label(seen[0]["resps"], harness),
            }


def _said(responses: Any) -> Any:
    """What one document's requests gave: a text, or pairs of a likelihood and whether it is greedy."""
    flat = [one[0] if isinstance(one, list | tuple) and one else one for one in responses]
    return flat[0] if len(flat) == 1 else flat


def _label(responses: Any, harness: Harness) -> Row:
    """That a likelihood is a lower bound, and of how many masks."""
    scored = not isinstance(_said(responses), str)
    if not scored:
        return {}
    if not harness.elbo:
        return {"elbo": False, "likelihood": "exact"}
    return {"elbo": True, "likelihood": "ELBO estimate", "samples": harness.samples, "seed": harness.seed}


def finite(found: Any) -> Any:
    """The same as JSON can hold it: None for numbers that are not finite, and text for what is not JSON's."""
    if isinstance(found, dict):
        return {str(key): finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [finite(value) for value in found]
    if isinstance(found, float):
        return float(found) if math.isfinite(found) else None
    return found if isinstance(found, str | int | None) else str(found)
