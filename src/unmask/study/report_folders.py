"""The results folders that a page of evidence is built from: the newest of each kind, whole and of this version."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import __version__
from unmask.errors import UserError

Row = dict[str, Any]
FILES = ("run.json", "rows.jsonl", "summary.json")
KINDS = ("gap", "emergence", "control", "eval", "serve", "decode", "levers", "bench", "peer")
"""What a page tells of, in its order; of these, or with a dash and more behind it."""
AGAIN = "measure again, or leave the folder out"


@dataclass(frozen=True)
class Folder:
    """One finished run."""

    name: str
    path: Path
    run: Row
    rows: list[Row]
    summary: Row

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return kind(self.run["name"])

    @property
    def config(self) -> Row:
        """What was asked for."""
        return self.run["config"]


def kind(name: str) -> str:
    """Which of KINDS a run's name is of; empty for another one."""
    return next((k for k in KINDS if name == k or name.startswith(f"{k}-")), "")


def gather(paths: Sequence[Path]) -> list[Folder]:
    """The folders to tell of, in the order of KINDS: those named, and the newest of each name below those named.

    A quick run is taken only where there is no other. UserError for a path that is no results folder and holds none,
    for a folder of another version, and for one that lacks rows or whose summary is not that of its rows.
    """
    newest: dict[str, tuple[bool, str, Path]] = {}
    for path in paths:
        for folder, run in _below(path):
            rank = (not _quick(run), str(run["date"]), folder)
            newest[run["name"]] = max(rank, newest.get(run["name"], rank))
    found = [read(folder) for *_, folder in newest.values()]
    return sorted(found, key=lambda one: (KINDS.index(one.kind), one.name))


def _quick(run: Row) -> bool:
    return bool(isinstance(run.get("config"), Mapping) and run["config"].get("quick"))


def _below(path: Path) -> Iterator[tuple[Path, Row]]:
    """The folder itself, or those in it that are of a kind that is told of, with their run.json."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give results folders, or a folder that holds them")
    if (path / "run.json").exists():
        run = _json(path, "run.json")
        if not kind(str(run.get("name"))):
            raise UserError(f"{path} is a run of {run.get('name')!r}, and a page tells of {', '.join(KINDS)}")
        yield path, run
        return
    if any((path / name).exists() for name in FILES):
        raise UserError(f"{path} has no run.json: it was never finished; {AGAIN}")
    inside = [one for one in sorted(path.iterdir()) if one.is_dir() and kind(one.name)]
    if not inside:
        raise UserError(f"{path} holds no results of {', '.join(KINDS)}; measure with `unmask bench gap` first")
    for folder in inside:
        yield from _below(folder)


def _json(folder: Path, name: str) -> Row:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {folder / name}: {error.strerror}; {AGAIN}") from None
    except ValueError:
        raise UserError(f"{folder / name} is not whole JSON; {AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not what a run writes; {AGAIN}")
    return found


def read(folder: Path) -> Folder:
    """A folder, checked; UserError for another version, missing rows, and a summary that is not that of its rows."""
    run = _json(folder, "run.json")
    if run.get("unmask") != __version__:
        raise UserError(f"{folder} was measured by unmask {run.get('unmask')}, and this is {__version__}; {AGAIN}")
    if lacking := {"name", "date", "git", "machine", "config"} - run.keys():
        raise UserError(f"{folder / 'run.json'} does not say {', '.join(sorted(lacking))}; {AGAIN}")
    found = Folder(folder.resolve().name, folder, run, _rows(folder), _json(folder, "summary.json"))
    try:
        _agree(found)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is not what {run['name']} of this version writes ({error}); {AGAIN}") from None
    return found


def _rows(folder: Path) -> list[Row]:
    file, found = folder / "rows.jsonl", []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {AGAIN}") from None
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file} is cut off at line {number}; {AGAIN}") from None
    if not found:
        raise UserError(f"{file} has no rows; {AGAIN}")
    return found


def _agree(folder: Folder) -> None:
    """UserError unless the rows are as many as the summary says, and come to the same."""
    tellers = {
        "gap": _gap,
        "levers": _cases,
        "decode": _cases,
        "emergence": _emergence,
        "bench": _bench,
        "control": _control,
        "eval": _eval,
        "serve": _serve,
    }
    if folder.kind not in tellers or (folder.kind == "bench" and folder.run["name"] != "bench"):
        return
    for name, own, count, said in tellers[folder.kind](folder):
        here = sum(row.get("one", 1) for row in own)
        if here != count:
            raise UserError(f"{folder.path} has {here} of {count} rows of {name!r}; {AGAIN}")
        for what, told, value in _told(own, said):
            if not math.isclose(told, value, rel_tol=1e-6, abs_tol=1e-9):
                raise UserError(
                    f"{folder.path / 'summary.json'} says {what} {told:g} of {name!r}, and the rows come to {value:g}"
                )


def _told(own: Sequence[Row], said: Mapping[str, float | None]) -> Iterator[tuple[str, float, float]]:
    """(what, as the summary says, as the rows come to), for what can be told from rows."""
    sums = {key: sum(row.get(key, 0) for row in own) for key in ("right", "forwards", "useful_tokens", "seconds")}
    problems = sum(row.get("one", 1) for row in own) or math.nan
    values = {
        "accuracy": sums["right"] / problems,
        "NFE": sums["forwards"] / problems,
        "useful tok/s": sums["useful_tokens"] / sums["seconds"] if sums["seconds"] else math.nan,
    }
    for what, told in said.items():
        if told is not None and not math.isnan(values[what]):
            yield what, told, values[what]


Told = tuple[str, list[Row], int, dict[str, float | None]]
"""A name, its rows, how many problems there should be, and what the summary says of them."""


def _gap(folder: Folder) -> Iterator[Told]:
    own = defaultdict(list)
    for row in folder.rows:
        own[row["stage"], row["batch"], row["case"]].append(row)
    for line in folder.summary["rows"]:
        said = {"accuracy": line["accuracy"], "NFE": line["nfe"], "useful tok/s": line["useful_tok_s"]}
        name = f"{line['case']}, batch {line['batch']}"
        yield name, own["test", line["batch"], line["case"]], line["problems"], said


def _cases(folder: Folder) -> Iterator[Told]:
    own = defaultdict(list)
    for row in folder.rows:
        own[row["case"]].append(row)
    keys = {"accuracy": "accuracy", "NFE": "forwards", "useful tok/s": "useful_tokens_per_second"}
    for line in folder.summary["cases"]:
        yield line["case"], own[line["case"]], line["items"], {what: line[key]["value"] for what, key in keys.items()}


def _eval(folder: Folder) -> Iterator[Told]:
    for line in folder.summary["tasks"]:
        own = [row for row in folder.rows if row["task"] == line["task"]]
        told = [{**row, "right": row.get("correct") or 0} for row in own]
        yield line["task"], told, line["problems"], {"accuracy": line["accuracy"]} if line["runner"] == "unmask" else {}


def _serve(folder: Folder) -> Iterator[Told]:
    for line in folder.summary["rows"]:
        own = [row for row in folder.rows if (row["kind"], row["level"]) == (line["kind"], line["level"])]
        yield f"{line['kind']} {line['level']:g}", own, line["requests"], {}


def _emergence(folder: Folder) -> Iterator[Told]:
    own = defaultdict(list)
    for row in folder.rows:
        told = {"right": row["correct"], "forwards": 0, "useful_tokens": 0, "seconds": 0}
        for samples in ("all", "finally correct") if row["correct"] else ("all",):
            own[row["stage"], row["model"], row["suffix"], row["order"], samples].append(told)
    for line in folder.summary["emergence"]:
        where = tuple(line[key] for key in ("model", "suffix", "order", "samples"))
        yield ", ".join(map(str, where)), own["test", *where], line["n"], {"accuracy": line["accuracy"]}
    sizes = {"test": folder.config["items"], "validation": folder.config["validation"]}
    for where, rows in own.items():
        if where[-1] == "all":
            yield ", ".join(map(str, where)), rows, sizes[where[0]], {}


def _bench(folder: Folder) -> Iterator[Told]:
    own = defaultdict(list)
    for row in folder.rows:
        own[row["recipe"]].append(row)
    for line in folder.summary["rows"]:
        yield line["recipe"], own[line["recipe"]], line["runs"], {}


def _control(folder: Folder) -> Iterator[Told]:
    own = defaultdict(list)
    for row in folder.rows:
        own[row["case"], row["task"]].append({"seconds": 0, **row})
    for line in folder.summary["rows"]:
        said = {"accuracy": line["success"]["value"]}
        yield f"{line['case']}, {line['task']}", own[line["case"], line["task"]], line["n"], said
