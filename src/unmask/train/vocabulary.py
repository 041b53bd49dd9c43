"""The tokenizer of the embedded pair: whole words and whole numbers, anything else spelled in characters."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from unmask.train import problems, restaurants

SPECIAL = ("<pad>", "<eos>", "<mask>", "<sep>", "<unk>")
PAD, EOS, MASK, SEP, UNK = range(5)
CONTINUES = "~~"
"""Prefix of a piece that continues a word (`##` would clash with the answer mark)."""

MARKERS = tuple(f"Q{i}" for i in range(1, 9))


def problem_words() -> set[str]:
    """Every word the problem generator can write."""
    phrases = " ".join(p for group in problems.PHRASES.values() for p in group)
    text = re.sub(r"\{\w\}", " ", phrases).split()
    names = problems.WOMEN + problems.MEN + problems.ITEMS + problems.BOXES + problems.DAYS
    return {
        *text,
        *names,
        *(i.capitalize() for i in problems.ITEMS),
        "he",
        "she",
        "He",
        "She",
        "####",
        ";",
        "=",
        *problems.OPERATIONS,
    }


def build(rows: Iterable[restaurants.Restaurant]) -> Tokenizer:
    """A WordPiece tokenizer over the words of the generator and of the E2E `rows`, with a character fallback."""
    seen = problem_words() | {w for r in rows for w in restaurants.words(f"{r.prompt} {r.sentence}")}
    characters = string.ascii_letters + string.digits + string.punctuation + "£é"
    pieces = [*SPECIAL, *MARKERS, *(str(n) for n in range(problems.LIMIT))]
    pieces += sorted(seen - set(pieces)) + [c for c in characters if c not in seen and not c.isdigit()]
    pieces += [f"{CONTINUES}{c}" for c in characters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token="<unk>", max_input_chars_per_word=64, continuing_subword_prefix=CONTINUES
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"####|'s|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]"), "removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer
