"""`unmask report`: a page of evidence from results folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Results folders, or folders that hold some; default results/.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The page; pictures are written beside it.")] = Path("docs/evidence.md"),
    json: Annotated[bool, typer.Option("--json", help="Print what the page was built from as JSON.")] = False,
) -> None:
    """Write a page of tables, pictures and answers from results folders alone, the newest of each kind.

    A folder of another version, one that lacks rows, and one whose summary is not that of its rows are refused.
    """
    import json as jsonlib

    from unmask.cli import write
    from unmask.study import report as pages

    write.check(out)
    folders = pages.write(results or [Path("results")], out, write.emit)
    told = {"page": str(out), "folders": [str(folder.path) for folder in folders]}
    print(jsonlib.dumps(told, indent=2) if json else f"{out}: built from {', '.join(told['folders'])}")
