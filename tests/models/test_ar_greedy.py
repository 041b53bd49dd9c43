"""AR twins: our loop with its K/V pool generates what `transformers.generate` does, token for token, in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unmask import recipes
from unmask.decode import Canvas, Ledger, decode
from unmask.denoise import Plain
from unmask.models import load_checkpoint

FOLDER = Path(__file__).parents[1] / "golden_models"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "ar_greedy.json").read_text())
BATCH = 8


@pytest.mark.parametrize("name", sorted(GOLDEN["outputs"]))
def test_greedy_equals_transformers(name: str) -> None:
    model = load_checkpoint(FOLDER / "checkpoints" / name, dtype="float32").model
    new, prompts, outputs = GOLDEN["max_new_tokens"], GOLDEN["prompts"], GOLDEN["outputs"][name]
    assert len(prompts) >= 40
    for at in range(0, len(prompts), BATCH):
        batch = prompts[at : at + BATCH]
        start = Canvas.new(batch, new, mask_id=-1, eos=model.config.eos_ids)
        denoise = Plain(model, slots=len(batch), length=start.tokens.shape[1], cached=True)
        ledger, canvas = Ledger(), start
        for canvas, event in decode(denoise, recipes.get("ar"), start):
            ledger.update(canvas, event)
        for i, expected in enumerate(outputs[at : at + BATCH]):
            assert canvas.tokens[i, len(batch[i]) :][: len(expected)].tolist() == expected
            assert ledger.report().exit_steps[i] <= len(expected)
