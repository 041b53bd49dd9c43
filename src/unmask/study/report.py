"""`unmask report`: a page of evidence that is built from results folders alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from unmask.study import control_show, decode_questions, decode_show, emergence_show, gap_show, levers_show, load_show
from unmask.study.report_answers import Answer, answers
from unmask.study.report_folders import KINDS, Folder, gather
from unmask.study.report_notes import NOTES

Row = Mapping[str, Any]
WIDE = 14
"""Columns of a table of results whose shape this page does not know."""
LONG = 60
"""Rows of such a table."""
FLEXIBLE = ("accuracy_flexible", "ci_flexible")
TITLES = {
    "gap": "The gap to an autoregressive twin",
    "emergence": "When the answer emerges",
    "control": "Control under speed",
    "eval": "Benchmark tasks, the embedded models' honest scores",
    "serve": "A server under load",
    "decode": "Decoding at several lengths, and a distilled student",
    "levers": "What each lever is worth",
    "bench": "What a step costs",
    "peer": "Published loops beside ours",
}
HEAD = """# Evidence

This page is written by `unmask report` from results folders alone: every number in a table, every verdict and every
answer is computed from `rows.jsonl` and `summary.json` of the folder that is named above it, after the rows were
counted and the summary compared with them. Change nothing here by hand: a test writes the page anew and fails where it
differs. Intervals are 95%.
"""


def page(folders: Sequence[Folder], plots: Mapping[str, str] | None = None) -> str:
    """The page as markdown; `plots`: the picture of each kind that has one, as a path beside the page."""
    parts = [HEAD, "## The three questions\n", *(_answer(one) for one in answers(folders))]
    for kind in KINDS:
        own = [folder for folder in folders if folder.kind == kind]
        parts.append(f"## {TITLES[kind]}\n")
        if not own:
            parts.append(f"Not measured yet: no results folder `{kind}-...` was given.\n")
        for folder in own:
            parts += [provenance(folder), *SECTIONS.get(folder.kind, other)(folder)]
            if picture := (plots or {}).get(folder.name):
                parts.append(f"![{TITLES[kind]}]({picture})\n")
    notes = [f"- **{claim}.** {note}" for claim, note in NOTES]
    parts += ["## Footnotes on published claims\n", "Figures in this section are those of the papers.\n"]
    return "\n".join([*parts, *notes]) + "\n"


def provenance(folder: Folder) -> str:
    """Folder, commit, machine and date, in a line above its tables."""
    run, where = folder.run, folder.run["machine"]
    commit = (run["git"].get("hash") or "unknown")[:12]
    dirty = " with uncommitted changes" if run["git"].get("dirty") else ""
    load = ", ".join(map(str, where.get("load") or ())) or "unknown"
    machine = f"{where.get('cpu')}, {where.get('threads')} of {where.get('cores')} cores, torch {where.get('torch')}"
    quick = " **A quick run: too few problems to conclude from.**" if folder.config.get("quick") else ""
    return (
        f"`results/{folder.name}`: commit {commit}{dirty}, {run['date']}, unmask {run['unmask']}; {machine}, "
        f"load {load} at the start; {run.get('dtype') or 'dtype unknown'}; {len(folder.rows)} rows.{quick}\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, bars inside cells escaped; nothing where there are no rows."""
    lines = [heads, ["---"] * len(heads), *rows] if rows else []
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _answer(one: Answer) -> str:
    reasons = "\n".join(f"- {reason}" for reason in one.reasons)
    return f"### {one.question}\n\n**{one.word}.** {one.rule}\n\n{reasons}\n\n{table(one.heads, one.rows)}"


def gap(folder: Folder) -> Iterator[str]:
    """A table a batch size, the interactions, the frontier and the verdict."""
    yield f"{gap_show.settings(folder.config)}.\n\n{gap_show.LEGEND}\n"
    for batch in folder.config["batches"]:
        own = [line for line in folder.summary["rows"] if line["batch"] == batch]
        yield f"### Batch {batch}\n\n{table(gap_show.HEADS, [gap_show.cells(line) for line in own])}"
    rows = [gap_show.pair_cells(line) for line in folder.summary["pairs"]]
    yield f"### Do two levers multiply?\n\n{gap_show.PAIRS_LEGEND}\n\n{table(gap_show.PAIRS, rows)}"
    front, refused = folder.summary["frontier"], folder.summary["refused"]
    yield f"Frontier: {', '.join(front['cases'])}; area under it (AUP) {front['aup']:.0f}.\n"
    yield f"{gap_show.verdict(folder.summary)}\n"
    if refused:
        why = [[row["case"], row["why"]] for row in refused]
        yield f"Left out, as these models or the algebra refuse them:\n\n{table(('case', 'why'), why)}"


def emergence(folder: Folder) -> Iterator[str]:
    """When the answer is right, early exits against truncation, what a gap means, and the verdict."""
    summary, show = folder.summary, emergence_show
    bins = [show.gap_cells(line, one) for line in summary["calibration"] for one in line["bins"]]
    exits = list(map(show.exit_cells, summary["exits"]))
    yield f"{show.settings(folder.config)}.\n"
    for title, heads, rows, legend in (
        ("When is the answer right?", show.HEADS, list(map(show.cells, summary["emergence"])), show.LEGEND),
        ("Early exits against static truncation", show.EXITS, exits, show.EXITS_LEGEND),
        ("What a gap means", show.GAPS, bins, show.GAPS_LEGEND),
    ):
        yield f"### {title}\n\n{legend}\n\n{table(heads, rows)}"
    yield f"{show.verdict(summary)}\n"


def control(folder: Folder) -> Iterator[str]:
    """Success, fluency and cost by task, whether control is kept, what was refused, and the rule."""
    yield f"{control_show.settings(folder.config)}.\n\n{control_show.LEGEND}\n"
    for title, heads, rows in control_show.tables(folder.summary):
        yield f"### {title}\n\n{table(heads, rows)}"
    yield f"{folder.summary['rule']} Margin {folder.summary['margin']:g}.\n"


def scores(folder: Folder) -> Iterator[str]:
    """Each task: how many are right, strictly and by the last number anywhere, and what an answer took."""
    config = folder.config
    yield f"{config['model']} by `{config['recipe_used']}`, {config['cells']} cells.\n"
    heads = ("task", "problems", "right", "right, last number", "forwards", "positions", "useful tok/s", "not asked")
    rows = []
    for line in folder.summary["tasks"]:
        shares = [_share(line.get(key), line.get(ends)) for key, ends in (("accuracy", "ci"), FLEXIBLE)]
        numbers = [cell(line.get(key)) or "-" for key in ("forwards", "positions", "useful_tok_s", "not_asked")]
        rows.append([line["task"], str(line["problems"]), *shares, *numbers])
    yield table(heads, rows)


def _share(value: float | None, ends: Sequence[float] | None) -> str:
    return "-" if value is None or not ends else f"{value:.2%} [{ends[0]:.2%}, {ends[1]:.2%}]"


def serve(folder: Folder) -> Iterator[str]:
    """Throughput and latency at each level of load."""
    plan = folder.summary["plan"]
    yield (
        f"{plan['model']}{', recipe ' + plan['recipe'] if plan['recipe'] else ''}, {plan['dtype']}, at most "
        f"{plan['rows']} decoded at once, {plan['requests']} requests a level; milliseconds; ttft: to the first "
        f"committed text; good: within {plan['slo']:g} s.\n"
    )
    first = folder.summary["rows"][0]
    yield table(load_show.HEADS, [load_show.cells(line, first) for line in folder.summary["rows"]])


def decode(folder: Folder) -> Iterator[str]:
    """The questions that the run answers; all cases are on a page of their own."""
    yield f"{decode_questions.RULE}\n"
    yield table(decode_show.QUESTIONS, decode_show.questions(folder.summary))


def levers(folder: Folder) -> Iterator[str]:
    """Each case, the questions, and the interactions."""
    yield f"{levers_show.LEGEND}\n"
    cases = [[line["case"], f"`{line['recipe']}`", *levers_show.alone(line)] for line in folder.summary["cases"]]
    yield table(("case", "recipe", *levers_show.ALONE), cases)
    yield table(levers_show.QUESTIONS, levers_show.answers(folder.summary))
    yield table(levers_show.STACKS, levers_show.stacks(folder.summary))


def other(folder: Folder) -> Iterator[str]:
    """Tables of a summary whose shape is not known: its lists of rows, what is nested in them left out."""
    facts = {key: told for key, value in folder.summary.items() if (told := cell(value)) is not None}
    if facts:
        yield "\n".join(f"- {key}: {told}" for key, told in facts.items()) + "\n"
    for key, value in folder.summary.items():
        lines = [line for line in value if isinstance(line, Mapping)] if isinstance(value, list) else []
        if isinstance(value, Mapping) and cell(value) is None:
            lines = [value]
        names = dict.fromkeys(name for line in lines for name, one in line.items() if cell(one) is not None)
        heads = list(islice(names, WIDE))
        rows = [[cell(line.get(name)) or "-" for name in heads] for line in lines[:LONG]]
        if rows and heads:
            yield f"### {key}\n\n{table(heads, rows)}"
    yield "Whatever is nested deeper is in `summary.json`.\n"


def cell(value: Any) -> str | None:
    """A value as it stands in a table; None for what has no place in a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        return f"[{value[0]:.4g}, {value[1]:.4g}]"
    if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
        return levers_show.number(value, ".3g")
    return str(value) if isinstance(value, int | str) else None


SECTIONS = {
    **{"gap": gap, "emergence": emergence, "control": control, "eval": scores, "serve": serve},
    **{"decode": decode, "levers": levers},
}
"""How each kind whose shape is known is told."""


def picture(folder: Folder, beside: Path) -> Path:
    """Where the picture of a folder stands: beside the page, by the run's name."""
    return beside.with_name(f"{beside.stem}-{folder.run['name']}.svg")


def pictures(folders: Sequence[Folder], beside: Path) -> dict[str, str]:
    """The pictures that stand beside the page, by the folder that each is of."""
    return {one.name: path.name for one in folders if one.kind in SECTIONS and (path := picture(one, beside)).exists()}


def draw(folders: Sequence[Folder], beside: Path) -> None:
    """SVG pictures beside the page, where matplotlib is there; those of another run are removed where it is not."""
    from unmask.study import decode_plot, emergence_plot, gap_plot, levers_plot

    whole = {"gap": gap_plot, "emergence": emergence_plot}

    for folder in folders:
        path = picture(folder, beside)
        if find_spec("matplotlib") is None:
            path.unlink(missing_ok=True)
        elif folder.kind in whole:
            whole[folder.kind].draw(folder.summary, path)
        elif folder.kind in ("decode", "levers"):
            drawn = decode_plot if folder.kind == "decode" else levers_plot
            drawn.draw(folder.summary["cases"], path, folder.name)


def write(paths: Sequence[Path], out: Path, emit: Callable[[str, Path], None]) -> list[Folder]:
    """Draw the pictures beside `out` and `emit` the page; what it was built from.

    UserError, before anything is written, for folders that cannot be told of.
    """
    folders = gather(paths)
    page(folders)  # whatever cannot be told stops here, before a picture is drawn
    draw(folders, out)
    emit(page(folders, pictures(folders, out)), out)
    return folders
