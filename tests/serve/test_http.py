"""The server on real requests: OpenAI's shapes, streams, infilling, and what is refused."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unmask
import vocabularies
from serve.conftest import MODELS, made
from unmask.models.tokenizer import Tokenizer
from unmask.serve.shapes import Answer
from unmask.settings import ALIASES
from unmask.train import problems

PROMPT = "Tom has 4 eggs . He buys 9 boxes of 3 eggs . How many eggs has he ?"
CHAT = {"messages": [{"role": "user", "content": PROMPT}]}
RESTAURANT = "name[Blue Spice], eatType[pub], area[riverside]"


def complete(http, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(http, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    found = []
    with http.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        found.append(json.loads(line.removeprefix("data: ")))
    return found


@pytest.mark.parametrize("name", [*MODELS])
def test_it_answers_what_generate_writes(http, name: str) -> None:
    output = MODELS[name].generate(PROMPT)
    found = complete(http, model=name)
    assert found["choices"][0]["text"] == output.text
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == len(output.tokens)
    assert found["unmask"]["forwards"] == output.forwards
    chat = http.post("/v1/chat/completions", json={"model": name, **CHAT}).json()
    assert chat["choices"][0]["message"]["content"] == output.text
    assert chat["object"] == "chat.completion"


@pytest.mark.parametrize("extra", [{}, {"diffusing": True}, {"diffusion": {"recipe": "wino"}}, {"model": "d2f"}])
def test_a_stream_adds_up_to_the_whole(http, extra: dict[str, Any]) -> None:
    whole = complete(http, **extra)["choices"][0]
    parts = [c["choices"][0] for c in chunks(http, prompt=PROMPT, **extra)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [p["finish_reason"] for p in parts][-1] == whole["finish_reason"]
    assert {p["finish_reason"] for p in parts[:-1]} == {None}
    told = chunks(http, "/v1/chat/completions", **CHAT, **extra, stream_options={"include_usage": True})
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in told[:-1]) == whole["text"]
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] > 0


def test_drafts_replay_to_the_final_canvas(http) -> None:
    found = chunks(http, prompt=PROMPT, diffusing=True, diffusion={"recipe": "llada", "steps": 12}, max_tokens=24)
    first, *steps, last = [c["unmask"] for c in found]
    assert first["cells"] == 24 and first["step"] == 0 and first["recipe"]["name"] == "llada"
    assert [s["step"] for s in steps] == [*range(1, len(steps) + 1)]
    cells: dict[int, int] = {}
    for told in steps:
        for cell, token, piece, score in told["changed"]:
            cells[cell] = token
            assert MODELS["dllm"].tokenizer.piece(token) == piece and 0 <= score <= 1
            top = told["top"][str(cell)]
            assert top[0][0] == token and sum(p for *_, p in top) <= 1.001 and len(top) == 5
        for cell in told["remasked"]:
            del cells[cell]
        assert not {cell for cell, *_ in told["draft"]} & {*cells}
    output = MODELS["dllm"].generate(PROMPT, recipe="llada", steps=12)
    origin = int(output.canvas.origin[0])
    assert [cells[i] for i in range(24)] == output.canvas.tokens[0, origin:].tolist()
    assert last["done"] and last["forwards"] == output.forwards and last["useful_tokens"] == len(output.tokens)


def test_a_suffix_is_written_towards(http) -> None:
    found = complete(http, prompt=RESTAURANT, suffix=" near the river .", max_tokens=8)
    expected = MODELS["dllm"].generate(RESTAURANT, suffix=" near the river .", length=8)
    assert found["choices"][0]["text"] == expected.text
    for name, word in (("d2f", "block-causal"), ("twin", "autoregressive")):
        answer = http.post("/v1/completions", json={"model": name, "prompt": RESTAURANT, "suffix": " ."})
        assert answer.status_code == 400 and word in answer.json()["error"]["message"]


def test_pins_hold_and_resume(http) -> None:
    free = complete(http, prompt=RESTAURANT, max_tokens=20)["choices"][0]["text"]
    pinned = complete(http, prompt=RESTAURANT, max_tokens=20, diffusion={"pins": [[0, "There"], [2, "a"]]})
    words = pinned["choices"][0]["text"].split()
    assert words[0] == "There" and words[2] == "a" and pinned["choices"][0]["text"] != free
    ids = MODELS["dllm"].tokenizer.encode(free)
    kept = [[cell, token] for cell, token in enumerate(ids) if cell != 2]
    assert (
        complete(http, prompt=RESTAURANT, max_tokens=len(ids), diffusion={"pins": kept})["choices"][0]["text"] == free
    )


def test_a_prediction_that_is_right_saves_forwards(http) -> None:
    stream, kept, saved = problems.problems(3, "templates"), 0, 0
    for prompt, text, _ in (problems.worksheet(stream, 1) for _ in range(10)):
        alone = complete(http, prompt=prompt, diffusion={"recipe": "wino"}, max_tokens=24)
        found = complete(http, prompt=prompt, prediction={"type": "content", "content": text}, max_tokens=24)
        kept += found["choices"][0]["text"] == text
        saved += alone["unmask"]["forwards"] - found["unmask"]["forwards"]
    assert kept >= 4 and saved > 0, "a true prediction is confirmed more often than found"
    told = http.post(
        "/v1/completions", json={"prompt": PROMPT, "diffusion": {"recipe": "dual", "seed_canvas": "9 + 4"}}
    )
    assert told.status_code == 400 and "wino" in told.json()["error"]["message"]


def test_stop_cuts_the_committed_text(http) -> None:
    whole = complete(http)["choices"][0]["text"]
    found = complete(http, stop=["####", "never"])
    assert found["choices"][0] | {"text": ""} == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert found["choices"][0]["text"] == whole[: whole.index("####")]
    streamed = chunks(http, prompt=PROMPT, stop="####")
    assert "".join(c["choices"][0]["text"] for c in streamed) == found["choices"][0]["text"]


def test_seeds_choices_and_temperature(http) -> None:
    drawn = {"prompt": RESTAURANT, "temperature": 1.5, "seed": 11, "n": 3, "max_tokens": 24}
    first, second = complete(http, **drawn), complete(http, **drawn)
    assert first["choices"] == second["choices"] and len({c["text"] for c in first["choices"]}) > 1
    once = complete(http, **{**drawn, "n": 1})["usage"]
    assert first["usage"]["prompt_tokens"] == once["prompt_tokens"], "a prompt is counted once, whatever n is"
    alone = [complete(http, **{**drawn, "seed": 11 + i, "n": 1})["choices"][0]["text"] for i in range(3)]
    assert alone == [c["text"] for c in first["choices"]]
    assert complete(http, prompt=[PROMPT, RESTAURANT])["choices"][1]["index"] == 1


def test_logprobs_are_those_of_the_commit(http) -> None:
    choice = complete(http, logprobs=2, diffusion={"recipe": "llada"})["choices"][0]
    marks = choice["logprobs"]
    for piece, at in zip(marks["tokens"], marks["text_offset"], strict=True):
        assert choice["text"][at:].startswith(piece)
    assert len(marks["tokens"]) == len(marks["token_logprobs"]) == len(marks["top_logprobs"])
    for piece, own, top in zip(marks["tokens"], marks["token_logprobs"], marks["top_logprobs"], strict=True):
        assert own <= 0 and max(top.values()) == pytest.approx(top[piece]) == pytest.approx(own)
    chat = http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2}).json()
    entry = chat["choices"][0]["logprobs"]["content"][0]
    assert bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 2


def test_structured_output(http) -> None:
    regex = r"(\d+ [*+/-] \d+ = \d+( ; )?)+#### \d+"
    told = {"response_format": {"type": "regex", "regex": regex.replace("( ; )?", "( ;)? ")}, "logprobs": 20}
    for extra in ({}, {"temperature": 1.5}, {"diffusion": {"recipe": "prophet"}}, {"model": "twin"}, {"model": "d2f"}):
        choice = complete(http, max_tokens=24, **told, **extra)["choices"][0]
        assert re.fullmatch(told["response_format"]["regex"], choice["text"]), choice  # type: ignore[index]
        assert choice["finish_reason"] == "stop"
        streamed = chunks(http, prompt=PROMPT, max_tokens=24, **told, **extra, seed=1)
        assert re.fullmatch(told["response_format"]["regex"], "".join(c["choices"][0]["text"] for c in streamed))  # type: ignore[index]
    word = complete(
        http, prompt=RESTAURANT, response_format={"type": "regex", "regex": r"(Blue|Green) [a-z]+"}, max_tokens=4
    )
    assert word["choices"][0]["text"].split()[0] in ("Blue", "Green")
    infill = {
        "suffix": " near the river .",
        "max_tokens": 6,
        "response_format": {"type": "regex", "regex": "is a( [a-z]+)+"},
    }
    assert complete(http, prompt=RESTAURANT, **infill)["choices"][0]["text"].startswith("is a ")
    for wrong, word in (
        ({"type": "regex", "regex": "("}, "regex"),
        ({"type": "json_schema", "json_schema": {}}, "schema"),
        ({"type": "yaml"}, "type is one of"),
    ):
        answer = http.post("/v1/completions", json={"prompt": PROMPT, "response_format": wrong})
        assert answer.status_code == 400 and word in answer.json()["error"]["message"]
    short = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, **told})
    assert short.status_code == 400 and "7 cells" in short.json()["error"]["message"]
    revising = http.post("/v1/completions", json={"prompt": PROMPT, "diffusion": {"recipe": "wino"}, **told})
    assert revising.status_code == 400 and "revises" in revising.json()["error"]["message"]


def test_streamed_logprobs_are_those_of_the_whole(http) -> None:
    body = {
        "prompt": RESTAURANT,
        "n": 3,
        "temperature": 1.2,
        "seed": 5,
        "logprobs": 3,
        "max_tokens": 30,
        "model": "twin",
    }
    for extra in ({}, {"stop": ["riverside .", "pub that"]}):
        whole = complete(http, **body, **extra)["choices"]
        told: dict[int, dict[str, list]] = {}
        for chunk in chunks(http, **body, **extra):
            for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
                told.setdefault(chunk["choices"][0]["index"], {}).setdefault(name, []).extend(values or [])
        assert [told[c["index"]] for c in whole] == [c["logprobs"] for c in whole]


def test_only_what_was_asked_for_is_told(http) -> None:
    assert complete(http, diffusing=True)["choices"][0]["logprobs"] is None
    first = chunks(http, prompt=PROMPT, diffusing=True)[1]
    assert first["choices"][0]["logprobs"] is None
    assert len(next(iter(first["unmask"]["top"].values()))) == 5
    assert http.post("/v1/embeddings", json={}).status_code == 404
    extra = {"role": "user", "content": PROMPT, "tool_calls": [1]}
    assert "tool_calls" in http.post("/v1/chat/completions", json={"messages": [extra]}).json()["error"]["message"]
    anchored = {"response_format": {"type": "regex", "regex": "^Blue( [a-z]+)+$"}, "max_tokens": 6}
    assert complete(http, prompt=RESTAURANT, **anchored)["choices"][0]["text"].startswith("Blue ")


def test_offsets_of_tokens_that_share_a_character(tmp_path: Path) -> None:
    model = SimpleNamespace(tokenizer=Tokenizer.from_directory(vocabularies.write(tmp_path / "v", "json")))
    text = "é no😀x é"
    ids = model.tokenizer.encode(text)
    found = Answer(model, False, [], 0)._offsets(ids, text)  # type: ignore[arg-type]
    for at, token in zip(found, ids, strict=True):
        piece = model.tokenizer.piece(token)
        assert "\ufffd" in piece or text[at:].startswith(piece)
    assert found == sorted(found) and len(set(found)) < len(found)


def test_effort_is_a_preset_of_speed(http) -> None:
    forwards = [complete(http, reasoning_effort=e)["unmask"]["forwards"] for e in ("low", "medium", "high")]
    assert forwards[0] <= forwards[1] < forwards[2]


def test_vllms_names(http) -> None:
    ours = complete(http, diffusion={"recipe": "llada", "steps": 6, "canvas_length": 24})
    theirs = complete(http, vllm_xargs={"diffusion_recipe": "llada"}, diffusion_steps=6, diffusion_canvas_length=24)
    assert ours["choices"] == theirs["choices"] and theirs["unmask"]["forwards"] == 6
    cut = complete(http, diffusion={"recipe": "llada"}, diffusion_max_steps=3)
    assert cut["unmask"]["forwards"] == 3 and cut["choices"][0]["finish_reason"] == "length"


WIDE = {
    "$ref": "#/$defs/a",
    "$defs": {
        name: {"type": "object", "required": list("pqrstuvwxy"), "properties": dict.fromkeys("pqrstuvwxy", inner)}
        for name, inner in (("a", {"$ref": "#/$defs/b"}), ("b", {"$ref": "#/$defs/c"}), ("c", {"type": "string"}))
    },
}
"""Three levels of ten properties: a thousand strings."""
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "unknown model"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": 129}, 400, "longer"),
    ({"prompt": PROMPT * 40}, 400, "cells"),
    ({"prompt": ""}, 400, "empty"),
    ({"prompt": []}, 400, "no prompt"),
    ({"prompt": [5, 10**8]}, 400, "token of a prompt"),
    ({"temperature": -1}, 400, "temperature"),
    ({"seed": 2**70}, 400, "seed"),
    ({"n": 5}, 400, "choices"),
    ({"best_of": 3}, 400, "send n"),
    ({"echo": True}, 400, "refused"),
    ({"tools": [{"type": "function"}]}, 400, "response_format"),
    ({"temprature": 1}, 400, "temperature"),
    ({"diffusion": {"recipe": "treshold"}}, 400, "threshold"),
    ({"diffusion": {"recipe": "/etc/passwd.toml"}}, 400, "not a file"),
    ({"diffusion": {"recipe": "x.toml"}}, 400, "not a file"),
    ({"diffusion": {"stepz": 3}}, 400, "stepz"),
    ({"diffusion": {"pins": [[99, 5]]}}, 400, "pin 99"),
    ({"diffusion": {"pins": [[0, 2]]}}, 400, "token 2"),
    ({"diffusion_steps": -4}, 400, "diffusion.steps"),
    ({"diffusion": {"steps": 3}, "diffusion_steps": 4}, 400, "contradict"),
    ({"logit_bias": {"dog": 4}}, 400, "logit_bias"),
    ({"logit_bias": {"100000": 4}}, 400, "100000"),
    ({"stop": [""]}, 400, "stop"),
    ({"model": "twin", "diffusion": {"recipe": "dual"}}, 400, "autoregressive"),
    ({"diffusion": {"template": "a {think:200000000} b"}}, 400, "too long"),
    ({"max_tokens": 2**31 - 1, "diffusion": {"template": "a {think} b"}}, 400, "longer"),
    ({"diffusion": {"pins": [[0, 5], [0, 6]]}}, 400, "twice"),
    ({"logit_bias": {"01": 1, "1": 2}}, 400, "twice"),
    ({"prompt": [5, 2]}, 400, "mask"),
    ({"messages": []}, 400, "/v1/chat/completions"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 3}}}},
        400,
        "minimum",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": WIDE}}}, 400, "JSON schema"),
    ({"response_format": {"type": "regex", "regex": "xyz!"}}, 400, "can be spelt by"),
    ({"model": "twin", "reasoning_effort": "low"}, 400, "reasoning_effort"),
]


@pytest.mark.parametrize(("body", "status", "word"), WRONG, ids=[json.dumps(w[0])[:40] for w in WRONG])
def test_mistakes_are_told_in_one_line(http, body: dict[str, Any], status: int, word: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (
        word in error["message"] and "\n" not in error["message"] and {*error} == {"message", "type", "param", "code"}
    )
    assert len(error["message"]) < 1001 and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800 x"}', b"[" * 100_000, b'{"prompt": 5}',
     b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_malformed_bodies(http, raw: bytes) -> None:
    answer = http.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_the_masks_name_is_text_in_a_prompt(http) -> None:
    found = complete(http, prompt="Tom has <mask> eggs . <eos>", max_tokens=8)
    assert found["usage"]["prompt_tokens"] > 3
    assert "<mask>" not in found["choices"][0]["text"]


def test_large_bodies_and_missing_keys_are_refused(http) -> None:
    assert http.post("/v1/completions", json={"prompt": "a" * 300_000}).status_code == 413
    parts = (b"x" * 50_000 for _ in range(8))
    answer = http.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    with made(rows=1, length=64, key="secret") as closed:
        assert closed.get("/v1/models").status_code == closed.get("/metrics").status_code == 401
        assert closed.get("/v1/models", headers={"authorization": "Bearer secrets"}).status_code == 401
        assert closed.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert closed.get("/health").status_code == 200


def test_hosts_of_other_names_are_refused() -> None:
    with made(rows=1, length=64, hosts=("localhost",)) as closed:
        assert closed.get("/v1/models", headers={"host": "rebound.example"}).status_code == 400


def test_a_full_queue_says_so() -> None:
    with made(rows=1, queue=2, length=128) as small:
        small.app.state.server.worker.stopped = True
        assert small.post("/v1/completions", json={"prompt": PROMPT}).status_code == 503
    with made(rows=1, queue=2, length=128) as small:
        answer = small.post("/v1/completions", json={"prompt": PROMPT, "n": 3})
        assert answer.status_code == 429 and answer.headers["retry-after"]


def test_nothing_inside_is_told(http, monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.app.state.server
    monkeypatch.setattr(server.engines["dllm"], "submit", lambda *_, **__: 1 / 0)
    answer = http.post("/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == 500 and "division" not in answer.text
    monkeypatch.undo()
    assert complete(http)["choices"]


def test_a_stream_tells_of_a_failure_once(http, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("unmask.engine.tell.Telling._cells", broken)
    told = chunks(http, prompt=PROMPT, diffusing=True, diffusion={"recipe": "llada"})
    assert [{*chunk} == {"error"} for chunk in told] == [False, True] and "inside" not in json.dumps(told)
    monkeypatch.undo()
    assert complete(http)["choices"]


def test_a_storm_of_requests_leaks_nothing(http) -> None:
    wrong: list[str] = []
    expected = {r: complete(http, diffusion={"recipe": r})["choices"] for r in ("dual", "threshold", "prophet")}

    def client(number: int) -> None:
        recipe = [*expected][number % 3]
        if number % 4 == 3:  # goes away in the middle
            with http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True, "temperature": 1}):
                return
        found = http.post("/v1/completions", json={"prompt": PROMPT, "diffusion": {"recipe": recipe}})
        if found.status_code != 200 or found.json()["choices"] != expected[recipe]:
            wrong.append(found.text)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    complete(http)
    engine = http.app.state.server.engines["dllm"]
    assert not wrong and not engine.live and not engine.waiting
    assert all(len(lane.free) == engine.rows for lane in engine.lanes.values())


def test_models_tokenizer_metrics_and_state(http) -> None:
    listed = {m["id"]: m["unmask"] for m in http.get("/v1/models").json()["data"]}
    assert listed["twin"]["recipes"] == ["ar"] and listed["dllm"]["default_recipe"] == "threshold"
    for recipe in listed["d2f"]["recipes"]:
        assert complete(http, model="d2f", prompt=PROMPT, max_tokens=24, diffusion={"recipe": recipe})
    assert http.get("/v1/models/twin").json()["id"] == "twin"
    assert http.get("/v1/models/none").status_code == 404
    told = http.post("/tokenize", json={"prompt": PROMPT}).json()
    assert told["count"] == len(told["tokens"]) == len(told["pieces"])
    text = http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:generation_tokens_total", "unmask:tokens_per_forward_sum"):
        assert f'{name}{{model_name="dllm"}}' in text
    assert http.get("/ready").json()["status"] == "ready"


def test_refused_aliases_of_generate_are_no_surprise(http) -> None:
    assert unmask.__version__ in http.get("/openapi.json").text
    for name in ("gen_length", "alg"):
        assert name in ALIASES
        assert http.post("/v1/completions", json={"prompt": PROMPT, name: 3}).status_code == 400
