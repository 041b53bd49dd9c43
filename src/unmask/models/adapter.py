"""LoRA adapters in PEFT's layout (Hu et al. 2022; D2F, arXiv 2508.09192): merged into the base they were made for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.models.config import Layout, ModelConfig
from unmask.models.experts import wide
from unmask.models.families import Place, part_of, positive, span
from unmask.models.files import FLOATS, headers, read_json, tensors, write_atomically
from unmask.models.hub import locate
from unmask.models.tables import FAMILIES
from unmask.models.transformer import Transformer

SETTINGS, PAIRS = "adapter_config.json", "adapter_model.safetensors"
D2F = Layout("block", 16)
"""What published D2F students were trained with: blocks of 16 from the end of the prompt, which sees all of itself."""
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
}


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says. Those that unmask wrote say what follows the targets, too."""

    name: str
    directory: Path
    base: str
    rank: int
    scale: float
    targets: tuple[str, ...] = ()
    digest: str = ""
    layout: Layout | None = None
    in_flight: bool = False
    mask_id: int = -1
    """-1: that of the base."""

    def mask(self, base: ModelConfig, layout: Layout) -> int:
        """The mask of the merged model, which attends by `layout`; UserError if one in blocks would have none."""
        found, path = self.mask_id if self.mask_id >= 0 else base.mask_id, self.directory / SETTINGS
        if found >= base.token_count:
            raise UserError(f"{path}: mask_id is {found}, and the base has {base.token_count} tokens")
        if layout.kind == "block" and found < 0:
            raise UserError(
                f"{path} names no mask and its base has none, so that nothing could be decoded in blocks; train the "
                f"adapter anew, or load the merged model that was written with it"
            )
        return found

    def flies(self, base: ModelConfig, layout: Layout) -> bool:
        """May the merged model, which attends by `layout`, write several blocks at once? Published ones are D2F's."""
        if self.layout is not None:
            return self.in_flight
        return base.in_flight if base.layout.kind == layout.kind else layout.kind == "block"

    def attention(self, base: Layout, block: int | None) -> Layout:
        """The layout of the merged model, in blocks of `block` if given; UserError where nobody can know it."""
        if self.layout is not None:
            return self.layout.resized(block) if block else self.layout
        if base.kind != "full" or block == 0:
            return base.resized(block) if block else base
        if "d2f" in f"{self.name} {self.directory.name}".lower():
            return D2F.resized(block) if block else D2F
        if block is None:
            raise UserError(
                f"{self.directory / SETTINGS} does not say for which attention it was trained; give block=16 if it is "
                f"by D2F, or block=0 if the attention is that of its base"
            )
        return Layout("block", block)


def is_adapter(directory: Path) -> bool:
    """Does the directory hold an adapter rather than a model?"""
    return (directory / SETTINGS).is_file()


def read_adapter(name: str, directory: Path) -> Adapter:
    """Read adapter_config.json; UserError for what cannot be merged."""
    path = directory / SETTINGS
    raw = read_json(path)
    for key, values in REQUIRED.items():
        if key in raw and raw[key] not in values:
            raise UserError(f"{path}: {key} is {raw[key]!r:.80}; supported is {values[0]!r} only")
    base, alpha, targets = raw.get("base_model_name_or_path"), raw.get("lora_alpha"), raw.get("target_modules")
    try:
        rank = positive(raw.get("r"), "r")
        if not isinstance(base, str) or not base:
            raise UserError("base_model_name_or_path is missing; it names the model that the adapter was made for")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < torch.inf:
            raise UserError(f"lora_alpha must be a positive number, not {alpha!r}")
        own = ours(raw.get("unmask") or {})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    scale = alpha / (rank**0.5 if raw.get("use_rslora") else rank)
    told = tuple(map(str, targets)) if isinstance(targets, list) and raw.get("layers_to_transform") is None else ()
    return Adapter(name, directory, base, rank, scale, told, **own)


def ours(record: Any) -> dict[str, Any]:
    """The fields of an `Adapter` that the record `unmask` tells, checked; of an empty one, that of others, nothing."""
    if not record:
        return {}
    known = record if isinstance(record, dict) else {}
    if lacks := [key for key in ("layout", "base_digest") if key not in known]:
        raise UserError(f"the record `unmask` lacks {' and '.join(lacks)}; write the adapter anew")
    flies, mask = known.get("in_flight", False), known.get("mask_id", -1)
    if not isinstance(flies, bool):
        raise UserError(f"in_flight must be true or false, not {flies!r:.80}")
    if isinstance(mask, bool) or not isinstance(mask, int) or mask < -1:
        raise UserError(f"mask_id must be the id of a token, not {mask!r:.80}")
    layout = part_of(Layout, known["layout"], "layout")
    return {"digest": str(known["base_digest"]), "layout": layout, "in_flight": flies, "mask_id": mask}


def find_base(adapter: Adapter, base: str | Path | None, shipped: Path | None) -> tuple[str, Path]:
    """(what it is called, directory) of the base: the one given, else the one that adapter_config.json names.

    A bare name may be that of a model in the folder `shipped`; a named path may be relative to the adapter.
    """
    called = str(base if base is not None else adapter.base)
    beside = [adapter.directory / called] if base is None and not Path(called).exists() else []
    beside += [shipped / called] if shipped and Path(called).name == called else []
    try:
        return called, locate(next((path for path in beside if path.is_dir()), called))[1]
    except UserError as error:
        if base is not None:
            raise
        told = f"{adapter.directory} is an adapter of {adapter.base!r}; give that model as base"
        raise UserError(f"{told}: {error}") from error


def check_name(adapter: Adapter, called: str, directory: Path) -> None:
    """UserError if the base is not known to be the model that an adapter without a digest was made for."""
    if adapter.digest:
        return
    said = read_json(directory / "config.json").get("_name_or_path")
    names = [*named(called), *named(str(directory)), *named(str(directory.resolve())), *named(str(said or ""))]
    names = list(dict.fromkeys(name for name in names if name))
    asked = named(adapter.base)[0]
    if asked.lower() not in (name.lower() for name in names):
        raise UserError(
            f"{adapter.directory} was made for {adapter.base!r}, and {directory} is not known to be that model, only "
            f"as {', '.join(names)}; if it is, give as base a directory or link that is called {asked!r}"
        )


def named(path: str) -> list[str]:
    """What a hub id or a path calls a model, the best name first: its repository in a hub cache, its last part."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return [*cached, *parts[-1:]] or [""]


def pairs_of(adapter: Adapter, config: ModelConfig, places: Mapping[str, Place]) -> dict[str, Place]:
    """Module of each pair -> the rows it changes; UserError, before anything is read, for one that does not fit."""
    path, found, seen = adapter.directory / PAIRS, {}, set()
    if not path.is_file():
        others = sorted(p.name for p in adapter.directory.glob("adapter_model.*"))
        hint = f"; {others[0]} is not read, because a pickle can run code" if others else ""
        raise UserError(f"{adapter.directory} has no {PAIRS}{hint}")
    for name, shape, kind in headers(path):
        match = KEY.fullmatch(name)
        place = target(match[1], config, places) if match else None
        if match is None or place is None or len(place.shape) != 2:
            raise UserError(f"{path} holds {name}, which adapts nothing that its base has ({config.family})")
        expected = (adapter.rank, place.shape[1]) if match[2] == "A" else (place.shape[0], adapter.rank)
        if shape != expected:
            raise UserError(f"{path}: {name} has shape {shape}, expected {expected}")
        if kind not in FLOATS:
            raise UserError(f"{path}: {name} is stored as {kind}; supported are {', '.join(FLOATS)}")
        found[match[1]] = place
        seen.add((match[1], match[2]))
    asked = [m for m in modules(config, places) if any(m == t or m.endswith(f".{t}") for t in adapter.targets)]
    missing = [f"{m}.lora_{half}" for m in dict.fromkeys([*asked, *found]) for half in "AB" if (m, half) not in seen]
    if missing or not found:
        raise UserError(f"{path} lacks {', '.join(missing[:3]) or 'all pairs'}" + " and more" * (len(missing) > 3))
    return found


def modules(config: ModelConfig, places: Mapping[str, Place]) -> Iterator[str]:
    """Published names of all matrices, without their ending."""
    for name, place in places.items():
        if name.endswith(".weight") and len(place.shape) == 2:
            yield name.removesuffix(".weight")


def target(module: str, config: ModelConfig, places: Mapping[str, Place]) -> Place | None:
    """The rows of our parameter that a module of the base is; `name:q` is a piece of a matrix that it stores as one."""
    name, _, piece = module.partition(":")
    place = places.get(f"{name}.weight")
    if place is None or not piece:
        return place
    try:
        first, rows = span(config, piece, place.shape[0])
    except KeyError:
        return None
    return Place(place.parameter, place.first + first, (rows, *place.shape[1:]))


@torch.no_grad()
def merge(model: Transformer, adapter: Adapter, pairs: Mapping[str, Place]) -> None:
    """Add scale * B A to each matrix, in fp32, rounding once to the dtype of the model."""
    parameters = dict(model.named_parameters())
    halves = {m.group(1, 2): value for name, value in tensors(adapter.directory / PAIRS) if (m := KEY.fullmatch(name))}
    for module, place in pairs.items():
        rows = parameters[place.parameter][place.first : place.first + place.shape[0]]
        a, b = (wide(halves[module, half].to(rows.device)) for half in "AB")
        rows.copy_(wide(rows) + adapter.scale * (b @ a).to(wide(rows).dtype))


def save_adapter(
    directory: str | Path,
    config: ModelConfig,
    pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    *,
    alpha: float,
    base: str,
    digest: str,
    layout: Layout,
    in_flight: bool = False,
    mask_id: int = -1,
) -> None:
    """Write an adapter in PEFT's layout, for a base of this config and digest (`joint.digest`), called `base`.

    `pairs`: (our parameter, its piece: "q", "k", "v", "gate", "up" or "") -> (A [r, in], B [rows, r]), all of one r;
    they are stored in fp32 under the names of the base's family, the piece of a matrix that is one there after a colon.
    `layout` and `mask_id` (-1: that of the base) are what they were trained with, `in_flight` whether on noisy earlier
    blocks (`ModelConfig`).
    """
    directory, named = Path(directory), published(config)
    ranks = {a.shape[0] for a, _ in pairs.values()}
    assert len(ranks) == 1, "one rank for all pairs"
    stored = {}
    for (parameter, piece), halves in pairs.items():
        fused = named.get((parameter, ""), parameter.removesuffix(".weight")) + f":{piece}" * bool(piece)
        module = named.get((parameter, piece), fused)
        for half, value in zip("AB", halves, strict=True):
            stored[f"base_model.model.{module}.lora_{half}.weight"] = (
                value.detach().to("cpu", torch.float32).contiguous()
            )
    own = {"base_digest": digest, "layout": asdict(layout), "block": layout.size}
    told = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({KEY.fullmatch(name)[1].rpartition(".")[2] for name in stored}),  # type: ignore[index]
        "unmask": {**own, "in_flight": in_flight, "mask_id": mask_id},
    }
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(told, indent=2) + "\n"
    write_atomically(directory / PAIRS, lambda path: save_file(stored, path, metadata={"format": "pt"}))
    write_atomically(directory / SETTINGS, lambda path: Path(path).write_text(text, encoding="utf-8"))


def published(config: ModelConfig) -> dict[tuple[str, str], str]:
    """(our parameter, its piece) -> the module's name in the base's family; empty for our own format."""
    family = next((f for f in FAMILIES if f.name == config.family), None)
    found = {}
    for theirs, ours in family.names.items() if family else ():
        name, _, piece = ours.partition(":")
        for layer in range(config.layers) if theirs.count("{}") == 1 else ():
            found[name.format(layer), piece] = theirs.format(layer).removesuffix(".weight")
    return found
