"""unmask: an engine for diffusion language models, one loop in which published decoding methods compose.

Importing the package imports nothing heavy: each name below loads its module at first use (PEP 562).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.decode import Canvas, Recipe, decode, step
    from unmask.errors import UserError
    from unmask.generate import load

__version__ = "0.1.0"

_EXPORTS = {  # name: the module it comes from; the block above says the same to type checkers
    "Canvas": "unmask.decode",
    "Recipe": "unmask.decode",
    "UserError": "unmask.errors",
    "decode": "unmask.decode",
    "load": "unmask.generate",
    "step": "unmask.decode",
}

__all__ = ["Canvas", "Recipe", "UserError", "decode", "load", "step"]


class _CallableModule(ModuleType):
    """A submodule that is called like the function of the same name inside it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Lets `unmask.decode` be the loop and the folder of the loop, whichever is asked for first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _EXPORTS.get(name) == value.__name__ == f"{__name__}.{name}":
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_EXPORTS[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
