"""The size budgets and the layers hold in src, and the checker sees what breaks them."""

from pathlib import Path

import pytest

import budget

SRC = Path(__file__).resolve().parents[1] / "src"


def test_sizes():
    assert budget.size_errors(SRC) == []


def test_layers():
    assert budget.layer_errors(SRC) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def function(name: str, lines: int) -> str:
    return f"def {name}():\n" + "    x = 1\n" * lines


def body(source: str, tmp_path: Path) -> int:
    return max(found.lines for found in budget.functions(tree(tmp_path, {"a.py": source}) / "a.py"))


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    '''Say.'''\n", 0),
        ("def f():\n    '''Say\n    much\n    more.'''\n\n    # why\n    return 1\n", 1),
        ("def f():\n    x = 1\n\n    # counted: it stands between\n    return x\n", 4),
        ("def f(\n    a,\n    b,\n):\n    return (\n        a + b\n    )\n", 3),
        ("class A:\n    async def f(self):\n        def g():\n            pass\n        return g\n", 3),
        ("def f():\n    @one\n    @two\n    def g():\n        pass\n", 4),
        ("def f(): ...\n", 1),
    ],
)
def test_body_lines(source, lines, tmp_path):
    assert body(source, tmp_path) == lines


@pytest.mark.parametrize(("values", "expected"), [([], 0), ([7], 7), (range(1, 101), 95), ([1] * 19 + [9], 1)])
def test_percentile(values, expected):
    assert budget.percentile(values, 95) == expected


def test_nothing_violates_nothing(tmp_path):
    assert budget.size_errors(tmp_path) == budget.layer_errors(tmp_path) == []


@pytest.mark.parametrize("lines", [40, 41])
def test_longest_function(lines, tmp_path):
    short = "".join(function(f"f{i}", 1) for i in range(50))
    errors = budget.size_errors(tree(tmp_path, {"a.py": short, "deep/b.py": function("long", lines)}))
    assert len(errors) == (lines > 40)
    assert all("b.py:1: long: a body of 41 lines" in error for error in errors)


@pytest.mark.parametrize("lines", [30, 31])
def test_p95_function(lines, tmp_path):
    source = "".join(function(f"f{i}", lines) for i in range(2)) + "".join(function(f"g{i}", 1) for i in range(18))
    errors = budget.size_errors(tree(tmp_path, {"a.py": source}))
    assert len(errors) == (lines > 30)
    assert all("95th percentile function has 31 lines" in error for error in errors)


@pytest.mark.parametrize("lines", [399, 400])
def test_longest_file(lines, tmp_path):
    errors = budget.size_errors(tree(tmp_path, {"a.py": "x = 1\n" * lines}))
    assert len(errors) == (lines >= 400)


LAYERS = [  # file, line, allowed
    ("decode/loop.py", "from unmask.decode.canvas import Canvas", True),
    ("decode/loop.py", "from .canvas import Canvas", True),
    ("decode/loop.py", "from . import canvas", True),
    ("decode/loop.py", "from ..errors import UserError", True),
    ("decode/loop.py", "import torch", True),
    ("decode/loop.py", "from unmask import errors, __version__", True),
    ("decode/loop.py", "import unmask", False),
    ("decode/loop.py", "from unmask import load", False),
    ("decode/loop.py", "from .. import models", False),
    ("decode/loop.py", "from unmask.models.kv import Pool", False),
    ("decode/deep/loop.py", "from ...models import kv", False),
    ("decode/deep/loop.py", "from ..canvas import Canvas", True),
    ("decode/__init__.py", "from .loop import step", True),
    ("decode/__init__.py", "from ..denoise import plain", False),
    ("decode/loop.py", "def f():\n    from unmask.denoise import plain", False),
    ("decode/loop.py", "import importlib\nimportlib.import_module('unmask.models')", False),
    ("models/kv.py", "from unmask.models.transformer import T\nfrom unmask.errors import UserError", True),
    ("models/kv.py", "from unmask.decode import Canvas", False),
    ("denoise/plain.py", "import unmask.decode, unmask.models.kv", True),
    ("denoise/plain.py", "import unmask.train", False),
    ("errors.py", "import unmask.decode", False),
    ("engine.py", "from unmask.denoise import plain", True),
    ("engine.py", "from unmask.cli import main", False),
    ("cli/demo.py", "from unmask.cli import show\nfrom unmask import train", True),
    ("__main__.py", "from unmask.cli import main", True),
    ("engine.py", "import tests.golden", False),
    ("train/data.py", "from experiments.old import data", False),
    ("__init__.py", "import experiments", False),
]


@pytest.mark.parametrize(("name", "source", "allowed"), LAYERS)
def test_layer_rules(name, source, allowed, tmp_path):
    errors = budget.layer_errors(tree(tmp_path, {f"unmask/{name}": source}))
    assert (errors == []) == allowed, errors


def test_command(tmp_path, capsys):
    assert budget.main([str(tree(tmp_path, {"a.py": function("f", 1)}))]) == 0
    assert budget.main([str(tree(tmp_path, {"a.py": function("f", 50)}))]) == 1
    assert "a.py:1: f: a body of 50 lines" in capsys.readouterr().out
    assert budget.main([str(tmp_path / "nowhere")]) == 2
