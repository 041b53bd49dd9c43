"""`unmask doctor`: versions, device, threads, compiler, embedded weights, and what is missing."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
from typing import Annotated, Any

import typer

CORE = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "jinja2", "typer", "rich")
EXTRA = {
    "matplotlib": "train",
    "transformers": "hf",
    "outlines-core": "constrained",
    "llguidance": "constrained",
}
"""Packages that some feature needs, and the extra that installs them."""


def doctor(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Say what is installed and what is missing.

    The exit code is 1 if unmask cannot work.
    """
    found = examine()
    if json:
        print(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    raise typer.Exit(1 if found["broken"] else 0)


def examine() -> dict[str, Any]:
    """Everything `unmask doctor` tells, as JSON can hold it."""
    import unmask

    packages = {name: _version(name) for name in (*CORE, *EXTRA)}
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    models = _models()
    broken = [f"{name} is not installed" for name in CORE if packages[name] is None]
    broken += [f"the embedded model {name!r} has no weights" for name, size in models.items() if not size]
    missing = [f"{name} (pip install 'unmask[{e}]')" for name, e in EXTRA.items() if packages[name] is None]
    missing += (
        [] if compiler else ["a C++ compiler (torch.compile on a CPU needs one; `unmask train --no-compile` does not)"]
    )
    return {
        "unmask": unmask.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        **_torch(packages["torch"] is not None),
        "cores": os.cpu_count(),
        "compiler": compiler,
        **_kernels(packages["torch"] is not None),
        "models": models,
        "missing": missing,
        "broken": broken,
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _models() -> dict[str, int]:
    """Bytes of the weights of each embedded model; 0 if they are missing."""
    from pathlib import Path

    from unmask import zoo

    folders = {name: Path(zoo.__file__).parent / name for name in zoo.NAMES}
    folders |= {folder.name: folder for name in zoo.NAMES if (folder := zoo.sampler(name))}
    files = {name: folder / "model.safetensors" for name, folder in folders.items()}
    return {name: file.stat().st_size if file.is_file() else 0 for name, file in files.items()}


def _torch(installed: bool) -> dict[str, Any]:
    if not installed:
        return {"device": None, "threads": 0, "cpu": ""}
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": gpu or "cpu", "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def _kernels(installed: bool) -> dict[str, Any]:
    """Does this processor decode with compiled kernels (compiled now, if they never were), and what it is fast at."""
    if not installed:
        return {"kernels": "none: torch is not installed", "fast": []}
    from unmask.models import native

    fast = native.units()
    try:
        native.library("float32", half=False)
    except native.Unavailable as error:
        return {"kernels": f"none: {error}", "fast": fast}
    return {"kernels": f"compiled, in {native.folder()}", "fast": fast}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]unmask[/] {found['unmask']}, Python {found['python']}, {found['platform']}")
    console.print(f"device {found['device']} ({found['cpu']}), {found['threads']} threads of {found['cores']} cores")
    console.print("packages " + ", ".join(f"{k} {v}" for k, v in found["packages"].items() if v))
    console.print(f"compiler {found['compiler'] or 'none'}")
    console.print(f"kernels {found['kernels']}; processor: {', '.join(found['fast']) or 'no bf16 or int8 units'}")
    sizes = (f"{name} {size / 1e6:.1f} MB" if size else f"{name} missing" for name, size in found["models"].items())
    console.print("embedded models " + ", ".join(sizes))
    for line in found["missing"]:
        console.print(f"optional, missing: {line}", markup=False, style="yellow", soft_wrap=True)
    for line in found["broken"]:
        console.print(f"broken: {line}", markup=False, style="red", soft_wrap=True)
    if not found["broken"]:
        console.print("[green]everything that is needed is here[/]")
