"""A training run as a model directory: weights, config, tokenizer and a card that says how it came about."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from unmask.errors import UserError
from unmask.models.load import save_checkpoint
from unmask.models.transformer import Transformer
from unmask.train.loop import TrainConfig
from unmask.train.run import read_state

TEMPLATE = "{{ messages[-1]['content'] }}<sep>"


def export(checkpoint: Path, out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `checkpoint` (a file of a run) as a bf16 model directory `out`; returns the card."""
    state = read_state(checkpoint)
    known = {k: v for k, v in state["config"].items() if k in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**{**known, "keep": tuple(known.get("keep", ()))})
    model = Transformer(config.model(tokenizer.get_vocab_size()))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit this tokenizer and configuration: {error}") from None
    save_checkpoint(model, out)
    tokenizer.save(str(out / "tokenizer.json"))
    words = {"chat_template": TEMPLATE, "pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
    (out / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    card = describe(state, model)
    write_card(out, card)
    return card


def describe(state: dict[str, Any], model: Transformer) -> dict[str, Any]:
    """The card of a run: what was trained, on what, for how long; `accuracy` is filled by `unmask evaluate --card`."""
    config = state["config"]
    curve = [{k: row[k] for k in ("step", "loss", "tokens")} for row in _log(state)]
    return {
        "kind": config["kind"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": {
            "config": config,
            "steps_done": state["step"],
            "tokens": state["tokens"],
            "tokens_inherited": state["inherited"],
            "minutes": round(state["seconds"] / 60, 1),
            "earlier_rounds": state["history"],
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, one CPU thread",
        },
        "data": "procedural word problems within 100; E2E restaurant descriptions (CC BY-SA 4.0), filtered",
        "licence": "Apache-2.0",
        "curve": curve,
        "accuracy": [],
    }


def _log(state: dict[str, Any]) -> list[dict[str, Any]]:
    path = state.get("log")
    if path is None or not Path(path).is_file():
        return []
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keep = max(1, len(rows) // 20)
    return [r for i, r in enumerate(rows) if i % keep == 0 or i == len(rows) - 1]


def write_card(directory: Path, card: dict[str, Any]) -> None:
    """Write card.json of a model directory."""
    (directory / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
