"""What stands before the endpoints: a bound on bodies, a key, and headers."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from unmask.serve.shapes import problem

OPEN = ("/health", "/ready")
"""Paths that need no key, beside the playground's own files."""
HEADERS = {
    b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class TooLarge(Exception):
    """A body is over its bound."""


class Guard:
    """ASGI around an application: refuses bodies over `body` bytes and, if there is a key, requests without it."""

    def __init__(self, app: Any, *, body: int, key: str | None, keyed: tuple[str, ...]) -> None:
        self.app, self.body, self.keyed = app, body, keyed
        self.key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]
        given = headers.get(b"authorization", b"")
        if self.key is not None and path.startswith(self.keyed) and not hmac.compare_digest(given, self.key):
            told = "the key is missing or wrong; send the header `Authorization: Bearer ...`"
            await refuse(send, 401, problem(told, "authentication_error", code="invalid_api_key"))
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.body:
            await refuse(send, 413, self._large())
            return
        await self._served(scope, receive, send)

    def _large(self) -> dict[str, Any]:
        return problem(f"the body is larger than {self.body} bytes", "invalid_request_error", code="body_too_large")

    async def _served(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Hand the request on, counting the bytes of its body, and put our headers on the answer."""
        size, begun, large = 0, False, False

        async def counted() -> Any:
            nonlocal size, large
            message = await receive()
            size += len(message.get("body", b""))
            large = large or size > self.body
            if large:
                raise TooLarge
            return message

        async def headed(message: Any) -> None:
            nonlocal begun
            if large and not begun:  # what the application makes of a body that breaks off
                return
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS.items()]}
            await send(message)

        with suppress(TooLarge):
            await self.app(scope, counted, headed)
        if large and not begun:
            await refuse(send, 413, self._large())


async def refuse(send: Any, status: int, error: Mapping[str, Any]) -> None:
    """Answer with an error object."""
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS.items()]})
    await send({"type": "http.response.body", "body": body})
