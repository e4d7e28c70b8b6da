# SPDX-License-Identifier: Apache-2.0
"""`ksae train`: an option for each key of the run's configuration."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ksae.cli.tables import SUMMARY
from ksae.errors import UserError
from ksae.runs import config as runconfig

PANELS = {"": "Run", "model": "Model", "data": "Data", "train": "Training", "log": "Log"}


def train(
    ctx: typer.Context,
    config: Path | None,
    resume: bool,
    restart: bool,
    allow_change: bool,
    **options: str | bool | None,
) -> None:
    """Train on a file of activations, or on a language model's.

    Settings come from the CONFIG file, then from the options.
    With --resume and no CONFIG they come from the run in --out.
    With --from, sizes and activation are those of the model to start from.
    Pictures of the run need matplotlib: pip install "ksae[plots]".
    Over several processes: torchrun --nproc-per-node 2 -m ksae train run.yaml

    ksae train --activations x.npy --d-sae 4096 --k 32 --out runs/x
    """
    from ksae.runs.model import TAKEN
    from ksae.runs.start import train as do_run

    typed = {
        key: _typed(options[name])
        for key, name in OPTIONS.items()
        if ctx.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
    }
    if typed.get("model.start") is not None:
        for key in TAKEN:
            if f"model.{key}" in typed:
                flag = flag_of(f"model.{key}")
                raise UserError(
                    f"train: {flag} must be left out with --from, whose model has it already"
                )
    if config is None and resume and (Path(str(options["out"])) / "run.yaml").is_file():
        config = Path(str(options["out"])) / "run.yaml"
        typed["out"] = str(options["out"])  # the folder may have been moved
    start = runconfig.RunConfig() if config is None else runconfig.read(config)
    settings = runconfig.override(start, typed)
    result = do_run(settings, resume=resume, restart=restart, allow_change=allow_change)
    if result.rank:
        return
    print(f"trained {result.steps:,} steps, {result.tokens:,} tokens; model: {result.model_path}")
    if result.evaluation:
        from ksae.runs.evaluation import table

        print(f"on {result.held_out_tokens:,} held-out tokens:")
        print(table(result.evaluation, SUMMARY))
    for path in result.plots:
        print(f"picture: {path}")


def _typed(value: str | bool | None) -> str | bool | None:
    return None if isinstance(value, str) and value.lower() in ("null", "none") else value


def _with_options(command: Any) -> Any:
    """`command` with an option for each key of the run's configuration, in place of **options."""
    parameters = {
        "ctx": typer.Context,
        "config": Annotated[
            Path | None,
            typer.Argument(metavar="CONFIG", help="YAML file with settings", show_default=False),
        ],
        "resume": Annotated[
            bool,
            typer.Option("--resume", help="Go on with the run in --out", rich_help_panel="Run"),
        ],
        "restart": Annotated[
            bool,
            typer.Option(
                "--restart",
                help="Start over in --out and drop what a run left there",
                rich_help_panel="Run",
            ),
        ],
        "allow_change": Annotated[
            bool,
            typer.Option(
                "--allow-change",
                help="With --resume: learning rate, length and the like may change from here on",
                rich_help_panel="Run",
            ),
        ],
    }
    defaults: dict[str, Any] = {"ctx": inspect.Parameter.empty, "config": None}
    defaults |= {"resume": False, "restart": False, "allow_change": False}
    for key, kind, default, text in runconfig.describe():
        name = OPTIONS[key]
        flag = flag_of(key)
        section = key.rpartition(".")[0]
        options: dict[str, Any] = {
            "help": text[:1].upper() + text[1:],
            "rich_help_panel": PANELS[section],
            "show_default": default is not None,
        }
        if kind == "bool":
            option = typer.Option(f"{flag}/--no-{flag[2:]}", **options)
            parameters[name], defaults[name] = Annotated[bool | None, option], default
        else:
            # As text: the configuration converts and checks, with one message for any origin.
            option = typer.Option(
                flag, metavar=kind.upper() if "|" not in kind else f"[{kind}]", **options
            )
            parameters[name] = Annotated[str | None, option]
            defaults[name] = None if default is None else _text(default)
    command.__annotations__ = parameters
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation
            )
            for name, annotation in parameters.items()
        ]
    )
    return command


def _text(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _option_name(key: str) -> str:
    return {"log.every": "log_every"}.get(key, key.rpartition(".")[2])


def flag_of(key: str) -> str:
    """The option of a key: train.lr -> --lr."""
    return {"model.start": "--from"}.get(key, "--" + OPTIONS[key].replace("_", "-"))


OPTIONS = {key: _option_name(key) for key, *_ in runconfig.describe()}  # train.lr -> lr, for --lr


command = _with_options(train)
