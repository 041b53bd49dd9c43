"""The three questions of the project, answered from what was measured by rules that are said beside each answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.study import control_cases, control_show, control_summary, gap_show
from unmask.study.gap_cases import LEVERS
from unmask.study.levers_show import number
from unmask.study.report_folders import Folder

Row = Mapping[str, Any]
EXITS = {lever.name for lever in LEVERS if lever.kind == "exit"}
CACHES = {lever.name for lever in LEVERS if lever.kind == "cache"}
BLOCK_EXIT = "block_gap"
"""The early exit of a block-causal student, as its recipe names it."""
OURS, OTHER_ENGINE, SHAPE = "kernels", "llama.cpp", "embedded"
"""Engines and the shape as `unmask bench ar` names them."""
COMBINED = ("stack", "tok/s over the twin", "right, over the twin", "closes", "faster than each part")


@dataclass
class Answer:
    """A question, the answer in a few words, the rule, what it rests on, and a table of it."""

    question: str
    word: str
    rule: str
    reasons: list[str] = field(default_factory=list)
    heads: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)


def answers(folders: Sequence[Folder]) -> list[Answer]:
    """All three; what was not measured is said."""
    named = [(folder.run["name"] if folder.kind == "bench" else folder.kind, folder) for folder in folders]
    by_kind = dict(reversed(named))  # of a kind the first: a gap at the pair's own length, not one at another
    return [_combine(by_kind), _practice(by_kind), _control(by_kind)]


def closes(line: Row, margin: float) -> bool:
    """Is a case of `unmask bench gap` at least as fast as the twin and as good within `margin`, by whole intervals?"""
    rate, right = line["speedup_twin_ci"], line["accuracy_over_twin"]
    if not rate or not right or rate[0] is None or right["low"] is None:
        return False
    return rate[0] >= 1 and right["low"] >= -margin


def shown(line: Row, margin: float) -> str:
    """Does a case close the gap: "yes" by `closes`, "no" if a whole interval is on the other side, else "not shown"."""
    rate, right = line["speedup_twin_ci"], line["accuracy_over_twin"]
    if closes(line, margin):
        return "yes"
    slower = bool(rate) and rate[1] is not None and rate[1] < 1
    worse = bool(right) and right["high"] is not None and right["high"] < -margin
    return "no" if slower or worse else "not shown"


def _hedged(gap: Folder) -> str:
    return " (a quick run, of too few problems to conclude from)" if gap.config["quick"] else ""


def exits(line: Row) -> bool:
    """Does a case stop early?"""
    return bool(EXITS & {*line["levers"]}) or BLOCK_EXIT in line["recipe"]


def architecture(line: Row) -> bool:
    """Does a case change what a forward computes: by a cache, or by a student that attends in blocks?"""
    return line["role"] == "student" or bool(CACHES & {*line["levers"]})


def parts(line: Row, lines: Sequence[Row]) -> list[Row]:
    """What a stack is made of, each alone: its levers, or the student without its exit."""
    if line["role"] != "student":
        return [one for one in lines if list(one["levers"]) in [[name] for name in line["levers"]]]
    bare = line["recipe"].partition(f" + {BLOCK_EXIT}")[0]
    return [one for one in lines if one["role"] == "student" and one["recipe"] == bare]


def faster(line: Row, others: Sequence[Row]) -> bool:
    """Is the whole interval of its speed-up over vanilla above those of all others?"""
    ends = [one["speedup_vanilla_ci"] for one in (line, *others)]
    if not others or any(end is None or None in end for end in ends):
        return False
    return ends[0][0] > max(high for _, high in ends[1:])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _combine(by_kind: Mapping[str, Folder]) -> Answer:
    rule = (
        "Yes if the verdict of `unmask bench gap` is that the gap is closed (its rule is below) and a stack of an "
        "early exit and an architecture lever (a cache, or a student that attends in blocks) closes it too and is "
        "faster than each of its parts alone, by whole intervals of the speed-up over vanilla. No if the stack of the "
        "verdict is slower or worse by a whole interval, else not shown. Two levers multiply if "
        "the interval of I = ln S(both) - ln S(one) - ln S(other) holds 0. Only the stack of the verdict was chosen on "
        "other problems; that one of many others does well here may be chance."
    )
    found = Answer("Can architecture and early stopping combine to close the inference gap?", "not measured yet", rule)
    if gap := by_kind.get("gap"):
        first, margin = gap.config["batches"][0], gap.config["margin"]
        lines = [line for line in gap.summary["rows"] if line["batch"] == first]
        both = [line for line in lines if exits(line) and architecture(line)]
        won = [one["case"] for one in both if closes(one, margin) and faster(one, parts(one, lines))]
        verdict = gap.summary["verdict"]
        closed = verdict["closed"]
        best = [shown(line, margin) for line in lines if line["case"] == verdict["best"]]
        found.word = "yes" if won else "the gap is closed, but not shown to be by combining these two"
        found.word = (found.word if closed else " and ".join(best)) + _hedged(gap)
        found.reasons += [f"Gap {'closed' if closed else 'not closed'}, by the stack chosen on other problems."]
        found.reasons += [f"Stacks of both that close it and beat their parts: {', '.join(won) or 'none'}."]
        found.reasons += [_multiplied([(p["a"], p["b"], p["verdict"]) for p in gap.summary["pairs"]], "gap")]
        found.heads, found.rows = COMBINED, [_combined(one, lines, margin) for one in both]
    if levers := by_kind.get("levers"):
        told = [(i["one"], i["other"], i["speed"]["verdict"]) for i in levers.summary["interactions"]]
        found.reasons.append(_multiplied(told, "levers"))
    return found


def _combined(line: Row, lines: Sequence[Row], margin: float) -> list[str]:
    right = line["accuracy_over_twin"]
    told = number(right, "+.3f") if right else "-"
    rate = gap_show.interval(line["speedup_twin"], line["speedup_twin_ci"])
    return [line["case"], rate, told, shown(line, margin), _yes(faster(line, parts(line, lines)))]


def _multiplied(pairs: Sequence[tuple[str, str, str]], where: str) -> str:
    """How many pairs with an early exit overlap, multiply, or are worth more than that."""
    own = [words for a, b, words in pairs if any(name.startswith((*EXITS, "ice")) for name in (a, b))]
    counts = Counter(words.partition(":")[0] for words in own)
    told = ", ".join(f"{words} {count}" for words, count in sorted(counts.items())) or "none was measured"
    return f"Of {len(own)} pairs with an early exit in `{where}`, by useful tokens a second: {told}."


def _practice(by_kind: Mapping[str, Folder]) -> Answer:
    rule = (
        "Yes at a batch size if the stack that was chosen on other problems is there at least as fast as the "
        "autoregressive twin in useful tokens a second, and right at most the margin less often: both by the whole 95% "
        "interval of the paired difference. No if a whole interval is on the other side, else not shown. "
        "The twin has the same tokenizer, data and size, and runs on our own fast "
        "path. Where another engine was timed on the same shape, what the twin takes over it is told, too: an engine "
        "that is faster than our twin is the harder yardstick."
    )
    found = Answer("Can diffusion language models match autoregressive speed in practice?", "not measured yet", rule)
    if gap := by_kind.get("gap"):
        best, margin, words = gap.summary["verdict"]["best"], gap.config["margin"], []
        for batch in gap.config["batches"]:
            own = [line for line in gap.summary["rows"] if line["batch"] == batch]
            words += [f"batch {batch}: {shown(one, margin)}" for one in own if one["case"] == best]
            found.reasons += [_chosen(one, margin) for one in own if one["case"] == best]
            found.reasons.append(_counted(batch, [one for one in own if one["role"] != "twin"], margin))
        found.word = (", ".join(words) or found.word) + _hedged(gap)
    found.reasons += _engines(by_kind.get("bench-ar"), by_kind.get("gap"))
    if decode := by_kind.get("decode"):
        twins = [name for name, role in decode.config["roles"].items() if role == "twin"]
        asked = [q for q in decode.summary["questions"] if q["kind"] == "faster" and q["over"].split()[0] in twins]
        found.reasons += [f"{q['title']}: {number(q['found'])}, {q['answer']} (`decode`)." for q in asked]
    if levers := by_kind.get("levers"):
        asked = [c for c in levers.summary["comparisons"] if c["over"] == "ar"]
        found.reasons += [
            f"{c['title']}: {number(c['speed'])} times its useful tok/s, accuracy {number(c['accuracy'], '+.3f')} "
            f"(`levers`; * the interval shows no difference)."
            for c in asked
        ]
    return found


def _engines(bench: Folder | None, gap: Folder | None) -> list[str]:
    """How long a token of the twin's shape takes here and in another engine; what the chosen stack then has over it."""
    lines = [line for line in bench.summary["rows"] if line["what"] == "one token"] if bench else []
    told = []
    for other in [line for line in lines if line["engine"] == OTHER_ENGINE and line["preset"] == SHAPE]:
        alike = [one for one in lines if (one["preset"], one["dtype"]) == (SHAPE, other["dtype"])]
        for one in [one for one in alike if one["engine"] == OURS and one["ms"] and other["ms"]]:
            ratio = one["ms"] / other["ms"]
            words = (
                f"One token of the twin's shape in {one['dtype']}: {one['ms']:.3f} ms here, {other['ms']:.3f} ms in "
            )
            words += f"{OTHER_ENGINE}, {ratio:.2f} times as long (`bench-ar`)."
            if gap and gap.config["dtype"] == one["dtype"] and gap.summary["verdict"]["speedup_twin"]:
                over = gap.summary["verdict"]["speedup_twin"] / ratio
                words += (
                    f" If that holds for whole texts, the chosen stack has {over:.2f} times the speed of that engine."
                )
            told.append(words)
    return told


def _counted(batch: int, own: Sequence[Row], margin: float) -> str:
    """How many cases are at least as fast as the twin, and how many of them as good."""
    ends = [one["speedup_twin_ci"] for one in own]
    quick = sum(bool(end) and end[0] is not None and end[0] >= 1 for end in ends)
    good = sum(closes(one, margin) for one in own)
    return f"Batch {batch}: {quick} of {len(own)} cases are at least as fast as the twin, {good} of them as good, too."


def _chosen(line: Row, margin: float) -> str:
    rate = gap_show.interval(line["speedup_twin"], line["speedup_twin_ci"])
    right = number(line["accuracy_over_twin"], "+.3f") if line["accuracy_over_twin"] else "-"
    return (
        f"Batch {line['batch']}, {line['case']}: {rate} times the twin's useful tok/s, accuracy {right}, "
        f"{'as good' if closes(line, margin) else 'not shown to be as fast and as good'} (margin {margin:g})."
    )


KEPT = ("task", "decoder", "speed", "success", "over vanilla", "in words", "log-likelihood over vanilla")
CONTROL = (
    "Of the tasks on which vanilla decoding succeeds more often than the twin that writes left to right and cannot see "
    "given words ahead (there is an advantage: the whole interval of the paired difference is above 0), and of the "
    "decoders of the masked model and its student that are faster than vanilla by the whole interval of the speed-up: "
    "yes if one keeps control there (the whole interval of its success minus that of vanilla is at or above minus the "
    "margin), no if every one loses it (the whole interval is below), else not shown. That one of several decoders "
    "keeps control may be chance, so all are listed. A refusal counts as a failure."
)


def _control(by_kind: Mapping[str, Folder]) -> Answer:
    question, found = "Is the advantage in control separate from speed?", by_kind.get("control")
    if found is None:
        rule = "Answered only where success under constraints was measured with and without the levers."
        return Answer(question, "not measured yet", rule, ["No results folder holds such a run."])
    lines = found.summary["rows"]
    told = Answer(question, "", CONTROL, heads=KEPT)
    words = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        words.append(f"{task}: {separate(own)}")
        told.reasons.append(_advantage(task, own))
        told.rows += [[task, *_kept(line)] for line in own if _quicker(line)]
    refused = sorted({f"{line['case']} ({line['task']})" for line in lines if line["refused"] == 1})
    told.reasons.append(f"Refused outright: {', '.join(refused) or 'nothing'}.")
    for verdict in (control_summary.LOSES, control_summary.KEEPS):
        names = [one["case"] for one in found.summary["verdicts"] if one["verdict"] == verdict]
        where = "on some task" if verdict == control_summary.LOSES else "on all tasks"
        told.reasons.append(f"In all, {verdict} {where}: {', '.join(names) or 'none'}.")
    told.word = ", ".join(words) + _hedged(found)
    return told


def _quicker(line: Row) -> bool:
    """Is a masked model or a student faster than vanilla by the whole interval?"""
    rate = line["speedup"]
    return line["role"] != "twin" and rate is not None and rate["low"] is not None and rate["low"] > 1


def separate(lines: Sequence[Row]) -> str:
    """The answer for one task, by CONTROL."""
    (vanilla,) = (line for line in lines if line["case"] == control_cases.VANILLA)
    over = vanilla["over_blind"]
    if over is None or not over["low"] > 0:
        return "no advantage shown"
    verdicts = [line["verdict"] for line in lines if _quicker(line)]
    if control_summary.KEEPS in verdicts:
        return "yes"
    return "no" if verdicts and all(one == control_summary.LOSES for one in verdicts) else "not shown"


def _advantage(task: str, lines: Sequence[Row]) -> str:
    (vanilla,) = (line for line in lines if line["case"] == control_cases.VANILLA)
    others = [line for line in lines if line["role"] == "twin" and line["refused"] < 1]
    told = "; ".join(f"{one['case']}: {control_show.estimate(one['success'])}" for one in others)
    over = control_show.estimate(vanilla["over_blind"], "+.3f")
    return (
        f"{task}: vanilla succeeds in {control_show.estimate(vanilla['success'])} ({told}), {over} over the blind twin."
    )


def _kept(line: Row) -> list[str]:
    rate, over = control_show.estimate(line["speedup"], ".2f"), control_show.estimate(line["over_vanilla"], "+.3f")
    fluency = control_show.estimate(line["loglik_over_vanilla"], "+.2f")
    return [line["case"], rate, control_show.estimate(line["success"]), over, line["verdict"], fluency]
