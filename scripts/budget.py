"""Size budgets and layers of the source tree, read from its syntax: `python scripts/budget.py src`."""

import ast
import sys
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

P95_LINES = 30  # 95 of 100 function bodies are at most this long
MAX_LINES = 40  # no function body is longer
FILE_LINES = 400  # every file stays below

# A room and what it may import of unmask. A room not listed may import any other except those in ON_TOP.
LAYERS = {
    "errors": set(),
    "decode": {"errors"},
    "models": {"errors"},
    "denoise": {"decode", "models", "errors"},
}
ON_TOP = {"cli": {"__main__"}}  # a room that only these may import
OUTSIDE = {"tests", "experiments", "scripts", "docs_src"}  # these import src, never the other way round


class Function(NamedTuple):
    """A function and the number of lines of its body after the docstring."""

    path: Path
    line: int
    name: str
    lines: int


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines from the first to the last statement after the docstring."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not body:
        return 0
    decorators = getattr(body[0], "decorator_list", [])
    first = min([body[0].lineno, *(decorator.lineno for decorator in decorators)])
    return (body[-1].end_lineno or first) - first + 1


def functions(path: Path) -> Iterator[Function]:
    """Yield every function of a file, methods and inner functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(path, node.lineno, node.name, body_lines(node))


def percentile(values: Iterable[int], percent: int) -> int:
    """Return the smallest value that `percent` of 100 values do not exceed (0 of none)."""
    ranked = sorted(values)
    return ranked[ceil(percent * len(ranked) / 100) - 1] if ranked else 0


def size_errors(src: Path) -> list[str]:
    """List the violations of the size budgets below `src`."""
    files = sorted(src.rglob("*.py"))
    errors = []
    for path in files:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines >= FILE_LINES:
            errors.append(f"{path}: {lines} lines; files stay below {FILE_LINES}")
    every = [function for path in files for function in functions(path)]
    for function in every:
        if function.lines > MAX_LINES:
            where = f"{function.path}:{function.line}: {function.name}"
            errors.append(f"{where}: a body of {function.lines} lines; no function is over {MAX_LINES}")
    p95 = percentile((function.lines for function in every), 95)
    if p95 > P95_LINES:
        longest = sorted(every, key=lambda function: -function.lines)[:5]
        names = ", ".join(f"{function.path.name}:{function.name} ({function.lines})" for function in longest)
        errors.append(f"{src}: the 95th percentile function has {p95} lines, over {P95_LINES}; longest: {names}")
    return errors


def absolute(node: ast.ImportFrom, package: list[str]) -> str:
    """Return the absolute name of the module that a `from` import inside `package` names."""
    if not node.level:
        return node.module or ""
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(path: Path, src: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a file imports, in functions and by `import_module("...")` too."""
    package = list(path.relative_to(src).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def forbidden(room: str, name: str) -> str | None:
    """Say why a module in `room` of unmask may not import the dotted `name`, or None if it may."""
    top, _, rest = name.partition(".")
    if top in OUTSIDE:
        return f"the package never imports {top}"
    if top != "unmask":
        return None
    other = rest.partition(".")[0]
    if other == room or (other.startswith("__") and other.endswith("__")):
        return None
    if room in LAYERS and other not in LAYERS[room]:
        allowed = ", ".join(sorted(LAYERS[room])) or "nothing"
        return f"{room} may import {allowed} of unmask, not {other or 'unmask itself'}"
    if other in ON_TOP and room not in ON_TOP[other]:
        return f"{other} stands on top; only {', '.join(sorted(ON_TOP[other]))} may import it"
    return None


def layer_errors(src: Path) -> list[str]:
    """List the imports below `src` that reach up or out."""
    errors = []
    for path in sorted(src.rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        room = parts[1] if parts[0] == "unmask" and len(parts) > 1 else ""
        for line, name in imports(path, src):
            if reason := forbidden(room, name):
                errors.append(f"{path}:{line}: imports {name}: {reason}")
    return errors


def main(arguments: list[str]) -> int:
    """Print every violation below the given folder (default: src); return 1 if there is one."""
    src = Path(arguments[0] if arguments else "src")
    if not src.is_dir():
        print(f"error: no folder {src}; run this from the root of the repository", file=sys.stderr)
        return 2
    errors = size_errors(src) + layer_errors(src)
    for error in errors:
        print(error)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
