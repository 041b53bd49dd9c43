"""A regular expression as a token-level automaton: which tokens may follow which, for one tokenizer's own spelling."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.models.tokenizer import Tokenizer

T = TypeVar("T")
MOST_STATES, MOST_CHARACTERS, MOST_CELLS, MOST_WORK, SECONDS = 20_000, 8_000, 8_000_000, 4_000_000_000, 10
APART = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
MOST = {most}
try:
    told = make(sys.stdin.buffer.read().decode())
except Exception as error:
    told = dict(error=str(error))
json.dump(told, sys.stdout)
"""
BUILD = """
def make(regex):
    from outlines_core import Index, Vocabulary
    index = Index(regex, Vocabulary(256, {bytes([b]): [b] for b in range(256)}))
    table = index.get_transitions()
    if len(table) > MOST:
        return dict(error="it has %d states, over %d" % (len(table), MOST))
    edges = [[s, b, t] for s, row in table.items() for b, t in row.items() if b < 256]
    return dict(start=index.get_initial_state(), final=list(index.get_final_states()), edges=edges)
"""


def apart(make: str, text: str, what: str, *, most: int) -> dict[str, Any]:
    """What `make`, the text of a function, makes of a text, in a process with bounds of its own; UserError if nothing.

    A short regex or schema can ask for any amount of time and memory.
    """
    try:
        import outlines_core  # noqa: F401
    except ImportError:
        raise UserError("constraints need outlines-core: pip install 'unmask[constrained]'") from None
    command = [sys.executable, "-c", make + APART.replace("{most}", str(most))]
    try:
        ran = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"this {what} takes too long to compile; make it simpler") from None
    except UnicodeError:
        raise UserError(f"this {what} is no valid Unicode text") from None
    if ran.returncode:
        raise UserError(f"this {what} is too large to compile; make it simpler")
    told = json.loads(ran.stdout)
    if "error" in told:
        raise UserError(f"this {what} cannot be a constraint: {' '.join(told['error'].split())[:300]}")
    return told


def once(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, asked again only for what it has not made of late, and not for what was a mistake."""

    @lru_cache(maxsize=64)
    def known(*given: Any) -> tuple[T | None, str]:
        try:
            return make(*given), ""
        except UserError as error:
            return None, str(error)

    @wraps(make)
    def call(*given: Any) -> T:
        found, mistake = known(*given)
        if mistake:
            raise UserError(mistake)
        return cast(T, found)

    return call


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over classes of tokens. A canvas of cells is valid if it ends in a final state.

    EOS leads from the states in which the text is complete to one that only EOS keeps; that one is final as well.
    """

    classes: Tensor
    """[V] int64: the class of each token; tokens of one lead from each state to the same one. 0 leads nowhere."""
    next: Tensor
    """[S, C] int64: the state a class leads to; -1 where the text would leave the language."""
    start: int
    final: Tensor
    """[S] bool."""

    @cached_property
    def moves(self) -> Tensor:
        """[S, C] int64: `next` with S in the place of -1."""
        return torch.where(self.next < 0, len(self.next), self.next)

    def of(self, width: int) -> Tensor:
        """[width] int64: `classes` for a model with so many tokens; those the tokenizer lacks lead nowhere."""
        short = width - len(self.classes)
        return torch.nn.functional.pad(self.classes, (0, short)) if short > 0 else self.classes[:width]

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether these cells, EOS included, are a whole text of the language."""
        state = self.start
        for token in tokens:
            state = int(self.next[state, self.classes[token]]) if 0 <= token < len(self.classes) else -1
            if state < 0:
                return False
        return bool(self.final[state])


def spelling(tokenizer: Tokenizer) -> tuple[bool, list[bytes | None]]:
    """Whether the decoder puts a space between tokens, and the bytes of each token; None for what is no text.

    UserError for a decoder whose spelling is not known here.
    """
    decoder = json.loads(tokenizer.inner.to_str()).get("decoder") or {}
    names = [tokenizer.inner.id_to_token(i) for i in range(tokenizer.vocab_size)]
    special = set(tokenizer.special.values())
    known = [None if name is None or i in special else name for i, name in enumerate(names)]
    if decoder.get("type") == "ByteLevel":
        table = byte_letters()
        return False, [None if n is None else letters(n, table) or None for n in known]
    if decoder.get("type") == "WordPiece" and not decoder.get("cleanup"):
        prefix = decoder["prefix"]
        return True, [None if not n or n.startswith(prefix) else b" " + n.encode() for n in known]
    raise UserError(
        f"a constraint needs to know how tokens are spelt, not how a {decoder.get('type', 'missing')} decoder does; "
        "use a model with a byte-level vocabulary"
    )


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


def letters(name: str, table: dict[str, int]) -> bytes:
    """The bytes of one token; a name with other letters than the table's is its own text."""
    return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()


@once
def bytewise(pattern: str) -> tuple[Tensor, int, Tensor]:
    """(next [S + 1, 256], start, final [S + 1]) of the regex over bytes; the last state is the dead one.

    The regex is closed by a NUL, which no text may have: outlines-core's index loses texts that go on after a shorter
    match.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise UserError(f"a regex of {len(pattern)} characters is too long; {MOST_CHARACTERS} are allowed")
    return _tables(apart(BUILD, f"(?:{pattern})\\x00", "regex or schema", most=MOST_STATES))


def _tables(told: dict) -> tuple[Tensor, int, Tensor]:
    edges = torch.tensor(told["edges"], dtype=torch.int64).view(-1, 3)
    ids = torch.tensor([told["start"], *told["final"], *edges[:, 0].tolist(), *edges[:, 2].tolist()]).unique()
    source, target = (torch.searchsorted(ids, edges[:, n].contiguous()) for n in (0, 2))
    closed, final = torch.zeros(2, len(ids) + 1, dtype=torch.bool)
    closed[torch.searchsorted(ids, torch.tensor(told["final"], dtype=torch.int64))] = True
    nul = edges[:, 1] == 0
    final[source[nul & closed[target]]] = True
    edges, source, target = edges[~nul], source[~nul], target[~nul]
    live = final.clone()
    while True:  # only states from which a text can be completed
        more = live.clone()
        more[source[live[target]]] = True
        if bool((more == live).all()):
            break
        live = more
    table = torch.full((len(ids) + 1, 256), len(ids))
    keep = live[target]
    table[source[keep], edges[keep, 1]] = target[keep]
    return table, int(torch.searchsorted(ids, torch.tensor(told["start"]))), final


KEPT = 12
"""Automata that are kept, of some tens of megabytes at most."""
_lock = threading.Lock()
_known: dict[tuple[int, str, tuple[int, ...], tuple[int, ...]], tuple[Tokenizer, Automaton]] = {}


def automaton(tokenizer: Tokenizer, pattern: str, *, eos: Sequence[int], never: Sequence[int] = ()) -> Automaton:
    """The automaton whose texts, decoded up to the first EOS, match the regex as a whole; the last few are kept.

    `never`: ids that are never written, such as a model's mask. UserError for a regex that is malformed or too large.
    """
    key = (id(tokenizer), pattern, tuple(eos), tuple(never))
    with _lock:
        found = _known.get(key)
    if found is None:
        found = (tokenizer, _built(tokenizer, pattern, tuple(eos), tuple(never)))
        with _lock:
            _known[key] = found
            while len(_known) > KEPT:
                _known.pop(next(iter(_known)))
    return found[1]


def _built(tokenizer: Tokenizer, pattern: str, eos: tuple[int, ...], never: tuple[int, ...]) -> Automaton:
    spaced, words = spelling(tokenizer)
    words = [None if i in {*eos, *never} else w for i, w in enumerate(words)]
    _, begin, ends = bytewise(pattern)
    empty = bool(ends[begin])
    table, start, final = bytewise(f" (?:{pattern})") if spaced else bytewise(pattern)
    size = len(table) - 1
    if size * sum(len(w) for w in words if w) > MOST_WORK:
        raise UserError(f"this regex or schema has {size} states, too many for a vocabulary of {len(words)} tokens")
    mark = _marks(table, words)
    dead = torch.zeros(2, dtype=torch.int64)
    _, classes = torch.unique(torch.cat([dead[None], mark]), dim=0, return_inverse=True)
    zero = classes[0]
    classes = torch.where(classes == zero, 0, classes + 1)[1:]  # 0 leads nowhere
    present, classes = torch.unique(torch.cat([classes.new_zeros(1), classes]), return_inverse=True)
    classes, count = classes[1:], len(present) + 1
    if (size + 2) * count > MOST_CELLS:
        raise UserError(f"this regex or schema has {size} states and {count} kinds of token; make it simpler")
    return _finished(table, start, final, classes, words, eos, empty)


def _grid(words: Sequence[bytes]) -> tuple[Tensor, Tensor, Tensor]:
    """(order [W], their bytes [W, longest] uint8, their lengths [W]): the words from the longest to the shortest."""
    lengths = torch.tensor([len(w) for w in words], dtype=torch.int64)
    order = lengths.argsort(descending=True)
    longest = max(map(len, words), default=0)
    whole = bytearray(b"".join(w.ljust(longest, b"\0") for w in words))
    grid = torch.frombuffer(whole, dtype=torch.uint8) if whole else torch.empty(0, dtype=torch.uint8)
    return order, grid.view(len(words), longest)[order], lengths[order]


def _walk(table: Tensor, words: tuple[Tensor, Tensor, Tensor], states: Tensor) -> Tensor:
    """[states, W] int32: where each word leads from each state."""
    (order, grid, lengths), flat = words, table.flatten().int()
    at = states.int()[:, None].repeat(1, len(order))
    for column in range(grid.shape[1]):
        live = int((lengths > column).sum())
        at[:, :live] = flat[at[:, :live] * 256 + grid[:live, column].int()]
    return torch.empty_like(at).index_copy_(1, order, at)


def _marks(table: Tensor, words: Sequence[bytes | None]) -> Tensor:
    """[V, 2] int64: two numbers that only tokens with the same transitions share (but for a chance of 2**-100)."""
    size, texts = len(table) - 1, _grid([w for w in words if w])
    place = torch.tensor([i for i, w in enumerate(words) if w], dtype=torch.int64)
    weight = torch.randint(-(2**62), 2**62, (size, 2), generator=torch.Generator().manual_seed(7))
    mark = torch.zeros(len(words), 2, dtype=torch.int64)
    for first in range(0, size, 16):
        to = _walk(table, texts, torch.arange(first, min(first + 16, size))).long()
        told = torch.where(to == size, 0, to + 1)
        for n in range(2):
            mark[place, n] += (told * (told + n * 977) * weight[first : first + 16, n, None]).sum(0)
    return mark


def _finished(
    table: Tensor,
    start: int,
    final: Tensor,
    classes: Tensor,
    words: Sequence[bytes | None],
    eos: tuple[int, ...],
    empty: bool,
) -> Automaton:
    """The automaton, with the state behind the end and the class of EOS."""
    size, count = len(table) - 1, int(classes.max()) + 1
    example = torch.zeros(count, dtype=torch.int64).scatter_(0, classes, torch.arange(len(classes)))
    to = _walk(table, _grid([words[i] or b"" for i in example[1:].tolist()]), torch.arange(size)).long()
    end, moves = size, torch.full((size + 1, count + 1), -1)
    moves[:size, 1:count] = torch.where(to == size, -1, to)
    done = torch.cat([final[:size], torch.ones(1, dtype=torch.bool)])
    done[start] |= empty
    moves[done, count] = end
    width = max([len(classes), *(e + 1 for e in eos)])
    classes = torch.nn.functional.pad(classes, (0, width - len(classes)))
    if eos:
        classes[list(eos)] = count
    return Automaton(classes, moves, start, done)
