"""Draw docs/canvas.svg: a few moments of one real decode of the embedded model, cells coloured by confidence.

`python scripts/draw_canvas.py` decodes and writes the picture. Nothing in it is random: the same weights give the same
picture.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "canvas.svg"
PROMPT = (
    "Anna has 12 apples . Then she buys 3 bags of 4 apples each . She gives half of the apples to Tom . "
    "How many apples does Anna have now ?"
)
RECIPE = "threshold"

MOMENTS = 6
CELL, GAP, ROW, LINE, LEFT = 24, 3, 40, 20, 108
LETTER = 7.3  # width of one letter at 12 px in a monospaced font, with a little air
STOPS = [
    (0.0, (244, 140, 75)),
    (0.5, (253, 190, 110)),
    (0.8, (255, 240, 175)),
    (0.95, (186, 224, 232)),
    (1.0, (116, 173, 209)),
]
"""Confidence from 0 (orange) to 1 (blue); every colour carries black text and survives colour blindness."""

STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #57606a }
.cell { fill: #111; text-anchor: middle }
.mask { fill: #8c959f; fill-opacity: .28 }
.new { stroke: #57606a; stroke-width: 1.6 }
@media (prefers-color-scheme: dark) { text { fill: #9da7b3 } .cell { fill: #111 } .new { stroke: #e6edf3 } }
"""


@dataclass(frozen=True)
class Moment:
    """One line of the picture: what stands in each cell (None: undecided), how sure, and what is new."""

    title: str
    words: Sequence[str | None]
    score: Sequence[float]
    new: Sequence[bool]


def colour(score: float) -> str:
    """The colour of a confidence, interpolated between the stops."""
    for (low, a), (high, b) in pairwise(STOPS):
        if score <= high:
            part = max(0.0, score - low) / (high - low)
            return "#" + "".join(f"{round(x + (y - x) * part):02x}" for x, y in zip(a, b, strict=True))
    return colour(1.0)


def widths(moments: Sequence[Moment]) -> list[int]:
    """Every column is as wide as the longest word that ever stands in it."""
    columns = zip(*(m.words for m in moments), strict=True)
    return [max(CELL, *(round(len(w) * LETTER) + 8 for w in words if w), CELL) for words in columns]


def draw(moments: Sequence[Moment], prompt: str, caption: str) -> str:
    """The picture as SVG text."""
    wide = widths(moments)
    starts = [LEFT + sum(wide[:i]) + GAP * i for i in range(len(wide))]
    right = starts[-1] + wide[-1] + 8
    head = [*textwrap.wrap(prompt, int((right - 16) / LETTER)), caption]
    top = LINE * len(head) + 24
    bottom = top + ROW * len(moments)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + 40}" role="img">',
        f"<title>{escape(caption)}</title><style>{STYLE}</style>",
        *(f'<text x="8" y="{LINE * (i + 1)}">{escape(line)}</text>' for i, line in enumerate(head)),
    ]
    for row, moment in enumerate(moments):
        y = top + ROW * row
        out.append(f'<text x="8" y="{y + 20}">{escape(moment.title)}</text>')
        for i, (x, width) in enumerate(zip(starts, wide, strict=True)):
            out.append(_cell(moment, i, x, y, width))
    out.append(_legend(bottom + 14))
    return "\n".join([*out, "</svg>", ""])


def _cell(moment: Moment, i: int, x: int, y: int, width: int) -> str:
    word = moment.words[i]
    box = f'x="{x}" y="{y}" width="{width}" height="30" rx="4"'
    if word is None:
        return f'<rect class="mask" {box}/>'
    mark = ' class="new"' if moment.new[i] else ""
    text = f'<text class="cell" x="{x + width / 2:g}" y="{y + 19}">{escape(word)}</text>'
    return f'<rect{mark} {box} fill="{colour(moment.score[i])}"/>{text}'


def _legend(y: int) -> str:
    parts = [f'<text x="8" y="{y + 12}">confidence</text>']
    for i in range(11):
        parts.append(f'<rect x="{LEFT + 18 * i}" y="{y}" width="18" height="16" fill="{colour(i / 10)}"/>')
    end = LEFT + 18 * 11
    parts.append(f'<text class="cell" x="{LEFT + 9}" y="{y + 12}">0</text>')
    parts.append(f'<text class="cell" x="{end - 9}" y="{y + 12}">1</text>')
    parts.append(f'<rect class="mask" x="{end + 24}" y="{y}" width="22" height="16" rx="3"/>')
    parts.append(f'<text x="{end + 52}" y="{y + 12}">undecided</text>')
    parts.append(f'<rect class="new" x="{end + 136}" y="{y}" width="22" height="16" rx="3" fill="{colour(1.0)}"/>')
    parts.append(f'<text x="{end + 166}" y="{y + 12}">decided in this forward</text>')
    return "".join(parts)


def moments(job: Any, word: Callable[[int], str]) -> list[Moment]:
    """Decode one row; the empty canvas, and at most MOMENTS - 1 of the canvases after it, the last among them."""
    seen = [moment(job.canvas, None, word)]
    seen += [moment(canvas, event.pick, word) for canvas, event in job]
    last, count = len(seen) - 1, min(MOMENTS, len(seen))
    return [seen[round(i * last / max(1, count - 1))] for i in range(count)]


def moment(canvas: Any, pick: Any, word: Callable[[int], str]) -> Moment:
    """The response of the only row as it stands now."""
    start, step = int(canvas.origin[0]), int(canvas.step[0])
    tokens, masked, score = (t[0, start:].tolist() for t in (canvas.tokens, canvas.masked, canvas.score))
    new = [False] * len(tokens) if pick is None else pick[0, start:].tolist()
    words = [None if m else word(t) for t, m in zip(tokens, masked, strict=True)]
    return Moment(f"forward {step}" if step else "start", words, score, new)


def main() -> int:
    """Decode the prompt and write the picture."""
    import unmask
    from unmask.settings import Settings

    model = unmask.load()
    job = model.prepare([PROMPT], Settings(recipe=RECIPE))
    eos = model.network.config.eos_ids
    seen = moments(job, lambda token: "end" if token in eos else model.tokenizer.decode([token]))
    decided, forwards = sum(w is not None for w in seen[-1].words), seen[-1].title.split()[-1]
    caption = f"The embedded model, recipe {RECIPE}: {decided} cells in {forwards} forwards"
    TARGET.write_text(draw(seen, PROMPT, caption), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {' '.join(w or '_' for w in seen[-1].words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
