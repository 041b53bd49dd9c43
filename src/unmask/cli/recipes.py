"""`unmask recipes` and `unmask explain`: what can be decoded with, and what each part of it does."""

from __future__ import annotations

import json as jsonlib
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.decode import Recipe, Rule, Tally
    from unmask.generate import Output
    from unmask.recipes.levers import Lever

JOINTS = {
    "|": "any of these",
    "&": "where all of these hold",
    ">>": "the right one chooses among what the left one chose",
    "~": "everywhere else",
    ".when": "the first one, in rows of which the second one holds",
}


HEADS = {
    "query": "computes",
    "unmask": "commits",
    "edit": "rewrites",
    "remask": "gives back",
    "beliefs": "believes",
    "stop": "stops",
}
"""What each part of a recipe says."""
BOUNDS = ("least", "above", "most", "below")
NARROW, FEW = 120, 4
"""A terminal of fewer columns than this has no room for a table of more columns than that."""


def recipes(
    levers: Annotated[
        bool, typer.Option("--levers", help="List what can be stacked, as in `dual + threshold`.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the published methods, with settings and citations."""
    from unmask.recipes import entries
    from unmask.recipes.levers import levers as known

    if levers:
        keys = ("name", "kind", "title", "cite", "needs", "defaults")
        found = list(known().values())
        told = [{**{key: getattr(v, key) for key in keys}, "bounds": _bounds(v)} for v in found]
        does = [f"{v.title} {_said(v.defaults)}".strip() for v in found]
        rows = [(v.name, v.kind, v.needs, text, v.cite) for v, text in zip(found, does, strict=True)]
        return _list(rows, ("lever", "kind", "needs", "what it is, and its settings", "from"), told if json else None)
    keys = ("name", "title", "about", "cite", "reproduces", "defaults")
    rows = [(e.name, e.title, _said(e.defaults), e.cite) for e in entries().values()]
    told = [{key: getattr(e, key) for key in keys} for e in entries().values()]
    return _list(rows, ("recipe", "what it is", "settings", "from"), told if json else None)


def _bounds(lever: Lever) -> dict[str, dict[str, Any]]:
    """What each setting may be, by BOUNDS (none where it has no such bound) and `among`."""
    found = {s.name: {key: getattr(s, key) for key in BOUNDS} for s in lever.settings.values()}
    told = {name: {k: v for k, v in bounds.items() if math.isfinite(v)} for name, bounds in found.items()}
    return {n: {**b, **({"among": list(a)} if (a := lever.settings[n].among) else {})} for n, b in told.items()}


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _list(rows: list[tuple[str, ...]], heads: tuple[str, ...], json: list[dict[str, Any]] | None) -> None:
    """Print a table, without its last column where many do not fit, or what JSON is to say."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if json is not None:
        print(jsonlib.dumps(json, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    console = Console()
    shown = heads[:-1] if console.width < NARROW and len(heads) > FEW else heads
    table.add_column(shown[0], style="bold cyan", no_wrap=True)
    for column in shown[1:]:
        table.add_column(column, no_wrap=column == "kind")
    for row in rows:
        table.add_row(*(Text(cell or "-") for cell in row[: len(shown)]))
    console.print(table)


def explain(
    recipe: Annotated[str, typer.Argument(help="A name, TOML file, stack of levers or expression.")],
    *,
    set: Annotated[list[str] | None, typer.Option(help="A setting, e.g. --set threshold=0.8.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Write a response to it, and say what each rule did.")] = None,
    model: Annotated[str | None, typer.Option(help="What writes it; the default is dllm.")] = None,
    guide: Annotated[str | None, typer.Option(help="Autoregressive model that gives a second opinion.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Folder of a joint sampler; the embedded dLLM has one.")] = None,
    template: Annotated[str | None, typer.Option(help="The response as words and slots.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Key of the randomness; default 0.")] = None,
    length: Annotated[int | None, typer.Option(help="Cells of the response.")] = None,
    block: Annotated[int | None, typer.Option(help="Cells of a block.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a recipe does, rule by rule, and where it is from; with a prompt, forward by forward."""
    from unmask.recipes import entries
    from unmask.settings import check_blocks, read

    given = _given(set or [], block, length)
    run = {"model": model, "guide": guide, "sampler": sampler, "template": template}
    run |= {"temperature": temperature, "seed": seed}
    if prompt is None and (useless := [f"--{name}" for name, value in run.items() if value is not None]):
        raise UserError(f"{' and '.join(useless)}: of use with --prompt only; give one")
    made, output, tally = read(recipe, given, length), None, None
    if prompt is None and length is not None:
        check_blocks(made, length)
    if prompt is not None:
        made, output, tally = _perform(recipe, given, prompt, {"length": length, **run})
    entry = entries().get(recipe)
    keys = ("title", "about", "cite", "reproduces", "defaults")
    known = {} if entry is None else {key: getattr(entry, key) for key in keys}
    if json:
        told = _told(made, known)
        if output is not None and tally is not None:
            told["account"] = {"prompt": prompt, **account(output, tally)}
        print(jsonlib.dumps(told, indent=2, ensure_ascii=False))
    else:
        _print(made, known, output, tally)


def _given(said: list[str], block: int | None, length: int | None) -> dict[str, Any]:
    """The settings of `--set` and `--block`, each said once; UserError for one that no generation could have."""
    from unmask.settings import Settings

    pairs = [*([("block", block)] if block is not None else []), *map(_pair, said)]
    given = dict(pairs)
    names = [name for name, _ in pairs]
    if twice := [name for name in given if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is said twice; give one")
    rules = ("block", "steps", "threshold", "factor", "tau", "eps")
    Settings(length=length, **{name: value for name, value in given.items() if name in rules})
    return given


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--set wants setting=value, not {text!r}")
    try:
        return name, jsonlib.loads(value)
    except ValueError:
        return name, value


def _perform(
    recipe: str,
    given: dict[str, Any],
    prompt: str,
    run: dict[str, Any],
) -> tuple[Recipe, Output, Tally]:
    """Write a response by the recipe, and count what each of its rules does. `run`: the model, and settings by name."""
    from dataclasses import replace

    from unmask.decode import Tally
    from unmask.generate import load
    from unmask.settings import Settings, read

    said = {name: value for name, value in run.items() if value is not None}
    loaded = load(said.pop("model", "dllm"))
    settings = Settings(**said)
    made = read(recipe, given, loaded.length(prompt, settings), loaded.network.config.layout)
    job = loaded.prepare([prompt], replace(settings, recipe=made))
    tally = Tally(job.recipe, job.canvas)
    return job.recipe, loaded.run(job, on_step=tally)[0], tally


def parts(recipe: Recipe) -> dict[str, list[tuple[int, str, str]]]:
    """What each part of a recipe says, rule by rule."""
    found = {part: rules(rule) for part in HEADS if part != "beliefs" and (rule := getattr(recipe, part)) is not None}
    if recipe.beliefs:
        found["beliefs"] = [line for belief in recipe.beliefs for line in rules(belief)]
    return {part: found[part] for part in HEADS if part in found}


def _told(recipe: Recipe, known: dict[str, Any]) -> dict[str, Any]:
    """The recipe as JSON can hold it."""
    told = {"name": recipe.name, "hash": recipe.hash, "expression": repr(recipe), "cite": recipe.cite, **known}
    lines = {part: [{"depth": d, "rule": r, "does": w} for d, r, w in found] for part, found in parts(recipe).items()}
    return {**told, "parts": lines, "revisions": recipe.allowance, "toml": recipe.to_toml()}


def account(output: Output, tally: Tally) -> dict[str, Any]:
    """What each rule did in each forward, as JSON can hold it: `among` and `chosen` have one number a rule."""
    keys = ("part", "depth", "rule", "unit")
    first = [told.as_dict() for told in tally.steps[0]]
    rows = [
        {"forward": n, "among": [t.among[0] for t in step], "chosen": [t.chosen[0] for t in step]}
        for n, step in enumerate(tally.steps, 1)
    ]
    return {
        "text": output.text,
        "ledger": output.ledger.as_dict(),
        "rules": [{key: told[key] for key in keys} for told in first],
        "forwards": rows,
    }


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
        below = rules(part, depth + 1)
        bracket = sign in ("|", "&") and type(part) is type(rule)  # the operands of a | b | c stand side by side
        found += [(deep - 1, text, told) for deep, text, told in below[1:]] if bracket else below
    return found


def _print(recipe: Recipe, known: dict[str, Any], output: Output | None, tally: Tally | None) -> None:
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
        console.print(Text("Settings: " + _said(known["defaults"])))
    for part, found in parts(recipe).items():
        often = f", each cell at most {recipe.revisions} x" if part in ("edit", "remask") else ""
        console.print(Text(f"\n{HEADS[part]} ({part}{often})", style="bold"))
        for depth, expression, does in found:
            console.print(Text.assemble("  " * (depth + 1), (expression, "cyan"), f"  {does}"), soft_wrap=True)
    console.print(Text(f"\nTOML (hash {recipe.hash})", style="bold"))
    console.print(Text(recipe.to_toml().strip()), soft_wrap=True)
    if output is not None and tally is not None:
        _print_account(console, output, tally)


def _print_account(console: Console, output: Output, tally: Tally) -> None:
    """The rules by number, then a line a forward: cells that each named or chose, and whether a condition held."""
    from rich.text import Text

    from unmask.cli.demo import helpers

    part = ""
    for number, told in enumerate(tally.steps[0], 1):
        if told.part != part:
            part = told.part
            console.print(Text(f"\nwhat {HEADS[part]} ({part})", style="bold"))
        line = Text.assemble(f"{number:>4}  ", "  " * told.depth, (repr(told.rule), "cyan"))
        console.print(line.append("  (holds?)" if told.unit == "rows" else ""), soft_wrap=True)
    shown = [
        [("✓" if t.unit == "rows" else str(t.chosen[0])) if t.chosen[0] else "·" for t in step] for step in tally.steps
    ]
    wide = [max(len(str(i + 1)), *(len(row[i]) for row in shown)) + 1 for i in range(len(shown[0]))]
    console.print(Text("\nforward" + "".join(f"{i:>{w}}" for i, w in enumerate(wide, 1)), style="bold"), soft_wrap=True)
    for number, row in enumerate(shown, 1):
        console.print(
            Text(f"{number:>7}" + "".join(f"{v:>{w}}" for v, w in zip(row, wide, strict=True))), soft_wrap=True
        )
    report = output.ledger
    told = [f"{report.forwards} forwards, {report.positions} positions, {report.tokens} cells committed"]
    told += [f"{name} {cost}" for name, cost in helpers(report).items()]
    console.print(Text(f"\n{output.text}\n{'; '.join(told)}"), soft_wrap=True)
