"""A small byte-level vocabulary with special tokens and a chat template, written in both published layouts."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from unmask.models.tokenizer import QWEN_SPLIT

SPECIAL = ["<|end|>", "<|start|>", "<|mask|>", "<s>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def bpe() -> models.BPE:
    """All 256 bytes and a few merges, one of them across the joint of a newline and a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("<", "|"), ("|", ">"), (">", "Ċ")]
    pieces = dict.fromkeys([*alphabet, *("".join(m) for m in merges)])
    return models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


FIRST = 256 + 8
START, MASK, BOS = FIRST + 1, FIRST + 2, FIRST + 3


def write(directory: Path, kind: str, **config: Any) -> Path:
    """A tokenizer directory as tokenizer.json or as vocab.json + merges.txt with added_tokens_decoder."""
    directory.mkdir(exist_ok=True)
    said = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE, **config}
    if kind == "json":
        inner = Tokenizer(bpe())
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        inner.normalizer, inner.decoder = normalizers.NFC(), decoders.ByteLevel()
        inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        inner.save(str(directory / "tokenizer.json"))
    else:
        bpe().save(str(directory))
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        said["added_tokens_decoder"] = {str(FIRST + i): {"content": t, **flags} for i, t in enumerate(SPECIAL)}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    return directory
