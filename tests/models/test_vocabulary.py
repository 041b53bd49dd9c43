"""A guide must speak the model's tokens: what may differ between two vocabularies, and what is refused."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models

from unmask import zoo
from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer
from unmask.models.vocabulary import same_vocabulary


def made(words: list[str], *added: str, special: dict[str, str] | None = None) -> Tokenizer:
    """Words numbered in order, then tokens added behind them."""
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    inner.add_tokens(list(added))
    return Tokenizer(inner, special or {})


def test_the_embedded_pair_shares_its_vocabulary() -> None:
    model, guide = (Tokenizer.from_directory(zoo.path(name)) for name in zoo.PAIR)
    same_vocabulary(model, guide)
    same_vocabulary(guide, model)


def test_added_and_special_tokens_may_differ() -> None:
    model = made(["<unk>", "a", "b"], "<mask>", "<think>", special={"mask_token": "<mask>"})
    guide = made(["<unk>", "a", "b"], "<end>", special={"eos_token": "<end>"})
    same_vocabulary(model, guide)
    same_vocabulary(guide, model)


def test_a_special_token_may_lie_inside_the_vocabulary() -> None:
    same_vocabulary(
        made(["<unk>", "<mask>", "b"], special={"mask_token": "<mask>"}),
        made(["<unk>", "<end>", "b"], special={"eos_token": "<end>"}),
    )


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (["<unk>", "b", "a"], "'a' is 1 in the model and is 2 in the guide"),
        (["<unk>", "a", "c"], "'b' is 2 in the model and is missing from the guide"),
        (["<unk>", "a", "b", "c"], "'c' is missing from the model and is 3 in the guide"),
        (["a", "b"], "'<unk>' is 0 in the model and is missing from the guide"),
    ],
)
def test_another_vocabulary_is_refused_by_its_first_difference(guide: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        same_vocabulary(made(["<unk>", "a", "b"]), made(guide))
    assert says in str(caught.value) and "\n" not in str(caught.value)
