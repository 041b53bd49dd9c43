"""A training run as a model directory: weights, config, tokenizer and a card that says how it came about."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from unmask.errors import UserError
from unmask.generate import Model
from unmask.models.adapter import save_adapter
from unmask.models.joint import save_sampler
from unmask.models.load import save_checkpoint
from unmask.models.transformer import Transformer
from unmask.train import lora
from unmask.train.blocks import BlockConfig, BlocksRun, D2FConfig
from unmask.train.joint import JointTrainer
from unmask.train.loop import TrainConfig
from unmask.train.run import Run, read_state

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


def export_sampler(trainer: JointTrainer, out: Path) -> dict[str, Any]:
    """Write the sampler of a finished run as a folder `out` with its card; returns the card."""
    c = trainer.config
    save_sampler(trainer.model, out, base=c.base)
    card = {
        "kind": "joint sampler",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "base": c.base,
        "trained": _run(trainer),
        "data": f"the base's own runs: {c.data}",
        "licence": "Apache-2.0",
        "curve": [{k: r[k] for k in ("step", "loss")} for r in _log({"log": str(trainer.folder / "log.jsonl")})],
    }
    write_card(out, card)
    return card


def export_blocks(trainer: BlocksRun, source: Model, out: Path) -> dict[str, Any]:
    """Write the model of a finished run as `out`/model, with the tokenizer of its source and a card; returns the card.

    A LoRA is merged there, and stands alone in `out`/adapter. Of several processes the first writes; others get {}.
    """
    c, folder, model = trainer.config, out / "model", trainer.whole()
    if trainer.processes.rank:
        return {}
    if c.rank:
        adapter = {"base": source.name, "digest": c.base, "layout": model.config.layout}
        adapter |= {"in_flight": model.config.in_flight, "mask_id": model.config.mask_id}
        save_adapter(out / "adapter", source.network.config, lora.pairs(model), alpha=c.alpha, **adapter)
        lora.merge(model)
    save_checkpoint(model, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        if (source.directory / file).is_file():
            shutil.copyfile(source.directory / file, folder / file)
    scratch = isinstance(c, BlockConfig) and c.scratch
    card = {
        "kind": "D2F student" if isinstance(c, D2FConfig) else "block diffusion",
        "parameters": sum(p.numel() for p in model.parameters()),
        "base": "none" if scratch else source.name,
        "trained": {**_run(trainer), "tokens_inherited": 0 if scratch else _seen(source.directory)},
        "data": c.data,
        "licence": "Apache-2.0",
        "curve": [
            {k: r[k] for k in ("step", "loss", "tokens")} for r in _log({"log": str(trainer.folder / "log.jsonl")})
        ],
        "accuracy": [],
    }
    write_card(folder, card)
    return card


def _seen(directory: Path) -> int:
    """Tokens that the model of this folder has seen, by its card; 0 without one."""
    path = directory / "card.json"
    made = json.loads(path.read_text(encoding="utf-8")).get("trained", {}) if path.is_file() else {}
    return made.get("tokens", 0) + made.get("tokens_inherited", 0)


def _run(trainer: Run) -> dict[str, Any]:
    return {
        "config": asdict(trainer.config),
        "steps_done": trainer.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.seconds / 60, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {trainer.processes.told}",
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
