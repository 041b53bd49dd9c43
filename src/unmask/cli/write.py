"""Output that is whole or not there."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from unmask.errors import UserError


def emit(text: str, output: Path | None) -> None:
    """Print `text`, or write it to a file that appears under its name only when it is complete."""
    if output is None:
        sys.stdout.write(text)
        return
    part = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=output.parent, delete=False, encoding="utf-8") as file:
            part = Path(file.name)
            file.write(text)
        part.chmod(0o666 & ~_umask())
        os.replace(part, output)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {output}: {error.strerror}") from None


def check(output: Path | None) -> None:
    """UserError, before anything is computed, for an output that could not be written."""
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise UserError(
            f"cannot write {output}: {'it is a directory' if output.is_dir() else 'no such folder, or closed'}"
        )


def check_folder(folder: Path) -> None:
    """UserError, before anything is computed, for a folder that could not be made or written into."""
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise UserError(f"cannot write the folder {folder}: {there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write the folder {str(folder)[:200]}: {error.strerror or error}") from None


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
