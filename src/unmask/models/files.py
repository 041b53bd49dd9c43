"""Reading and writing the files of a checkpoint: JSON objects and safetensors, never a pickle, never half a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_text(path: Path) -> str:
    """The text in `path`; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `missing` if there is no such file and a default is given, else UserError."""
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; an earlier file survives a failure."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or the shards its index names."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {others[0]} is not read, because a pickle can run code" if others else ""
        raise UserError(f"{directory} has no {SINGLE} and no {INDEX}{hint}")
    table = read_json(directory / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{directory / INDEX} has no weight_map")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{directory / INDEX} names {name!r}, which is not a safetensors file beside it")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; {INDEX} names it")
    return [directory / name for name in names]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever the safetensors library says about a broken `path` into one line that names it."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is corrupted or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def headers(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and stored type of each tensor of one file, without reading its values."""
    with reading(path):
        file = safe_open(str(path), framework="pt")
    with file:
        for name in file.keys():  # noqa: SIM118 (the object is no mapping)
            with reading(path):
                part = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
            yield name, shape, kind


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of one file, read one at a time."""
    with reading(path):
        file = safe_open(str(path), framework="pt")
    with file:
        for name in file.keys():  # noqa: SIM118 (the object is no mapping)
            with reading(path):
                value = file.get_tensor(name)
            yield name, value
