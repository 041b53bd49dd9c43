"""Do two models speak the same tokens?"""

from __future__ import annotations

from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer


def same_vocabulary(model: Tokenizer, guide: Tokenizer) -> None:
    """UserError unless every ordinary token has the same id in both; special and added tokens may differ."""
    own, other = model.inner.get_vocab(), guide.inner.get_vocab()
    apart = _added(model) | _added(guide)
    for token in sorted(own.keys() | other.keys(), key=lambda t: (own.get(t, len(own)), t)):
        here, there = own.get(token), other.get(token)
        if here != there and token not in apart:
            said = [f"is {i} in" if i is not None else "is missing from" for i in (here, there)]
            raise UserError(
                f"the guide's vocabulary is another one: token {token!r} {said[0]} the model and {said[1]} the guide; "
                "take a guide with the model's tokenizer"
            )


def _added(tokenizer: Tokenizer) -> set[str]:
    """The special and added tokens, by name."""
    return {*tokenizer.special, *(t.content for t in tokenizer.inner.get_added_tokens_decoder().values())}
