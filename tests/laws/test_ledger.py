"""Law 7: the ledger, on runs counted by hand."""

from __future__ import annotations

import pytest
import torch

from laws.common import EOS, Scripted, Synthetic, line, plain, ragged, run, small
from unmask.decode import Blocks, Budget, Canvas, Ledger, Recipe, best, ended, everything, filled, useful
from unmask.decode.ledger import Report

b = Blocks(2)


def report(denoise, recipe: Recipe, canvas: Canvas) -> Report:
    ledger = Ledger()
    for after, event in run(denoise, recipe, canvas)[1]:
        ledger.update(after, event)
    return ledger.report()


def counts(r: Report) -> tuple[int, ...]:
    return r.forwards, r.positions, r.cache_hits, r.tokens


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (everything, (4, 4 * 7, 0, 4)),
        (b | everything.when(b.entered), (4, 7 + 2 + 7 + 2, 5 + 5, 4)),
        (b.onward | everything.when(b.entered), (4, 7 + 4 + 7 + 2, 3 + 5, 4)),
    ],
)
def test_caches_by_hand(query, expected: tuple[int, ...]) -> None:
    found = report(Synthetic(), Recipe(query, b >> best(1)), line(3, 4))
    assert counts(found) == expected
    assert found.exit_steps == (4,) and found.rows == 1
    assert found.tokens_per_forward == 1 and found.useful_tokens == 4


def test_autoregression_by_hand() -> None:
    canvas = line(3, 4)
    found = report(plain("causal", small("ar"), canvas), small("ar"), canvas)
    assert counts(found) == (4, 3 + 1 + 1 + 1, 3 + 4 + 5, 4)


def test_a_shifted_model_pays_for_the_cell_before() -> None:
    canvas, recipe = line(3, 4), Recipe(b | everything.when(b.entered), b >> best(1))
    found = report(plain("shifted", recipe, canvas), recipe, canvas)
    assert 7 + 2 + 7 + 2 < found.positions <= 7 + 3 + 7 + 3
    assert found.positions + found.cache_hits == 4 * 7


def test_rows_are_summed_and_done_rows_cost_nothing() -> None:
    canvas = Canvas.new([[1, 2], [3]], [2, 5], mask_id=60, seed=[1, 2], dtype=torch.float64)
    found = report(Synthetic(), Recipe(everything, b >> best(1)), canvas)
    assert counts(found) == (2 + 5, 2 * 4 + 5 * 6, 0, 7)
    assert found.exit_steps == (2, 5)


def test_useful_tokens_end_before_the_first_eos() -> None:
    canvas = Canvas.of([[EOS, 1, None, None, EOS, None, None, None]], origin=[2], mask_id=60, eos=[EOS])
    denoise = Scripted((0, 0, 5, 6, 0, 7, EOS, 8))
    found = report(denoise, Recipe(everything, b >> best(2)), canvas)
    assert (found.tokens, found.useful_tokens) == (5, 3)  # 5 6 7: neither the given EOS nor the tail counts
    assert found.exit_steps == (3,) and found.tokens_per_forward == 5 / 3


def test_without_an_eos_all_tokens_are_useful() -> None:
    end, _ = run(Scripted(tuple(range(9))), Recipe(everything, b >> best(2)), line(3, 5, eos=[EOS]))
    assert useful(end)[0].tolist() == [False] * 3 + [True] * 5


def test_undecided_cells_are_no_tokens() -> None:
    found = report(Synthetic(), Recipe(everything, best(1), stop=filled | Budget(2)), line(3, 4))
    assert counts(found) == (2, 14, 0, 2) and found.exit_steps == (2,)


def test_an_early_end_saves_forwards() -> None:
    canvas = line(2, 6, eos=[EOS])
    found = report(Scripted((0, 0, 5, EOS, 6, 6, 6, 6)), Recipe(everything, b >> best(1), stop=filled | ended), canvas)
    assert (found.forwards, found.tokens, found.useful_tokens) == (2, 2, 1)


def test_a_report_is_plain_data() -> None:
    assert counts(Ledger().report()) == (0, 0, 0, 0) and Ledger().report().tokens_per_forward == 0
    canvas = ragged()
    found = report(plain("full", small("dual"), canvas), small("dual"), canvas)
    data = found.as_dict()
    assert data["exit_steps"] == list(found.exit_steps) and sum(found.exit_steps) == found.forwards
    assert found.positions + found.cache_hits == sum(
        steps * int(n) for steps, n in zip(found.exit_steps, canvas.valid.sum(1), strict=True)
    )
    assert data["useful_tokens_per_second"] == found.useful_tokens / found.seconds > 0
