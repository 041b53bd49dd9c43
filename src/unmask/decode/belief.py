"""Beliefs as data: what a recipe wants changed about the model's beliefs. `denoise/dress.py` makes the wrappers."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.decode.algebra import Rule, term
from unmask.decode.pick import check


class Belief(Rule):
    """A wrapper of the denoiser, named in a recipe; the network it needs is given when the recipe is run."""

    guided = False
    """Does it need a guide (an autoregressive model of the same tokenizer)?"""


@term("joint")
@dataclass(frozen=True, repr=False)
class Joint(Belief):
    """Draw up to k dependent tokens from one forward, by a joint sampler (ADJUST, arXiv 2509.22738).

    The first token of a forward is drawn from the model, each of the next k - 1 from a one-layer sampler that has seen
    those before it; where comes next is decided `by` confidence. The cells are the candidates of the rule `drawn`, or
    all undecided ones where the recipe has none. Drawing goes on while the surest probability is at least `least`. An
    early commit is filled so too, in k draws of several cells each, instead of all at once.
    """

    k: int
    by: str = "entropy"
    least: float = 0.0

    def __post_init__(self) -> None:
        check(self.by)
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"joint needs a whole number of tokens k >= 1, not {self.k!r}")
        if isinstance(self.least, bool) or not isinstance(self.least, int | float) or not 0 <= self.least <= 1:
            raise ValueError(f"least is a probability in [0, 1], not {self.least!r}")


@term("blend")
@dataclass(frozen=True, repr=False)
class Blend(Belief):
    """Mix the guide's log-probabilities into the model's own, with this weight in [0, 1]."""

    weight: float
    guided = True

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 <= self.weight <= 1:
            raise ValueError(f"a blend's weight lies in [0, 1], not {self.weight!r}")
