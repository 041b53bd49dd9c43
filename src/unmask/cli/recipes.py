"""`unmask recipes` and `unmask explain`: what can be decoded with, and what each part of it does."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.decode import Recipe, Rule

JOINTS = {
    "|": "either of the two",
    "&": "where both hold",
    ">>": "the right one chooses among what the left one chose",
    "~": "everywhere else",
    ".when": "the first one, in rows of which the second one holds",
}


def recipes(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the published methods, with settings and citations."""
    from rich.console import Console
    from rich.table import Table

    from unmask.recipes import entries

    found = list(entries().values())
    if json:
        keys = ("name", "title", "about", "cite", "reproduces", "defaults")
        print(jsonlib.dumps([{key: getattr(e, key) for key in keys} for e in found], indent=2, ensure_ascii=False))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", style="bold cyan", no_wrap=True)
    for column in ("what it is", "settings", "from"):
        table.add_column(column)
    for e in found:
        table.add_row(e.name, e.title, ", ".join(f"{k}={v}" for k, v in e.defaults.items()), e.cite or "-")
    Console().print(table)


def explain(
    recipe: Annotated[str, typer.Argument(help="A name, TOML file or expression.")],
    *,
    set: Annotated[list[str] | None, typer.Option(help="A setting, e.g. --set threshold=0.8.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a recipe does, rule by rule, and where it is from."""
    from unmask.recipes import entries

    made, entry = _read(recipe, dict(map(_pair, set or []))), entries().get(recipe)
    known = (
        {} if entry is None else {k: getattr(entry, k) for k in ("title", "about", "cite", "reproduces", "defaults")}
    )
    parts = {part: rules(rule) for part in ("query", "unmask", "remask", "stop") if (rule := getattr(made, part))}
    if json:
        told = {"name": made.name, "hash": made.hash, "expression": repr(made), **known}
        told["parts"] = {k: [{"depth": d, "rule": r, "does": w} for d, r, w in v] for k, v in parts.items()}
        print(jsonlib.dumps({**told, "toml": made.to_toml()}, indent=2, ensure_ascii=False))
    else:
        _print(made, known, parts)


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--set wants setting=value, not {text!r}")
    try:
        return name, jsonlib.loads(value)
    except ValueError:
        return name, value


def _read(text: str, settings: dict[str, Any]) -> Recipe:
    from unmask import recipes as folder
    from unmask.decode import Recipe
    from unmask.settings import from_expression

    if text.endswith(".toml"):
        try:
            return Recipe.from_toml(Path(text).read_text(encoding="utf-8"), **settings)
        except OSError as error:
            raise UserError(f"cannot read the recipe {text}: {error.strerror}") from None
    if text.replace("-", "").replace("_", "").isalnum():
        return folder.get(text, **settings)
    if settings:
        raise UserError("--set changes settings of named recipes; write them into the expression")
    return from_expression(text)


def rules(rule: Rule, depth: int = 0) -> list[tuple[int, str, str]]:
    """(depth, expression, what it does) of a rule and of every rule inside it."""
    inner = getattr(rule, "rule", None)
    if type(rule).__name__ == "Chosen" and inner is not None:  # a set of cells, standing where a choice stands
        return rules(inner, depth)
    sign = getattr(rule, "_sign", "") or {"WhereNot": "~", "RowsNot": "~"}.get(type(rule).__name__, "")
    if type(rule).__name__.endswith("When"):
        sign = ".when"
    does = JOINTS.get(sign) or " ".join((type(rule).__doc__ or "").split("\n\n")[0].split())
    found = [(depth, repr(rule), does)]
    for part in rule.parts:
        found += rules(part, depth + 1)
    return found


def _print(recipe: Recipe, known: dict[str, Any], parts: dict[str, list[tuple[int, str, str]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble((recipe.name or "a recipe", "bold cyan"), f"  {known.get('title', '')}".rstrip()))
    for line in (known.get("about"), recipe.cite and f"From: {recipe.cite}"):
        if line:
            console.print(Text(line))
    if known.get("reproduces"):
        console.print(Text(f"Equals, token for token: {known['reproduces']}"))
    if known.get("defaults"):
        console.print(Text("Settings: " + ", ".join(f"{k}={v}" for k, v in known["defaults"].items())))
    heads = {"query": "computes", "unmask": "commits", "remask": "gives back", "stop": "stops"}
    for part, found in parts.items():
        console.print(Text(f"\n{heads[part]} ({part})", style="bold"))
        for depth, expression, does in found:
            console.print(Text.assemble("  " * (depth + 1), (expression, "cyan"), f"  {does}"), soft_wrap=True)
    console.print(Text(f"\nTOML (hash {recipe.hash})", style="bold"))
    console.print(Text(recipe.to_toml().strip()), soft_wrap=True)
