"""The package starts fast, exports what it says, speaks plainly about mistakes, and ships its data."""

import ast
import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import unmask
from unmask.errors import UserError, suggest

ROOT = Path(__file__).resolve().parents[1]
START_S = 0.3  # the budget of `import unmask` and of `unmask --help`, beyond the start of the interpreter


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "src", check=False)
    assert done.returncode == 0, done.stderr
    return done


def fastest(runs: int, *arguments: str) -> float:
    """Return the least processor time of a few runs, in seconds: wall clock would measure the neighbours."""
    times = []
    for _ in range(runs):
        before = os.times()
        run(*arguments)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(times)


@pytest.mark.parametrize(
    "command",
    ["import unmask", "import runpy; sys.argv = ['unmask', '--help']; runpy.run_module('unmask', run_name='__main__')"],
    ids=["import", "help"],
)
def test_start_without_torch(command):
    code = f"import sys\ntry:\n    {command}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
    run("-c", code + "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy")


def test_import_is_fast():
    assert fastest(3, "-c", "import unmask") - fastest(3, "-c", "pass") < START_S


def test_help_is_fast():
    assert fastest(5, "-m", "unmask", "--help") - fastest(5, "-c", "pass") < START_S


@pytest.mark.parametrize("name", unmask.__all__)
def test_exports_resolve(name):
    assert callable(getattr(unmask, name))
    assert name in dir(unmask)


def test_exports_agree_with_what_type_checkers_see():
    source = ast.parse(Path(unmask.__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == unmask._EXPORTS
    assert sorted(unmask.__all__) == sorted(unmask._EXPORTS)


@pytest.mark.parametrize("first", ["import unmask", "import unmask.decode", "from unmask.decode import Canvas"])
def test_decode_is_the_loop_and_its_folder(first):
    run("-c", f"{first}\nimport unmask\nassert callable(unmask.decode) and unmask.decode.Canvas is unmask.Canvas")
    run("-c", f"{first}\nfrom unmask import decode\nimport unmask.decode as folder\nassert decode is folder")


def test_unknown_export():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        unmask.lode  # noqa: B018


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("duall", ["prefix", "dual"], "unknown recipe 'duall'; did you mean 'dual'? Known: dual, prefix"),
        ("D2F", ["d2f"], "unknown recipe 'D2F'; did you mean 'd2f'? Known: d2f"),
        ("x", ["dual", "dual"], "unknown recipe 'x'. Known: dual"),
        ("", iter(["dual"]), "unknown recipe ''. Known: dual"),
        ("x", [], "unknown recipe 'x'. There is no recipe to choose from"),
        ("two\nlines", ["dual"], r"unknown recipe 'two\nlines'. Known: dual"),
    ],
)
def test_suggest(name, known, message):
    error = suggest(name, known, "recipe")
    assert isinstance(error, UserError)
    assert str(error) == message


def test_user_error_is_one_line():
    error = UserError("cannot read\n  the file;\n\ntry another")
    assert str(error) == "cannot read the file; try another"
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling (the dev extra)")
def test_wheel_ships_the_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wheel = next(tmp_path.glob(f"unmask-{unmask.__version__}-*.whl"))
    shipped = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    wanted = [
        path
        for path in (source / "unmask").rglob("*")
        if path.suffix in {".py", ".typed", ".safetensors", ".json", ".toml"}
    ]
    assert {path.relative_to(source).as_posix() for path in wanted} <= shipped
