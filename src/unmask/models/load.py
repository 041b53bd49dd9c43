"""Checkpoints: ours and the published ones, from a directory or the hub, filled tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from unmask.errors import UserError
from unmask.models.config import ModelConfig
from unmask.models.families import Place, config_of, ignored, places_of
from unmask.models.files import FLOATS, SINGLE, headers, read_json, tensors, weight_files, write_atomically
from unmask.models.hub import locate
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
    weights = {n: p.detach().to("cpu", dtype).contiguous() for n, p in model.named_parameters()}
    text = json.dumps({"architectures": ["UnmaskTransformer"], **asdict(model.config)}, indent=2) + "\n"
    write_atomically(directory / SINGLE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomically(directory / "config.json", lambda path: Path(path).write_text(text, encoding="utf-8"))


def load_checkpoint(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Loaded:
    """Load a directory, or a hub id `org/name`, as a frozen model in eval mode with its tokenizer, if it has one.

    `dtype`: that of the weights in memory; "auto" keeps the one they are stored in. UserError for whatever is wrong
    with the files.
    """
    name, directory = locate(source)
    raw = read_json(directory / "config.json")
    config = config_of(raw, read_json(directory / "generation_config.json", missing={}), directory)
    tokenizer = find_tokenizer(directory, reserved=(config.mask_id, config.bos_id, *config.eos_ids))
    if tokenizer is not None and (words := tokenizer.inner.get_vocab_size(with_added_tokens=False)) > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {words} tokens, the model only {config.vocab_size}")
    if tokenizer is not None and config.family != "unmask":
        config = replace(config, token_count=spoken(config, tokenizer))
    files = weight_files(directory)
    with torch.device("meta"):
        model = Transformer(config)
    places = places_of(config, {name: p.shape for name, p in model.named_parameters()})
    compare(config, places, files)
    model = model.to(choose_dtype(dtype, files)).to_empty(device=device)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    fill(model, places, files)
    return Loaded(model.requires_grad_(False).eval(), tokenizer, name, directory)


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
    """The dtype asked for, or that of the first tensor stored."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return next(FLOATS[kind] for path in files for _, _, kind in headers(path) if kind in FLOATS)
    if dtype.removeprefix("torch.") not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def compare(config: ModelConfig, places: Mapping[str, Place], files: list[Path]) -> None:
    """UserError if a tensor is missing, unknown, misshapen or quantized: found before memory is taken for any."""
    missing, unknown = set(places), []
    for path in files:
        for name, shape, kind in headers(path):
            if name in places:
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
