"""Write the generated parts of the documentation: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

A name may be followed by one argument, such as the results folder that a table is read from.

`python scripts/fill_docs.py` fills them from the recipes, the rules, the cards of the embedded pair and results/;
`--check` only says which files are out of date, and tests/test_docs.py does the same.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fill_benchmarks
from unmask import recipes

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "src" / "unmask" / "zoo"
STUDENT = "d2f"
KINDS = {"dllm": "dLLM", "ar": "twin", "D2F student": "D2F student"}
MARK = re.compile(r"(<!-- begin (\w+) ?([^ >]*) ?-->\n).*?(<!-- end \2 -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table; bars inside cells are escaped."""
    assert all(len(row) == len(head) for row in rows), head
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)


def recipe_table() -> str:
    """Name, what it is, what it is checked against, where it was published."""
    rows = []
    for entry in recipes.entries().values():
        equals = entry.reproduces or "laws only"
        rows.append([f"`{entry.name}`", entry.title, equals, entry.cite or "common knowledge"])
    return table(["recipe", "what it is", "checked against", "published in"], rows)


def recipe_texts() -> str:
    """Every recipe with its settings and expressions, as its file says them."""
    parts = []
    for entry in recipes.entries().values():
        settings = ", ".join(f"`{key}` = {json.dumps(value)}" for key, value in entry.defaults.items())
        body = entry.text[entry.text.index("[let]" if "[let]" in entry.text else "[recipe]") :].strip()
        facts = [
            f"{entry.about}",
            f"Settings: {settings}." if settings else "",
            entry.cite and f"Source: {entry.cite}.",
        ]
        parts.append(f"### {entry.name}\n\n{entry.title}.\n\n" + "\n".join(f for f in facts if f))
        parts.append(f"```toml\n{body}\n```")
    return "\n" + "\n\n".join(parts) + "\n\n"


def rule_table() -> str:
    """Every word of the rule language, from its class: what kind of rule it is, how it is called, what it says."""
    from unmask.decode.algebra import TERMS, Pick, Rows, Rule, Where
    from unmask.decode.belief import Belief
    from unmask.decode.early import Schedule

    kinds = {Where: "where", Pick: "pick", Rows: "rows", Schedule: "schedule", Belief: "belief"}
    rows = []
    for name, rule in sorted(TERMS.items()):
        cls = type(rule) if isinstance(rule, Rule) else rule
        kind = next(word for base, word in kinds.items() if issubclass(cls, base))
        call = name if isinstance(rule, Rule) else f"{name}({_parameters(cls)})"
        rows.append([kind, f"`{call}`", _sentence(cls)])
    order = list(kinds.values())
    rows.sort(key=lambda row: order.index(row[0]))
    return table(["kind", "written", "meaning"], rows)


def _parameters(cls: type) -> str:
    found = inspect.signature(cls).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found)


def _sentence(thing: Any) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def lever_table() -> str:
    """Every lever with its settings, the kind of part it fills, what it does, and where it was published."""
    from unmask.recipes.levers import levers

    rows = []
    for lever in levers().values():
        needs = f" Needs a {lever.needs}." if lever.needs and lever.needs not in lever.title else ""
        rows.append([f"`{lever}`", lever.kind, lever.title + needs, lever.cite or "common knowledge"])
    return table(["lever", "kind", "what it does", "published in"], rows)


def stack_matrix() -> str:
    """Which two levers can stand in one stack, and below it why the others cannot."""
    from unmask.recipes.levers import levers
    from unmask.recipes.stack import refusal

    names, rows = list(levers()), []
    alike: dict[str, list[tuple[str, str]]] = {}
    for at, one in enumerate(names[1:], 1):
        reasons = {other: refusal(other, one) for other in names[:at]}
        rows.append([f"`{one}`", *(("no" if reasons[n] else "yes") if n in reasons else "" for n in names[:-1])])
        for other, reason in reasons.items():
            if reason:
                general = re.sub(rf"(?<!keep )(?<!\()\b({one}|{other})\b", "_", reason)
                alike.setdefault(general, []).append((f"`{other} + {one}`", reason))
    told = ""
    for (_, reason), *more in alike.values():
        told += f"- {reason}." + (f" Likewise {', '.join(pair for pair, _ in more)}." if more else "") + "\n"
    return table(["", *(f"`{name}`" for name in names[:-1])], rows) + "\n" + told


SCORES = {"right": "right", "exact": "whole response exact", "doubled": "texts with a doubled word"}
RATES = {"forwards": "forwards a response", "tokens_per_forward": "tokens a forward"}


def cards() -> str:
    """What the cards of the embedded pair say of their making and of their evaluation."""
    found = [*both(), card(STUDENT)]
    return made(found) + "\n" + accuracy(found)


def rounds() -> str:
    """One row for each round of training that a shipped model has behind it."""
    settings = ("steps", "seed", "muon_lr", "adam_lr", "decay", "tokens_per_step")
    rows = []
    for card in both():
        made, model = card["trained"], "dLLM" if card["kind"] == "dllm" else "twin"
        for r in [*made.get("earlier_rounds", []), {"config": made["config"], "steps": made["steps_done"]}]:
            config = r["config"]
            values = [f"{config[k]:,}" for k in settings]
            rows.append([model, config["kind"], config.get("mixture", "even"), f"{r['steps']:,}", *values])
    heads = [
        "model",
        "objective",
        "mixture",
        "steps done",
        "steps planned",
        "seed",
        "Muon rate",
        "Adam rate",
        "decay",
        "tokens a step",
    ]
    return table(heads, rows)


def curve() -> str:
    """About ten points of each training curve: the loss, and whatever else was measured along the way."""
    rows, found = [], [(card["kind"], point) for card in both() for point in _some(card["curve"], 10)]
    heads = ["step", *dict.fromkeys(k for _, point in found for k in point if k not in ("step", "tokens"))]
    for kind, point in found:
        values = [f"{point[k]:.3f}" if k in point else "" for k in heads[1:]]
        rows.append(["dLLM" if kind == "dllm" else "twin", f"{point['step']:,}", *values])
    return table(["model", *heads], rows)


def _some(points: list[Any], count: int) -> list[Any]:
    """`count` of the points, evenly spaced, the last among them."""
    return [points[round((i + 1) * len(points) / count) - 1] for i in range(count)] if len(points) > count else points


def both() -> list[dict[str, Any]]:
    """The cards of the dLLM and of its twin."""
    return [card(name) for name in ("dllm", "twin")]


def card(name: str) -> dict[str, Any]:
    """The card of an embedded model."""
    return json.loads((ZOO / name / "card.json").read_text(encoding="utf-8"))


def made(found: list[dict[str, Any]]) -> str:
    """Sizes and training of each model."""
    rows = []
    for card in found:
        tokens = card["trained"]["tokens"] + card["trained"].get("tokens_inherited", 0)
        rows.append([KINDS[card["kind"]], f"{card['parameters']:,}", f"{tokens:,}", card["trained"]["machine"]])
    return table(["model", "parameters", "tokens seen", "trained on"], rows)


def accuracy(found: list[dict[str, Any]]) -> str:
    """Decoded accuracy by task and recipe, as `unmask evaluate` wrote it into the cards."""
    results = [(card["kind"], r) for card in found for r in card["accuracy"]]
    if not results:
        return "The evaluation is not in the cards yet.\n"
    shown = {k: v for k, v in SCORES.items() if any(k in r for _, r in results)}
    rows = []
    for kind, r in results:
        scores = [f"{r[k]:.3f}" if k in r else "" for k in shown]
        rates = [f"{r[k]:.2f}" for k in RATES]
        rows.append([r["task"], KINDS[kind], f"`{r['recipe']}`", str(r["items"]), *scores, *rates])
    order = {task: i for i, task in reversed(list(enumerate(row[0] for row in rows)))}
    rows.sort(key=lambda row: order[row[0]])
    return table(["task", "model", "recipe", "prompts", *shown.values(), *RATES.values()], rows)


def sampler() -> str:
    """How the joint sampler of the embedded dLLM came about, and its curve, from its card."""
    return _curve_of(
        "dllm-joint",
        "{parameters:,} parameters, {steps_done:,} steps of {rows} windows in {minutes:.0f} minutes ({machine}), up to "
        "{k} tokens a forward, on {runs:,} recorded runs of word problems and a third as many of restaurants (seed "
        "{seed}, Muon {muon_lr}, Adam {adam_lr}, decay {decay}).",
    )


def student() -> str:
    """How the D2F student of the embedded dLLM came about, and its curve, from its card."""
    return _curve_of(
        STUDENT,
        "{parameters:,} parameters in blocks of {block}, {steps_done:,} steps, {tokens:,} tokens in {minutes:.0f} "
        "minutes ({machine}), noise `{schedule}`, on {data} (seed {seed}, Muon {muon_lr}, Adam {adam_lr}, decay "
        "{decay}).",
    )


def _curve_of(name: str, text: str) -> str:
    found = card(name)
    told = found["trained"]["config"] | found["trained"] | {k: found[k] for k in ("parameters", "data")}
    rows = [[f"{point['step']:,}", f"{point['loss']:.3f}"] for point in _some(found["curve"], 10)]
    return text.format(**told) + "\n\n" + table(["step", "loss"], rows)


def settings() -> str:
    """The canonical names that `generate` takes in Python."""
    from dataclasses import fields

    from unmask.errors import UserError
    from unmask.generate import Model
    from unmask.settings import Settings, resolve

    def taken(name: str) -> bool:
        try:
            resolve({}, {name: None})
        except UserError:
            return name in inspect.signature(Model.generate).parameters
        return True

    names = [f"`{f.name}`" for f in fields(Settings) if taken(f.name)]
    return ", ".join(names) + ".\n"


def alias_table() -> str:
    """Every other name of a setting, the setting it stands for, and how its values are translated."""
    from unmask.settings import ALIASES, REFUSED

    rows = []
    for name, alias in ALIASES.items():
        values = alias.values or {}
        told = [f"`{v!r}`: {', '.join(f'`{k}={w!r}`' for k, w in m.items())}" for v, m in values.items() if m]
        rows.append([f"`{name}`", "; ".join(told) or f"`{alias.setting}`"])
    for name, (harmless, reason) in REFUSED.items():
        rows.append([f"`{name}`", f"accepted at `{harmless[0]!r}` only: {reason}"])
    return table(["name", "means"], rows)


def bench(folder: str) -> str:
    """The summary of one folder that `unmask bench` wrote: `<!-- begin bench results/bench-... -->`."""
    run, summary = (json.loads((ROOT / folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("run", "summary"))
    plan, machine = run["config"], run["machine"]
    head = (
        f"Median ms per step over interleaved runs, batch 1, {plan['length']} cells, {plan['dtype']}, "
        f"{plan['prompts']} prompts x {plan['repeats']} runs, one thread of {machine['cpu']}, torch {machine['torch']} "
        f"(`{folder}`).\n\n"
    )
    rows = []
    for r in summary["rows"]:
        times = [f"{r[k]:.2f}" for k in ("step_ms", "forward_ms", "other_ms")]
        counts = [f"{r['forwards']:.1f}", f"{r['positions']:.0f}", f"{r['tokens_per_forward']:.2f}"]
        speed = f"{r['useful_tokens_per_second']:.0f}"
        rows.append([f"`{r['recipe']}`", *times, f"{r['share']:.0%}", *counts, speed])
    heads = ["recipe", "ms a step", "forward", "everything else", "share"]
    return head + table([*heads, "forwards", "positions", "tokens a forward", "useful tokens/s"], rows)


def levers(folder: str = "") -> str:
    """The summary of one folder that `unmask bench levers` wrote: `<!-- begin levers results/levers-... -->`."""
    from unmask.study import levers_show as show

    if not folder:
        return "Not measured yet.\n"
    run, summary = (json.loads((ROOT / folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("run", "summary"))
    plan, machine = run["config"], run["machine"]
    told = (
        f"{plan['items']} problems of the held-out split, batch 1, {plan['dtype']}, one thread of {machine['cpu']}, "
        f"torch {machine['torch']}; seed {plan['seed']}, {summary['bootstrap']['draws']} resamples (`{folder}`). "
        f"{show.LEGEND}\n\n"
    )
    cases = summary["cases"]
    alone = [[one["case"], f"`{one['recipe']}`", *show.alone(one)] for one in cases]
    parts = [table(["case", "recipe", *show.ALONE], alone)]
    parts.append(table(["case", *show.PAIRED], [[one["case"], *show.paired(one)] for one in cases if one["paired"]]))
    parts.append(table(list(show.QUESTIONS), show.answers(summary)))
    parts.append(table(list(show.STACKS), show.stacks(summary)))
    heads = ("Each case", "Each case over another", "Questions", "Do two levers multiply?")
    body = "\n".join(f"### {head}\n\n{part}" for head, part in zip(heads, parts, strict=True))
    left = "".join(f"- Left out: {one['case']} ({one['why']}).\n" for one in summary["skipped"])
    return told + body + (f"\n{left}" if left else "")


def decode(folder: str = "") -> str:
    """The summary of one folder that `unmask bench decode` wrote: `<!-- begin decode results/decode-... -->`."""
    from unmask.study import decode_show as show

    if not folder:
        return "Not measured yet.\n"
    run, summary = (json.loads((ROOT / folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("run", "summary"))
    plan, machine = run["config"], run["machine"]
    roles = ", ".join(f"{role} {name}" for name, role in plan["roles"].items())
    told = (
        f"{roles}; {plan['items']} problems of the held-out split, {plan['sheets']} worksheets of the largest size, "
        f"batch 1, {plan['dtype']}, one thread of {machine['cpu']}, torch {machine['torch']}; seed {plan['seed']}, "
        f"{summary['bootstrap']['draws']} resamples (`{folder}`). {show.limits(plan)}. {show.LEGEND}\n\n"
    )
    parts = {
        "Questions": (show.QUESTIONS, show.questions(summary)),
        "One problem on a canvas": (show.CASES, show.cases(summary)),
        "Worksheets": (show.SHEETS, show.sheets(summary)),
        "The student over the others": (show.PAIRS, show.pairs(summary)),
        "The ways to decode": (show.WAYS, show.ways(plan)),
    }
    body = "\n".join(f"### {head}\n\n{table(list(heads), rows)}" for head, (heads, rows) in parts.items() if rows)
    left = "".join(f"- Left out: {one['case']} ({one['why']}).\n" for one in summary["skipped"])
    return told + body + (f"\n{left}" if left else "")


SECTIONS: dict[str, Callable[..., str]] = {
    "recipe_table": recipe_table,
    "recipe_texts": recipe_texts,
    "rule_table": rule_table,
    "lever_table": lever_table,
    "stack_matrix": stack_matrix,
    "settings": settings,
    "alias_table": alias_table,
    "cards": cards,
    "rounds": rounds,
    "curve": curve,
    "sampler": sampler,
    "student": student,
    "bench": bench,
    "levers": levers,
    "decode": decode,
    "headline": lambda folder: fill_benchmarks.headline(ROOT, folder, table),
    "speed": lambda folder="": fill_benchmarks.speed(ROOT, folder, table),
}


def fill(text: str) -> str:
    """`text` with every marked section written anew."""
    return MARK.sub(lambda m: f"{m[1]}{SECTIONS[m[2]](*[a for a in [m[3]] if a])}{m[4]}", text)


def pages() -> list[Path]:
    """The pages of the documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str]) -> int:
    """Fill every page, or with --check only name those that are out of date; 1 if there is one."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = fill(text)
        if new != text:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if '--check' in arguments else 'written'}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
