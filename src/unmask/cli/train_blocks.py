"""`unmask train d2f` and `unmask train block`: models that attend in blocks."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from unmask.cli import write
from unmask.cli.train import ITEMS, app, follow
from unmask.errors import UserError, suggest

if TYPE_CHECKING:
    from unmask.generate import Model
    from unmask.train.batches import Mixture
    from unmask.train.blocks import BlocksRun
    from unmask.train.run import Alone, Source
    from unmask.train.texts import Texts

Steps = Annotated[int, typer.Option(help="Length of the run; the learning rate decays to its end.")]
Size = Annotated[int, typer.Option(help="Cells of a block.")]
Data = Annotated[
    Path | None, typer.Option(help='JSON lines of {"prompt": ..., "response": ...}; without, the embedded tasks.')
]
E2E = Annotated[Path | None, typer.Option(help="Folder of the E2E data; without it, word problems alone.")]
Longest = Annotated[int, typer.Option(help="Cells of the longest row of --data that is learned.")]
Tokens = Annotated[int, typer.Option(help="Cells of a batch; each process has one of its own.")]
Rank = Annotated[int, typer.Option(help="Rank of a LoRA on the attention; 0 trains all weights.")]
Muon = Annotated[float, typer.Option(help="Rate of matrices.")]
Adam = Annotated[float, typer.Option(help="Rate of the rest, and of a LoRA.")]
Seed = Annotated[int, typer.Option(help="Decides data and masks.")]
Type = Annotated[str, typer.Option(help="Of activations: bfloat16 or float32.")]
Compile = Annotated[bool, typer.Option(help="Compile the loss; needs a C++ compiler; off in several processes.")]
Every = Annotated[
    int, typer.Option(help="Steps between measurements of decoded accuracy; 0, --data or several processes: none.")
]
Keep = Annotated[list[float] | None, typer.Option(help="Keep a checkpoint at this fraction of the run.")]


@app.command("d2f")
def d2f(
    *,
    teacher: Annotated[str, typer.Option(help="A masked model with full attention; its weights stay.")] = "dllm",
    steps: Steps = 4000,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")] = Path("runs/d2f"),
    block: Size = 8,
    schedule: Annotated[str, typer.Option(help="Noise of the blocks: monotone, ramp, or random (ablation).")] = "ramp",
    low: Annotated[float, typer.Option(help="Least rate of a monotone or random schedule.")] = 0.2,
    high: Annotated[float, typer.Option(help="Largest rate of a monotone or random schedule.")] = 0.7,
    rank: Rank = 0,
    alpha: Annotated[float, typer.Option(help="Scale of a LoRA: it adds alpha / rank times its product.")] = 32.0,
    data: Data = None,
    e2e: E2E = None,
    longest: Longest = 512,
    tokens: Tokens = 4608,
    muon_lr: Muon = 0.0005,
    adam_lr: Adam = 0.0002,
    seed: Seed = 0,
    dtype: Type = "bfloat16",
    compile: Compile = True,
    keep: Keep = None,
    eval_every: Every = 500,
) -> None:
    """Distil a block-causal student that refines several blocks at once (Discrete Diffusion Forcing).

    The student is the folder `model` in --out (with --rank also the folder `adapter`). For a big model, start
    `torchrun --nproc-per-node N -m unmask train d2f ...`: its weights are sharded over N GPUs, or CPU processes.
    """
    from unmask.train.blocks import D2FConfig, D2FTrainer
    from unmask.train.forcing import Schedule

    with _processes() as processes:
        if schedule not in get_args(Schedule):
            raise suggest(schedule, get_args(Schedule), "schedule")
        if not 0 <= low < high <= 1:
            raise UserError(f"--low and --high are rates with 0 <= low < high <= 1, not {low:g} and {high:g}")
        common = _common(locals(), processes)
        sizes = {"block": block, "tokens": tokens, "longest": longest, "seed": seed}
        loaded, source, told = _ready(processes, teacher, data, e2e, **sizes)
        config = D2FConfig(**common | told, schedule=schedule, low=low, high=high)  # type: ignore[arg-type]
        trainer = D2FTrainer(config, loaded.network, source, out, processes=processes)
        _train(trainer, loaded, 0 if data else eval_every)


@app.command("block")
def block(
    *,
    base: Annotated[str, typer.Option(help="The model to begin with: autoregressive or masked.")] = "twin",
    scratch: Annotated[bool, typer.Option("--scratch", help="Draw the weights anew, in the base's shape.")] = False,
    mask_id: Annotated[int, typer.Option(help="The mask of a model without one: an id that no text uses.")] = -1,
    grid: Annotated[
        str, typer.Option(help="Blocks are counted from the prompt's end (origin), or absolute.")
    ] = "origin",
    prompt: Annotated[str, typer.Option(help="How the prompt attends: bidirectional, or in blocks.")] = "bidirectional",
    complementary: Annotated[bool, typer.Option(help="See each row with a mask and with its complement.")] = True,
    steps: Steps = 4000,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")] = Path("runs/block"),
    size: Annotated[int, typer.Option("--block", help="Cells of a block.")] = 8,
    rank: Rank = 0,
    alpha: Annotated[float, typer.Option(help="Scale of a LoRA: it adds alpha / rank times its product.")] = 32.0,
    data: Data = None,
    e2e: E2E = None,
    longest: Longest = 512,
    tokens: Tokens = 4608,
    muon_lr: Muon = 0.003,
    adam_lr: Adam = 0.001,
    seed: Seed = 0,
    dtype: Type = "bfloat16",
    compile: Compile = True,
    keep: Keep = None,
    eval_every: Every = 500,
) -> None:
    """Train a model that diffuses block after block over an exact cache (BD3-LM, SDAR, Fast-dLLM v2).

    The model is the folder `model` in --out. `torchrun` shards a big one, as for `unmask train d2f`.
    """
    from unmask.models.config import GRIDS, PROMPTS
    from unmask.train.blocks import BlockConfig, BlockTrainer

    with _processes() as processes:
        for name, value, known in (("grid", grid, GRIDS), ("prompt", prompt, PROMPTS)):
            if value not in known:
                raise suggest(value, known, name)
        if scratch and rank:
            raise UserError(
                "--rank trains a LoRA, and the weights of --scratch that it adds to are kept nowhere; drop one"
            )
        common = _common({**locals(), "block": size}, processes)
        sizes = {"block": size, "tokens": tokens, "longest": longest, "seed": seed}
        loaded, source, told = _ready(processes, base, data, e2e, **sizes)
        told |= {"grid": grid, "prompt": prompt, "complementary": complementary, "scratch": scratch}
        told["mask_id"] = _mask(loaded, mask_id)
        if scratch:
            loaded.network.initialise(seed)
            told["base"] = ""
        trainer = BlockTrainer(BlockConfig(**common | told), loaded.network, source, out, processes=processes)
        if processes.world > 1:
            loaded.network.to("meta")  # the weights live on in shards
        _train(trainer, loaded, 0 if data else eval_every)


def _common(said: dict[str, Any], processes: Alone) -> dict[str, Any]:
    """The settings of both kinds of run, checked."""
    for name, least in (("steps", 1), ("block", 1), ("tokens", 1), ("longest", 2), ("rank", 0), ("eval_every", 0)):
        if said[name] < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {said[name]}")
    if said["dtype"] not in ("bfloat16", "float32"):
        raise suggest(said["dtype"], ("bfloat16", "float32"), "dtype")
    for name in ("muon_lr", "adam_lr", "alpha"):
        least = "more than" if name == "alpha" else "at least"
        if not 0 <= said[name] < math.inf or (name == "alpha" and not said[name]):
            raise UserError(f"--{name.replace('_', '-')} must be a number of {least} 0, not {said[name]:g}")
    for share in said["keep"] or ():
        if not 0 < share <= 1:
            raise UserError(f"--keep is a fraction of the run, more than 0 and at most 1, not {share:g}")
    for folder in (said["out"], said["out"] / "model", said["out"] / "adapter"):
        processes.agree(partial(write.check_folder, folder))
    names = ("steps", "seed", "block", "rank", "alpha", "muon_lr", "adam_lr", "dtype", "compile", "tokens", "longest")
    return {name: said[name] for name in names} | {"keep": tuple(said["keep"] or ())}


def _processes() -> AbstractContextManager[Alone]:
    """This process, alone or one of those that torchrun started."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        from unmask.train.run import ALONE

        return nullcontext(ALONE)
    from unmask.train.sharded import started

    return started()


def _ready(
    processes: Alone, name: str, data: Path | None, e2e: Path | None, **sizes: int
) -> tuple[Model, Source, dict[str, Any]]:
    """The model, where its batches come from, and what the run's configuration says of all this."""
    from dataclasses import replace

    import torch

    from unmask.models.joint import digest

    loaded = processes.load(name)
    torch.set_num_threads(1)

    def read() -> tuple[Mixture | Texts, dict[str, Any]]:
        source, texts = _source(loaded, data, e2e, **sizes)
        _fits(loaded, source.cells, sizes["block"])
        return source, {"base": digest(loaded.network), **texts}

    source, told = processes.agree(read)
    return loaded, replace(source, share=(processes.rank, processes.world)), told


def _source(
    loaded: Model, data: Path | None, e2e: Path | None, *, block: int, tokens: int, longest: int, seed: int
) -> tuple[Mixture | Texts, dict[str, str]]:
    """Where batches come from, and what the run's configuration says of that."""
    from unmask.train import restaurants, texts
    from unmask.train.batches import Mixture

    if data is not None:
        eos = next(iter(loaded.network.config.eos_ids), None)
        if eos is None:
            raise UserError(f"{loaded.name} names no end-of-sequence token, with which a response ends")
        source = texts.read(data, loaded, eos=eos, longest=longest, unit=block, tokens=tokens, seed=seed)
        if source.left_out:
            print(
                f"{source.left_out} rows of {data} are longer than {longest} cells (--longest) and left out", flush=True
            )
        return source, {"data": f"{len(source.pairs)} rows of {data.name}", "data_digest": source.digest}
    if not loaded.embedded:
        raise UserError(f"{loaded.name} is not an embedded model; give its training texts by --data FILE.jsonl")
    rows = [] if e2e is None else restaurants.clean(restaurants.read(e2e, "train"))
    mixture = Mixture(loaded.tokenizer.inner, rows, seed, tokens, shares="short" if rows else "alone")
    return mixture, {"data": "word problems" + ", E2E restaurant descriptions" * bool(rows)}


def _fits(loaded: Model, widest: tuple[int, int], block: int) -> None:
    """UserError if the widest batch, (prompt, response) in whole blocks, has more cells than the model positions."""
    prompt, response = widest
    cells, room = prompt + -(-response // block) * block, loaded.network.config.max_positions
    if cells > room:
        raise UserError(
            f"prompts of {prompt} and responses of {response} cells in blocks of {block} make batches of {cells}, and "
            f"{loaded.name} has {room} positions; lower --block, or give shorter texts (--data, --longest)"
        )


def _mask(loaded: Model, given: int) -> int:
    """The id of the mask of a model without one, that given or a twin's vocabulary's; -1: the model's own."""
    from unmask.train.vocabulary import MASK

    c = loaded.network.config
    if not -1 <= given < c.token_count:
        raise UserError(f"--mask-id must be a token of the vocabulary of {c.token_count}, not {given}")
    if given >= 0 and given in (*c.eos_ids, c.bos_id):
        raise UserError(f"--mask-id {given} begins or ends a text in this model; name an id that no text uses")
    if given < 0 and c.mask_id < 0 and loaded.embedded:
        return MASK
    return -1 if given == c.mask_id else given


def _train(trainer: BlocksRun, loaded: Model, every: int) -> None:
    """Run to the end, then write the model."""
    from unmask.train.export import export_blocks

    out, processes, resumed = trainer.folder, trainer.processes, trainer.resume()
    if processes.world > 1:
        print(f"{processes.told}: sharded by FSDP2, not compiled, accuracy not measured along the way", flush=True)
    told = f"resumed at step {trainer.step}" if resumed else "from the start"
    print(f"blocks of {trainer.config.block}: {told}, in {out}", flush=True)
    measured = every and loaded.embedded and processes.world == 1
    follow(trainer, _measure(loaded) if measured else None, every)
    if card := export_blocks(trainer, loaded, out):
        print(f"{out / 'model'}: {card['parameters']:,} parameters; use it by --model {out / 'model'}")


def _measure(loaded: Model) -> Any:
    """A function of the model: share of right answers to held-out problems, one block at a time and in a pipeline."""
    from unmask.study import evaluate, tasks

    task, tokenizer = tasks.word_problems(ITEMS, seed=1), loaded.tokenizer.inner

    def evaluated(model: Any) -> dict[str, float]:
        size, found = model.config.layout.size, {}
        for name, recipe in (("serial", "d2f(0.9, 1.0, 1.0)"), ("pipeline", "d2f(0.9, 0.1, 0.95)")):
            chosen = evaluate.recipe_for(model, recipe, task.length, block=size)
            result = evaluate.evaluate(model, tokenizer, task, chosen)
            found |= {name: result.scores["right"], f"{name}_forwards": result.forwards}
        return found

    return evaluated
