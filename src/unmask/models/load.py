"""Checkpoints: ours and the published ones, from a directory or the hub, filled tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from unmask.errors import UserError
from unmask.models.adapter import SETTINGS, Adapter, check_name, find_base, is_adapter, merge, pairs_of, read_adapter
from unmask.models.config import ModelConfig
from unmask.models.experts import WIDE
from unmask.models.families import OWN, Place, config_of, ignored, places_of
from unmask.models.files import FLOATS, SINGLE, headers, read_json, tensors, weight_files, write_atomically
from unmask.models.hub import locate
from unmask.models.joint import digest
from unmask.models.tables import FAMILIES
from unmask.models.tokenizer import Tokenizer
from unmask.models.transformer import Transformer, rope_tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference and what came with it."""

    model: Transformer
    tokenizer: Tokenizer | None
    name: str
    directory: Path


def save_checkpoint(model: Transformer, directory: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors under our own names; each file is complete or not there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = model.named_parameters()
    weights = {n: p.detach().to("cpu", p.dtype if n.endswith(WIDE) else dtype).contiguous() for n, p in parameters}
    text = json.dumps({"architectures": ["UnmaskTransformer"], **asdict(model.config)}, indent=2) + "\n"
    write_atomically(directory / SINGLE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomically(directory / "config.json", lambda path: Path(path).write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Plan:
    """A checkpoint whose files were found to be right, before any memory is taken for its weights."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    model: Transformer
    """On the meta device: shapes without memory."""
    files: list[Path]
    places: dict[str, Place]


def load_checkpoint(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
    block: int | None = None,
    family: str = "",
    shipped: Path | None = None,
) -> Loaded:
    """Load a directory, or a hub id `org/name`, as a frozen model in eval mode with its tokenizer, if it has one.

    `dtype`: that of the weights in memory; "auto" keeps the one they are stored in. An adapter is merged into its base:
    `base`, else the one it names, which may stand in the folder `shipped`. `block`: size of the attention's blocks, a
    multiple or a part of that trained. `family`: which it is of those that share an architecture ("diffullama", say).
    UserError for whatever is wrong with the files.
    """
    name, directory = locate(source)
    if dtype != "auto":
        dtype = choose_dtype(dtype, [])
    if is_adapter(directory):
        adapter = read_adapter(name, directory)
        called, under = find_base(adapter, base, shipped)
        found = plan(under, 0, family)
        check_name(adapter, called, under)
        model = adapted(adapter, found, dtype, device, block)
        special = (model.config.mask_id, found.config.bos_id, *found.config.eos_ids)
        return Loaded(model, find_tokenizer(under, reserved=special), name, directory)
    if base is not None:
        raise UserError(f"{directory} is no adapter (it has no {SETTINGS}); leave base out")
    found = plan(directory, block or 0, family)
    return Loaded(build(found, dtype, device), found.tokenizer, name, directory)


def plan(directory: Path, block: int, family: str) -> Plan:
    """Read and check everything but the values of the weights."""
    raw = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json", missing={})
    if raw.get("mask_token_id") is None and (mask := named_mask(family, directory)) is not None:
        raw = {**raw, "mask_token_id": mask}
    config = config_of(raw, generation, directory, family=family, block=block)
    tokenizer = find_tokenizer(directory, reserved=(config.mask_id, config.bos_id, *config.eos_ids))
    if tokenizer is not None and (words := tokenizer.inner.get_vocab_size(with_added_tokens=False)) > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {words} tokens, the model only {config.vocab_size}")
    if tokenizer is not None and not family:
        check_family(config, tokenizer, directory)
    if tokenizer is not None and config.family != "unmask":
        config = replace(config, token_count=spoken(config, tokenizer))
    files = weight_files(directory)
    with torch.device("meta"):
        model = Transformer(config)
    names = replace(config, family="unmask") if OWN in (raw.get("architectures") or []) else config
    places = places_of(names, {name: p.shape for name, p in model.named_parameters()})
    compare(config, places, files)
    return Plan(directory, config, tokenizer, model, files, places)


def build(plan: Plan, dtype: str | torch.dtype, device: str | torch.device) -> Transformer:
    """The model of a plan, filled tensor by tensor."""
    model = plan.model.to(choose_dtype(dtype, plan.files)).to_empty(device=device)
    model.cos, model.sin = (t.to(device) for t in rope_tables(plan.config))
    fill(model, plan.places, plan.files)
    return model.requires_grad_(False).eval()


def adapted(
    adapter: Adapter, base: Plan, dtype: str | torch.dtype, device: str | torch.device, block: int | None
) -> Transformer:
    """The base with the adapter merged into it, rounded once, at the end; UserError for the wrong base."""
    layout = adapter.attention(base.config.layout, block)
    mask = adapter.mask(base.config, layout)
    pairs = pairs_of(adapter, base.config, base.places)
    chosen = choose_dtype(dtype, base.files)
    model = build(base, torch.promote_types(chosen, choose_dtype("auto", base.files)), device)
    if adapter.digest and adapter.digest != (own := digest(model)):
        told = f"was made for a base of other weights ({adapter.digest}) than those of"
        raise UserError(f"{adapter.directory} {told} {base.directory} ({own})")
    merge(model, adapter, pairs)
    tables = model.cos, model.sin
    model = model.to(chosen)
    model.cos, model.sin = tables  # in fp32 as ever
    flies = adapter.flies(base.config, layout)
    model.config = replace(base.config, layout=layout, mask_id=mask, in_flight=flies)
    return model


def named_mask(family: str, directory: Path) -> int | None:
    """The mask that the tokenizer's files name, for a family whose config.json does not; None if there is none."""
    if not any(f.name == family and f.mask_named for f in FAMILIES):
        return None
    tokenizer = find_tokenizer(directory, reserved=())
    return None if tokenizer is None else tokenizer.id(tokenizer.named.get("mask_token", ""))


def check_family(config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """UserError for a model that seems autoregressive, but whose tokenizer has a mask: it may be of another family."""
    own = next((f for f in FAMILIES if f.name == config.family), None)
    others = [f.name for f in FAMILIES if own and f is not own and set(f.architectures) & set(own.architectures)]
    if own and others and config.autoregressive and "mask_token" in tokenizer.named:
        raise UserError(
            f"{directory}: {own.architectures[0]} with a mask token may be of family {others[0]!r} (attends to all, "
            f"fills masks) or {own.name!r} (autoregressive), and its files do not say which; give family"
        )


def find_device(name: str | torch.device) -> torch.device:
    """The device, or a UserError if there is none of that name or this torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the device {str(name)!r} cannot be used here: {reason}; use 'cpu'") from None
    return device


def find_tokenizer(directory: Path, reserved: Iterable[int]) -> Tokenizer | None:
    """The tokenizer beside the weights, `reserved` ids being special; None where there are no vocabulary files."""
    if (directory / "tokenizer.json").is_file() or (directory / "vocab.json").is_file():
        return Tokenizer.from_directory(directory, reserved=reserved)
    return None


def spoken(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """How many ids are real: those of the tokenizer and the special ones; the rest of the embedding is padding."""
    named = [config.mask_id, config.bos_id, *config.eos_ids]
    return min(config.vocab_size, max(tokenizer.vocab_size, *(i + 1 for i in named)))


def choose_dtype(dtype: str | torch.dtype, files: Iterable[Path]) -> torch.dtype:
    """The dtype asked for, or that of the first matrix stored."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return next(FLOATS[kind] for path in files for _, shape, kind in headers(path) if len(shape) > 1)
    if dtype.removeprefix("torch.") not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def compare(config: ModelConfig, places: Mapping[str, Place], files: list[Path]) -> None:
    """UserError if a tensor is missing, doubled, unknown, misshapen or quantized: before memory is taken for any."""
    missing, unknown = set(places), []
    for path in files:
        for name, shape, kind in headers(path):
            if name in places:
                if name not in missing:
                    raise UserError(f"{path} holds {name}, which an earlier shard holds as well")
                missing.discard(name)
                if shape != (expected := places[name].shape):
                    raise UserError(f"{path}: {name} has shape {shape}, expected {expected}")
                if kind not in FLOATS:
                    raise UserError(f"{path}: {name} is stored as {kind}; supported are {', '.join(FLOATS)}")
            elif not ignored(name, config):
                unknown.append(name)
    where = files[0] if len(files) == 1 else files[0].parent
    if missing:
        raise UserError(f"{where} lacks {listing(n for n in places if n in missing)}")
    if unknown:
        raise UserError(f"{where} holds {listing(unknown)}, which this architecture does not have")


def fill(model: Transformer, places: Mapping[str, Place], files: list[Path]) -> None:
    """Copy every stored tensor to its rows of a parameter, one at a time."""
    parameters = dict(model.named_parameters())
    for path in files:
        for name, value in tensors(path):
            if (place := places.get(name)) is not None:
                parameters[place.parameter].detach()[place.first : place.first + place.shape[0]].copy_(value)


def listing(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
