"""The `unmask` command. Each command is a module that imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from unmask.cli import (
    bench,
    chat,
    control,
    demo,
    doctor,
    emergence,
    gap,
    generate,
    harness,
    load,
    offline,
    peer,
    recipes,
    report,
    serve,
    study,
    trace,
    train,
    train_blocks,
    verify,
)
from unmask.errors import UserError

USAGE: Any = typer.BadParameter.__base__
"""Click's UsageError, wherever this typer keeps click."""
INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of the signal."""

app = typer.Typer(
    name="unmask",
    help="An engine for diffusion language models: one loop in which published decoding methods compose.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing it with rich takes longer than everything else
)
for name, function in (
    ("demo", demo.demo),
    ("generate", generate.generate),
    ("chat", chat.chat),
    ("recipes", recipes.recipes),
    ("explain", recipes.explain),
    ("export", train.export),
    ("evaluate", study.evaluate),
    ("verify", verify.verify),
    ("doctor", doctor.doctor),
    ("report", report.report),
    ("serve", serve.serve),
    ("batch", offline.batch),
):
    app.command(name)(function)
app.command("eval")(harness.eval_)
app.add_typer(train_blocks.app, name="train")
for name, function in (("step", bench.step), ("ar", bench.ar), ("batch", bench.batch), ("gap", gap.gap)):
    study.app.command(name)(function)
study.app.command("emergence")(emergence.emergence)
study.app.command("control")(control.control)
study.app.command("peer")(peer.peer)
study.app.command("serve")(load.load)
app.add_typer(study.app, name="bench")
app.add_typer(trace.app, name="trace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a user's mistake is one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = app(given or ["--help"], prog_name="unmask", standalone_mode=False) or 0
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code and say nothing
            print("interrupted", file=sys.stderr)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except USAGE as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "unmask")
        print(f"error: {' '.join(error.format_message().split())} See: {command} --help", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
