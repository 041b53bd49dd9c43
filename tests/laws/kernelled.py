"""The toys of the law tests in float32: in plain torch, and on the compiled kernels. Where there are none, who imports
this is skipped."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest

from laws import common
from unmask.models import native
from unmask.models.fast import accelerate
from unmask.models.transformer import Transformer

try:
    native.library("float32", half=False)
except native.Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

toy = common.model  # as it is before a test puts another in its place


@lru_cache
def slow(kind: str) -> Transformer:
    """The toy in float32, in plain torch."""
    return copy.deepcopy(toy(kind)).float()


@lru_cache
def fast(kind: str) -> Transformer:
    """The same on the kernels."""
    model = accelerate(copy.deepcopy(slow(kind)))
    assert model.native is not None
    return model
