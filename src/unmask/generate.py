"""Load a model and write with it: prompts in, texts and the ledger out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import torch

from unmask import zoo
from unmask.decode import Canvas, Denoiser, Ledger, Recipe, Report, Step, decode, useful
from unmask.decode.where import Region
from unmask.denoise import dress
from unmask.denoise.probe import spelled
from unmask.denoise.rows import Number, Whole, Word
from unmask.errors import UserError, suggest
from unmask.models.fast import KEPT, accelerate, check, split
from unmask.models.joint import JointSampler, load_sampler
from unmask.models.load import find_device, load_checkpoint
from unmask.models.tokenizer import Tokenizer
from unmask.models.transformer import Transformer
from unmask.models.vocabulary import same_vocabulary
from unmask.settings import NAMES, RecipeLike, Settings, choose, resolve
from unmask.streaming import Streamer, Streaming
from unmask.template import Form, Template, check_without, mark, regions, shown

_sampler = lru_cache(maxsize=4)(load_sampler)
LENGTH = 128
"""Cells of a response where the caller does not say, the embedded pair's own lengths aside."""

ASKS = {"guide": "'guided', 'blend' or guided(1) in a stack", "sampler": "'adjust' or joint(4) in a stack"}
"""Recipes that ask a guide, or a joint sampler."""

Message = Mapping[str, Any]
OnStep = Callable[[Canvas, Step], object]


@dataclass(frozen=True, eq=False)
class Output:
    """One response: its text and tokens up to the end, its canvas (one row), and the ledger of the whole call.

    With a template they are the whole response, the template's words in place, and `regions` has what was written into
    its slots: "thinking", "answer" and "written".
    """

    text: str
    tokens: list[int]
    ledger: Report
    canvas: Canvas
    recipe: Recipe
    regions: dict[str, str] = field(default_factory=dict)

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
    template: bool = False

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
        tau: float | None = None,
        guide: Model | str | Path | None = None,
        sampler: str | Path | None = None,
        temperature: Number | None = None,
        top_p: Number = 1.0,
        top_k: Whole = 0,
        min_p: Number | None = None,
        confidence: Word | None = None,
        repetition_penalty: Number | None = None,
        presence_penalty: Number | None = None,
        frequency_penalty: Number | None = None,
        logit_bias: Mapping[Any, float] | Sequence[Mapping[Any, float]] | None = None,
        eos: Word | None = None,
        cfg: Number | None = None,
        seed: Whole = 0,
        suffix: str = "",
        template: str | None = None,
        allocation: str = "even",
        streamer: Streamer | None = None,
        on_step: OnStep | None = None,
        **aliases: Any,
    ) -> Any:
        """Write one response to a text or to a conversation (an Output), or one to each text of a list (a list).

        `recipe`: a name, a TOML file, an expression, or a Recipe. `length`: cells of the response. `suffix`: text that
        follows the response, which is then written between the two, by a model with full attention. `guide`: the
        autoregressive model (loaded, or what `load` takes) that recipes with a second opinion ask; the embedded dLLM
        has its twin. `sampler`: the folder of a joint sampler of this model, for recipes that draw several tokens a
        forward; the embedded dLLM has one.

        `template`: the response as words and slots, "Step 1: {think} Step 2: {think} The answer is {answer:5}"; slots
        without a number share what is left of `length` by `allocation`: "even", "front" or "back". A block-causal model
        does not see the words of later blocks. `tau` is the mean confidence at which recipe "ice" answers.

        What is about beliefs is told in `denoise.Draws`, and each such setting may be a list with one value a text;
        `logit_bias` may name a token by its text, `cfg` is the scale of classifier-free guidance. Row i draws with
        seed + i, or with seed i of a list. `aliases` are the names that published loops and transformers give these
        settings (`settings.ALIASES`); any other is a UserError.
        """
        given = {name: value for name, value in locals().items() if name in NAMES}
        settings = resolve(given, aliases, mask_id=self.network.config.mask_id)
        prompts, single = _prompts(prompt)
        _check_listeners(streamer, on_step, len(prompts))
        job = self.prepare(prompts, settings, suffix=suffix)
        outputs = self.run(job, on_step=on_step, streamer=streamer)
        return outputs[0] if single else outputs

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of one prompt, by the model's chat template if it has one; a mask token's name in it stays text.

        A list of ids is taken as it is.
        """
        if not isinstance(prompt, str):
            if isinstance(prompt, Sequence) and prompt and all(type(i) is int for i in prompt):
                return self._known(prompt)
            if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
                raise UserError(f"a prompt is a text or a list of messages, not {prompt!r:.80}")
            return self.tokenizer.chat(prompt)
        if not prompt.strip():
            raise UserError("the prompt is empty; write a question")
        ids = self.tokenizer.prompt(prompt)
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no tokens in this model's vocabulary")
        return ids

    def _known(self, ids: Sequence[Any]) -> list[int]:
        """The same ids; UserError for one that the vocabulary does not have."""
        c = self.network.config
        if wrong := [i for i in ids if not 0 <= i < c.token_count or i == c.mask_id]:
            told = "is its mask" if wrong[0] == c.mask_id else f"is none of its ids, 0 to {c.token_count - 1}"
            raise UserError(f"{wrong[0]} cannot be a token of a prompt of this model: it {told}")
        return list(ids)

    def length(self, prompt: str | Sequence[Message], settings: Settings) -> int:
        """Cells of the response, a template's words included: as asked for, or what a template of numbered slots has,
        else as the embedded pair was trained, else 128."""
        form = self.form(prompt, settings)
        return len(form.cells) if form else settings.length or self._length(prompt)

    def _length(self, prompt: str | Sequence[Message]) -> int:
        if self.embedded and isinstance(prompt, str):
            return zoo.length(prompt)
        return LENGTH

    def form(self, prompt: str | Sequence[Message], settings: Settings) -> Form | None:
        """The response by the settings' template, or None without one; UserError if it does not fit into the length."""
        if settings.template is None:
            return None
        if self.network.config.autoregressive:
            raise UserError("an autoregressive model cannot write between given words; use a masked model")
        lay, default = Template.parse(settings.template).lay, self._length(prompt)
        return lay(self.tokenizer.encode, length=settings.length, default=default, allocation=settings.allocation)

    def row(self, prompt: str | Sequence[Message], settings: Settings, suffix: str = "") -> list[int | None]:
        """Ids of the prompt, holes for the response, given ids in it or behind it; UserError if they do not fit."""
        c, form = self.network.config, self.form(prompt, settings)
        ids, length = self.encode(prompt), self.length(prompt, settings)
        if not isinstance(suffix, str):
            raise UserError(f"the suffix is a text, not {suffix!r:.80}")
        tail = self.tokenizer.encode(suffix) if suffix else []
        if tail and c.autoregressive:
            raise UserError("an autoregressive model cannot write towards a suffix; use a masked model")
        if tail and c.layout.kind == "block":
            raise UserError(
                "a block-causal model writes a block before it sees what follows it, so it cannot write towards a "
                "suffix; use a model with full attention"
            )
        if suffix and form:
            raise UserError("a template has its own words behind the slots; write the suffix there")
        if (cells := len(ids) + length + len(tail)) > c.max_positions:
            raise UserError(
                f"a prompt of {len(ids) + len(tail)} tokens and a response of {length} are {cells} cells; "
                f"this model has {c.max_positions}"
            )
        return [*ids, *(form.cells if form else [None] * length), *tail]

    def recipe(self, prompts: Sequence[str | Sequence[Message]], settings: Settings) -> Recipe:
        """The recipe that decodes these prompts together, checked against the model and the longest response."""
        if not prompts:
            raise UserError("there is no prompt; write a question")
        found = choose(settings, self.network.config, max(self.length(prompt, settings) for prompt in prompts))
        if settings.template is not None:
            Template.parse(settings.template).check(found)
        found = spelled(found, self.tokenizer.encode, self.tokenizer.decode)
        return found if settings.template is not None else check_without(found)

    def lay(
        self, prompts: Sequence[Any], settings: Settings, *, suffix: str = "", offset: int = 0
    ) -> tuple[Canvas, Recipe]:
        """Check everything and lay out the canvas, with the recipe that decodes it; `offset` numbers the first row, for
        its seed."""
        c, recipe = self.network.config, self.recipe(prompts, settings)
        rows = [self.row(prompt, settings, suffix) for prompt in prompts]
        forms = [form for prompt in prompts if (form := self.form(prompt, settings))]
        heads = [len(row) - len(form.cells) for row, form in zip(rows, forms, strict=True)] if forms else []
        heads = heads or [row.index(None) for row in rows]
        seeds = settings.seeds(len(rows), offset)
        canvas = Canvas.of(rows, origin=heads, mask_id=c.mask_id, eos=c.eos_ids, seed=seeds, revisions=recipe.allowance)
        return _to(mark(canvas, forms) if forms else _answer(canvas, recipe), self.device), recipe

    def prepare(
        self, prompts: Sequence[str | Sequence[Message]], settings: Settings, *, suffix: str = "", offset: int = 0
    ) -> Job:
        """`lay`, and the denoiser that the recipe asks for."""
        canvas, recipe = self.lay(prompts, settings, suffix=suffix, offset=offset)
        draws = settings.draws(recipe, self.network.config, self.tokenizer)
        second = self.second(recipe, settings)
        place: dict[str, Any] = dict(zip(("slots", "length"), canvas.tokens.shape, strict=True))
        denoise = dress(self.network, recipe, **place, draws=draws, cfg=settings.cfg, **second)
        return Job(canvas, recipe, denoise, template=settings.template is not None)

    def second(self, recipe: Recipe, settings: Settings) -> dict[str, Any]:
        """The guide and the sampler of a recipe; UserError for one that is given and that the recipe does not ask."""
        drawing = recipe.joint is not None and recipe.joint.k > 1
        for name, asked in (("guide", recipe.guided), ("sampler", drawing)):
            if getattr(settings, name) is not None and not asked:
                called = repr(recipe.name or recipe)
                raise UserError(f"recipe {called} asks no {name}; leave {name} out, or use {ASKS[name]}")
        guide = self.guide(settings.guide) if recipe.guided else None
        return {"guide": guide, "sampler": self.sampler(settings.sampler) if drawing else None}

    def guide(self, source: Model | str | Path | None) -> Transformer | None:
        """The network of a guide of the same vocabulary; the embedded dLLM's own is its twin, others have none."""
        if source is None and not self.embedded:
            return None
        found = source if isinstance(source, Model) else _guide(str(source or zoo.PAIR[1]), str(self.device))
        if not found.network.config.autoregressive:
            raise UserError(f"a guide is an autoregressive model, and {found.name} is not")
        same_vocabulary(self.tokenizer, found.tokenizer)
        return found.network

    def sampler(self, source: str | Path | None) -> JointSampler | None:
        """The joint sampler of a folder that `unmask train joint` wrote, else the one that ships for this model."""
        folder = source if source is not None else zoo.sampler(self.name) if self.embedded else None
        return None if folder is None else _sampler(str(folder), self.network)

    @property
    def embedded(self) -> bool:
        """Is it one of those that ship with the package?"""
        return self.directory.parent == Path(zoo.__file__).parent

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.embed.weight.device

    def run(self, job: Job, *, on_step: OnStep | None = None, streamer: Streamer | None = None) -> list[Output]:
        """Decode a prepared call. The ledger's clock stands still while `on_step` and the streamer have the canvas."""
        tell = [on_step] if on_step else []
        if streamer is not None:
            tell.append(Streaming(streamer, job.canvas, template=job.template))
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
        report = ledger.report()
        return [self._output(canvas[row : row + 1], report, job) for row in range(len(canvas))]

    def _output(self, canvas: Canvas, report: Report, job: Job) -> Output:
        """What one row of a finished canvas says."""
        ids = canvas.tokens[shown(canvas) if job.template else useful(canvas)].tolist()
        told = regions(canvas, self.tokenizer.decode) if job.template else {}
        return Output(self.tokenizer.decode(ids), ids, report, canvas, job.recipe, told)


def load(
    source: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
    block: int | None = None,
    family: str = "",
    compile: str = "auto",
) -> Model:
    """The embedded dLLM (None or "dllm"), its student "d2f", its twin "twin", a checkpoint directory, or a hub id.

    `dtype` "auto": float32 on a CPU, as stored elsewhere; "int8": bfloat16 with matrices of 8 bits, on a CPU.
    `compile`: "auto" or "off", whether to take the processor's fast path (`models.fast.accelerate`). A LoRA adapter is
    merged into `base`, or into the model it names. `block`: size of the blocks a block-causal model attends in, a
    multiple or a part of that trained. `family`: "diffullama" for a Llama that fills masks, which its files do not tell
    from one that does not. UserError for an unknown model, unreadable files, or another base than that of the adapter.
    """
    name = str(source or zoo.NAMES[0])
    if name not in zoo.NAMES and "/" not in name and not Path(name).exists():
        raise UserError(f"{suggest(name, zoo.NAMES, 'model')}; or give a checkpoint folder or a hub id org/name")
    device = find_device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    given: dict[str, Any] = {"base": base, "block": block, "family": family}
    place, (dtype, weights) = zoo.path(name) if name in zoo.NAMES else name, split(dtype)
    check(compile, weights, device)
    loaded = load_checkpoint(place, dtype=dtype, device=device, **given, shipped=Path(zoo.__file__).parent)
    if loaded.tokenizer is None:
        raise UserError(f"{name} has no tokenizer: tokenizer.json, or vocab.json and merges.txt")
    accelerate(loaded.model, compile=compile, weights=weights, keep=loaded.model.size <= KEPT)
    return Model(loaded.model, loaded.tokenizer, loaded.name, loaded.directory)


@lru_cache(maxsize=2)
def _guide(source: str, device: str) -> Model:
    """A guide is loaded once."""
    return load(source, device=device)


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


def _answer(canvas: Canvas, recipe: Recipe) -> Canvas:
    """The canvas with its whole response marked as the answer, where the recipe watches one and nobody marked it."""
    if not any(isinstance(r, Region) for r in recipe.unmask.walk()):
        return canvas
    return replace(canvas, region=(~canvas.given & canvas.valid).to(canvas.region.dtype) * 2)


def _to(canvas: Canvas, device: torch.device) -> Canvas:
    """The same canvas on another device."""
    moved = {k: v.to(device) for k, v in vars(canvas).items() if torch.is_tensor(v)}
    return canvas if device.type == "cpu" else replace(canvas, **moved)
