"""`unmask serve`: the engine over HTTP."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from unmask.errors import UserError

DEFAULT = ("dllm", "d2f", "twin")


def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Models: embedded names, folders, hub ids.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Ask for this key; or set UNMASK_API_KEY.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Requests decoded at once, of each model.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.")] = 256,
    cells: Annotated[int | None, typer.Option(min=1, help="Cells decoded at once, prompts included.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Most cells of one request, prompt included.")] = None,
    max_choices: Annotated[int, typer.Option(min=1, help="Largest n of a request.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, or int8 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    ray: Annotated[bool, typer.Option("--ray", help="Replicas on Ray Serve, one engine each.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: most replicas.")] = 2,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Serve models with OpenAI's endpoints, and a playground at `/`. Without a model: the embedded ones.

    Chat and text completions, infilling by `suffix`, streams with drafts, structured output, metrics. SIGTERM finishes
    what has begun; a second one stops.
    """
    try:
        from unmask.serve.app import Options
        from unmask.serve.run import hosts
        from unmask.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}; pip install 'unmask[serve]'") from None
    from unmask.serve.models import loaded
    from unmask.serve.reading import Limits

    key = api_key if api_key is not None else os.environ.get("UNMASK_API_KEY")
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise UserError("an API key is printable ASCII, and not empty")
    names = models or list(DEFAULT)
    limits = Limits(choices=max_choices)
    options = Options(rows=rows, queue=queue, cells=cells, length=length, key=key, limits=limits, hosts=hosts(host))
    if ray:
        from unmask.serve.cluster import deploy

        deploy(names, options, host=host, port=port, replicas=replicas, dtype=dtype, device=device)
        return
    run(loaded(names, dtype=dtype, device=device), options, host=host, port=port, verbose=verbose)
