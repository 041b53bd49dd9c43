"""The two files of a batch: rows that are read when they are needed, and results that are each written once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from unmask.errors import UserError

Row = dict[str, Any]
"""A line of the input."""
Result = dict[str, Any]
"""A line of the output."""

SYNC_S = 2.0
"""Seconds between two calls of fsync."""
BEGINNING = b'{"id": '
"""How each line of the output begins."""


def name(row: Any) -> str | None:
    """What identifies a row, or a result: its custom_id or id as text; None if it has none."""
    found = row.get("custom_id", row.get("id")) if isinstance(row, dict) else None
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) and found != "" else None


def key(row: Row) -> str:
    """The name of a row that is known to have one."""
    found = name(row)
    assert found is not None
    return found


def digest(text: str) -> str:
    """64 hexadecimal digits that depend on the text alone."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Source:
    """A file of rows. Its ids are read at once and kept, its rows when they are needed.

    UserError for a file that cannot be read, a line that is no JSON object with an id, an id that is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        """By id: its line, counted from 1."""
        self.models: dict[str | None, int] = {}
        """By name: how many rows ask for this model; None counts those that name none."""
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is no file; the rows are read twice, first their ids and then what they ask")
        for number, row in self._read():
            self._note(number, row)
        if not self.lines:
            raise UserError(f"{path} holds no row")

    def __len__(self) -> int:
        return len(self.lines)

    def _note(self, number: int, row: Row) -> None:
        found = name(row)
        if found is None:
            raise UserError(f"{self.path}, line {number}: a row has an id (or custom_id), a text or a whole number")
        if first := self.lines.get(found):
            raise UserError(f"{self.path}: id {found[:80]!r} is in line {first} and in line {number}; ids are unique")
        self.lines[found] = number
        body = row.get("body", row)
        model = body.get("model") if isinstance(body, dict) else None
        model = model[:200] if isinstance(model, str) else None
        self.models[model] = self.models.get(model, 0) + 1

    def rows(self, without: Collection[str] = ()) -> Iterator[Row]:
        """The rows in order, but those whose ids are in `without`; each line is read when it is asked for."""
        left = self.lines.keys() - set(without) if without else self.lines.keys()
        for _, row in self._read():
            if key(row) in left:
                yield row

    def _read(self) -> Iterator[tuple[int, Row]]:
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, self._parsed(number, line)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None

    def _parsed(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = str(error)[:200] if isinstance(error, ValueError) else "nested too deeply"
            raise UserError(f"{self.path}, line {number}: not JSON ({told})") from None
        if not isinstance(row, dict):
            raise UserError(f'{self.path}, line {number}: expected an object like {{"id": "1", "prompt": "..."}}')
        return row


class Sink:
    """The file of results, which one run holds at a time. What is there stays; a broken last line is dropped.

    UserError if another run holds it, or if it is not what a run over `ids` has left. Nothing is changed before
    `begin` or the first `add`, and a file that was made for nothing is removed again.
    """

    def __init__(self, path: Path, ids: Collection[str]) -> None:
        self.path, self.ids = path, ids
        self.done: set[str] = set()
        self.failed = 0
        """Results so far, from earlier runs too, that are errors."""
        self.end, self.begun, self.synced = 0, False, time.monotonic()
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is no file; results are kept in one, so that a run can be taken up again")
        try:
            self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        try:
            self._hold()
            self._scan()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self) -> None:
        import fcntl

        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                return
            told = f"{self.path} was just replaced; try again"
        except (BlockingIOError, FileNotFoundError):
            told = f"another run is writing {self.path}; wait for it, or choose another file"
        except OSError as error:
            told = f"cannot lock {self.path}: {error.strerror or error}; choose a file on another disk"
        self.end = -1  # not ours to remove
        raise UserError(told)

    def _scan(self) -> None:
        """Read what is there: ids, errors, and where the last whole line ends."""
        torn = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if torn:
                    raise self._foreign(torn)
                result = _result(line)
                if result is None and not _broken(line):
                    raise self._foreign(number)
                if result is None or not line.endswith(b"\n"):
                    torn = number
                    continue
                self._known(number, key(result))
                self.failed += result["error"] is not None
                self.end += len(line)

    def _foreign(self, number: int) -> UserError:
        return UserError(f"{self.path}, line {number}: not a result of `unmask batch`; choose another file")

    def _known(self, number: int, found: str) -> None:
        if found not in self.ids:
            told = f"{self.path}, line {number}: id {found[:80]!r} is not in the input"
            raise UserError(f"{told}; this file belongs to another one, choose another output")
        if found in self.done:
            raise UserError(f"{self.path}, line {number}: id {found[:80]!r} is there twice; remove one of the lines")
        self.done.add(found)

    def begin(self) -> None:
        """Drop a broken last line, and go to the end."""
        if not self.begun:
            self.file.seek(self.end)
            self.file.truncate()
            self.begun = True

    def add(self, result: Result) -> bool:
        """Append one result as one write; False if it is there already. UserError where the disk does not take it."""
        if (found := key(result)) in self.done:
            return False
        line = memoryview(encoded(result))
        try:
            self.begin()
            while line:  # one write, unless a disk that is nearly full takes a part
                line = line[self.file.write(line) :]
            if time.monotonic() - self.synced > SYNC_S:
                self._sync()
        except OSError as error:
            told = f"cannot write {self.path}: {error.strerror or error}"
            raise UserError(f"{told}; {len(self.done)} results are kept, run again to go on") from None
        self.done.add(found)
        self.failed += result["error"] is not None
        return True

    def _sync(self) -> None:
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self) -> None:
        """Put everything on the disk and let the file go."""
        if self.file.closed:
            return
        try:
            if self.begun:
                self._sync()
            elif not self.end and not os.fstat(self.file.fileno()).st_size:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; run again to check it") from None
        finally:
            self.file.close()


def _result(line: bytes) -> Result | None:
    """A line as a result; None if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and name(found) is not None and {"response", "error"} <= found.keys()
    return found if whole else None


def _broken(line: bytes) -> bool:
    """Is it what is left of a result that was not written to its end?"""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(BEGINNING) or BEGINNING.startswith(line) or not line.strip(b"\0")
    return False


def encoded(result: Result) -> bytes:
    """A result as its line; text stays readable unless it is no Unicode."""
    try:
        return f"{json.dumps(result, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(result)}\n".encode()
