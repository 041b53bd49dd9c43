"""`unmask train`: train the embedded pair from scratch, resumably, with live progress."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.errors import UserError, suggest

if TYPE_CHECKING:
    from unmask.generate import Model
    from unmask.train.joint import JointConfig, Trajectories
    from unmask.train.run import Progress, Run

RATES = {"ar": (0.02, 0.003), "dllm": (0.003, 0.001)}
"""Peak rates of Muon and AdamW: a twin starts at random, a dLLM from its twin, which a higher rate destroys."""

ITEMS = 64
"""Problems, and descriptions, that are decoded to measure accuracy along the way."""


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    *,
    kind: Annotated[str, typer.Option(help="dllm, or ar for the twin.")] = "dllm",
    steps: Annotated[int, typer.Option(help="Length of the run; the learning rate decays to its end.")] = 30000,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")] = Path("runs/dllm"),
    e2e: Annotated[Path, typer.Option(help="Folder of the E2E data (train.jsonl.gz, ...).")] = Path("data/e2e"),
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this checkpoint.")] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, data and masks.")] = 0,
    muon_lr: Annotated[float | None, typer.Option(help="Rate of matrices; default 0.02 (ar), 0.003 (dllm).")] = None,
    adam_lr: Annotated[float | None, typer.Option(help="Rate of the rest; default 0.003 (ar), 0.001 (dllm).")] = None,
    decay: Annotated[float, typer.Option(help="Share of the run over which the rate decays.")] = 0.7,
    compile: Annotated[bool, typer.Option(help="Compile the loss; needs a C++ compiler.")] = True,
    mixture: Annotated[str, typer.Option(help="Shares of the tasks: even, or short for single items.")] = "even",
    keep: Annotated[list[float] | None, typer.Option(help="Keep a checkpoint at this fraction of the run.")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements of decoded accuracy; 0: none.")] = 2000,
) -> None:
    """Train a masked dLLM or its autoregressive twin.

    The data are word problems, drawn as they are needed, and the restaurant descriptions of E2E.
    """
    if context.invoked_subcommand is not None:
        return
    if kind not in ("dllm", "ar"):
        raise suggest(kind, ("dllm", "ar"), "kind")
    if steps < 1 or eval_every < 0:
        raise UserError(f"--steps must be at least 1 and --eval-every at least 0, not {steps} and {eval_every}")
    from unmask.train import restaurants, vocabulary
    from unmask.train.batches import MIXTURES, Mixture
    from unmask.train.loop import TrainConfig, Trainer

    if mixture not in MIXTURES:
        raise suggest(mixture, MIXTURES, "mixture")
    rows = restaurants.clean(restaurants.read(e2e, "train"))
    tokenizer = vocabulary.build(rows)
    default = RATES[kind]
    rates: dict[str, Any] = {"muon_lr": muon_lr or default[0], "adam_lr": adam_lr or default[1], "decay": decay}
    rates |= {"mixture": mixture, "keep": tuple(keep or ())}
    config = TrainConfig(kind=kind, steps=steps, seed=seed, compile=compile, **rates)
    trainer = Trainer(config, Mixture(tokenizer, rows, seed), out)
    resumed = trainer.resume()
    if not resumed and init is not None:
        trainer.start_from(init)
    print(f"{kind}: {'resumed at step ' + str(trainer.step) if resumed else 'from the start'}, in {out}", flush=True)
    follow(trainer, measure(tokenizer, e2e) if eval_every else None, eval_every)


@app.command("joint")
def joint(
    *,
    model: Annotated[str, typer.Option(help="The dLLM whose sampler it is; its weights stay as they are.")] = "dllm",
    steps: Annotated[int, typer.Option(help="Length of the run; the learning rate decays to its end.")] = 2500,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")] = Path("runs/joint"),
    e2e: Annotated[Path | None, typer.Option(help="Folder of the E2E data; without it, word problems alone.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of the model that are recorded on word problems.")] = 6144,
    k: Annotated[int, typer.Option(help="Tokens a forward to train for.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides weights, prompts and windows.")] = 0,
) -> None:
    """Train a joint sampler: a layer that draws dependent tokens from one forward.

    It learns from runs of the model itself, one token a step. The finished sampler is the folder `sampler` in --out.
    """
    for name, value, least in (("steps", steps, 1), ("runs", runs, 8), ("k", k, 2)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    import torch

    from unmask.generate import load
    from unmask.train.export import export_sampler
    from unmask.train.joint import JointConfig, JointTrainer

    loaded = load(model, dtype="bfloat16", compile="off")
    if loaded.network.config.autoregressive:
        raise UserError(f"a joint sampler draws for a masked model, and {model} is autoregressive")
    torch.set_num_threads(1)
    config, data = _recorded(loaded, JointConfig(steps=steps, seed=seed, k=k, runs=runs), e2e, out)
    trainer = JointTrainer(config, loaded.network, data, out)
    print(f"joint sampler: {f'resumed at step {trainer.step}' if trainer.resume() else 'from the start'}, in {out}")
    follow(trainer, None, 1)
    card = export_sampler(trainer, out / "sampler")
    print(f"{out / 'sampler'}: {card['parameters']:,} parameters; use it by --sampler {out / 'sampler'}")


def _recorded(
    loaded: Model, config: JointConfig, e2e: Path | None, out: Path
) -> tuple[JointConfig, list[Trajectories]]:
    """The configuration, which names base and data, and the model's own runs, kept in `out` for a resumed run."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from unmask.models.joint import digest
    from unmask.train import trajectories

    chosen = trajectories.sources(e2e)
    told = ", ".join(f"{s.task} in blocks of {s.block} at temperature {s.temperature:g}" for s in chosen)
    config = replace(config, base=digest(loaded.network), data=told)
    path, key = out / "runs.pt", f"{config.base} {config.runs} {config.seed} {told}"
    if (data := trajectories.kept(path, key)) is not None:
        return config, data
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("recording", total=sum(trajectories.share(i, config.runs) for i in range(len(chosen))))
        size = {"count": config.runs, "seed": config.seed, "e2e": e2e}
        advance = partial(bar.advance, task)
        data = trajectories.collect(loaded.network, loaded.tokenizer, chosen, **size, on_row=advance)
    trajectories.keep(path, key, data)
    return config, data


def measure(tokenizer: Any, e2e: Path) -> Callable[[Any], dict[str, float]]:
    """A function of the model: share of right answers to held-out problems and of slots in held-out descriptions."""
    from unmask.study import evaluate, tasks

    chosen = [tasks.word_problems(ITEMS), tasks.descriptions(e2e, ITEMS, split="valid")]

    def evaluated(model: Any) -> dict[str, float]:
        found = {}
        for task in chosen:
            recipe = evaluate.recipe_for(model, "threshold", task.length)
            found[task.name] = evaluate.evaluate(model, tokenizer, task, recipe).scores["right"]
        return found

    return evaluated


def follow(trainer: Run, evaluate: Callable[[Any], dict[str, float]] | None, every: int) -> None:
    """Run to the end: a live bar in a terminal, now and then a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(highlight=False)
    run = trainer.run(evaluate=evaluate, evaluate_every=max(1, every))
    if not console.is_terminal:
        for progress in run:
            if progress.step % 200 == 0 or progress.metrics or progress.step == progress.steps:
                console.print(line(progress), soft_wrap=True)
        return
    with Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=trainer.config.steps, completed=trainer.step)
        for progress in run:
            bar.update(task, completed=progress.step, description=line(progress, short=True))
            if progress.metrics:
                console.print(line(progress))


def line(progress: Progress, *, short: bool = False) -> str:
    """Where a run stands, in one line."""
    minutes = progress.eta / 60
    left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
    told = f"loss {progress.loss:.4f}, {progress.tokens_per_second / 1e3:.1f} ktok/s, {left} left"
    accuracy = "".join(f", {name} {value:.3f}" for name, value in progress.metrics.items())
    return told if short else f"step {progress.step} of {progress.steps}: {told}{accuracy}"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `unmask train`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the model.")],
    *,
    e2e: Annotated[Path, typer.Option(help="Folder of the E2E data: its words are the vocabulary.")] = Path("data/e2e"),
) -> None:
    """Turn a training checkpoint into a model folder with a card."""
    from unmask.train import restaurants, vocabulary
    from unmask.train.export import export as write
    from unmask.train.run import read_state

    read_state(checkpoint)  # a checkpoint that is none is told before data that it would need
    card = write(checkpoint, out, vocabulary.build(restaurants.clean(restaurants.read(e2e, "train"))))
    print(f"{out}: {card['parameters']:,} parameters, {card['trained']['tokens']:,} tokens seen in this run")
