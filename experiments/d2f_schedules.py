"""Does the noise of a D2F student's blocks matter? Students of the embedded dLLM, alike but for their schedule.

    python experiments/d2f_schedules.py [--steps 500] [--items 500] [--bucket 0] [--runs runs/d2f-schedules]

Each is trained on word problems alone (resumable), as many a text as `--bucket` of `train.batches` has, and decodes
the same held-out ones, block after block and in a pipeline. Its loss on held-out batches is told for each kind of
noise, which is what a schedule trains for. Rows and summary: a folder of results/.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import unmask
from unmask.models.transformer import Transformer
from unmask.study import evaluate, tasks
from unmask.study.results import Results
from unmask.train.batches import BUCKETS, MIXTURES, Bucket, Mixture
from unmask.train.blocks import D2FConfig, D2FTrainer
from unmask.train.forcing import Noise, loss, prepare

STUDENTS = {
    "monotone": {"schedule": "monotone", "low": 0.2, "high": 0.7},
    "random": {"schedule": "random", "low": 0.2, "high": 0.7},
    "monotone to 1": {"schedule": "monotone", "low": 0.0, "high": 1.0},
    "random to 1": {"schedule": "random", "low": 0.0, "high": 1.0},
    "ramp": {"schedule": "ramp"},
}
RECIPES = {"serial": "d2f(0.9, 1.0, 1.0)", "pipeline": "d2f(0.9, 0.1, 0.95)"}
BLOCK, BATCHES = 8, 8


def train(name: str, teacher: Any, said: argparse.Namespace, folder: Path) -> Transformer:
    """The student of one schedule after `said.steps` steps of word problems."""
    steps, seed, bucket = said.steps, said.seed, BUCKETS[said.bucket]
    MIXTURES["single"] = (1.0,)
    source = Mixture(teacher.tokenizer.inner, [], seed, buckets=(bucket,), shares="single")
    config = D2FConfig(
        steps=steps, seed=seed, block=BLOCK, save_every=100, data=f"worksheets of {bucket.items} problems"
    )
    trainer = D2FTrainer(replace(config, **STUDENTS[name]), teacher.network, source, folder)
    trainer.resume()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=steps, completed=trainer.step)
        for progress in trainer.run():
            bar.update(task, completed=progress.step, description=f"{name}, loss {progress.loss:.3f}")
    return trainer.model.eval()


@torch.no_grad()
def held_out(student: Any, teacher: Any, seed: int, bucket: Bucket) -> dict[str, float]:
    """Mean loss on held-out batches, by the noise they are given."""
    source = Mixture(teacher.tokenizer.inner, [], seed + 1_000_000, buckets=(bucket,), shares="single")
    ids, found = {"mask": teacher.network.config.mask_id, "eos": teacher.network.config.eos_ids[0]}, {}
    for name, noise in {n: Noise(**s) for n, s in STUDENTS.items()}.items():
        draw, losses = torch.Generator().manual_seed(seed), []
        for step in range(BATCHES):
            noisy = prepare(source.batch(step), noise, student.config.layout, draw, **ids)
            losses.append(float(loss(student, teacher.network, noisy, torch.float32)))
        found[name] = sum(losses) / len(losses)
    return found


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Mean of per-item values and its 95% bootstrap interval."""
    draws = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    return [float(values.mean()), *map(float, np.percentile(draws, [2.5, 97.5]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument(
        "--bucket", type=int, default=0, choices=range(4), help="0 to 3: up to 1, 2, 4, 8 problems a text"
    )
    parser.add_argument("--only", nargs="*", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/d2f-schedules"))
    said = parser.parse_args()
    torch.set_num_threads(1)
    teacher = unmask.load()
    bucket = BUCKETS[said.bucket]
    task = tasks.word_problems(said.items, k=max(bucket.items))
    right: dict[tuple[str, str], np.ndarray] = {}
    losses: dict[str, dict[str, float]] = {}
    config = {
        "steps": said.steps,
        "items": said.items,
        "seed": said.seed,
        "bucket": bucket,
        "students": STUDENTS,
        "recipes": RECIPES,
    }
    with Results.create("d2f-schedules", config) as results:
        for name in said.only:
            student = train(name, teacher, said, said.runs / name.replace(" ", "-"))
            losses[name] = held_out(student, teacher, said.seed, bucket)
            print(f"{name:14} loss by noise {', '.join(f'{n} {v:.4f}' for n, v in losses[name].items())}", flush=True)
            for way, text in RECIPES.items():
                recipe = evaluate.recipe_for(student, text, task.length, block=BLOCK)
                found = evaluate.evaluate(student, teacher.tokenizer.inner, task, recipe)
                right[name, way] = np.array([row["right"] for row in found.rows])
                for row in found.rows:
                    results.row({"student": name, "way": way, **row})
                print(f"{name:14} {way:9} right {found.scores['right']:.3f} forwards {found.forwards:.2f}", flush=True)
        rows = [
            {"student": n, "way": w, "right": interval(v), f"over {said.only[0]}": interval(v - right[said.only[0], w])}
            for (n, w), v in right.items()
        ]
        print(results.finish({"rows": rows, "losses": losses}))


if __name__ == "__main__":
    main()
