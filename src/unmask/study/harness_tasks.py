"""Tasks that `unmask eval` runs by itself: problems from a folder of the user's, and how an answer is read."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import UserError

BUILT_IN = ("gsm8k",)
"""Tasks that need no lm-eval, only a folder with their data."""
FILES = ("{}.jsonl", "{}.jsonl.gz")
"""How the file of a split may be called."""
STRICT = re.compile(r"####\s*(-?\$?[0-9][0-9.,]*)")
FLEXIBLE = re.compile(r"-?\$?[0-9][0-9.,]*")


@dataclass(frozen=True)
class Problem:
    """A prompt and the right answer, by its number in the file."""

    number: int
    prompt: str
    gold: str


@dataclass(frozen=True)
class Local:
    """A task read from a folder."""

    name: str
    problems: tuple[Problem, ...]
    digest: str
    """SHA-256 of the files that were read."""
    until: tuple[str, ...] = ("Question:",)
    """A response is cut off where one of these begins."""


def number(text: str) -> str:
    """A number as answers are compared: without thousands separators, a currency sign and a full stop behind it."""
    return text.replace(",", "").replace("$", "").rstrip(".").strip()


def strict(text: str) -> str | None:
    """The number behind the first `####`, or None (GSM8K's own format; Cobbe et al. 2021)."""
    found = STRICT.search(text)
    return number(found[1]) if found else None


def flexible(text: str) -> str | None:
    """The last number anywhere in the text, or None."""
    found = FLEXIBLE.findall(text)
    return number(found[-1]) if found else None


def cut(text: str, until: tuple[str, ...] | list[str]) -> str:
    """The text up to the first of the stop strings; an empty one stops nothing."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def gsm8k(folder: Path, *, shots: int = 0, limit: int | None = None) -> Local:
    """GSM8K's test problems of a folder that holds test.jsonl, or test.jsonl.gz, of questions and answers.

    With `shots` the first problems of train.jsonl stand before each question, as "Question: ... Answer: ..." with
    GSM8K's calculator marks left out; without, the prompt is the question. UserError for what cannot be read.
    """
    rows, digest = _read(folder, "test")
    before = ""
    if shots:
        shown, other = _read(folder, "train")
        digest = hashlib.sha256(f"{digest} {other}".encode()).hexdigest()
        if shots > len(shown):
            raise UserError(f"--shots {shots} is more than the {len(shown)} problems of {folder}/train.jsonl")
        said = ((q, re.sub(r"<<.*?>>", "", a)) for q, a in shown[:shots])
        before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in said)
    problems = []
    for at, (question, answer) in enumerate(rows[:limit]):
        gold = strict(answer)
        if gold is None:
            raise UserError(f"{folder}: the answer of problem {at + 1} has no '#### n'")
        problems.append(Problem(at, f"{before}Question: {question}\nAnswer:" if shots else question, gold))
    return Local("gsm8k", tuple(problems), digest)


def _read(folder: Path, split: str) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) of each line of a split, and the digest of its file; UserError if there is none to read."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data is the folder that holds GSM8K's test.jsonl")
    file = next((folder / name.format(split) for name in FILES if (folder / name.format(split)).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {split}.jsonl or {split}.jsonl.gz; --data is the folder of GSM8K's files")
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    rows = [_pair(line, f"{file}, line {at}") for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise UserError(f"{file} holds no problem")
    return rows, hashlib.sha256(raw).hexdigest()


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        question, answer = record["question"], record["answer"]
    except (ValueError, TypeError, KeyError):
        question = answer = None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f'{where}: expected an object like {{"question": "...", "answer": "... #### 42"}}')
    return question, answer
