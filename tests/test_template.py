"""Templates: read, shared out, laid into the canvas as given cells with regions, and told back by region."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedded
import unmask
from unmask import UserError, recipes
from unmask.cli import main
from unmask.decode import Canvas, useful
from unmask.generate import Model, Output
from unmask.models.config import Layout
from unmask.template import ALLOCATIONS, CHAINS, REGIONS, SLOTS, Slot, Template, allocate, mark, regions, shown
from unmask.train import problems
from unmask.train.vocabulary import EOS

PROMPT, OTHER = embedded.PROMPT, "Tom has 7 eggs ."
THINK = "Tom has {think} so {think} #### {answer:2} ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return unmask.load(embedded.build(folder / "dllm"))


@pytest.fixture(scope="module")
def twin(folder) -> Model:
    return unmask.load(embedded.build(folder / "twin", layout=Layout("causal")))


# The language


slots = st.one_of(
    st.builds(Slot, st.sampled_from(["think", "write"]), st.none() | st.integers(1, 99)),
    st.builds(Slot, st.just("answer"), st.integers(1, 99)),
)
texts = st.text(st.sampled_from("ab {}:\n#é") | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)


@given(st.lists(st.tuples(texts, slots), min_size=1, max_size=5), texts | st.none())
def test_a_template_reads_back_what_it_prints(pairs: list[tuple[str, Slot]], tail: str | None) -> None:
    made = Template(tuple(part for pair in pairs for part in pair) + ((tail,) if tail else ()))
    assert Template.parse(str(made)) == made


@given(st.text(max_size=20) | st.text("{}think:5 wrteas", max_size=20))
def test_any_text_is_a_template_or_a_plain_error(text: str) -> None:
    try:
        assert str(Template.parse(text)).count("{") >= 1
    except UserError as error:
        assert "\n" not in str(error)


MISTAKES = [
    ("{thnik:5}", "unknown slot 'thnik'; did you mean 'think'.*column 1"),
    ("so {anwser:5}", "did you mean 'answer'.*column 4"),
    ("so {}", "unknown slot ''.*column 4"),
    ("so {think:0}", r"\{think:0\} at column 4.*at least 1"),
    ("so {think:-3}", "column 4.*at least 1"),
    ("so {think:}", "column 4.*at least 1"),
    ("so {think:2.5}", "column 4.*whole number"),
    ("so {think:²}", "column 4.*whole number"),
    ("so {think:" + "9" * 5000 + "}", "column 4.*whole number"),
    ("so {answer}", r"\{answer\} at column 4.*needs a number of cells"),
    ("{{so {think", "brace at column 6.*never ends"),
    ("{so {think}", "brace at column 1.*never ends"),
    ("so } {think}", "brace at column 4.*ends no slot; .*}}"),
    ("no slot {{think}}", "no slot to write into"),
    ("", "no slot to write into"),
    (3, "a template is a text"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES)
def test_mistakes_name_the_column(text: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Template.parse(text)
    assert "\n" not in str(caught.value)


# Sharing out


@given(n=st.integers(1, 60), more=st.integers(0, 2000), how=st.sampled_from(ALLOCATIONS))
def test_shares_are_whole_and_add_up(n: int, more: int, how: str) -> None:
    found = allocate(n + more, n, how)
    assert sum(found) == n + more and min(found) >= 1 and len(found) == n
    steps = [b - a for a, b in pairwise(found)]
    assert all({"even": -1 <= d <= 0, "front": d <= 0, "back": d >= 0}[how] for d in steps)
    assert max(found) - min(found) <= 1 or how != "even"
    weights = [found[i] - 1 for i in range(n)] if how != "back" else [found[-1 - i] - 1 for i in range(n)]
    ideal = [more * (n - i) / (n * (n + 1) / 2) if how != "even" else more / n for i in range(n)]
    assert all(abs(a - b) < 1 for a, b in zip(weights, ideal, strict=True))


def test_shares_by_hand() -> None:
    assert [allocate(9, 3, how) for how in ALLOCATIONS] == [[3, 3, 3], [4, 3, 2], [2, 3, 4]]
    assert [allocate(5, 3, how) for how in ALLOCATIONS] == [[2, 2, 1], [2, 2, 1], [1, 2, 2]]
    with pytest.raises(UserError, match="did you mean 'front'"):
        allocate(9, 3, "frnt")


def lay(text: str, length: int | None = None, how: str = "even"):
    return Template.parse(text).lay(lambda t: [ord(c) for c in t], length=length, default=20, allocation=how)


def told(text: str, length: int | None = None, how: str = "even") -> str:
    """The cells as text: words as they are, slots as the numbers of their regions."""
    form = lay(text, length, how)
    return "".join(
        str(region) if cell is None else chr(cell) for cell, region in zip(form.cells, form.region, strict=True)
    )


def test_cells_by_hand() -> None:
    assert told("a {think:3} b{answer:2}c") == "a111 b22c"
    assert told("a{think}b{think}c{answer:2}", 12) == "a1111b111c22"
    assert told("a{think}b{think}c{answer:2}", 12, "back") == "a111b1111c22"
    assert told("a{think}b{think}c{answer:2}", 14, "front") == "a111111b111c22"
    assert told("a{write}{think:2}{answer:2}") == "a" + "0" * 15 + "1122"
    assert told("{{{think:1}}}  {answer:1}") == "{1}2"
    assert told("{think:1} ", None) == "1 " and told("{think:2}", 2) == "11"


@given(
    length=st.integers(1, 80),
    parts=st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), slots), min_size=1, max_size=4),
    how=st.sampled_from(ALLOCATIONS),
)
def test_a_response_is_as_long_as_asked_or_refused(length: int, parts: list[tuple[str, Slot]], how: str) -> None:
    text = "".join(f"{words}{slot}" for words, slot in parts)
    numbers = [slot.cells for _, slot in parts]
    least = sum(len(words) for words, _ in parts) + sum(n or 1 for n in numbers)
    if length < least or (None not in numbers and length != least):
        with pytest.raises(UserError, match=r"too short; raise length|leave length out"):
            lay(text, length, how)
        return
    form = lay(text, length, how)
    assert len(form.cells) == len(form.region) == length
    for kind, region in SLOTS.items():
        cells = sum(c is None and r == region for c, r in zip(form.cells, form.region, strict=True))
        assert cells >= sum(slot.cells or 1 for _, slot in parts if slot.kind == kind)
    assert "".join(chr(c) for c in form.cells if c is not None) == "".join(words for words, _ in parts)


def test_slots_of_a_kind_side_by_side_are_refused() -> None:
    with pytest.raises(UserError, match="side by side"):
        lay("{think:3} {think:4}")
    assert told("{think:3} {answer:2}") == "11122"


# With a model


def consistent(out: Output, model: Model, length: int, template: str = THINK) -> None:
    """What must be so of any response by a template."""
    canvas = out.canvas
    assert int(canvas.valid.sum() - canvas.origin[0]) == length
    first = int(canvas.origin[0])
    words = [model.tokenizer.encode(part) for part in Template.parse(template).parts if isinstance(part, str)]
    held = canvas.given[0] & (canvas.position >= first)
    assert canvas.tokens[0][held & canvas.valid[0]].tolist() == [token for ids in words for token in ids]
    assert out.text == model.tokenizer.decode(out.tokens) and EOS not in out.tokens
    assert set(out.regions) == {REGIONS[SLOTS[slot.kind]] for slot in Template.parse(template).slots}
    written = canvas.tokens[0][useful(canvas)[0]].tolist()
    assert sorted(out.tokens) == sorted([*written, *(token for ids in words for token in ids)])


@pytest.mark.parametrize(
    "name", sorted(n for n, e in recipes.entries().items() if n not in ("ar", "adjust") and "grid" not in e.defaults)
)
def test_every_recipe_writes_into_a_template(name: str, model: Model, twin: Model) -> None:
    settings: dict[str, Any] = {"block": 8} if "block" in recipes.entry(name).defaults else {}
    settings |= {"guide": twin} if recipes.get(name).guided else {}
    out = model.generate(PROMPT, recipe=name, template=THINK, length=20, **settings)
    consistent(out, model, 20)
    assert out.canvas.given.sum() == len(model.encode(PROMPT)) + 5
    alone = model.generate(OTHER, recipe=name, template=THINK, length=20, seed=1, **settings)
    both = model.generate([PROMPT, OTHER], recipe=name, template=THINK, length=20, **settings)
    assert [(o.tokens, o.regions) for o in both] == [(o.tokens, o.regions) for o in (out, alone)]


@pytest.mark.parametrize("name", sorted(n for n, e in recipes.entries().items() if "grid" in e.defaults))
def test_a_model_of_absolute_blocks_takes_a_template(name: str, folder) -> None:
    layout = Layout("block", size=8, grid="absolute", prompt="blocks")
    model = unmask.load(embedded.build(folder / f"absolute-{name}", layout=layout))
    consistent(model.generate(PROMPT, recipe=name, template=THINK, length=20), model, 20)


def test_a_block_causal_model_takes_a_template(folder) -> None:
    model = unmask.load(embedded.build(folder / "block", layout=Layout("block", size=8)))
    consistent(model.generate(PROMPT, recipe="d2f", block=8, template=THINK, length=20), model, 20)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_response_is_as_long_as_without_a_template(model: Model, allocation: str) -> None:
    plain = model.generate(PROMPT, length=16)
    out = model.generate(PROMPT, template=THINK, allocation=allocation, length=16)
    consistent(out, model, int(plain.canvas.valid.sum()) - len(model.encode(PROMPT)))
    sizes = torch.unique_consecutive(out.canvas.region[0] * 2 + out.canvas.given[0], return_counts=True)[1].tolist()
    thought = [n for n, kind in zip(sizes, _kinds(out), strict=True) if kind == 1]
    assert thought == allocate(16 - 5 - 2, 2, allocation)
    assert model.length(PROMPT, unmask.settings.Settings(template="{think:3} so {answer:1}")) == 5


def _kinds(out: Output) -> list[int]:
    joined = torch.unique_consecutive(out.canvas.region[0] * 2 + out.canvas.given[0])
    return [int(kind) // 2 for kind in joined]


def test_regions_are_told_up_to_their_end(model: Model) -> None:
    out = model.generate(PROMPT, template="{think:4} so {think:4} #### {answer:3}", recipe="llada")
    canvas, own = out.canvas, ~out.canvas.given[0]
    expected: dict[str, list[str]] = {"thinking": [], "answer": []}
    for number in canvas.stretch[0][own].unique().tolist():
        cells = own & (canvas.stretch[0] == number)
        ids = canvas.tokens[0][cells].tolist()
        kept = ids[: ids.index(EOS)] if EOS in ids else ids
        expected[REGIONS[int(canvas.region[0][cells][0])]].append(model.tokenizer.decode(kept).strip())
    assert out.regions == {name: "\n".join(parts) for name, parts in expected.items()}
    assert model.generate(PROMPT, length=8).regions == {}


def test_regions_are_told_without_the_blanks_around_them() -> None:
    form = lay("{think:3} so {think:3} is {answer:2}")
    canvas = mark(Canvas.of([[7, *form.cells]], origin=[1], mask_id=-1, eos=[0]), [form])
    holes = canvas.masked[0].nonzero()[:, 0].tolist()
    for cell, letter in zip(holes, (" ", "a", "b", "c", "\0", "d", " ", "e"), strict=True):
        canvas.tokens[0, cell] = ord(letter)
    canvas = replace(canvas, decided_at=torch.where(canvas.masked, 1, canvas.decided_at))
    said = regions(canvas, lambda ids: "".join(map(chr, ids)))
    assert said == {"thinking": "ab\nc", "answer": "e"}
    assert "".join(map(chr, canvas.tokens[0][shown(canvas)[0]].tolist())) == " ab soc is e"


def test_ice_leaves_what_it_need_not_think(model: Model) -> None:
    out = model.generate(PROMPT, template=THINK, recipe="ice", tau=1e-6, length=20)
    assert out.forwards == 1 and out.regions["thinking"].strip() == "" and out.ledger.tokens == 2
    assert int(out.canvas.masked.sum()) == int((out.canvas.region == 1).sum()) > 0
    full = model.generate(PROMPT, template=THINK, recipe="ice-quota", tau=1.0, length=20)
    assert full.forwards == int((full.canvas.region == 1).sum()) + 1 and not full.canvas.masked.any()
    assert "ended" not in repr(out.recipe)


def test_an_answer_region_of_a_template_is_what_prophet_watches(model: Model) -> None:
    template = "{write:14} #### {answer:2}"
    out = model.generate(PROMPT, template=template, recipe="prophet", block=17, steps=17)
    assert (out.canvas.region == 2).sum() == 2 and out.regions.keys() == {"answer", "written"}
    consistent(out, model, 17, template)
    assert (model.generate(PROMPT, recipe="prophet", length=17).canvas.region == 2).sum() == 17


class Recorder:
    def __init__(self) -> None:
        self.settled: list[list[int]] = []
        self.drafts: list[list[int]] = []

    def put(self, value) -> None:
        self.settled.append(value.tolist())

    def put_draft(self, value) -> None:
        self.drafts.append(value.tolist())

    def end(self) -> None:
        self.settled.append([])


@pytest.mark.parametrize(("recipe", "more"), [("threshold", {}), ("ice", {"tau": 0.01}), ("dual", {"block": 5})])
def test_a_streamer_gets_the_whole_response(model: Model, recipe: str, more: dict) -> None:
    seen = Recorder()
    out = model.generate(PROMPT, template=THINK, recipe=recipe, length=20, streamer=seen, **more)
    assert seen.settled[0] == model.encode(PROMPT) and seen.settled[-1] == []
    assert [token for part in seen.settled[1:] for token in part] == out.tokens
    assert all(len(draft) <= 20 for draft in seen.drafts) and (recipe == "ice" or seen.drafts)


REFUSALS = [
    ({"template": "{thnik}"}, "did you mean 'think'"),
    ({"template": "{think} #### {answer:40}"}, "too short; raise length"),
    ({"template": "{think:3} #### {answer:4}"}, "leave length out"),
    ({"template": "{think:300} so {think:300}", "length": None}, "this model has 160"),
    ({"template": "{think} so {think}", "recipe": "prophet"}, "watches an answer, and the template has none"),
    ({"template": "{think} so {think}", "recipe": "ice"}, "watches an answer, and the template has none"),
    ({"template": "{think} {answer:1}", "recipe": "prefer(region(7), best(1))"}, "watches region 7"),
    ({"template": "{think}", "suffix": "#### 9"}, "write the suffix there"),
    ({"template": "{think}", "allocation": "frnt"}, "did you mean 'front'"),
    ({"template": 5}, "a template is a text"),
    ({"allocation": "front"}, "give a template"),
    ({"allocation": 3}, "unknown allocation '3'"),
    ({"recipe": "ice", "tau": 1.5}, "tau is a probability above 0 and at most 1"),
    ({"recipe": "ice", "tau": 0}, "tau is a probability above 0 and at most 1"),
    ({"recipe": "ice", "tau": float("nan")}, "tau is a probability above 0 and at most 1"),
    ({"recipe": "threshold", "tau": 0.5}, "has no setting tau"),
    ({"template": THINK, "block": 17}, "a block of 17 cells does not fit into a response of 16"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refused(model: Model, call: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        model.generate(**{"prompt": PROMPT, "length": 16, **call})
    assert "\n" not in str(error.value)


def test_an_autoregressive_model_is_refused(twin: Model) -> None:
    with pytest.raises(UserError, match="autoregressive model cannot write between given words"):
        twin.generate(PROMPT, template=THINK, length=16)


# The command line


@pytest.fixture
def run(capsys):
    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return command


def test_command(run, model: Model, tmp_path) -> None:
    said = ("--model", str(model.directory), "--template", THINK, "--length", "20", "--recipe", "ice", "--tau", "0.4")
    code, out, err = run("generate", PROMPT, *said, "--allocation", "back", "--json")
    record = json.loads(out)
    ours = model.generate(PROMPT, template=THINK, length=20, recipe="ice", tau=0.4, allocation="back")
    assert (code, err) == (0, "") and record["regions"] == ours.regions and record["text"] == ours.text
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n{OTHER}\n")
    code, out, _ = run("generate", "--batch", str(prompts), *said, "--json")
    assert code == 0 and [json.loads(row)["regions"].keys() for row in out.splitlines()] == [ours.regions.keys()] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--template", "{thnik}"), "did you mean 'think'"),
        (("--template", "{think:900}"), "this model has 160"),
        (("--template", "{think}", "--recipe", "ice"), "the template has none"),
        (("--template", "{think}", "--suffix", "x"), "write the suffix there"),
        (("--allocation", "front"), "give a template"),
        (("--recipe", "ice", "--tau", "2"), "tau is a probability"),
    ],
)
def test_mistakes_on_the_command_line(run, model: Model, tmp_path, arguments: tuple[str, ...], says: str) -> None:
    target = tmp_path / "out.json"
    code, out, err = run("generate", PROMPT, "--model", str(model.directory), "--output", str(target), *arguments)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1 and not target.exists()


# The embedded pair


def test_chains_are_what_the_problems_look_like() -> None:
    embedded_model = unmask.load()
    encode = embedded_model.tokenizer.encode
    stream = problems.problems(5)
    for problem in (next(stream) for _ in range(20)):
        template = CHAINS[len(problem.steps)]
        words, _, rest = problem.response.partition(" #### ")
        form = Template.parse(template).lay(encode, length=None, default=0)
        spelled = [*encode(words), *encode("####"), *encode(rest)]
        assert len(form.cells) == len(spelled)
        assert all(cell in (None, token) for cell, token in zip(form.cells, spelled, strict=True))


def test_the_embedded_model_thinks_and_answers() -> None:
    question = next(p for p in problems.problems(5) if len(p.steps) == 1)
    out = unmask.load().generate(question.question, template=CHAINS[1], recipe="ice", tau=1.0)
    assert out.regions["answer"] == out.regions["thinking"].split()[-1] == str(question.answer)
