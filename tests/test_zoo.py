"""The embedded models: what ships is small, paired, and as good as its card says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from unmask import zoo
from unmask.decode import Canvas
from unmask.models.config import Layout
from unmask.models.joint import JointSampler, digest, load_sampler
from unmask.models.load import load_checkpoint
from unmask.study import tasks
from unmask.study.cards import load
from unmask.study.evaluate import evaluate, recipe_for
from unmask.train.joint import loss, record
from unmask.train.trajectories import SOURCES
from unmask.train.vocabulary import SEP

MEGABYTE = 1e6


def test_weights_are_small() -> None:
    sizes = [(zoo.path(name) / "model.safetensors").stat().st_size for name in zoo.NAMES]
    assert max(sizes) <= 16 * MEGABYTE
    assert sum(sizes) <= 40 * MEGABYTE


def test_the_pair_differs_only_in_what_makes_it_a_pair() -> None:
    dllm, twin = (load_checkpoint(zoo.path(name)).model.config for name in zoo.PAIR)
    assert replace(dllm, layout=twin.layout, mask_id=twin.mask_id) == twin
    assert twin.autoregressive
    assert not dllm.autoregressive
    texts = {(zoo.path(name) / "tokenizer.json").read_bytes() for name in zoo.NAMES}
    assert len(texts) == 1


def test_the_student_is_the_dllm_in_blocks() -> None:
    dllm, student = (load_checkpoint(zoo.path(name)).model for name in (zoo.PAIR[0], zoo.STUDENT))
    assert replace(student.config, layout=dllm.config.layout, in_flight=False) == dllm.config
    assert student.config.in_flight
    assert student.config.layout == Layout("block", 8)
    assert zoo.card(zoo.STUDENT)["trained"]["config"]["base"] == digest(dllm)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_cards_say_how_the_weights_came_about(name: str) -> None:
    card = json.loads((zoo.path(name) / "card.json").read_text())
    model = load_checkpoint(zoo.path(name)).model
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["trained"]["tokens"] > 0
    assert card["curve"]
    assert card["accuracy"], "run `unmask evaluate --card`"
    assert all(row["results"].startswith("evaluate-") for row in card["accuracy"])


@pytest.mark.parametrize(("name", "recipe"), [("dllm", "threshold"), ("twin", "ar"), ("d2f", "d2f")])
def test_accuracy_is_what_the_card_says(name: str, recipe: str) -> None:
    """64 of the card's own problems: within three standard errors of the accuracy on all of them."""
    torch.set_num_threads(1)
    loaded, tokenizer = load(name, "float32")
    said = next(r for r in zoo.card(name)["accuracy"] if (r["task"], r["recipe"]) == ("problems-draws", recipe))
    task = tasks.word_problems(64)
    found = evaluate(loaded.model, tokenizer, task, recipe_for(loaded.model, recipe, task.length, block=8))
    spread = 3 * (max(said["right"] * (1 - said["right"]), 0.02) / 64) ** 0.5
    assert abs(found.scores["right"] - said["right"]) <= spread
    assert abs(found.forwards - said["forwards"]) <= 0.25 * said["forwards"]


def test_the_joint_sampler_is_the_dllms_and_helps_where_beliefs_move() -> None:
    """Five draws into a held-out run, around the step that moved its beliefs most: nearer to the model run again than
    the marginal sampler is. Averaged over all steps the two are equal (docs/log.md)."""
    torch.set_num_threads(1)
    loaded, tokenizer = load("dllm", "bfloat16")
    folder = zoo.sampler("dllm")
    assert folder is not None
    sampler = load_sampler(folder, loaded.model)
    card = json.loads((folder / "card.json").read_text())
    assert card["parameters"] == sum(p.numel() for p in sampler.parameters())
    assert card["base"] == digest(loaded.model) and card["curve"]
    c = loaded.model.config
    prompts = [[*tokenizer.encode(i.prompt).ids, SEP] for i in tasks.word_problems(96, seed=3).items]
    canvas = Canvas.new(prompts, 24, mask_id=c.mask_id, eos=c.eos_ids)
    runs = record(loaded.model, canvas, SOURCES[0].order())
    rows = (runs.steps > 10).nonzero()[:, 0]
    start = runs.surprise[rows, :5].argmax(1)
    with torch.inference_mode():
        marginal = JointSampler(c).initialise(0).bfloat16()
        found, none = (float(loss(loaded.model, head, runs, rows, start, draws=5)) for head in (sampler, marginal))
    assert found < 0.9 * none, (found, none)
