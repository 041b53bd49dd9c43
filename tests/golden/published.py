"""Import published decoding loops from a clone: the module alone, its heavy dependencies replaced by empty shells."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ORIGIN = {  # key on the command line: (where the clone comes from, where the loop lies in it)
    "llada": ("https://github.com/ML-GSAI/LLaDA", ["generate.py"]),
    "fast-dllm": ("https://github.com/NVlabs/Fast-dLLM", ["v1/llada/generate.py", "llada/generate.py"]),
    "prophet": ("https://github.com/pixeli99/Prophet", ["generate_earlyexit.py"]),
    "dream": (
        "https://github.com/zhijie-group/Discrete-Diffusion-Forcing",
        ["D2F-eval/model_cache/dream/generation_utils.py", "generation_utils.py"],
    ),
    "d2f": ("https://github.com/zhijie-group/Discrete-Diffusion-Forcing", ["D2F-eval/eval_llada.py"]),
    "d2f-dream": ("https://github.com/zhijie-group/Discrete-Diffusion-Forcing", ["D2F-eval/eval_dream.py"]),
    "sdar": ("https://github.com/JetAstra/SDAR", ["generate.py"]),
    "llada2": (
        "https://github.com/ZHZisZZ/dllm",
        ["dllm/pipelines/llada2/models/modeling_llada2_moe.py", "modeling_llada2_moe.py"],
    ),
    "llada21": (
        "https://github.com/ZHZisZZ/dllm",
        ["dllm/pipelines/llada21/models/modeling_llada21_moe.py", "modeling_llada2_moe.py"],
    ),
    "fast-dllm-v2": ("https://github.com/NVlabs/Fast-dLLM", ["v2/generation_functions.py"]),
}
BESIDE = "published_beside"
"""The package that a module's relative imports are looked for in; there is none."""
HEAVY = (
    *("transformers", "peft", "accelerate", "datasets", "lm_eval", "tqdm", "packaging", "model", "model_cache"),
    BESIDE,
)


class _Anything(type):
    """A class whose every missing attribute is another such class, and which any type may subscript."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return shell(name)

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(cls, *given: Any, **named: Any) -> Any:
        decorated = len(given) == 1 and not named and isinstance(given[0], type | FunctionType)
        return given[0] if decorated else super().__call__(*given, **named)


def shell(name: str) -> type:
    """A stand-in for any class or function of a heavy dependency: can be called, subclassed, used as a decorator."""

    def call(self: Any, first: Any = None, *rest: Any, **named: Any) -> Any:
        return first

    return _Anything(name, (), {"__init__": lambda self, *a, **k: None, "__call__": call})


class _Hollow(ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return shell(name)


class _Shells(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def shells() -> Iterator[None]:
    """Replace the heavy dependencies, for the imports inside the block only."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in HEAVY}
    for name in kept:
        del sys.modules[name]
    finder = _Shells()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in HEAVY]:
            del sys.modules[name]
        sys.modules.update(kept)


@dataclass(frozen=True)
class Published:
    """A module of a clone and where it came from."""

    module: ModuleType
    source: dict[str, str]


def load(key: str, clone: Path) -> Published:
    """Import the loop's module from the clone; nothing of it is copied."""
    url, candidates = ORIGIN[key]
    file = next((f for f in candidates if (clone / f).is_file()), None)
    if file is None:
        raise SystemExit(f"{key}: none of {', '.join(candidates)} in {clone}")
    spec = importlib.util.spec_from_file_location(f"published_{key.replace('-', '_')}", clone / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = BESIDE
    sys.modules[spec.name] = module  # dataclasses look their module up
    with shells():
        spec.loader.exec_module(module)
    return Published(module, {"repository": url, "commit": _commit(clone), "file": file})


def _commit(clone: Path) -> str:
    done = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def with_constant(function: FunctionType, old: int, new: int) -> FunctionType:
    """The same function with one number hard-coded in it replaced (D2F's end-of-sequence id)."""
    code: CodeType = function.__code__
    assert old in code.co_consts, f"{function.__name__} has no constant {old}"
    constants = tuple(new if type(c) is int and c == old else c for c in code.co_consts)
    code = code.replace(co_consts=constants)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
