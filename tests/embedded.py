"""A tiny random pair in the format of the embedded one, for tests that need no sense in what is written."""

from __future__ import annotations

import json
from pathlib import Path

from unmask.models.config import Layout, ModelConfig
from unmask.models.load import save_checkpoint
from unmask.models.transformer import Transformer
from unmask.train import vocabulary
from unmask.train.restaurants import Restaurant, parse

PROMPT = "Tom has 5 eggs . Then Tom gets 4 eggs from Max . How many eggs does Tom have now ?"
ROWS = [Restaurant(parse("name[The Mill], eatType[pub], food[Italian]"), "The Mill is an Italian pub .")]
NAMED = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "unk_token": "<unk>", "sep_token": "<sep>"}
FULL, CAUSAL = Layout(), Layout("causal")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<sep>"


def build(folder: Path, *, layout: Layout = FULL, positions: int = 160) -> Path:
    """Write a random checkpoint with the embedded vocabulary into `folder`."""
    tokenizer = vocabulary.build(ROWS)
    count, causal = tokenizer.get_vocab_size(), layout.kind == "causal"
    mask = -1 if causal else vocabulary.MASK
    shape = {"d_model": 32, "layers": 2, "heads": 2, "ff": 48, "max_positions": positions}
    config = ModelConfig(
        count + 3, **shape, layout=layout, shift=True, mask_id=mask, eos_ids=(vocabulary.EOS,), token_count=count
    )
    model = Transformer(config).initialise(3, gain=1.2)
    save_checkpoint(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMED, "chat_template": TEMPLATE}))
    return folder
