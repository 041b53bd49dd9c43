"""What the documentation says is so: its code runs, its tables are current, its links and commands and laws exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import draw_canvas
import fill_docs
from golden import toy
from unmask.decode import Canvas, Recipe, decode, parse
from unmask.decode.algebra import TERMS
from unmask.denoise import Plain
from unmask.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = fill_docs.pages()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str | Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(read(page)) if kind == language]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def words() -> Iterator[None]:
    """Terms that a page's code adds are taken out again."""
    before = dict(TERMS)
    yield
    TERMS.clear()
    TERMS.update(before)


def test_readme_code_runs() -> None:
    space: dict[str, object] = {"__name__": __name__}
    for code in blocks("README.md", "python"):
        exec(compile(code, "README.md", "exec"), space)


def test_readme_recipe_is_the_dual_cache() -> None:
    (code,) = blocks("README.md", "toml")
    from unmask import recipes

    assert Recipe.from_toml(code) == recipes.get("dual")


def test_a_method_in_ten_lines(words: None) -> None:
    (code,) = blocks("CONTRIBUTING.md", "python")
    (text,) = blocks("CONTRIBUTING.md", "toml")
    rule = code[code.index("@term") :]
    assert len([line for line in rule.splitlines() if line.strip()]) <= 10
    space: dict[str, object] = {"__name__": __name__}  # a dataclass looks its module up
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    recipe = Recipe.from_toml(text)
    assert parse(repr(recipe.unmask)) == recipe.unmask
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    rows = [toy_decode(recipe, [prompt]) for prompt in PROMPTS]
    together = toy_decode(recipe, PROMPTS)
    for prompt, (alone,), row in zip(PROMPTS, rows, together, strict=True):
        assert row[: len(alone)] == alone and alone[: len(prompt)] == prompt and toy.MASK not in alone
    with pytest.raises(UserError, match="may commit nothing"):
        Recipe.from_toml(text.replace(" | leftmost(1)", ""))


PROMPTS = [[3, 5, 8], [13, 21, 34, 55, 2], [1]]


def toy_decode(recipe: Recipe, prompts: list[list[int]]) -> list[list[int]]:
    """Decode 24 cells with the toy network; in every step each live row commits from the left of what is undecided."""
    canvas = Canvas.new(prompts, 24, mask_id=toy.MASK, dtype=torch.float64)
    denoise = Plain(toy.network(), slots=len(prompts), length=canvas.tokens.shape[1], cached=recipe.cached)
    for canvas, event in decode(denoise, recipe, canvas):  # noqa: B020
        last = torch.where(event.pick, canvas.position, -1).amax(1)
        assert (last < canvas.first(canvas.masked)).all()
    return [row[: len(p) + 24].tolist() for p, row in zip(prompts, canvas.tokens, strict=True)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_generated_sections_are_current(page: Path) -> None:
    text = read(page)
    assert fill_docs.fill(text) == text, "run `python scripts/fill_docs.py`"
    marked = re.findall(r"<!-- begin (\w+)", text)
    assert marked == [section for _, section, *_ in fill_docs.MARK.findall(text)]


def test_every_section_is_used() -> None:
    used = {section for page in PAGES for section in re.findall(r"<!-- begin (\w+)", read(page))}
    assert used <= set(fill_docs.SECTIONS) <= used | {"bench"}  # no page needs to show a benchmark


def test_laws_name_their_tests() -> None:
    text = read("ARCHITECTURE.md")
    assert len(text.splitlines()) <= 200
    laws = re.findall(r"^\| (\d) \| \*\*.*\| (.*) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in laws] == list(range(1, 10))
    for number, files in laws:
        found = re.findall(r"`(tests/[\w/]+\.py)`", files)
        assert found, f"law {number} names no test"
        for file in found:
            assert (ROOT / file).is_file(), f"law {number}: no {file}"


def test_every_law_test_is_named() -> None:
    text = read("ARCHITECTURE.md")
    for file in (ROOT / "tests" / "laws").glob("test_*.py"):
        assert name(file) in text, f"ARCHITECTURE.md does not name {name(file)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path) -> None:
    for path in re.findall(r"`((?:src|tests|scripts|docs)/[\w./-]+)`", read(page)):
        assert (ROOT / path).exists(), f"{name(page)} speaks of {path}"


def commands() -> dict[str, set[str]]:
    """Every command of `unmask`, a group's commands as `group command`, with its options."""
    import typer.main

    from unmask.cli import app

    def inside(group: Any, path: str) -> Iterator[tuple[str, set[str]]]:
        for word, command in group.commands.items():
            yield f"{path}{word}", {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            if hasattr(command, "commands"):
                yield from inside(command, f"{path}{word} ")

    return dict(inside(typer.main.get_command(app), ""))


WORDS = re.compile(r" ((?:[a-z0-9]+ \| )*[a-z0-9]+)(.*)")
"""A command, or several with bars between them, and the rest of the line."""


def named(line: str, known: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """(command, rest of the line) for each command that ` WORD ...` names; what follows a group is a command of it."""
    if match := WORDS.match(line):
        for word in match[1].split(" | "):
            group = any(other.startswith(f"{path}{word} ") for other in known)
            deeper = list(named(match[2], known, f"{path}{word} ")) if group else []
            yield from deeper or [(f"{path}{word}", match[2])]


def mentioned() -> list[tuple[str, str, set[str]]]:
    """(page, command, options) wherever a page writes `unmask COMMAND` as code."""
    found, known = [], commands()
    for page in PAGES:
        text = read(page)
        lines = [line for _, code in FENCE.findall(text) for line in code.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        for line in lines:
            if line.startswith("unmask "):
                for word, rest in named(line.removeprefix("unmask"), known):
                    found.append((name(page), word, set(re.findall(r"(?<!\S)--[a-z0-9-]+", rest.partition("#")[0]))))
    return found


def test_commands_exist() -> None:
    known = commands()
    assert mentioned()
    for page, word, options in mentioned():
        assert word in known, f"{page} mentions `unmask {word}`"
        assert options <= known[word] | {"--help"}, f"{page}: `unmask {word}` has no {options - known[word]}"


def test_commands_of_a_group_are_read() -> None:
    known = {
        "trace": set(),
        "trace record": {"--drafts"},
        "trace diff": set(),
        "train": {"--kind"},
        "train joint": set(),
    }
    for line, words in {
        " trace record PROMPT --drafts": ["trace record"],
        " trace record | diff A B": ["trace record", "trace diff"],
        " trace recrod A": ["trace recrod"],
        " trace": ["trace"],
        " train --kind ar": ["train"],
        " train joint --out X": ["train joint"],
        " explain dual": ["explain"],
    }.items():
        assert [word for word, _ in named(line, known)] == words
    assert {"trace record", "trace diff"} <= set(commands())


def test_picture_says_what_it_is_given() -> None:
    first = draw_canvas.Moment("start", [None, None], [0, 0], [False, False])
    last = draw_canvas.Moment("forward 1", ["a<b", "5"], [0.2, 1.0], [True, False])
    text = draw_canvas.draw([first, last], "a prompt", "a caption")
    assert text.count('class="mask"') == 3 and "a&lt;b" in text and "forward 1" in text
    assert draw_canvas.colour(0) != draw_canvas.colour(0.5) != draw_canvas.colour(1)


def test_picture_is_there_and_follows_dark_mode() -> None:
    text = read("docs/canvas.svg")
    assert "prefers-color-scheme: dark" in text and text.count('class="mask"') > 1 and 'class="cell"' in text
