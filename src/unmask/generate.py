"""Load a model and write with it: prompts in, texts and the ledger out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from unmask import zoo
from unmask.decode import Canvas, Denoiser, Ledger, Recipe, Report, Step, decode, useful
from unmask.decode.where import Region
from unmask.denoise import Draws, dress
from unmask.errors import UserError, suggest
from unmask.models.load import load_checkpoint
from unmask.models.tokenizer import Tokenizer
from unmask.models.transformer import Transformer
from unmask.models.vocabulary import same_vocabulary
from unmask.settings import RecipeLike, Settings, choose, resolve, shaped

LENGTH = 128
"""Cells of a response where the caller does not say, the embedded pair's own lengths aside."""

Message = Mapping[str, Any]
OnStep = Callable[[Canvas, Step], object]


class Streamer(Protocol):
    """What transformers' streamers understand: settled ids, the draft of what follows them, and the end."""

    def put(self, value: Tensor) -> object:
        """Take ids [N] that will not change: first the prompt, then the response from left to right."""

    def end(self) -> object:
        """The response is complete."""


@dataclass(frozen=True, eq=False)
class Output:
    """One response: its text and tokens up to the end, its canvas (one row), and the ledger of the whole call."""

    text: str
    tokens: list[int]
    ledger: Report
    canvas: Canvas
    recipe: Recipe

    @property
    def forwards(self) -> int:
        """The step at which this response was done."""
        return int(self.canvas.step[0])

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Job:
    """A call of `generate`, checked and ready to decode."""

    canvas: Canvas
    recipe: Recipe
    denoise: Denoiser

    def __iter__(self) -> Iterator[tuple[Canvas, Step]]:
        return decode(self.denoise, self.recipe, self.canvas)


@dataclass(frozen=True, eq=False)
class Model:
    """A network, its tokenizer, and how to write with them."""

    network: Transformer
    tokenizer: Tokenizer
    name: str
    directory: Path

    @overload
    def generate(self, prompt: str | list[Message], **settings: Any) -> Output: ...
    @overload
    def generate(self, prompt: list[str], **settings: Any) -> list[Output]: ...
    def generate(  # noqa: PLR0913 - the settings are the interface
        self,
        prompt: str | Sequence[str] | Sequence[Message],
        *,
        recipe: RecipeLike = None,
        length: int | None = None,
        block: int | None = None,
        steps: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        guide: Model | str | Path | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        suffix: str = "",
        streamer: Streamer | None = None,
        on_step: OnStep | None = None,
        **aliases: Any,
    ) -> Any:
        """Write one response to a text or to a conversation (an Output), or one to each text of a list (a list).

        `recipe`: a name, a TOML file, an expression, or a Recipe. `length`: cells of the response. `suffix`: text that
        follows the response, which is then written between the two. `guide`: the autoregressive model (loaded, or
        what `load` takes) that recipes with a second opinion ask; the embedded dLLM has its twin. Row i draws with
        seed + i. `aliases` are the names that published loops and transformers give these settings
        (`settings.ALIASES`); any other is a UserError.
        """
        given = {
            **{"recipe": recipe, "length": length, "block": block, "steps": steps, "threshold": threshold},
            **{"factor": factor, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
            "guide": guide,
        }
        settings = resolve(given, aliases, mask_id=self.network.config.mask_id)
        prompts, single = _prompts(prompt)
        _check_listeners(streamer, on_step, len(prompts))
        job = self.prepare(prompts, settings, suffix=suffix)
        outputs = self.run(job, on_step=on_step, streamer=streamer)
        return outputs[0] if single else outputs

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of one prompt, by the model's chat template if it has one; a mask token's name in it stays text."""
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
                raise UserError(f"a prompt is a text or a list of messages, not {prompt!r:.80}")
            return self.tokenizer.chat(prompt)
        if not prompt.strip():
            raise UserError("the prompt is empty; write a question")
        ids = self.tokenizer.prompt(prompt)
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no tokens in this model's vocabulary")
        return ids

    def length(self, prompt: str | Sequence[Message], settings: Settings) -> int:
        """Cells of the response: as asked for, else as the embedded pair was trained, else 128, or what is left."""
        if settings.length is not None:
            return settings.length
        if self.directory.parent == Path(zoo.__file__).parent and isinstance(prompt, str):
            return zoo.length(prompt)
        return LENGTH

    def row(self, prompt: str | Sequence[Message], settings: Settings, suffix: str = "") -> list[int | None]:
        """Ids of the prompt, holes for the response, ids of the suffix; UserError if they do not fit into the model."""
        c = self.network.config
        ids, length = self.encode(prompt), self.length(prompt, settings)
        if not isinstance(suffix, str):
            raise UserError(f"the suffix is a text, not {suffix!r:.80}")
        tail = self.tokenizer.encode(suffix) if suffix else []
        if tail and c.autoregressive:
            raise UserError("an autoregressive model cannot write towards a suffix; use a masked model")
        if (cells := len(ids) + length + len(tail)) > c.max_positions:
            raise UserError(
                f"a prompt of {len(ids) + len(tail)} tokens and a response of {length} are {cells} cells; "
                f"this model has {c.max_positions}"
            )
        return [*ids, *[None] * length, *tail]

    def recipe(self, prompts: Sequence[str | Sequence[Message]], settings: Settings) -> Recipe:
        """The recipe that decodes these prompts together, checked against the model and the longest response."""
        if not prompts:
            raise UserError("there is no prompt; write a question")
        return choose(settings, self.network.config, max(self.length(prompt, settings) for prompt in prompts))

    def prepare(
        self, prompts: Sequence[str | Sequence[Message]], settings: Settings, *, suffix: str = "", offset: int = 0
    ) -> Job:
        """Check everything and lay out the canvas; `offset` numbers the first row, for its seed."""
        c, recipe = self.network.config, self.recipe(prompts, settings)
        rows = [self.row(prompt, settings, suffix) for prompt in prompts]
        heads = [row.index(None) for row in rows]
        seeds = [settings.seed + offset + i for i in range(len(rows))]
        canvas = Canvas.of(rows, origin=heads, mask_id=c.mask_id, eos=c.eos_ids, seed=seeds, revisions=recipe.allowance)
        canvas = _to(_answer(canvas, recipe), self.network.embed.weight.device)
        confidence = "shaped" if shaped(recipe) else "raw"
        draws = Draws(settings.temperature or 0.0, settings.top_k, settings.top_p, confidence)
        guide = self.guide(settings.guide) if recipe.guided else None
        slots, width = canvas.tokens.shape
        return Job(canvas, recipe, dress(self.network, recipe, slots=slots, length=width, draws=draws, guide=guide))

    def guide(self, source: Model | str | Path | None) -> Transformer | None:
        """The network of a guide of the same vocabulary; the embedded dLLM's own is its twin, others have none."""
        embedded = self.directory.parent == Path(zoo.__file__).parent
        if source is None and not embedded:
            return None
        found = source if isinstance(source, Model) else load(source or zoo.PAIR[1], device=self.device)
        if not found.network.config.autoregressive:
            raise UserError(f"a guide is an autoregressive model, and {found.name} is not")
        same_vocabulary(self.tokenizer, found.tokenizer)
        return found.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.embed.weight.device

    def run(self, job: Job, *, on_step: OnStep | None = None, streamer: Streamer | None = None) -> list[Output]:
        """Decode a prepared call. The ledger's clock stands still while `on_step` and the streamer have the canvas."""
        tell = [on_step] if on_step else []
        if streamer is not None:
            tell.append(Streaming(streamer, job.canvas))
        ledger, canvas, pause = Ledger(), job.canvas, 0.0
        for canvas, event in job:
            ledger.began += pause
            ledger.update(canvas, event)
            since = time.perf_counter()
            for show in tell:
                show(canvas, event)
            pause = time.perf_counter() - since
        if streamer is not None:
            streamer.end()
        report, keep = ledger.report(), useful(canvas)
        tokens = [canvas.tokens[row][keep[row]].tolist() for row in range(len(canvas))]
        return [
            Output(self.tokenizer.decode(ids), ids, report, canvas[row : row + 1], job.recipe)
            for row, ids in enumerate(tokens)
        ]


class Streaming:
    """Feeds a streamer from the loop: the settled beginning by `put`, what follows as a draft by `put_draft`."""

    def __init__(self, streamer: Streamer, canvas: Canvas) -> None:
        self.streamer, self.sent = streamer, int(canvas.origin[0])
        self.draft = getattr(streamer, "put_draft", None)
        streamer.put(canvas.tokens[0, : self.sent].cpu())

    def __call__(self, canvas: Canvas, event: Step) -> None:
        """Put the cells that became settled in this step."""
        own = canvas.valid[0] & ~canvas.given[0]
        last = int(own.nonzero()[-1]) + 1
        stop = min(int(canvas.first(canvas.ended)[0]) + 1, last)
        settled = max(self.sent, min(int(canvas.first(canvas.masked)[0]), stop))
        if settled > self.sent:
            self.streamer.put(canvas.tokens[0, self.sent : settled].cpu())
            self.sent = settled
        if self.draft is not None and settled < stop:
            guess = torch.where(canvas.masked & event.draft.fresh, event.draft.token, canvas.tokens)
            self.draft(guess[0, settled:stop].cpu())


def load(source: str | Path | None = None, *, dtype: str = "auto", device: str | torch.device = "cpu") -> Model:
    """The embedded dLLM (None or "dllm"), its autoregressive "twin", a checkpoint directory, or a hub id `org/name`.

    `dtype` "auto": float32 on a CPU, as stored elsewhere. UserError for an unknown model or unreadable files.
    """
    name = str(source or zoo.NAMES[0])
    if name not in zoo.NAMES and "/" not in name and not Path(name).exists():
        raise UserError(f"{suggest(name, zoo.NAMES, 'model')}; or give a checkpoint folder or a hub id org/name")
    device = _device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    loaded = load_checkpoint(zoo.path(name) if name in zoo.NAMES else name, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise UserError(f"{name} has no tokenizer: tokenizer.json, or vocab.json and merges.txt")
    return Model(loaded.model, loaded.tokenizer, loaded.name, loaded.directory)


def _prompts(prompt: Any) -> tuple[Sequence[Any], bool]:
    """The prompts of a call, and whether it was one alone: a text or a conversation."""
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"a prompt is a text, a list of messages or a list of texts, not {prompt!r:.80}")
    single = bool(prompt) and isinstance(prompt[0], Mapping)
    return ([prompt] if single else prompt), single


def _check_listeners(streamer: Any, on_step: Any, prompts: int) -> None:
    """UserError, before anything is computed, for a streamer or an `on_step` that could not be called."""
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise UserError(f"a streamer has the methods put and end, as those of transformers; {streamer!r:.80} has not")
    if streamer is not None and prompts != 1:
        raise UserError(f"a streamer shows one response, not {prompts}; use on_step")
    if on_step is not None and not callable(on_step):
        raise UserError(f"on_step is a function of a canvas and a step, not {on_step!r:.80}")


def _device(name: str | torch.device) -> torch.device:
    """The device, or a UserError if there is none of that name or this torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the device {str(name)!r} cannot be used here: {reason}; use 'cpu'") from None
    return device


def _answer(canvas: Canvas, recipe: Recipe) -> Canvas:
    """The canvas with its whole response marked as the answer, where the recipe watches one and nobody marked it."""
    if not any(isinstance(r, Region) for r in recipe.unmask.walk()):
        return canvas
    return replace(canvas, region=(~canvas.given & canvas.valid).to(canvas.region.dtype) * 2)


def _to(canvas: Canvas, device: torch.device) -> Canvas:
    """The same canvas on another device."""
    moved = {k: v.to(device) for k, v in vars(canvas).items() if torch.is_tensor(v)}
    return canvas if device.type == "cpu" else replace(canvas, **moved)
