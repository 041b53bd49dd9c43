"""Levers as data: what a part of a published method fills in a recipe, its settings, and what it does not go with."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from unmask.decode.pick import MOST

KINDS = ("size", "cache", "window", "commit", "exit", "revise", "belief")
"""The files of this folder, in the order in which levers are named and composed."""


@dataclass(frozen=True)
class Setting:
    """One number (or word, or text) of a lever: its default and what it may be."""

    name: str
    default: Any
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    among: tuple[str, ...] = ()

    def fault(self, value: Any) -> str:
        """What it should have been, or "" if it may be that."""
        if self.among:
            return "" if value in self.among else f"one of {', '.join(self.among)}"
        if isinstance(self.default, str):
            told = bool(value.strip()) if isinstance(value, str) else isinstance(value, tuple) and bool(value)
            return "" if told else "a text in quotes, or token ids such as [17, 3]"
        if isinstance(self.default, bool):
            return "" if isinstance(value, bool) else "True or False"
        whole = isinstance(self.default, int)
        right = type(value) is int if whole else isinstance(value, int | float) and not isinstance(value, bool)
        inside = right and self.least <= value <= (min(self.most, MOST) if whole else self.most)
        inside = inside and (value < self.below or self.below == math.inf)
        inside = inside and (value > self.above or self.above == -math.inf)
        if whole and self.most == math.inf:
            return "" if inside else f"a whole number of at least {self.least:g} and at most {MOST}"
        return "" if inside else f"a {'whole ' if whole else ''}number{self._bounds()}"

    def _bounds(self) -> str:
        if self.above > -math.inf:
            return f" above {self.above:g} and at most {self.most:g}"
        if self.least == -math.inf:
            return ""
        if self.below < math.inf:
            return f" in [{self.least:g}, {self.below:g})"
        return f" of at least {self.least:g}" if self.most == math.inf else f" in [{self.least:g}, {self.most:g}]"


@dataclass(frozen=True)
class Lever:
    """A part of a recipe under a name: the expressions it fills in, over `b` (the blocks) and its own settings."""

    name: str
    kind: str
    title: str
    cite: str = ""
    needs: str = ""
    base: str = ""
    """The lever that commits where none is typed."""
    upon: str = ""
    """The lever without which it means nothing."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What it fills in otherwise beside another lever, or a lever of another kind."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Why it does not go with another lever, or a lever of another kind, and what to do instead."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each setting."""
        return {setting.name: setting.default for setting in self.settings.values()}

    def __str__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"{self.name}({told})" if told else self.name


WORDS = ("title", "cite", "needs", "base", "upon")


@lru_cache(maxsize=1)
def levers() -> dict[str, Lever]:
    """All levers by name, in the order of KINDS."""
    found = {}
    for kind in KINDS:
        text = (resources.files(__name__) / f"{kind}.toml").read_text(encoding="utf-8")
        for name, table in tomllib.loads(text).items():
            settings = {key: Setting(key, **value) for key, value in table.pop("settings", {}).items()}
            words = {key: table.pop(key, "") for key in WORDS}
            beside, refuses = table.pop("with", {}), table.pop("refuses", {})
            found[name] = Lever(name, kind, **words, settings=settings, parts=table, beside=beside, refuses=refuses)
    return found
