"""Beliefs as data: what a recipe wants changed about the model's beliefs. `denoise/dress.py` makes the wrappers."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.decode.algebra import Rule, term


class Belief(Rule):
    """A wrapper of the denoiser, named in a recipe; the network it needs is given when the recipe is run."""

    guided = False
    """Does it need a guide (an autoregressive model of the same tokenizer)?"""


@term("joint")
@dataclass(frozen=True, repr=False)
class Joint(Belief):
    """Draw up to k dependent tokens from one forward, by a joint sampler (ADJUST, arXiv 2509.22738).

    The first step after a forward reads the model, the next k - 1 a one-layer sampler that has seen what was drawn.
    """

    k: int

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"joint needs a whole number of tokens k >= 1, not {self.k!r}")


@term("blend")
@dataclass(frozen=True, repr=False)
class Blend(Belief):
    """Mix the guide's log-probabilities into the model's own, with this weight in [0, 1]."""

    weight: float
    guided = True

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 <= self.weight <= 1:
            raise ValueError(f"a blend's weight lies in [0, 1], not {self.weight!r}")
