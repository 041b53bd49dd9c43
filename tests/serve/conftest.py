"""One server for the tests of HTTP, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

import unmask
from unmask.serve.app import Options, Server, application
from unmask.serve.reading import Limits

MODELS = {name: unmask.load(name) for name in ("dllm", "d2f", "twin")}


def made(**options: object) -> TestClient:
    return TestClient(application(Server(MODELS, Options(**options))), raise_server_exceptions=False)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def http() -> Iterator[TestClient]:
    with made(rows=6, length=256, body=200_000, limits=Limits(choices=4, prompts=8, length=128)) as client:
        yield client
