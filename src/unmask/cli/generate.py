"""`unmask generate`: write a response to a prompt, or to every prompt of a file."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli import batch as batches
from unmask.cli import write
from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.generate import Model, Output
    from unmask.settings import Settings

ROWS = 16
"""Prompts of a file that are decoded at a time."""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    *,
    model: Annotated[
        str, typer.Option(help="dllm, d2f, twin (all embedded), a checkpoint folder or a hub id.")
    ] = "dllm",
    base: Annotated[
        str | None, typer.Option(help="The model that an adapter was made for, if it is not where the adapter says.")
    ] = None,
    family: Annotated[
        str, typer.Option(help="Which it is of those that share an architecture, such as diffullama.")
    ] = "",
    recipe: Annotated[str | None, typer.Option(help="A name (`unmask recipes`), TOML file or expression.")] = None,
    length: Annotated[int | None, typer.Option(help="Cells of the response.")] = None,
    block: Annotated[int | None, typer.Option(help="Cells of a block.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of recipes with a schedule.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Probability at which a cell is committed.")] = None,
    factor: Annotated[float | None, typer.Option(help="Fast-dLLM's factor.")] = None,
    tau: Annotated[float | None, typer.Option(help="Mean confidence at which recipe ice answers.")] = None,
    guide: Annotated[str | None, typer.Option(help="Autoregressive model that guided recipes ask.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Folder of a joint sampler; the embedded dLLM has one.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of tokens to draw from; 0: all.")] = 0,
    min_p: Annotated[float | None, typer.Option(help="Least probability, as a share of the largest.")] = None,
    confidence: Annotated[
        str | None,
        typer.Option(help="raw or shaped: read before or after temperature and filters; default: the model's."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divides positive and multiplies negative logits of tokens already written.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted from the logits of tokens already written, -2 to 2.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtracted for each time a token was already written, -2 to 2.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Added to a logit: of an id (digits) or else a token's text."),
    ] = None,
    eos: Annotated[
        str | None, typer.Option(help="free, never (no end is written) or last (ends are least sure).")
    ] = None,
    cfg: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 0: none.")] = None,
    seed: Annotated[int, typer.Option(help="Key of the randomness; prompt i of a file draws with seed + i.")] = 0,
    suffix: Annotated[str, typer.Option(help="Text that follows the response; not on a block-causal model.")] = "",
    template: Annotated[
        str | None, typer.Option(help="The response as words and slots: '{think} The answer is {answer:5}'.")
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="How slots without a number share the length: even, front or back (heavy).")
    ] = "even",
    batch: Annotated[
        Path | None, typer.Option(help="A file of prompts: text lines, or JSON lines with a prompt.")
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out malformed lines; exit code 1.")] = False,
    visual: Annotated[bool, typer.Option("--visual", help="Show the canvas unmasking.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print text, tokens, recipe and ledger as JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write to this file, when all is done.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, int8 (on a CPU).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    compile: Annotated[str, typer.Option(help="auto: compiled kernels if there are any; off: plain torch.")] = "auto",
) -> None:
    """Write a response, unmasking it by a recipe."""
    if (prompt is None) == (batch is None):
        raise UserError("give either a prompt or --batch FILE")
    write.check(output)
    lines = [] if batch is None else batches.read(batch)
    text = sys.stdin.read() if prompt == "-" else prompt
    if text is not None and not text.strip():
        raise UserError("the prompt is empty; write a question")

    settings, _ = settings_of(locals())
    from unmask.generate import load

    loaded = load(model, dtype=dtype, device=device, base=base, family=family, compile=compile)
    if batch is None:
        good = [batches.Line(1, text or "")]
    else:
        good = batches.sift(batch, lines, lambda p: loaded.row(p, settings, suffix), keep_going=keep_going)
    found = _respond(loaded, good, settings, suffix=suffix, visual=visual)
    write.emit(_format(good, found, loaded, json=json, numbered=batch is not None), output)
    if len(good) < len(lines):
        raise typer.Exit(1)


def settings_of(values: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings among the values of options, and the values that are none."""
    from unmask.settings import NAMES, resolve

    given = {name: value for name, value in values.items() if name in NAMES}
    settings = resolve({**given, "logit_bias": _bias(given.get("logit_bias") or [])}, {})
    return settings, {name: value for name, value in values.items() if name not in NAMES}


def _bias(said: list[str]) -> dict[str, float] | None:
    """Token to bias, from ID=BIAS; a token's text may hold a = itself."""
    found: dict[str, float] = {}
    for pair in said:
        token, _, value = pair.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            token = ""
        if not token or token in found:
            raise UserError(f"--logit-bias takes a token and a number, such as 42=-5, once each, not {pair!r}")
        found[token] = number
    return found or None


def _respond(model: Model, lines: list[batches.Line], settings: Settings, *, suffix: str, visual: bool) -> list[Output]:
    """One output for each line, in order; everything is checked before anything is computed."""
    chunks = [lines[at : at + ROWS] for at in range(0, len(lines), ROWS)]
    for chunk in chunks:
        model.recipe([line.prompt for line in chunk], settings)
    outputs: list[Output] = []
    for number, chunk in enumerate(chunks):
        job = model.prepare([line.prompt for line in chunk], settings, suffix=suffix, offset=number * ROWS)
        with _show(model) if visual else nullcontext() as show:
            outputs += model.run(job, on_step=show)
    return outputs


def _show(model: Model):
    from rich.console import Console

    from unmask.cli.show import Show

    return Show(Console(stderr=True), model.tokenizer, pause=0.03)


def _format(lines: list[batches.Line], outputs: list[Output], model: Model, *, json: bool, numbered: bool) -> str:
    """Texts, one after the other, or JSON lines."""
    if not json:
        return "".join(f"{output.text}\n" for output in outputs)
    records = [
        {**({"line": line.number} if numbered else {}), "prompt": line.prompt, **record(output, model)}
        for line, output in zip(lines, outputs, strict=True)
    ]
    return "".join(jsonlib.dumps(r, ensure_ascii=False) + "\n" for r in records)


def record(output: Output, model: Model) -> dict[str, Any]:
    """An output as JSON can hold it; the ledger is that of all prompts decoded together with it."""
    return {
        "text": output.text,
        "tokens": output.tokens,
        "regions": output.regions,
        "forwards": output.forwards,
        "model": model.name,
        "recipe": {"name": output.recipe.name, "hash": output.recipe.hash, "expression": repr(output.recipe)},
        "ledger": output.ledger.as_dict(),
    }
