"""The application: routes, streams and errors over the worker."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from unmask import __version__, recipes
from unmask.denoise.dress import check_second
from unmask.engine import Counts, Engine, Full, ask
from unmask.errors import UserError
from unmask.generate import LENGTH, Model
from unmask.serve import reading
from unmask.serve.guard import Guard
from unmask.serve.metrics import Metrics
from unmask.serve.reading import Limits, Reading, Unknown
from unmask.serve.schema import Chat, Common, Completion, Tokenize
from unmask.serve.shapes import Answer, problem
from unmask.serve.worker import Draining, Watch, Worker
from unmask.settings import Settings, choose, default_name
from unmask.template import check_without

log = logging.getLogger("unmask.serve")
COMPILING = 16
"""Requests with a constraint that may be read at once, waiting ones among them."""
KEYED = ("/v1", "/tokenize", "/metrics", "/docs", "/openapi.json")


@dataclass
class Options:
    """How a server is set up."""

    rows: int = 16
    queue: int = 256
    cells: int | None = None
    length: int | None = None
    body: int = 4_000_000
    key: str | None = None
    hosts: tuple[str, ...] = ("*",)
    """The Host headers that are answered."""
    limits: Limits = field(default_factory=Limits)


class Server:
    """The models of a server, their engines, and what is done with a request."""

    def __init__(self, models: Mapping[str, Model], options: Options) -> None:
        self.models, self.options = dict(models), options
        made = {"rows": options.rows, "queue": options.queue, "cells": options.cells, "length": options.length}
        self.engines = {name: Engine(model, **made) for name, model in self.models.items()}
        self.worker = Worker(self.engines)
        self.metrics = Metrics(self.worker)
        self.compilers, self.compiling = ThreadPoolExecutor(2, "unmask-constraints"), 0

    def warm(self) -> None:
        """One response of every model, so that the first request does not pay for what is made once."""
        for name, model in self.models.items():
            engine = self.engines[name]
            token = int(model.network.config.mask_id == 0)  # any but the mask
            engine.run(
                [ask(model, [token] * 4, Settings(length=min(4, engine.length - 4)))] if engine.length > 4 else []
            )
            engine.counts = Counts()

    async def answer(self, body: Common, read: Callable[..., Reading], request: Request) -> Response:
        """Decode what a body asks for, whole or as a stream."""
        found = await self._read(body, read)
        name = next(name for name, model in self.models.items() if model is found.model)
        stream = bool(body.stream)
        watch = self.worker.submit(self.engines[name], found.asks, follow=stream)
        more: dict[str, Any] = {"logprobs": found.logprobs, "each": found.each}
        answer = Answer(found.model, isinstance(body, Chat), watch.tickets, found.seed, **more)
        if stream:
            lines = self._stream(name, watch, answer, body)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})
        with watch:
            await self._wait(watch, request)
            self.metrics.ended(name, watch.tickets)
        if any(ticket.error for ticket in watch.tickets):
            return failed(next(ticket.error for ticket in watch.tickets if ticket.error))
        if not all(ticket.done for ticket in watch.tickets):
            return Response(status_code=499)
        return JSONResponse(answer.whole())

    async def _read(self, body: Common, read: Callable[..., Reading]) -> Reading:
        """Understand a body, in a thread; a constraint may take seconds to compile, and few are compiled at once."""
        if body.response_format is None:
            return await asyncio.to_thread(read, body, self.models, self.options.limits)
        if self.compiling >= COMPILING:
            raise Full("many constraints are being compiled; try again later")
        self.compiling += 1
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(self.compilers, read, body, self.models, self.options.limits)
        task.add_done_callback(lambda _: setattr(self, "compiling", self.compiling - 1))
        return await asyncio.shield(task)  # who leaves is counted until the work is done

    async def _wait(self, watch: Watch, request: Request) -> None:
        """Until all have ended, or the client has gone."""

        async def ended() -> None:
            async for _ in watch.events():
                pass

        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(ended()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(self, name: str, watch: Watch, answer: Answer, body: Common) -> AsyncIterator[str]:
        """Server-sent events: committed text in order, drafts beside it where asked for, and [DONE]."""
        detail = bool(body.diffusing)
        place = {id(ticket): index for index, ticket in enumerate(watch.tickets)}
        with watch:
            try:
                for index in place.values():
                    yield event(answer.opening(index, detail))
                async for ticket, update in watch.events():
                    index = place[id(ticket)]
                    if update is None and ticket.error:
                        yield event(fault(ticket.error)[0])
                    elif update is None and ticket.done:
                        yield event(answer.closing(index, detail))
                    elif update is not None and (chunk := answer.delta(index, update, detail)):
                        yield event(chunk)
                if body.stream_options and body.stream_options.include_usage:
                    yield event(answer.final())
                yield "data: [DONE]\n\n"
            finally:
                self.metrics.ended(name, watch.tickets)

    def listing(self) -> dict[str, Any]:
        """The models, as OpenAI lists them."""
        return {"object": "list", "data": [self.about(name) for name in self.models]}

    def about(self, name: str) -> dict[str, Any]:
        """One model, and what the playground wants to know of it."""
        model = reading.find(self.models, name)
        config = model.network.config
        length = 24 if model.embedded else LENGTH
        more = {
            "kind": "autoregressive" if config.autoregressive else "diffusion",
            "attention": config.layout.kind,
            "recipes": [entry for entry in recipes.entries() if suits(entry, model, length)],
            "default_recipe": default_name(Settings(), config),
            **{"length": length, "max_positions": self.engines[name].length},
        }
        return {"id": name, "object": "model", "created": 0, "owned_by": "unmask", "unmask": more}


def suits(name: str, model: Model, length: int) -> bool:
    """Can a recipe decode with this model as it is?"""
    try:
        found = check_without(choose(Settings(recipe=name), model.network.config, length))
        check_second(found, **model.second(found, Settings(recipe=name)))
        return True
    except UserError:
        return False


def event(chunk: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def fault(error: BaseException) -> tuple[dict[str, Any], int]:
    """What a client hears of a request that failed, and the status: of our own fault nothing of its inside."""
    if isinstance(error, UserError):
        return problem(str(error), "invalid_request_error"), 400
    log.error("a request failed", exc_info=error)
    return problem("the engine failed on this request", "server_error"), 500


def failed(error: BaseException) -> JSONResponse:
    """`fault` as an answer."""
    return JSONResponse(*fault(error))


def application(server: Server) -> FastAPI:
    """The routes of a server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.stop()

    app = FastAPI(title="unmask", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None)
    app.state.server = server
    _errors(app)
    _api(app, server)
    _state(app, server)
    page = Path(__file__).parent / "static"
    if page.is_dir():
        app.mount("/", StaticFiles(directory=page, html=True), name="playground")
    options = server.options
    app.add_middleware(Guard, body=options.body, key=options.key, keyed=KEYED)
    if options.hosts != ("*",):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts))
    return app


def _api(app: FastAPI, server: Server) -> None:
    told: dict[int | str, dict[str, Any]] = {
        code: {"description": what}
        for code, what in (
            (400, "A mistake of the request"),
            (404, "No such model"),
            (413, "The body is too large"),
            (429, "The queue is full"),
            (503, "The server is about to stop"),
        )
    }

    @app.post("/v1/completions", responses=told)
    async def completions(body: Completion, request: Request) -> Response:
        return await server.answer(body, reading.completion, request)

    @app.post("/v1/chat/completions", responses=told)
    async def chat(body: Chat, request: Request) -> Response:
        return await server.answer(body, reading.chat, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.listing()

    @app.get("/v1/models/{name:path}", responses={404: {"description": "No such model"}})
    async def model(name: str) -> dict[str, Any]:
        return server.about(name)

    @app.post("/tokenize", responses=told)
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        found = reading.find(server.models, body.model)
        ids = await asyncio.to_thread(found.tokenizer.encode, body.prompt)
        pieces = await asyncio.to_thread(lambda: [found.tokenizer.piece(i) for i in ids])
        most = found.network.config.max_positions
        return {"tokens": ids, "pieces": pieces, "count": len(ids), "max_model_len": most}


def _state(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses={503: {"description": "The engine has stopped"}})
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if server.worker.alive else Response(status_code=503)

    @app.get("/ready", responses={503: {"description": "No more requests are taken"}})
    async def ready() -> Response:
        able = server.worker.alive and not server.worker.draining
        return JSONResponse({"status": "ready" if able else "draining"}, 200 if able else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _errors(app: FastAPI) -> None:
    kind = "invalid_request_error"
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health", "/ready", "/metrics"}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        parts = () if first["type"].startswith("json_") else first["loc"]
        where = ".".join(str(part) for part in parts if part != "body")[:200]
        return JSONResponse(problem(f"{where or 'body'}: {first['msg']}", kind, param=where or None), 400)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        if isinstance(error, Unknown):
            return JSONResponse(problem(str(error), kind, param="model", code="model_not_found"), 404)
        return JSONResponse(problem(str(error), kind), 400)

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        if isinstance(error, Draining):
            return JSONResponse(problem(str(error), "server_error"), 503, {"retry-after": "5"})
        return JSONResponse(problem(str(error), "rate_limit_error", code="queue_full"), 429, {"retry-after": "1"})

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status, detail = error.status_code, str(error.detail)
        if status == 405 and request.url.path not in paths:  # of the playground's files, which are read only
            status, detail = 404, "Not Found"
        told = problem(detail, kind if status < 500 else "server_error")
        return JSONResponse(told, status, {} if status == 404 else dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> Response:
        return failed(error)
