"""The models that a server holds, by the names that requests use."""

from __future__ import annotations

from collections.abc import Sequence

from unmask.errors import UserError
from unmask.generate import Model, load


def loaded(names: Sequence[str], *, dtype: str = "auto", device: str = "cpu") -> dict[str, Model]:
    """Load each model once; UserError for what cannot be loaded, and for two of one name."""
    found: dict[str, Model] = {}
    for source in names:
        model = load(source, dtype=dtype, device=device)
        if model.name in found:
            raise UserError(f"two models are called {model.name}; serve one of them")
        found[model.name] = model
    return found
