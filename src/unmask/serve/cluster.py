"""Beyond one machine: replicas with an engine each, on Ray Serve for requests and on Ray Data for files."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.error import URLError
from urllib.request import urlopen

from unmask import zoo
from unmask.errors import UserError, suggest
from unmask.models.hub import locate
from unmask.serve.files import Result, Row

if TYPE_CHECKING:
    from unmask.serve.app import Options

NAME = "unmask"
REACH_S = 60
"""Seconds in which a proxy must have found the replicas."""
DRAIN_S = 3600
"""Seconds that requests may take to finish after a signal."""
FILLS = 4
"""A replica gets so many times the rows that its engine decodes at once, and answers when they are done."""


def located(name: str) -> tuple[str, str]:
    """(display name, place) of a model, without loading it; UserError for one that is not there."""
    if name in zoo.NAMES:
        return name, name
    if "/" not in name and not Path(name).exists():
        raise UserError(f"{suggest(name, zoo.NAMES, 'model')}; or give a checkpoint folder or a hub id org/name")
    shown, folder = locate(name)
    return shown, str(folder.resolve()) if Path(name).is_dir() else name


def ray_with(part: str) -> tuple[Any, Any]:
    """(ray, ray.part); UserError if they are not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray"), import_module(f"ray.{part}")
    except ModuleNotFoundError as error:
        raise UserError(f"--ray needs {error.name}; pip install 'unmask[ray]'") from None


@contextmanager
def cluster(ray: Any) -> Iterator[None]:
    """A cluster to work on: the one that RAY_ADDRESS names, which goes on, or one of this machine, which ends."""
    place: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
    for quiet in ("ray.data", "ray.serve"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
    for told in ("ray.data.exceptions", "ray.data._internal.execution.operators.actor_pool_map_operator"):
        logging.getLogger(told).setLevel(logging.CRITICAL)  # what we tell in one line
    try:
        ray.init(**place, log_to_driver=False, logging_level="WARNING")
    except ConnectionError as error:
        raise UserError(f"cannot reach the cluster at RAY_ADDRESS: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def spread(rows: Iterable[Row], made: Mapping[str, Any], *, replicas: int) -> Iterator[Result]:
    """The results of rows from up to `replicas` replicas on Ray Data; `made`: how a replica is made.

    Rows wait in Ray's object store, which goes to the disk where they are many; this process holds a block at a time.
    """
    checked(made["dtype"])
    ray, data = ray_with("data")
    arrow = import_module("pyarrow")
    with cluster(ray):
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        blocks = [ray.put(arrow.table({"row": block})) for block in cut(rows, FILLS * made["rows"])]
        found = data.from_arrow_refs(blocks).map_batches(
            Replica,
            fn_constructor_kwargs=dict(made),
            compute=data.ActorPoolStrategy(min_size=1, max_size=max(1, min(replicas, len(blocks)))),
            **{"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1},
            num_gpus=1 if made["device"].startswith("cuda") else None,
        )
        try:
            for row in found.iter_rows():
                yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise reason(str(error)) from None


def cut(rows: Iterable[Row], size: int) -> Iterator[list[str]]:
    """Blocks of `size` rows, each as JSON."""
    source = iter(rows)
    while block := [json.dumps(row) for row in islice(source, size)]:
        yield block


def reason(told: str) -> UserError:
    """Why replicas failed, as one line: the user's mistake if that is what the traceback in `told` ends with."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason is known"
    if found := [line for line in lines if line.startswith("unmask.errors.")]:
        return UserError(found[-1].partition(": ")[2])
    return UserError(f"the replicas failed: {last[:500]}; Ray's logs tell more")


def checked(dtype: str) -> None:
    """UserError for a dtype that no replica could load."""
    from unmask.models.fast import split
    from unmask.models.load import choose_dtype

    if dtype != "auto":
        choose_dtype(split(dtype)[0], [])


class Replica:
    """A model and its engine in a process of Ray Data."""

    def __init__(self, *, place: str, rows: int, length: int | None, dtype: str, device: str) -> None:
        from unmask.generate import load
        from unmask.serve.offline import Decoder

        self.decoder = Decoder(load(place, dtype=dtype, device=device), rows=rows, length=length)

    def __call__(self, block: Any) -> Any:
        """The results of a block of rows, an Arrow table with the column `row`, as one with the column `result`."""
        arrow = import_module("pyarrow")
        rows = [json.loads(text) for text in block["row"].to_pylist()]
        return arrow.table({"result": [json.dumps(result) for result in self.decoder.run(rows)]})


class Unmask:
    """A server in a process of Ray Serve."""

    app: ClassVar[Any] = None
    """The application of this process."""

    def __init__(self, places: Sequence[str], options: Options, dtype: str, device: str) -> None:
        from unmask.serve.app import Server, application
        from unmask.serve.models import loaded

        Unmask.app = application(Server(loaded(places, dtype=dtype, device=device), options))


class Late:
    """ASGI that can be sent to another process, and calls the application that was made there."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection, or the lifespan."""
        await Unmask.app(scope, receive, send)


def deploy(
    names: Sequence[str],
    options: Options,
    *,
    host: str,
    port: int,
    replicas: int,
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Serve on Ray Serve until a signal: 1 to `replicas` replicas with an engine each, as many as requests need.

    The first SIGTERM or Ctrl-C takes no more requests and finishes what has begun, the second one stops.
    """
    from unmask.serve.run import LOOPBACK, bound

    found = [located(name) for name in names]
    shown = [name for name, _ in found]
    if twice := next((name for name in shown if shown.count(name) > 1), None):
        raise UserError(f"two models are called {twice}; serve one of them")
    checked(dtype)
    ray, serve = ray_with("serve")
    with bound(host, port) as sock:
        port = sock.getsockname()[1]
    with cluster(ray):
        serve.start(http_options={"host": host, "port": port})
        made = [place for _, place in found], options, dtype, device
        started(serve, deployment(serve, options, replicas, device).bind(*made))
        if host not in LOOPBACK and options.key is None:
            print("warning: anyone who reaches this machine can use the server; set --api-key", file=sys.stderr)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        reached(where.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))
        print(f"unmask serves {', '.join(shown)} at {where} on Ray", file=sys.stderr, flush=True)
        stopped = wait()
        serve.delete(NAME, _blocking=False)
        drained(serve, stopped)


def started(serve: Any, app: Any) -> None:
    """Run an application; UserError with the reason if its replicas do not start."""
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        there = serve.status().applications.get(NAME)
        told = [deployment.message for deployment in there.deployments.values()] if there else []
        raise reason("\n".join([str(error), *told])) from None


def reached(where: str) -> None:
    """Wait until requests find the replicas: Ray's proxy hears of them a little later."""
    until = time.monotonic() + REACH_S
    while time.monotonic() < until:
        try:
            with urlopen(f"{where}/ready", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise UserError(f"the replicas run, but nothing answers at {where}; is another cluster's proxy there?")


def deployment(serve: Any, options: Options, replicas: int, device: str) -> Any:
    """A replica takes what its engine decodes at once and lets wait; another one comes when the first is busy."""
    return serve.deployment(
        serve.ingress(Late())(Unmask),
        name="engine",
        max_ongoing_requests=options.rows + options.queue,
        max_queued_requests=options.queue,
        autoscaling_config={"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": options.rows},
        ray_actor_options={"num_cpus": 1, **({"num_gpus": 1} if device.startswith("cuda") else {})},
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def wait() -> threading.Event:
    """Sleep until SIGTERM or Ctrl-C; the event that is returned is set by the next one."""
    first, second = threading.Event(), threading.Event()

    def heard(number: int, _: object) -> None:
        if first.is_set():
            second.set()
            return
        print(f"unmask stops on {signal.Signals(number).name}, once more to stop now", file=sys.stderr, flush=True)
        first.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    while not first.wait(0.5):
        pass
    return second


def drained(serve: Any, stopped: threading.Event) -> None:
    """Wait until the replicas have finished what they had begun, or for the second signal."""
    until = time.monotonic() + DRAIN_S
    while NAME in serve.status().applications and time.monotonic() < until:
        if stopped.wait(0.2):
            return
