"""Binding a port and serving until a signal says so: the first one drains, the second one stops."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Mapping
from types import FrameType

import uvicorn

from unmask.errors import UserError
from unmask.generate import Model
from unmask.serve.app import Options, Server, application

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Draining(uvicorn.Server):
    """uvicorn, which finishes what it has begun after one SIGTERM or Ctrl-C, and stops at once after two."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.served = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or stop."""
        if self.should_exit:
            self.force_exit = True
            self.served.worker.stopped = True
            self.served.worker.wake()
        else:
            waiting = sum(engine.live + engine.waiting for engine in self.served.engines.values())
            told = f"; {waiting} requests to finish, once more to stop now" if waiting else ""
            print(f"unmask stops on {signal.Signals(sig).name}{told}", file=sys.stderr, flush=True)
        self.served.worker.draining = True
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, so that asyncio sets TCP_NODELAY
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)  # from now on clients wait instead of being refused
    except (OSError, OverflowError) as error:
        sock.close()
        told = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port}: {told}; choose another --port, or --port 0") from None
    return sock


def hosts(host: str) -> tuple[str, ...]:
    """The Host headers that are answered: on loopback only its own names, so that no web page can reach through."""
    return ("127.0.0.1", "localhost", "[::1]") if host in LOOPBACK else ("*",)


def serve(models: Mapping[str, Model], options: Options, *, host: str, port: int, verbose: bool = False) -> None:
    """Serve until a signal."""
    sock = bound(host, port)
    server = Server(models, options)
    server.warm()
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    config = uvicorn.Config(
        application(server),
        **{"log_level": "info" if verbose else "warning", "access_log": verbose, "log_config": None},
        **{"server_header": False, "timeout_keep_alive": 30, "h11_max_incomplete_event_size": 65_536},
    )
    name = f"[{host}]" if ":" in host else host
    where = f"http://{name}:{sock.getsockname()[1]}"
    if host not in LOOPBACK and options.key is None:
        print("warning: anyone who reaches this machine can use the server; set --api-key", file=sys.stderr)
    print(f"unmask serves {', '.join(models)} at {where}", file=sys.stderr, flush=True)
    Draining(config, server).run(sockets=[sock])
