"""What `unmask bench levers` measures, as data: the cases, which two are compared, and which levers a stack joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROPHET = "prophet(7.5, 5, 2.5)"
CACHES = ("prefix", "dual", "dkv", "freecache", "freecache-lag")
STAGED = "sure(staged(7.5, 5.0, 2.5), region(2))"


@dataclass(frozen=True)
class Case:
    """One recipe, typed as a user would, and the case `over` which its gain is told."""

    name: str
    group: str
    recipe: str
    over: str = ""
    sized: bool = True
    """Is it told the size of a block? An expression that names its blocks, or a recipe without blocks, is not."""
    template: bool = False
    """Does it write into a template that fits the number of equations, which it is so told?"""
    model: str = "dllm"

    @property
    def told(self) -> dict[str, Any]:
        """What a table says of it."""
        facts = ("group", "recipe", "model", "template")
        return {"case": self.name, **{fact: getattr(self, fact) for fact in facts}}


@dataclass(frozen=True)
class Comparison:
    """A question: is `case` faster, cheaper or more often right than `over`? `target`: a ratio of speeds to pass."""

    title: str
    case: str
    over: str
    target: float | None = None


@dataclass(frozen=True)
class Interaction:
    """Is a stack of two levers worth the product of both, each alone over the same base?"""

    stack: str
    one: str
    other: str
    base: str


def _marginal(k: int) -> str:
    return f"blocks(8) >> best({k}, by='entropy')"


def _templated(name: str, recipe: str, over: str, *, sized: bool = True) -> Case:
    return Case(f"{name}-template", "template", recipe, f"{over}-template" if over else "", sized=sized, template=True)


CASES: tuple[Case, ...] = (
    Case("llada", "reference", "llada"),
    Case("threshold", "commit", "threshold", "llada"),
    Case("factor", "commit", "factor", "llada"),
    Case("eb", "commit", "eb", "llada"),
    Case("prefix-quota", "cache", "prefix + quota", "llada"),
    Case("dual-quota", "cache", "dual + quota", "llada"),
    Case("dkv-quota", "cache", "dkv + quota", "llada"),
    Case("freecache-quota", "cache", "freecache + quota", "llada"),
    Case("freecache-lag-quota", "cache", "freecache_lag + quota", "llada"),
    Case("guided-1", "guide", "guided(1)", "llada", sized=False),
    Case("guided-5", "guide", "guided(5)", "llada", sized=False),
    Case("guided-relative", "guide", "guided(2, relative=0.5)", "llada", sized=False),
    Case("guided-above", "guide", "guided(0, above=0.1)", "llada", sized=False),
    Case("blend", "guide", "blend(0.5) + threshold(0.9)", "threshold"),
    Case("wino", "revision", "wino", "threshold"),
    Case("edit", "revision", "edit", "threshold"),
    Case("prophet", "exit", PROPHET, "llada"),
    Case("sched", "exit", "sched(7.5, 2.5)", "llada"),
    Case("prefix", "stack", "prefix + threshold(0.9)", "threshold"),
    Case("dual", "stack", "dual + threshold(0.9)", "threshold"),
    Case("dkv", "stack", "dkv + threshold(0.9)", "threshold"),
    Case("freecache", "stack", "freecache + threshold(0.9)", "threshold"),
    Case("freecache-lag", "stack", "freecache_lag + threshold(0.9)", "threshold"),
    Case("freecache-guided-1", "stack", "freecache + guided(1)", "freecache-quota"),
    Case("freecache-guided-5", "stack", "freecache + guided(5)", "freecache-quota"),
    Case("freecache-lag-guided-1", "stack", "freecache_lag + guided(1)", "freecache-lag-quota"),
    Case("freecache-lag-guided-5", "stack", "freecache_lag + guided(5)", "freecache-lag-quota"),
    Case("prophet-threshold", "stack", f"threshold(0.9) + {PROPHET}", "threshold"),
    Case("prophet-dual", "stack", f"dual + threshold(0.9) + {PROPHET}", "dual"),
    _templated("llada", "llada", ""),
    _templated("threshold", "threshold", "llada"),
    _templated("prefix", "prefix + threshold(0.9)", "threshold"),
    _templated("freecache-lag", "freecache_lag + threshold(0.9)", "threshold"),
    _templated("dual", "dual + threshold(0.9)", "threshold"),
    _templated("dual-quota", "dual + quota", "llada"),
    _templated("prophet", PROPHET, "llada"),
    _templated("prophet-dual-quota", f"dual + quota + {PROPHET}", "dual-quota"),
    _templated("prophet-threshold", f"threshold(0.9) + {PROPHET}", "threshold"),
    _templated("prophet-dual", f"dual + threshold(0.9) + {PROPHET}", "dual"),
    _templated("ice-quota", "ice-quota", "llada", sized=False),
    _templated("ice", "ice", "threshold", sized=False),
    _templated("ice-prefix", "prefix + threshold(0.9) + ice(0.9)", "prefix"),
    _templated("ice-freecache-lag", "freecache_lag + threshold(0.9) + ice(0.9)", "freecache-lag"),
    Case("marginal-1", "joint", _marginal(1), "llada", sized=False),
    *(Case(f"marginal-{k}", "joint", _marginal(k), "marginal-1", sized=False) for k in (2, 4, 8)),
    *(Case(f"joint-{k}", "joint", f"blocks(8) + joint({k})", f"marginal-{k}") for k in (2, 4, 8)),
    Case("joint-threshold", "joint", "joint(8) + threshold(0.9)", "threshold"),
    Case("joint-guided", "joint", "guided(1) + joint(4)", "guided-1", sized=False),
    Case("joint-freecache-lag", "joint", "freecache_lag + joint(4)", "joint-4"),
    Case("prophet-marginal", "joint", f"everything.when({STAGED}) | {_marginal(4)}", "marginal-4", sized=False),
    Case("prophet-joint", "joint", f"{PROPHET} + joint(4)", "prophet-marginal"),
    Case("ar", "twin", "ar", "llada", sized=False, model="twin"),
)
"""Every case, in the order of the table."""

COMPARISONS: tuple[Comparison, ...] = (
    *(
        Comparison(f"{cache} + guided({n}) over {cache}, {told}", f"{name}-guided-{n}", f"{name}{end}", target)
        for cache, name in (("freecache", "freecache"), ("freecache_lag", "freecache-lag"))
        for n in (1, 5)
        for told, end, target in (("one cell a step", "-quota", 3.0), ("with threshold", "", None))
    ),
    *(Comparison(f"joint sampler over marginal, K = {k}", f"joint-{k}", f"marginal-{k}") for k in (2, 4, 8)),
    Comparison("early commit filled by the joint sampler over one-shot", "prophet-joint", "prophet-marginal"),
    Comparison("threshold over the AR twin", "threshold", "ar"),
    Comparison("freecache_lag + guided(1) over the AR twin", "freecache-lag-guided-1", "ar"),
)
"""The questions that the summary answers in words."""

INTERACTIONS: tuple[Interaction, ...] = (
    *(Interaction(name, f"{name}-quota", "threshold", "llada") for name in CACHES),
    *(
        Interaction(f"{name}-guided-{n}", f"{name}-quota", f"guided-{n}", "llada")
        for name in ("freecache", "freecache-lag")
        for n in (1, 5)
    ),
    Interaction("prophet-threshold", "prophet", "threshold", "llada"),
    Interaction("prophet-dual", "dual", "prophet-threshold", "threshold"),
    Interaction("prophet-threshold-template", "prophet-template", "threshold-template", "llada-template"),
    Interaction("prophet-dual-quota-template", "prophet-template", "dual-quota-template", "llada-template"),
    Interaction("prophet-dual-template", "prophet-threshold-template", "dual-template", "threshold-template"),
    *(
        Interaction(f"ice-{name}-template", "ice-template", f"{name}-template", "threshold-template")
        for name in ("prefix", "freecache-lag")
    ),
    Interaction("joint-guided", "joint-4", "guided-1", "llada"),
    Interaction("joint-freecache-lag", "joint-4", "freecache-lag-quota", "llada"),
    Interaction("prophet-joint", "joint-4", "prophet", "llada"),
)
"""The stacks whose two levers are measured alone over the same base."""


def find(name: str) -> Case:
    """A case by its name; UserError that suggests the nearest."""
    from unmask.errors import suggest

    known = {case.name: case for case in CASES}
    if name not in known:
        raise suggest(name, known, "case")
    return known[name]
