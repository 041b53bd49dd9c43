"""A request's body as something to write: the model it names, its prompts, and an Ask for each choice."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask import recipes
from unmask.engine import Ask, ask
from unmask.engine.ask import Pins
from unmask.errors import UserError, suggest
from unmask.generate import Model
from unmask.serve.schema import Chat, Common, Completion, Diffusion, Message, knobs
from unmask.settings import Settings, default_name

EFFORT = {"none": 0.6, "minimal": 0.6, "low": 0.75, "medium": None, "high": None}
"""The threshold of each reasoning effort; "medium" is the model's own recipe, "high" one cell a forward."""
PATIENCE = 8
"""A response may take so many forwards a cell at most, whatever its recipe revises."""


class Unknown(UserError):
    """There is no such model."""


CHARACTERS = 64
"""A token has fewer characters than this, all but surely."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    choices: int = 16
    prompts: int = 64
    length: int = 4096


@dataclass(frozen=True)
class Reading:
    """A request, understood: one Ask for each choice in order, `each` of them for a prompt.

    `logprobs`: how many likeliest tokens are told beside each token's log-probability; None: none of it.
    """

    model: Model
    asks: tuple[Ask, ...]
    seed: int
    each: int
    logprobs: int | None


def find(models: Mapping[str, Model], name: str | None) -> Model:
    """The model of that name, the first one where none is said; Unknown otherwise."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise Unknown(suggest(name[:80], models, "model"))
    return models[name]


def completion(body: Completion, models: Mapping[str, Model], limits: Limits) -> Reading:
    """The asks of `/v1/completions`: n for each prompt, prompts in order."""
    model = find(models, body.model)
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
    prompts: list[Any] = prompt if several else [prompt]
    if not prompts or prompts == [[]]:
        raise UserError("there is no prompt; write a question")
    if len(prompts) > limits.prompts:
        raise UserError(f"{len(prompts)} prompts are more than this server takes at once, {limits.prompts}")
    return _reading(body, model, prompts, limits, top=body.logprobs, suffix=body.suffix or "")


def chat(body: Chat, models: Mapping[str, Model], limits: Limits) -> Reading:
    """The asks of `/v1/chat/completions`: n for the conversation."""
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise UserError("max_tokens and max_completion_tokens contradict each other; send one")
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    if body.top_logprobs is not None and not body.logprobs:
        raise UserError("top_logprobs needs logprobs: true")
    model = find(models, body.model)
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _reading(body, model, [conversation(body.messages, model)], limits, top=top)


def conversation(messages: Sequence[Message], model: Model) -> Any:
    """The messages as the model's template takes them; a model without one answers a single question."""
    for message in messages:
        if more := [
            name for name, value in (message.model_extra or {}).items() if value is not None and name != "name"
        ]:
            raise UserError(f"{more[0][:80]} of a message is refused: messages are texts")
    said = [{"role": message.role, "content": content(message)} for message in messages]
    if model.tokenizer.has_chat_template and not model.embedded:
        return said
    if len(said) != 1 or said[0]["role"] != "user":
        raise UserError(f"{model.name} knows no conversation; send one message of the user")
    return said[0]["content"]


def content(message: Message) -> str:
    """The text of a message; UserError for a part that is none."""
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise UserError(f"a part of type {part.type[:40]!r} cannot be read; this engine reads text")
    return "".join(part.text or "" for part in message.content)


def _reading(
    body: Common, model: Model, prompts: Sequence[Any], limits: Limits, *, top: int | None, suffix: str = ""
) -> Reading:
    count, diffusion = body.n or 1, knobs(body)
    if count > limits.choices or count * len(prompts) > max(limits.choices, limits.prompts):
        raise UserError(f"{count * len(prompts)} choices are more than this server writes at once, {limits.choices}")
    seed = random.getrandbits(48) if body.seed is None else body.seed
    asks, watched = [], bool(body.diffusing and body.stream)
    for prompt in prompts:
        settings, length = _settings(body, diffusion, model, prompt, limits)
        first = ask(
            model,
            _raw(prompt, model) if isinstance(body, Completion) else prompt,
            replace(settings, seed=seed),
            suffix=suffix,
            pins=pins(diffusion, model),
            prediction=prediction(body, diffusion),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            max_steps=min(diffusion.max_steps or 2**31, PATIENCE * length),
            top=max(top or 0, 5) if watched else top,
            detail=watched,
            matching=body.response_format,
        )
        asks += [first if i == 0 else first.again(seed + i) for i in range(count)]
    return Reading(model, tuple(asks), seed, count, top)


def _raw(prompt: Any, model: Model) -> Any:
    """A text as its plain ids, without the chat template; the embedded models know no text without theirs."""
    if not isinstance(prompt, str) or model.embedded or not prompt.strip():
        return prompt
    return model.tokenizer.plain(prompt) or prompt


def _settings(body: Common, diffusion: Diffusion, model: Model, prompt: Any, limits: Limits) -> tuple[Settings, int]:
    """The body as `generate` would take it, and the cells of the response; UserError for what is out of range or
    contradicts itself."""
    recipe = _recipe(diffusion.recipe)
    said: dict[str, Any] = {
        **{"recipe": recipe, "steps": diffusion.steps, "block": diffusion.block_length, "tau": diffusion.tau},
        **{"threshold": diffusion.threshold, "factor": diffusion.factor, "cfg": diffusion.cfg_scale},
        **{"template": diffusion.template, "length": _length(body, diffusion), "temperature": body.temperature},
        **{"top_p": body.top_p, "min_p": body.min_p, "top_k": max(0, body.top_k or 0)},
        **{"presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty},
        **{"repetition_penalty": body.repetition_penalty, "logit_bias": _bias(body.logit_bias)},
        "eos": "never" if body.ignore_eos else None,
    }
    settings = Settings(**{name: value for name, value in said.items() if value is not None})
    _short(prompt, model)
    if (settings.length or 0) > limits.length:  # before so many cells are laid out
        raise UserError(f"a response of {settings.length} tokens is longer than this server writes, {limits.length}")
    length = model.length(prompt, settings)
    if length > limits.length:
        raise UserError(f"a response of {length} tokens is longer than this server writes, {limits.length}")
    if settings.template is None:
        settings = replace(settings, length=length)
    if prediction(body, diffusion) is not None and recipe is None:
        settings = replace(settings, recipe="wino")
    return _with_effort(settings, body.reasoning_effort, model, length), length


def _short(prompt: Any, model: Model) -> None:
    """UserError for a prompt so long that it need not be tokenised to see that it does not fit."""
    most = model.network.config.max_positions
    parts = prompt if isinstance(prompt, list) else [prompt]
    size = sum(len(p["content"]) for p in parts if isinstance(p, Mapping)) + sum(
        len(p) for p in parts if isinstance(p, str)
    )
    if size > CHARACTERS * most:
        raise UserError(f"a prompt of {size} characters does not fit into the {most} cells of this model")


def _recipe(text: str | None) -> str | None:
    """A recipe as a request may name it: never a file."""
    if text is not None and (".toml" in text.lower() or "/" in text or "\\" in text):
        raise UserError("a request names a recipe, a stack of levers or an expression, not a file")
    return text


def _length(body: Common, diffusion: Diffusion) -> int | None:
    if body.max_tokens and diffusion.canvas_length and body.max_tokens != diffusion.canvas_length:
        raise UserError("max_tokens and diffusion.canvas_length contradict each other; send one")
    return body.max_tokens or diffusion.canvas_length


def _with_effort(settings: Settings, effort: str | None, model: Model, length: int) -> Settings:
    """The settings of a reasoning effort, where there is one."""
    if effort is None or effort == "medium":
        return settings
    config = model.network.config
    if config.autoregressive:
        raise UserError("reasoning_effort sets how many cells a forward commits; an autoregressive model commits one")
    if settings.rules or settings.recipe is not None:
        raise UserError("reasoning_effort chooses a recipe, and the request names its own; send one of them")
    if effort == "high":
        return replace(settings, steps=length)
    name = default_name(settings, model.network.config)
    if "threshold" not in recipes.entry(name).defaults:
        raise UserError(f"reasoning_effort sets a threshold, and recipe {name!r} of this model has none")
    return replace(settings, recipe=name, threshold=EFFORT[effort])


def _bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """logit_bias by ids, as OpenAI has it."""
    if bias is None:
        return None
    if len({int(key) for key in bias if key.isascii() and key.isdigit()}) < len(bias) and all(map(str.isdigit, bias)):
        raise UserError("logit_bias names a token twice")
    if wrong := [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise UserError(f"logit_bias names tokens by their ids, and {wrong[0][:40]!r} is none")
    return {int(key): value for key, value in bias.items()}


def prediction(body: Common, diffusion: Diffusion) -> str | None:
    """What the response will probably say, if the request says so."""
    if body.prediction is None:
        return diffusion.seed_canvas
    said = body.prediction.content
    if isinstance(said, str):
        return said
    if not all(isinstance(part.get("text"), str) for part in said):
        raise UserError("a prediction is a text, or parts of type text")
    return "".join(part["text"] for part in said)


def pins(diffusion: Diffusion, model: Model) -> Pins:
    """Given cells with their ids; a text takes as many cells as it has tokens."""
    found = []
    for cell, said in diffusion.pins:
        ids = [said] if isinstance(said, int) else model.tokenizer.encode(said)
        if not ids:
            raise UserError(f"the text of pin {cell} has no tokens in this model's vocabulary")
        found += [(cell + offset, token) for offset, token in enumerate(ids)]
    return tuple(found)
