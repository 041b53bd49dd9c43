"""Where a checkpoint lies: a directory, or a repository on the Hugging Face hub that is downloaded once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from unmask.errors import UserError

PATTERNS = [
    "model*.safetensors",  # not the second copies that some repositories keep under other names
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
]


def locate(source: str | Path) -> tuple[str, Path]:
    """(display name, directory) of a checkpoint; a hub id `org/name` is downloaded if no such path exists."""
    path = Path(source)
    try:
        found = path.is_dir(), path.exists()
    except OSError as error:
        raise UserError(f"cannot look for a model at {str(path)[:80]!r}: {error.strerror}") from error
    if found[0]:
        return path.resolve().name, path
    if found[1]:
        raise UserError(f"{path} is a file; give the directory that holds config.json and the weights")
    name = str(source)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return name, download(name)
    raise UserError(f"there is no directory {name!r}, and it is not a hub id of the form org/name")


def download(name: str) -> Path:
    """The local snapshot of a hub repository: weights as safetensors, configuration, tokenizer, nothing executable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"the hub does not give {name!r}: {str(error).splitlines()[0]}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE") else ""
        raise UserError(
            f"{name!r} is neither a directory here nor in the local hub cache, and the hub cannot be reached{offline}"
        ) from error
