"""What a caller may ask of `generate`, under the names of many libraries, and the recipe that it comes to."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from unmask import recipes
from unmask.decode import Budget, Canvas, Decided, Recipe, ended, everything, parse
from unmask.decode.blocks import After, Blocks, Quota
from unmask.decode.expression import cut, rule_at, within
from unmask.decode.pick import MOST, DreamQuota, Leftmost, Scattered
from unmask.decode.recipe import PARTS, contents
from unmask.decode.revise import Calm
from unmask.decode.serial import Closed, Storing
from unmask.decode.where import Ended, Finished
from unmask.denoise import Draws
from unmask.denoise.dress import layout_of
from unmask.denoise.penalties import biased, spelled
from unmask.denoise.rows import Number, Whole, Word, each, fits, number, whole
from unmask.errors import UserError, suggest
from unmask.models.config import Layout, ModelConfig
from unmask.models.tokenizer import Tokenizer
from unmask.recipes import stack
from unmask.recipes.levers import levers
from unmask.template import ALLOCATIONS, Template

RecipeLike = Recipe | str | Path | None
SEEDS = 2**62
"""Seeds are below this: they are held in 64 bits, and row i draws with seed + i."""


@dataclass(frozen=True)
class Settings:
    """One generation's settings under their canonical names; None leaves the choice to the recipe or the model.

    What is about beliefs (temperature and all that follows it) may also be a list with one value a prompt.
    """

    recipe: RecipeLike = None
    length: int | None = None
    block: int | None = None
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    tau: float | None = None
    by: str | None = None
    eps: float | None = None
    cache: str | None = None
    guide: Any = None
    sampler: Any = None
    temperature: Number | None = None
    top_p: Number = 1.0
    top_k: Whole = 0
    min_p: Number = 0.0
    confidence: Word | None = None
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Mapping[Any, float] | Sequence[Mapping[Any, float]] | None = None
    eos: Word = "free"
    cfg: Number = 0.0
    seed: Whole = 0
    template: str | None = None
    allocation: str = "even"

    def __post_init__(self) -> None:
        for name in ("length", "block", "steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MOST):
                told = f"a whole number of at least 1 and at most {MOST}"
                raise UserError(f"{name} must be {told}, not {value!r:.80}")
        for name in ("threshold", "factor", "eps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                raise UserError(f"{name} must be a number >= 0, not {value!r:.80}")
        if self.threshold is not None and self.threshold > 1:
            raise UserError(f"threshold is a probability in [0, 1], not {self.threshold!r}")
        if self.eps is not None and self.eps > 1:
            raise UserError(f"eps is the noise that is left at the end, at most 1, not {self.eps!r}")
        self._seed()
        each("cfg", self.cfg, partial(number, "cfg"))
        each("logit_bias", self.logit_bias, partial(biased, words=True))
        self._draws("raw", None)
        _check_template(self)

    def _draws(self, confidence: Any, bias: Any) -> Draws:
        said = {f.name: getattr(self, f.name) for f in fields(Draws)}
        said |= {"logit_bias": bias, "temperature": 0.0 if self.temperature is None else self.temperature}
        return Draws(**{**said, "confidence": confidence if self.confidence is None else self.confidence})

    def draws(self, recipe: Recipe, model: ModelConfig, tokenizer: Tokenizer) -> Draws:
        """How tokens are drawn: a bias by ids, and confidence, where nothing is said, as in the source model."""
        bias = each("logit_bias", self.logit_bias, lambda b: spelled(b, tokenizer))
        return self._draws(source(recipe, model), bias)

    def _seed(self) -> int | tuple[int, ...]:
        return each("seed", self.seed, lambda v: whole("seed", v, -SEEDS, SEEDS))

    def seeds(self, rows: int, offset: int = 0) -> list[int]:
        """One seed a row: those given, or the one given, counted on from row `offset`."""
        fits("seed", seed := self._seed(), rows)
        return [seed + offset + i for i in range(rows)] if isinstance(seed, int) else list(seed)

    @property
    def rules(self) -> dict[str, Any]:
        """The settings that are the recipe's, those given only."""
        names = ("block", "steps", "threshold", "factor", "tau", "by", "eps")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


NAMES = tuple(f.name for f in fields(Settings))
"""The canonical names."""


def _check_template(settings: Settings) -> None:
    """UserError for a template that cannot be read, an allocation without one, and a tau that is no probability."""
    if settings.template is not None:
        Template.parse(settings.template)
    if settings.allocation not in ALLOCATIONS:
        raise suggest(str(settings.allocation), ALLOCATIONS, "allocation")
    if settings.template is None and settings.allocation != "even":
        raise UserError(f"allocation={settings.allocation!r} shares cells among a template's slots; give a template")
    tau = settings.tau
    if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau <= 1):
        raise UserError(f"tau is a probability above 0 and at most 1, not {tau!r}")


@dataclass(frozen=True)
class Alias:
    """Another name of a setting; `values` translates what the other library calls its values."""

    setting: str
    values: Mapping[Any, Mapping[str, Any]] | None = None


_REMASKING = {"low_confidence": {"by": "score"}, "random": {"by": "random"}}
_ALG = {
    "maskgit_plus": {"recipe": "dream", "by": "score"},
    "entropy": {"recipe": "dream", "by": "entropy"},
    "topk_margin": {"recipe": "dream", "by": "margin"},
    "origin": {"recipe": "dream-origin"},
    "confidence_threshold": {"recipe": "threshold"},
}

ALIASES: dict[str, Alias] = {
    "max_new_tokens": Alias("length"),  # transformers, Dream
    "gen_length": Alias("length"),  # LLaDA
    "block_length": Alias("block"),  # LLaDA, Fast-dLLM
    "block_size": Alias("block"),  # D2F
    "diffusion_steps": Alias("steps"),
    "num_steps": Alias("steps"),
    "confidence_threshold": Alias("threshold"),
    "remasking": Alias("by", _REMASKING),  # LLaDA
    "alg": Alias("by", _ALG),  # Dream
    "do_sample": Alias("temperature", {False: {"temperature": 0.0}, True: {}, None: {}}),  # transformers
    "use_cache": Alias("cache", {False: {}, True: {"cache": "prefix"}, None: {}}),  # Fast-dLLM
    "dual_cache": Alias("cache", {False: {}, True: {"cache": "dual"}, None: {}}),  # Fast-dLLM
    "cfg_scale": Alias("cfg"),  # LLaDA
    "logits_eos_inf": Alias("eos", {False: {}, True: {"eos": "never"}, None: {}}),  # LLaDA
    "confidence_eos_eot_inf": Alias("eos", {False: {}, True: {"eos": "last"}, None: {}}),  # LLaDA
}
"""Every other name of a setting, from the published loops and from transformers' `generate`."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guidance_scale": ((1, None), "it counts from 1; use cfg, which is one less"),
    "alg_temp": ((0, None), "noise on the order of commits is not implemented; use temperature, or alg='origin'"),
    "num_beams": ((1, None), "a canvas is not written by beams; use temperature and several seeds"),
    "num_return_sequences": ((1, None), "pass a list of prompts and each has its own seed"),
    "output_history": ((False, None), "pass on_step to see every canvas"),
}
"""Names that are understood but only at values that change nothing, and why."""


def resolve(given: Mapping[str, Any], aliases: Mapping[str, Any], *, mask_id: int = -1) -> Settings:
    """Settings from canonical names and from `aliases`; an unknown, refused or contradicting one is a UserError."""
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in aliases.items():
        for setting, meant in _meaning(name, value, mask_id).items():
            if said.get(setting, meant) != meant and not (name == "dual_cache" and said[setting] == "prefix"):
                raise UserError(f"{name}={value!r} and {setting}={said[setting]!r} contradict each other; give one")
            said[setting] = meant
    if aliases.get("do_sample"):
        said.setdefault("temperature", 1.0)
    return Settings(**said)


def _meaning(name: str, value: Any, mask_id: int) -> Mapping[str, Any]:
    """What an alias says in canonical names."""
    if name == "mask_id":
        if value not in (None, mask_id):
            raise UserError(f"mask_id is the model's own, {mask_id}, and cannot be {value!r}; leave it out")
        return {}
    if name in REFUSED:
        harmless, reason = REFUSED[name]
        if value not in harmless:
            raise UserError(f"{name}={value!r} is refused: {reason}")
        return {}
    if name in NAMES:
        return {} if value is None else {name: value}
    if name not in ALIASES:
        raise suggest(name, [*NAMES, *ALIASES, *REFUSED, "mask_id", "streamer", "on_step", "suffix"], "setting")
    alias = ALIASES[name]
    if alias.values is None:
        return {} if value is None else {alias.setting: value}
    if value not in alias.values:
        raise suggest(str(value), map(str, alias.values), f"value of {name}")
    return alias.values[value]


def choose(settings: Settings, model: ModelConfig, length: int) -> Recipe:
    """The recipe for a response of `length` cells, checked against the model; UserError with the reason if refused."""
    own = model.layout.size if model.layout.kind == "block" else 0
    if settings.block is not None and settings.block > max(own, length):
        raise UserError(
            f"a block of {settings.block} cells does not fit into a response of {length}; use at most that many"
        )
    named = settings.recipe if settings.recipe is not None else default_name(settings, model)
    recipe = named if isinstance(named, Recipe) else read(str(named), settings.rules, length, model.layout)
    if isinstance(named, Recipe) and settings.rules:
        raise UserError(f"{', '.join(settings.rules)}: settings of named recipes; a Recipe already holds its own")
    check(recipe, model, length)
    ends = Ended | Finished | Budget | Decided | Calm | Closed
    open_end = any(isinstance(r, ends) for r in recipe.stop.walk())
    return recipe if open_end else replace(recipe, stop=recipe.stop | ended)


def default_name(settings: Settings, model: ModelConfig) -> str:
    """The recipe that the settings ask for without naming one; for a block-causal model one whose cache is exact."""
    if model.autoregressive:
        return "ar"
    uncached = model.layout.kind == "block" and settings.cache is None
    if settings.factor is not None:
        plain = "freecache_lag + window(0) + factor" if uncached else "factor"
        return f"{settings.cache}-factor" if settings.cache else plain
    if settings.threshold is None and (settings.steps is not None or settings.by is not None):
        plain = "freecache_lag + window(0) + quota" if uncached else "llada"
        return f"{settings.cache}-quota" if settings.cache else plain
    return _blockwise(model) if uncached else settings.cache or "threshold"


def _blockwise(model: ModelConfig) -> str:
    """The recipe for a model that attends in blocks: as its family publishes it, or as its logits allow.

    Only what was trained on noisy earlier blocks is written at several at once; all others saw the blocks before them
    decided, and are written one by one.
    """
    if model.in_flight:
        return "d2f"
    return "fast-dllm-v2" if model.shift else "sdar" if model.family == "sdar" else "llada2"


def read(text: str, given: Mapping[str, Any], length: int | None = None, layout: Layout | None = None) -> Recipe:
    """A recipe by its name, from a TOML file, a stack of levers, or an expression, with the settings given.

    What is not given and follows from the length (cells of the response) and from the model's layout is fitted to them,
    where there are such. UserError for what is none of these, and for a number that its rule cannot mean
    (`confident(90)`).
    """
    if not text.strip():
        raise UserError("the recipe is empty; give a name, a TOML file, a stack of levers, or an expression")
    recipe = _read(text, given, length, layout)
    within(recipe.walk())
    return recipe


def _read(text: str, given: Mapping[str, Any], length: int | None, layout: Layout | None) -> Recipe:
    if text.endswith(".toml"):
        return _from_file(Path(text), given, length, layout)
    if stack.is_stack(text) and text not in recipes.entries():
        return stack.build(text, given=given, length=length, layout=layout)
    if re.fullmatch(r"[\w-]+", text):
        if text not in recipes.entries():
            raise suggest(cut(text), [*recipes.entries(), *levers()], "recipe or lever")
        return recipes.get(text, **_fitted(text, recipes.entry(text).defaults, given, length, layout))
    if given:
        raise UserError(f"{', '.join(given)}: settings of named recipes; write them into the expression")
    return from_expression(text)


def _fitted(
    name: str, defaults: Mapping[str, Any], given: Mapping[str, Any], length: int | None, layout: Layout | None
) -> dict[str, Any]:
    """The settings given, and those that follow from the length and the layout: `stack.fitted`, where it has such."""
    derived = stack.fitted(length, layout, given.get("block"))
    if "block" not in defaults:
        derived["steps"] = length
    if "sub" in defaults and "block" in derived:
        derived["sub"] = min(defaults["sub"], derived["block"])
    if unknown := [rule for rule in given if rule not in defaults]:
        has = ", ".join(defaults) or "none"
        raise UserError(f"recipe {name!r} has no setting {' and no '.join(unknown)}; it has {has}")
    return {**{k: v for k, v in derived.items() if k in defaults and v is not None}, **given}


def _from_file(path: Path, given: Mapping[str, Any], length: int | None, layout: Layout | None) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        made = stack.from_toml(text, given=given, length=length, layout=layout)
        if made is None:
            defaults = contents(text).get("defaults", {})
            made = Recipe.from_toml(text, **_fitted(path.name, defaults, given, length, layout))
        within(made.walk())
        return made
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_expression(text: str) -> Recipe:
    """`Recipe(query=..., unmask=..., ...)` as a recipe prints itself, or an `unmask` rule alone, without a cache."""
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "Recipe":
        parts = {k.arg: _part(k.value, text) for k in tree.keywords if k.arg}
        if tree.args or set(parts) - {*PARTS, "beliefs", "revisions"} or not {"query", "unmask"} <= set(parts):
            raise UserError(
                f"a recipe is Recipe(query=..., unmask=..., remask=..., edit=..., stop=...), not {cut(text)!r}"
            )
        return Recipe(**parts)
    return Recipe(everything, parse(text))  # type: ignore[arg-type]


def _part(node: ast.expr, text: str) -> Any:
    """A rule, a list of beliefs, or the number of revisions."""
    if isinstance(node, ast.List):
        return tuple(rule_at(element, text) for element in node.elts)
    return node.value if isinstance(node, ast.Constant) else rule_at(node, text)


def check(recipe: Recipe, model: ModelConfig, length: int) -> None:
    """UserError with the reason where a recipe and a model, or a recipe and a length, do not go together."""
    name = repr(recipe.name) if recipe.name else repr(recipe)
    if model.autoregressive and not isinstance(recipe.unmask, Leftmost):
        raise UserError(f"recipe {name} fills cells in any order, and this model is autoregressive; use recipe 'ar'")
    if not model.autoregressive and _causal(recipe):
        told = "'threshold', or 'prefix' or 'dual' for a cache"
        if model.layout.kind == "block":
            told = f"{default_name(Settings(), model)!r} or 'freecache-lag'"
        raise UserError(
            f"recipe {name} computes a cell once and reads what follows it, which only a causal model can; use {told}"
        )
    if model.layout.kind == "full" and any(isinstance(r, After) for r in recipe.query.walk()):
        raise UserError(
            f"recipe {name} opens block after block, and in this model every cell attends to all that follow it; "
            "use 'prefix', 'dual' or 'freecache', or a block-causal model"
        )
    if not model.shift and any(isinstance(r, Storing) for r in recipe.query.walk()):
        raise UserError(
            f"recipe {name} takes the first cell of a block from the block before it, and this model's logits are not "
            "shifted; use 'sdar' or 'llada2'"
        )
    check_blocks(recipe, length, model)


def check_blocks(recipe: Recipe, length: int, model: ModelConfig | None = None) -> None:
    """UserError for blocks that do not fit into a response of `length` cells, or not the blocks of the model."""
    own = layout_of(recipe, model.layout).size if model else 0
    for rule in recipe.walk():
        if isinstance(rule, Blocks) and rule.size > max(own, length):
            raise UserError(f"a block of {rule.size} cells does not fit into a response of {length}")
        if isinstance(rule, Quota) and rule.steps < (count := -(-length // rule.blocks.size)):
            raise UserError(
                f"{rule.steps} steps are fewer than the {count} blocks of {rule.blocks.size}; use at least {count}"
            )


def _causal(recipe: Recipe) -> bool:
    """Does the first forward compute no undecided cell but the first?"""
    canvas = Canvas.new([[0]], 4, mask_id=-1)
    return isinstance(recipe.unmask, Leftmost) and not bool((recipe.query(canvas) & canvas.masked)[:, 2:].any())


def source(recipe: Recipe, model: ModelConfig) -> Literal["raw", "shaped"]:
    """What confidence is read from in the published sampler: Dream's and SDAR's read it after temperature and filters.

    That is so for every recipe on these models, and for Dream's own schedules on any model.
    """
    scheduled = any(isinstance(r, DreamQuota | Scattered) for r in recipe.unmask.walk())
    return "shaped" if scheduled or model.family in ("dream", "sdar") else "raw"
