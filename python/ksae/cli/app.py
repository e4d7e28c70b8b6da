# SPDX-License-Identifier: Apache-2.0
"""The `ksae` command: its subcommands, and what becomes of a mistake.

A mistake of the user is one line on the standard error, `ksae: error: ...`, and exit code 1 (2:
wrong usage), with no traceback unless KSAE_DEBUG=1. Ctrl-C ends with 130 and SIGTERM with 143,
after training has saved a checkpoint. Commands import torch as they run, so that help needs none.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from ksae import env
from ksae.cli import bench, config, convert, dashboard, demo, eval, help, hooks, train
from ksae.errors import RankError, UserError
from ksae.version import VERSION

TRAIN_USAGE = (
    "usage: ksae train [CONFIG.yaml] [--activations FILE | --model NAME --hook LAYER --text FILE] "
    "[--out FOLDER] ...; all options: ksae train --help"
)


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the first would be lost, and whose
    help fits in 80 columns."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.name == "train":
            raise _Usage(TRAIN_USAGE)
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        options = [p for p in given if p.param_type_name == "option"]
        for number, option in enumerate(options):
            if option in options[:number]:
                ctx.fail(f"Option {option.opts[0]} is given twice")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help.text(self, ctx) + "\n")


class _Usage(Exception):
    """A line of usage, for a command without arguments."""


class _Terminated(SystemExit):
    """SIGTERM, outside of training."""


app = typer.Typer(
    name="ksae",
    help="Trains k-sparse autoencoders and transcoders on the activations of language models",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("train", cls=Command)(train.command)
app.command("eval", cls=Command)(eval.evaluate)
app.command("dashboard", cls=Command)(dashboard.dashboard)
app.command("convert", cls=Command)(convert.convert)
app.command("hooks", cls=Command)(hooks.hooks)
app.command("config", cls=Command)(config.config)
app.command("demo", cls=Command)(demo.demo)
app.command("bench", cls=Command)(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ksae {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `ksae` command."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """`main` that returns the exit code."""

    def terminate(signum: int, frame: object) -> None:
        # while training, the trainer's own handler stands in front of this one
        raise _Terminated(128 + signum)

    if not sys.stderr.isatty():  # bars would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        return _run(args)
    except _Terminated as end:
        # torchrun stops the ranks that are left as they fail: the reason is still to be said
        code, message = _explain(end.__context__) if end.__context__ else (0, None)
        if message is None:
            raise
        _say(f"error: {message}")
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: Sequence[str] | None) -> int:
    from ksae.runs.signals import Interrupted

    try:
        code = app(
            args=None if args is None else list(args), prog_name="ksae", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Interrupted as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + signal.SIGINT
    except _Usage as usage:
        print(usage, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `ksae config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left is to say it, once
        if env.read("KSAE_DEBUG") != "0":
            raise
        code, message = _explain(error)
        if message is None:
            raise
        _say(f"error: {message}")
        return code


def _explain(error: BaseException) -> tuple[int, str | None]:
    """Exit code and message for a user's mistake; no message for what must be a defect of ksae."""
    usage = getattr(error, "format_message", None)  # typer has its own copy of click's exceptions
    if usage is not None:
        context = getattr(error, "ctx", None)
        command = "ksae" if context is None else context.command_path
        return 2, f"{_one_line(usage())} (see {command} --help)"
    if isinstance(error, UserError | RankError | ValueError | OSError):
        return 1, _one_line(str(error)) or type(error).__name__
    if (
        isinstance(error, MemoryError)
        or "allocate memory" in str(error)
        or "out of memory" in str(error)
    ):
        return 1, "out of memory: choose a smaller d_sae or batch_size, or bfloat16"
    return 1, None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(line: str) -> None:
    print(f"ksae: {line}", file=sys.stderr, flush=True)
