"""Make the golden traces from clones of the published repositories; see README.md beside this file.

PYTHONPATH=src:tests python -m golden.make_traces --repo llada=~/src/LLaDA --repo d2f=~/src/Discrete-Diffusion-Forcing
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden import published, toy
from golden.configs import METHODS
from golden.load import FOLDER
from golden.methods import Config, Method

PROMPTS = 40


def prompts() -> list[list[int]]:
    """40 prompts of 5 .. 23 random tokens, the mask token not among them."""
    draw = np.random.RandomState(2024)
    return [draw.randint(0, toy.MASK, size=5 + int(draw.randint(0, 19))).tolist() for _ in range(PROMPTS)]


def block_of(config: Config) -> int:
    """The block that a block-causal toy attends in."""
    return config.get("block_size", config.get("block_length", 0))


def face_of(method: Method, config: Config) -> toy.Face:
    """A fresh face of the network this method runs on."""
    model = toy.network(method.kind, block_of(config))
    return toy.ShiftedFace(model) if method.kind == "dream" else toy.Face(model)


def decode(method: Method, module: Any, face: toy.Face, prompt: list[int], config: Config, seed: int) -> list[Any]:
    """One run as it is stored: forwards, positions computed, output, born, extra."""
    face.reset()
    canvas, extra = method.run(module, face, torch.tensor([prompt]), config, seed)
    row = canvas[0].tolist()
    assert row[: len(prompt)] == prompt and toy.MASK not in row, f"{method.name} {config}: an unfinished canvas"
    born = toy.born(face, len(prompt), len(row) - len(prompt))
    return [face.calls, face.computed, row[len(prompt) :], born, extra]


def record(method: Method, source: published.Published) -> dict[str, Any]:
    """All runs of one method with their provenance."""
    rows, seeds = prompts(), [1000 + 7 * i for i in range(PROMPTS)]
    cases = []
    for c, config in enumerate(method.configs):
        face = face_of(method, config)
        runs = [decode(method, source.module, face, row, config, seed) for row, seed in zip(rows, seeds, strict=True)]
        again = [decode(method, source.module, face_of(method, config), rows[p], config, seeds[p]) for p in (0, 1, 2)]
        assert again == runs[:3], f"{method.name} {config}: a second run differs"
        cases += [[p, c, *run] for p, run in enumerate(runs)]
    meta = {
        **source.source,
        "function": method.function,
        "script": "tests/golden/make_traces.py",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "toy": {**toy.describe(), "kind": method.kind},
        "extra": method.extra,
        "notes": list(method.notes),
    }
    return {"meta": meta, "configs": method.configs, "prompts": rows, "seeds": seeds, "cases": cases}


def check_faces() -> None:
    """The face says what the network says: whole, on cached keys and values, by replacement, under a block mask."""
    row = torch.tensor([prompts()[0] + [toy.MASK] * 16])
    cut = row.shape[1] - 16
    model = toy.network()
    face, whole = toy.Face(model), model(row)
    out = face(row, use_cache=True)

    def same(logits: Tensor, expected: Tensor) -> None:
        keep = torch.arange(toy.VOCAB) != toy.MASK
        torch.testing.assert_close(logits[..., keep], expected[..., keep], rtol=0, atol=1e-11)
        assert (logits[..., toy.MASK] == -torch.inf).all()

    same(out.logits, whole)
    prefix = [(k[:, :, :cut], v[:, :, :cut]) for k, v in out.past_key_values]
    same(face(row[:, cut:], past_key_values=prefix).logits, whole[:, cut:])
    window = torch.zeros_like(row, dtype=torch.bool)
    window[:, cut : cut + 8] = True
    part = face(row[:, cut : cut + 8], past_key_values=out.past_key_values, replace_position=window)
    same(part.logits, whole[:, cut : cut + 8])
    config = toy.config("d2f", 8)
    index = torch.arange(row.shape[1])[None]
    visible = config.layout.visible(index, index, torch.tensor([cut]))
    assert visible is not None
    bias = torch.zeros(1, 1, *visible.shape[1:], dtype=torch.float64).masked_fill(~visible[:, None], -torch.inf)
    same(face(row, attention_bias=bias).logits, model(row, visible=visible[:, None]))


def main() -> None:
    """Write tests/golden/traces/*.json for the repositories given."""
    parser = argparse.ArgumentParser(description="Record published decoding loops on the toy network.")
    keys = ", ".join(published.ORIGIN)
    parser.add_argument("--repo", nargs="+", action="extend", required=True, metavar="KEY=PATH", help=f"KEY: {keys}")
    parser.add_argument("--only", nargs="+", metavar="TRACE", help="make these traces only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_faces()
    clones = {key: Path(path).expanduser() for key, _, path in (item.partition("=") for item in options.repo)}
    FOLDER.mkdir(exist_ok=True)
    for method in METHODS:
        if method.repo in clones and (options.only is None or method.name in options.only):
            data = record(method, published.load(method.repo, clones[method.repo]))
            path = FOLDER / f"{method.name}.json"
            path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
            spent = [case[2] for case in data["cases"]]
            size = path.stat().st_size
            print(f"{method.name}: {len(spent)} runs, {min(spent)}..{max(spent)} forwards, {size} bytes", flush=True)


if __name__ == "__main__":
    main()
