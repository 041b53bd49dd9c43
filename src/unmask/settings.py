"""What a caller may ask of `generate`, under the names of many libraries, and the recipe that it comes to."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from unmask import recipes
from unmask.decode import Budget, Canvas, Recipe, ended, everything, finished, parse
from unmask.decode.algebra import Rule
from unmask.decode.blocks import After, Blocks, Quota
from unmask.decode.pick import DreamQuota, Leftmost, Scattered
from unmask.decode.recipe import PARTS
from unmask.decode.where import Ended
from unmask.errors import UserError, suggest
from unmask.models.config import ModelConfig

RecipeLike = Recipe | str | Path | None
BLOCK = 32
"""Cells of a block where none is asked for."""
SEEDS = 2**62
"""Seeds are below this: they are held in 64 bits, and row i draws with seed + i."""


@dataclass(frozen=True)
class Settings:
    """One generation's settings under their canonical names; None leaves the choice to the recipe or the model."""

    recipe: RecipeLike = None
    length: int | None = None
    block: int | None = None
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    by: str | None = None
    eps: float | None = None
    cache: str | None = None
    guide: Any = None
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("block", 1), ("steps", 1), ("top_k", 0), ("seed", -SEEDS)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < SEEDS):
                bound = f"of at least {least}" if name != "seed" else "between -2**62 and 2**62"
                raise UserError(f"{name} must be a whole number {bound}, not {value!r}")
        for name in ("threshold", "factor", "temperature", "eps", "top_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                raise UserError(f"{name} must be a number >= 0, not {value!r}")
        if self.temperature == math.inf:
            raise UserError("temperature must be finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.eps is not None and self.eps > 1:
            raise UserError(f"eps is the noise that is left at the end, at most 1, not {self.eps!r}")

    @property
    def rules(self) -> dict[str, Any]:
        """The settings that are the recipe's, those given only."""
        names = ("block", "steps", "threshold", "factor", "by", "eps")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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
}
"""Every other name of a setting, from the published loops and from transformers' `generate`."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cfg_scale": ((0, None), "classifier-free guidance is not implemented; leave it out"),
    "cfg": ((0, None), "classifier-free guidance is not implemented; leave it out"),
    "alg_temp": ((0, None), "noise on the order of commits is not implemented; use temperature, or alg='origin'"),
    "num_beams": ((1, None), "a canvas is not written by beams; use temperature and several seeds"),
    "num_return_sequences": ((1, None), "pass a list of prompts and each has its own seed"),
    "repetition_penalty": ((1, None), "it is not implemented; leave it out"),
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
    canonical = [f.name for f in fields(Settings)]
    if name in canonical:
        return {} if value is None else {name: value}
    if name not in ALIASES:
        raise suggest(name, [*canonical, *ALIASES, *REFUSED, "mask_id", "streamer", "on_step", "suffix"], "setting")
    alias = ALIASES[name]
    if alias.values is None:
        return {} if value is None else {alias.setting: value}
    if value not in alias.values:
        raise suggest(str(value), map(str, alias.values), f"value of {name}")
    return alias.values[value]


def choose(settings: Settings, model: ModelConfig, length: int) -> Recipe:
    """The recipe for a response of `length` cells, checked against the model; UserError with the reason if refused."""
    if settings.block is not None and settings.block > length:
        raise UserError(
            f"a block of {settings.block} cells does not fit into a response of {length}; use at most that many"
        )
    named = settings.recipe if settings.recipe is not None else default_name(settings, model)
    recipe = named if isinstance(named, Recipe) else _read(str(named), settings, length)
    if isinstance(named, Recipe) and settings.rules:
        raise UserError(f"{', '.join(settings.rules)}: settings of named recipes; a Recipe already holds its own")
    check(recipe, model, length)
    open_end = recipe.stop == finished or any(isinstance(r, Ended | Budget) for r in recipe.stop.walk())
    return recipe if open_end else replace(recipe, stop=recipe.stop | ended)


def default_name(settings: Settings, model: ModelConfig) -> str:
    """The recipe that the settings ask for without naming one."""
    if model.autoregressive:
        return "ar"
    if settings.factor is not None:
        return f"{settings.cache}-factor" if settings.cache else "factor"
    if settings.threshold is None and (settings.steps is not None or settings.by is not None):
        return f"{settings.cache}-quota" if settings.cache else "llada"
    if settings.threshold is None and model.layout.kind == "block":
        return "d2f"
    return settings.cache or "threshold"


def _read(text: str, settings: Settings, length: int) -> Recipe:
    """A recipe by name, from a TOML file, or from an expression."""
    if re.fullmatch(r"[\w-]+", text):
        return recipes.get(text, **_fitted(text, recipes.entry(text).defaults, settings, length))
    if text.endswith(".toml"):
        return _from_file(Path(text), settings, length)
    if settings.rules:
        raise UserError(f"{', '.join(settings.rules)}: settings of named recipes; write them into the expression")
    return from_expression(text)


def _fitted(name: str, defaults: Mapping[str, Any], settings: Settings, length: int) -> dict[str, Any]:
    """The settings given, and those that follow from the length: blocks of at most its size, one cell a step.

    A schedule gives every block the same number of steps, so an incomplete last one counts as whole.
    """
    block = settings.block or min(BLOCK, length)
    derived = {"block": block, "steps": -(-length // block) * block if "block" in defaults else length}
    if unknown := [rule for rule in settings.rules if rule not in defaults]:
        has = ", ".join(defaults) or "none"
        raise UserError(f"recipe {name!r} has no setting {' and no '.join(unknown)}; it has {has}")
    return {**{k: v for k, v in derived.items() if k in defaults}, **settings.rules}


def _from_file(path: Path, settings: Settings, length: int) -> Recipe:
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        defaults = tomllib.loads(text).get("defaults", {})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not a recipe file: {error}") from None
    return Recipe.from_toml(text, **_fitted(path.name, defaults, settings, length))


def from_expression(text: str) -> Recipe:
    """`Recipe(query=..., unmask=..., ...)` as a recipe prints itself, or an `unmask` rule alone, without a cache."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "Recipe":
        parts = {k.arg: _part(k.value) for k in tree.keywords if k.arg}
        if tree.args or set(parts) - {*PARTS, "beliefs", "revisions"} or not {"query", "unmask"} <= set(parts):
            raise UserError(f"a recipe is Recipe(query=..., unmask=..., remask=..., edit=..., stop=...), not {text!r}")
        return Recipe(**parts)
    return Recipe(everything, parse(text))  # type: ignore[arg-type]


def _part(node: ast.expr) -> Any:
    """A rule, a list of beliefs, or the number of revisions."""
    if isinstance(node, ast.List):
        return tuple(parse(ast.unparse(element)) for element in node.elts)
    return node.value if isinstance(node, ast.Constant) else parse(ast.unparse(node))


def check(recipe: Recipe, model: ModelConfig, length: int) -> None:
    """UserError with the reason where a recipe and a model, or a recipe and a length, do not go together."""
    rules = [r for part in (recipe.query, recipe.unmask, recipe.remask, recipe.stop) if part for r in part.walk()]
    name = repr(recipe.name) if recipe.name else repr(recipe)
    if model.autoregressive and not isinstance(recipe.unmask, Leftmost):
        raise UserError(f"recipe {name} fills cells in any order, and this model is autoregressive; use recipe 'ar'")
    if not model.autoregressive and _causal(recipe):
        raise UserError(
            f"recipe {name} computes a cell once and reads what follows it, which only a causal model can; "
            "use 'threshold', or 'prefix' or 'dual' for a cache"
        )
    if model.layout.kind == "full" and any(isinstance(r, After) for r in recipe.query.walk()):
        raise UserError(
            f"recipe {name} opens block after block, and in this model every cell attends to all that follow it; "
            "use 'prefix', 'dual' or 'freecache', or a block-causal model"
        )
    _check_blocks(rules, model, length)


def _check_blocks(rules: list[Rule], model: ModelConfig, length: int) -> None:
    for rule in rules:
        if isinstance(rule, Blocks) and rule.size > length:
            raise UserError(f"a block of {rule.size} cells does not fit into a response of {length}")
        if isinstance(rule, After) and model.layout.kind == "block" and rule.blocks.size != model.layout.size:
            raise UserError(f"this model attends in blocks of {model.layout.size} cells; use that as the block")
        if isinstance(rule, Quota) and rule.steps < (count := -(-length // rule.blocks.size)):
            raise UserError(
                f"{rule.steps} steps are fewer than the {count} blocks of {rule.blocks.size}; use at least {count}"
            )


def _causal(recipe: Recipe) -> bool:
    """Does the first forward compute no undecided cell but the first?"""
    canvas = Canvas.new([[0]], 4, mask_id=-1)
    return not bool((recipe.query(canvas) & canvas.masked)[:, 2:].any()) and isinstance(recipe.unmask, Leftmost)


def shaped(recipe: Recipe) -> bool:
    """Does the published sampler read its confidence after temperature and filters (Dream)?"""
    return any(isinstance(r, DreamQuota | Scattered) for r in recipe.unmask.walk())
