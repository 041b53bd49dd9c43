"""Text to ids and back: tokenizer.json or vocab.json + merges.txt, special tokens and the chat template."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from unmask.errors import UserError
from unmask.models.chat import ChatTemplate
from unmask.models.files import read_json, read_text

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")
BYTE_LEVEL = ("GPT2", "Qwen2", "Dream")
"""How the names of the tokenizer classes begin whose vocab.json and merges.txt can be read."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A vocabulary with its special tokens and chat template. Text a user wrote never becomes a special token."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        template: str | None = None,
        *,
        reserved: Iterable[int] = (),
    ) -> None:
        self.inner, self.config = inner, dict(config)
        inner.no_truncation()
        inner.no_padding()
        self.named = {name: content for name in NAMED if (content := content_of(config.get(name))) is not None}
        extra = [c for t in config.get("additional_special_tokens") or () if (c := content_of(t)) is not None]
        extra += [t for i in reserved if i >= 0 and (t := inner.id_to_token(i)) is not None]
        known = [t for t in (*self.named.values(), *extra) if inner.token_to_id(t) is not None]
        inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in known])
        inner.encode_special_tokens = True
        added = inner.get_added_tokens_decoder()
        self.vocab_size = max([inner.get_vocab_size(), *(i + 1 for i in added)])
        self.special = {t.content: i for i, t in added.items() if t.special or t.content in known}
        self._unknown = self.special.get(self.named.get("unk_token", "<unk>"))
        self._reserved = set(self.special.values()) - {self._unknown}
        longest = sorted(filter(None, self.special), key=len, reverse=True)
        self._special_text = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else None
        self._template = None if template is None else ChatTemplate(template)
        self._lock = threading.Lock()

    @staticmethod
    def from_directory(path: str | Path, *, reserved: Iterable[int] = ()) -> Tokenizer:
        """Read tokenizer.json, or vocab.json + merges.txt (byte-level BPE as in Qwen2); UserError if none is there.

        `reserved`: ids that are special whatever the files say, such as a model's mask.
        """
        path = Path(path)
        config: dict[str, Any] = {**read_json(path / "special_tokens_map.json", missing={})}
        config |= {k: v for k, v in read_json(path / "tokenizer_config.json", missing={}).items() if v is not None}
        try:
            return Tokenizer(read_vocabulary(path, config), config, find_template(path, config), reserved=reserved)
        except UserError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{path}: the tokenizer's files are malformed: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if the vocabulary names one."""
        return self.id(self.named["bos_token"]) if "bos_token" in self.named else None

    def id(self, token: str) -> int | None:
        """Id of a token given by its name in the vocabulary, special or not; None if there is none."""
        return self.inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; the literal name of a special token in it stays text, and nothing is added."""
        with self._lock:
            ids = self.inner.encode(unicode(text), add_special_tokens=False).ids
        if self._reserved.isdisjoint(ids):
            return ids
        # Without added tokens, a vocabulary of whole words still finds the name of a token in itself.
        told = ((self._unknown if i in self._reserved else i) for i in ids)
        return [i for i in told if i is not None]

    def encode_markup(self, text: str) -> list[int]:
        """Ids of trusted text in which the names of special tokens mean those tokens."""
        with self._lock:
            self.inner.encode_special_tokens = False
            try:
                return self.inner.encode(unicode(text), add_special_tokens=False).ids
            finally:
                self.inner.encode_special_tokens = True

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`, by default without special tokens; ids outside the vocabulary are left out."""
        return self.inner.decode(
            [i for i in map(int, ids) if 0 <= i < self.vocab_size], skip_special_tokens=skip_special
        )

    def piece(self, id: int) -> str:
        """One cell as it is displayed: what the token alone decodes to, special tokens by name."""
        name = self.inner.id_to_token(int(id)) if 0 <= id < self.vocab_size else None
        if name is None or name in self.special:
            return name or ""
        return self.inner.decode([int(id)], skip_special_tokens=False) or name

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kw: Any
    ) -> list[int]:
        """Ids of a conversation, by the model's own template; special tokens come from the template only.

        Names of special tokens inside `messages` or `kw` pass through the template as stand-ins and end as plain text.
        UserError if there is no template, or if it refuses the conversation.
        """
        if self._template is None:
            raise UserError("this model has no chat template; give it plain text")
        values = {"messages": list(messages), "tools": None, "documents": None, **kw}
        stand = StandIns(self._special_text, values)
        rendered = self._template.render(
            {**self.named, **stand.hide(values), "add_generation_prompt": add_generation_prompt}
        )
        ids = self._encode_hidden(rendered, stand) if stand.used else self.encode_markup(rendered)
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.bos_id else ids

    def prompt(self, text: str) -> list[int]:
        """Ids that ask for an answer to `text`: as one user message, or plainly (after BOS, if the model wants one)."""
        return self.plain(text) if self._template is None else self.chat([{"role": "user", "content": text}])

    def plain(self, text: str) -> list[int]:
        """Ids of a text to continue: after BOS, if the model wants one."""
        bos = self.bos_id
        return [*([bos] if bos is not None and self._adds_bos(bos) else []), *self.encode(text)]

    def _adds_bos(self, bos: int) -> bool:
        said = self.config.get("add_bos_token")
        return bool(said) if said is not None else bos in self.inner.encode("", add_special_tokens=True).ids

    def _encode_hidden(self, rendered: str, stand: StandIns) -> list[int]:
        assert self._special_text is not None
        ids: list[int] = []
        for part in self._special_text.split(rendered):
            ids += [self.special[part]] if part in self.special else self.encode(stand.show(part)) if part else []
        return ids


class StandIns:
    """Replaces special-token names in user values by private-use text before rendering, and puts them back after."""

    def __init__(self, special: re.Pattern[str] | None, values: Any) -> None:
        seen = set(repr(values))
        free = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in seen and ascii(c)[1:-1] not in repr(values))
        self.special, self.open, self.close = special, next(free), next(free)
        self.used: list[str] = []

    def hide(self, value: Any) -> Any:
        """The same value with a stand-in for every special-token name in its strings."""
        if isinstance(value, str):
            return self.special.sub(self._stand, value) if self.special else value
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(v) for v in value]
        return value

    def _stand(self, match: re.Match[str]) -> str:
        self.used.append(match[0])
        return f"{self.open}{len(self.used) - 1}{self.close}"

    def show(self, text: str) -> str:
        """Undo `hide` in a piece of rendered text."""
        return re.sub(f"{self.open}(\\d+){self.close}", lambda m: self.used[int(m[1])], text)


def unicode(text: str) -> str:
    """The text with a replacement character for every lone surrogate, which no vocabulary can spell."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_of(token: Any) -> str | None:
    """The text of a special token as configuration files write it: a string or {"content": ...}."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def find_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or tokenizer_config.json's `chat_template` (the one named default)."""
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja")
    said = config.get("chat_template")
    if isinstance(said, list):
        said = {t.get("name"): t.get("template") for t in said if isinstance(t, Mapping)}.get("default")
    return said if isinstance(said, str) else None


def read_vocabulary(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """tokenizer.json, or vocab.json + merges.txt; UserError if neither is there or it is broken."""
    if (path / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path / 'tokenizer.json'} is not a tokenizer: {error}") from error
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return byte_level(path, config)
    raise UserError(f"{path} has no tokenizer.json, nor vocab.json with merges.txt")


def byte_level(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt: Qwen2's split and NFC, or GPT-2's where the config says so."""
    said = str(config.get("tokenizer_class", "Qwen2"))
    if not said.startswith(BYTE_LEVEL):
        raise UserError(f"{path}: how a {said} splits text is not known here; save it as tokenizer.json")
    try:
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: vocab.json and merges.txt are not a vocabulary: {error}") from error
    inner = tokenizers.Tokenizer(model)
    gpt2 = said.startswith("GPT2")
    spaced = bool(config.get("add_prefix_space", False))
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=gpt2)
    inner.pre_tokenizer = plain if gpt2 else pre_tokenizers.Sequence([split, plain])
    if not gpt2:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    for id, token in sorted(added_tokens(path, config).items()):
        inner.add_tokens([token])
        if inner.token_to_id(token.content) != id:
            raise UserError(f"{path}: token {token.content!r} cannot have id {id}; the vocabulary has a gap before it")
    return inner


def added_tokens(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by id: added_tokens.json, tokenizer_config.json's `added_tokens_decoder`."""
    plain: dict[str, int] = read_json(path / "added_tokens.json", missing={})
    found = {i: AddedToken(content, normalized=False) for content, i in plain.items()}
    for i, t in (config.get("added_tokens_decoder") or {}).items():
        flags = {k: bool(t.get(k, False)) for k in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[int(i)] = AddedToken(t["content"], **flags)
    return found
