"""The server over a vocabulary of bytes and a real chat template: a random network, whose texts are odd."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import vocabularies

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

import unmask
from serve.test_http import chunks
from unmask.models.config import ModelConfig
from unmask.models.load import save_checkpoint
from unmask.models.transformer import Transformer
from unmask.serve.app import Options, Server, application

END = vocabularies.FIRST
OWN = ModelConfig(272, 32, 2, 4, 48, mask_id=vocabularies.MASK, eos_ids=(END,), max_positions=512, token_count=268)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "n", "ok"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
TALK = [
    {"role": "system", "content": "Be odd."},
    {"role": "user", "content": "hello <|mask|>"},
    {"role": "assistant", "content": "é😀"},
    {"role": "user", "content": [{"type": "text", "text": "again"}]},
]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("models") / "bytes"
    save_checkpoint(Transformer(OWN).initialise(0), folder)
    vocabularies.write(folder, "json")
    server = Server({"bytes": unmask.load(folder)}, Options(rows=6, length=400))
    with TestClient(application(server), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"temperature": 1.3, "n": 3},
        {"diffusion": {"recipe": "dual", "block_length": 16}},
        {"diffusion": {"recipe": "prophet"}},
        {"diffusion": {"pins": [[0, "{"], [9, '"']]}, "temperature": 0.8},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_a_schema_holds_whatever_the_network_wants(http: TestClient, extra: dict) -> None:
    body = {"messages": TALK, "response_format": FORMAT, "max_tokens": 60, "seed": 2, **extra}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    streamed: dict[int, str] = {}
    for chunk in chunks(http, "/v1/chat/completions", **body):
        choice = chunk["choices"][0]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
    for choice in answer.json()["choices"]:
        text = choice["message"]["content"]
        found = json.loads(text)
        assert [*found] == ["name", "n", "ok"] and isinstance(found["name"], str) and len(found["name"]) <= 8
        assert type(found["n"]) is int and type(found["ok"]) is bool
        assert streamed[choice["index"]] == text and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", [None, "Z", ["\ufffd", "é"]])
def test_odd_bytes_stream_to_the_whole_text(http: TestClient, stop: object) -> None:
    for seed in range(4):
        body = {"prompt": "x", "max_tokens": 48, "temperature": 1.5, "seed": seed, "stop": stop, "ignore_eos": True}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert "".join(c["choices"][0]["text"] for c in chunks(http, **body)) == whole


def test_a_conversation_is_told_by_the_models_template(http: TestClient) -> None:
    model = http.app.state.server.models["bytes"]  # type: ignore[attr-defined]
    texts = [{**m, "content": m["content"] if isinstance(m["content"], str) else "again"} for m in TALK]
    answer = http.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 8}).json()
    assert answer["usage"]["prompt_tokens"] == len(model.tokenizer.chat(texts))
    assert answer["choices"][0]["message"]["content"] == model.generate(texts, length=8).text
    plain = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 8}).json()
    assert plain["usage"]["prompt_tokens"] == len(model.tokenizer.plain("hello")), "a completion has no template"
