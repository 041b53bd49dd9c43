"""A folder of results with its provenance: run.json, rows.jsonl, summary.json. It appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from unmask import __version__
from unmask.study import machine


def plain(value: Any) -> Any:
    """`json.dumps(default=plain)`: dataclasses, paths, sets, dtypes and tensors as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    tolist = getattr(value, "tolist", None)
    return str(value) if tolist is None else tolist()


class Results:
    """A results folder in the making. Rows are written as they come, into a hidden folder beside the final one.

    `finish` gives the folder its name. Leaving the `with` block by an exception removes it, so that a folder under
    `root` is always complete.
    """

    def __init__(self, folder: Path, draft: Path, run: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        """Where the results stand once finished: `<root>/<name>-<UTC time>`."""
        self.run = run
        self._draft, self.resumable = draft, resume
        self.found: list[dict[str, Any]] = _whole(draft / "rows.jsonl") if resume else []
        """Rows of an earlier run alike that was interrupted."""
        file = draft / "rows.jsonl"
        if self.found:  # without what was cut off behind them
            whole = "".join(json.dumps(row, default=plain) + "\n" for row in self.found)
            file.with_suffix(".new").write_text(whole, encoding="utf-8")
            file.with_suffix(".new").replace(file)
        self._rows: TextIO = file.open("a" if self.found else "w", encoding="utf-8")
        self.count = len(self.found)
        """Rows written so far, those found among them."""

    @staticmethod
    def create(
        name: str, config: Any = None, root: str | Path = "results", *, seeds: Any = None, resume: bool = False
    ) -> Results:
        """Begin `<root>/<name>-<UTC time>`; `config` is a dict or a dataclass and is kept in run.json.

        `resume`: an exception leaves the rows that are written, and the next run alike (same name, configuration and
        commit, below the same root) has them as `found` and goes on behind them.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"a result's name is made of letters, digits, '.', '_' and '-', not {name!r}")
        root, now = Path(root), datetime.now(UTC)
        root.mkdir(parents=True, exist_ok=True)
        config = config if config is not None else {}
        if seeds is None and isinstance(config, Mapping):
            seeds = {k: v for k, v in config.items() if k in ("seed", "seeds")}
        run = {
            "name": name,
            "date": now.isoformat(timespec="seconds"),
            "unmask": __version__,
            "git": machine.commit(),
            "machine": machine.describe(),
            "dtype": config.get("dtype") if isinstance(config, Mapping) else getattr(config, "dtype", None),
            "seeds": seeds,
            "config": config,
        }
        if resume:
            alike = json.dumps([name, config, run["git"], __version__], default=plain, sort_keys=True)
            draft = root / f".{name}-{hashlib.sha256(alike.encode()).hexdigest()[:16]}.part"
            draft.mkdir(exist_ok=True)
        else:
            draft = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".part", dir=root))
        return Results(root / f"{name}-{now:%Y%m%dT%H%M%SZ}", draft, run, resume=resume)

    def row(self, row: Mapping[str, Any]) -> None:
        """Append one row to rows.jsonl."""
        self._rows.write(json.dumps(row, default=plain) + "\n")
        self._rows.flush()
        self.count += 1

    def finish(self, summary: Any = None) -> Path:
        """Write summary.json and run.json, and let the folder appear; its path."""
        self._rows.close()
        for name, data in (("run.json", self.run), ("summary.json", summary if summary is not None else {})):
            text = json.dumps(data, default=plain, indent=2)
            (self._draft / name).write_text(text + "\n", encoding="utf-8")
        self._draft.chmod(0o755)
        first, number = self.folder, 1
        while True:  # two runs of one second: the later one gets a number
            try:
                os.rename(self._draft, self.folder)
                return self.folder
            except OSError:
                if not self.folder.exists():
                    raise
                number += 1
                self.folder = first.with_name(f"{first.name}-{number}")

    def discard(self) -> None:
        """Remove what was written, if it has not been finished."""
        self._close()
        shutil.rmtree(self._draft, ignore_errors=True)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draft.exists() and not (self.resumable and self.count):
            self.discard()
        self._close()

    def _close(self) -> None:
        """Let go of the rows; what a full disk has refused once is refused again, and has been told."""
        with suppress(OSError):
            self._rows.close()


def _whole(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that were written whole; none if there is no file."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last one, cut off where the disk was full or the power went
            break
    return found


def read(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """(run, rows, summary) of a finished folder."""
    folder = Path(folder)
    run, summary = (json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("run", "summary"))
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return run, [json.loads(line) for line in lines], summary
