"""Request bodies: OpenAI's fields, and one `diffusion` object. What makes no sense for a canvas is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from unmask.errors import UserError, suggest

Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Word = Annotated[str, StringConstraints(max_length=200)]
Id = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Whole = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pin = tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], Id | Word]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]

HARMLESS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change nothing here, at any value."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **{"store": (None, False), "service_tier": (None, "auto", "default"), "modalities": (None, ["text"])},
    **{
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none"),
    },
    **{
        "echo": (None, False),
        "best_of": (None, 1),
        "audio": (None,),
        "web_search_options": (None,),
        "verbosity": (None, "medium"),
    },
    **{"use_beam_search": (None, False), "length_penalty": (None, 1, 1.0)},
}
"""Fields that are understood at these values only."""
REASONS: Mapping[str, str] = {
    "echo": "the prompt is not scored; send it to `unmask eval` for likelihoods",
    "best_of": "send n, and choose among the choices",
    "tools": "no tool calls are parsed; describe the tool in the prompt and constrain the answer by response_format",
    "functions": "no tool calls are parsed; constrain the answer by response_format",
    "use_beam_search": "a canvas is not written by beams",
    "store": "nothing is stored",
    "audio": "this engine writes text",
    "modalities": "this engine writes text",
}


class Closed(BaseModel):
    """An object whose every field is known."""

    model_config = ConfigDict(extra="forbid")


class Diffusion(Closed):
    """How a canvas is decoded."""

    recipe: Annotated[str, StringConstraints(max_length=2000)] | None = None
    """A recipe's name, a stack of levers, or an expression."""
    steps: Whole | None = None
    block_length: Whole | None = None
    threshold: Share | None = None
    factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tau: Share | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    template: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    """The response as words and slots, as in `generate(template=)`."""
    pins: Annotated[list[Pin], Field(max_length=65_536)] = []
    """Cells of the response that are given: [cell, token id or text]."""
    canvas_length: Whole | None = None
    """Another name of max_tokens."""
    seed_canvas: Text | None = None
    """Another name of `prediction`."""
    max_steps: Whole | None = None
    """Forwards after which the response is cut off."""


class Prediction(Closed):
    """OpenAI's predicted output: here the canvas to begin with, which a recipe that revises may change."""

    type: Literal["content"] = "content"
    content: Text | list[dict[str, Any]]


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk with the usage."""

    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow")

    model: Word | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31, strict=True)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(gt=-(2**62), lt=2**62, strict=True)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[Word, Finite], Field(max_length=1024)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    """A preset of speed against care: the threshold at which cells are committed; "high" writes one cell a forward."""
    prediction: Prediction | None = None
    response_format: dict[str, Any] | None = None
    """`json_schema`, `json_object`, or {"type": "regex", "regex": ...}."""
    ignore_eos: bool | None = None
    diffusion: Diffusion | None = None
    diffusing: bool | None = None
    """With `stream`: tell of every decided and drafted cell too, in the field `unmask` of each chunk."""


class Completion(Common):
    """`POST /v1/completions`."""

    prompt: Text | list[Text] | list[Id] | list[list[Id]]
    suffix: Text | None = None
    """Text behind the response, which is then written between the two."""
    logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None


class Part(BaseModel):
    """A piece of a message."""

    type: Word
    text: Text | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1024)]


class Chat(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None


class Tokenize(Closed):
    """`POST /tokenize`."""

    prompt: Text
    model: Word | None = None


def knobs(body: Common) -> Diffusion:
    """The `diffusion` object, with what stands beside it under vLLM's names (`diffusion_steps`, `vllm_xargs`).

    UserError for a field that is unknown, or that makes no sense here, with the reason.
    """
    found = {
        name: value for name, value in (body.diffusion or Diffusion()).model_dump().items() if value not in (None, [])
    }
    extra = dict(body.model_extra or {})
    arguments = extra.pop("vllm_xargs", None)
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError("vllm_xargs is an object")
    for name, value in {**(arguments or {}), **extra}.items():
        short = name.removeprefix("diffusion_")
        short = {"pinned": "pins"}.get(short, short)
        if name.startswith("diffusion_") and short in Diffusion.model_fields:
            if short in found and found[short] != value and body.diffusion and short in body.diffusion.model_fields_set:
                raise UserError(f"{name} and diffusion.{short} contradict each other; send one")
            found[short] = value
        else:
            _refuse(name, value, type(body))
    try:
        return Diffusion.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"diffusion.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _refuse(name: str, value: Any, body: type[Common]) -> None:
    """UserError for a field outside of the schema, unless it changes nothing."""
    for other, path in ((Completion, "/v1/completions"), (Chat, "/v1/chat/completions")):
        if name in other.model_fields and name not in body.model_fields:
            raise UserError(f"{name} is a field of {path}; send it there")
    if name in HARMLESS:
        return
    if name in NEUTRAL:
        if value not in NEUTRAL[name]:
            raise UserError(f"{name} is refused: {REASONS.get(name, 'it makes no sense for a canvas')}")
        return
    known = {
        *Completion.model_fields,
        *Chat.model_fields,
        *NEUTRAL,
        *(f"diffusion_{n}" for n in Diffusion.model_fields),
    }
    raise suggest(name[:80], known, "parameter")
