"""Published methods as data: one TOML file each, with its expression, defaults and citation."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from unmask.errors import UserError, suggest


@dataclass(frozen=True)
class Entry:
    """One file of this folder: what the method is, what can be set, and its expressions."""

    name: str
    title: str
    about: str
    cite: str
    reproduces: str
    defaults: dict[str, Any]
    text: str


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All recipes by name."""
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            text = file.read_text(encoding="utf-8")
            data = tomllib.loads(text)
            words = {key: data.get(key, "") for key in ("name", "title", "about", "cite", "reproduces")}
            found[data["name"]] = Entry(**words, defaults=data.get("defaults", {}), text=text)
    return found


def entry(name: str) -> Entry:
    """One recipe's file, or an error that suggests the nearest name."""
    known = entries()
    if name not in known:
        raise suggest(name, known, "recipe")
    return known[name]


def get(name: str, **settings: Any):
    """The recipe `name` with its defaults, some of them set otherwise.

    Raises UserError for an unknown name, an unknown setting, or one of another type than its default.
    """
    from unmask.decode import Recipe

    found = entry(name)
    for key, value in settings.items():
        if key not in found.defaults:
            raise suggest(key, found.defaults, f"setting of recipe {name!r}")
        default = found.defaults[key]
        numbers = isinstance(default, float) and isinstance(value, int | float)
        if not numbers and (type(value) is not type(default)):
            raise UserError(f"{key} of recipe {name!r} is a {type(default).__name__} like {default!r}, not {value!r}")
    return Recipe.from_toml(found.text, **settings)
