# SPDX-License-Identifier: Apache-2.0
"""The command line: `ksae demo`, `train`, `eval`, `bench`, `config`.

Each imports what it needs as it runs.

A mistake of the user is one line on the standard error, `ksae: error: ...`, and exit code 1 (2:
wrong usage), with no traceback unless KSAE_DEBUG=1. Ctrl-C ends with 130 and SIGTERM with 143,
after training has saved a checkpoint.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ksae.errors import UserError
from ksae.runs import config as runconfig

app = typer.Typer(
    name="ksae",
    help="Trains k-sparse autoencoders and transcoders on the activations of language models",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
PANELS = {"": "Run", "model": "Model", "data": "Data", "train": "Training", "log": "Log"}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `ksae` command."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """`main` that returns the exit code."""
    from ksae.runs.signals import Interrupted

    def terminate(signum: int, frame: object) -> None:
        sys.exit(
            128 + signum
        )  # while training, the trainer's own handler stands in front of this one

    if not sys.stderr.isatty():  # bars would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = signal.signal(signal.SIGTERM, terminate)
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
    except BrokenPipeError:  # `ksae config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("KSAE_DEBUG", "0") not in ("", "0"):
            raise
        code, message = _explain(error)
        if message is None:
            raise
        _say(f"error: {message}")
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(error: Exception) -> tuple[int, str | None]:
    """Exit code and message for a user's mistake; no message for what must be a defect of ksae."""
    usage = getattr(
        error, "format_message", None
    )  # typer carries its own copy of click's exceptions
    if usage is not None:
        return 2, f"{_one_line(usage())} (see ksae --help)"
    if isinstance(error, UserError | ValueError | OSError):
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


def _train(
    ctx: typer.Context, config: Path | None, resume: bool, **options: str | bool | None
) -> None:
    """Train on a file of activations, or on a language model's.

    Settings come from the CONFIG file, then from the options.
    With --resume and no CONFIG they come from the run in --out.

    ksae train --activations x.npy --d-sae 4096 --k 32 --out runs/x
    """
    from ksae.runs.trainer import train

    typed = {
        key: _typed(options[name])
        for key, name in OPTIONS.items()
        if ctx.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
    }
    if config is None and resume and (Path(str(options["out"])) / "run.yaml").is_file():
        config = Path(str(options["out"])) / "run.yaml"
    start = runconfig.RunConfig() if config is None else runconfig.read(config)
    settings = runconfig.override(start, typed)
    result = train(settings, resume=resume)
    print(f"trained {result.steps:,} steps, {result.tokens:,} tokens; model: {result.model_path}")
    if result.evaluation:
        from ksae.runs.evaluation import table

        print("on held-out activations:")
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
    }
    defaults: dict[str, Any] = {"ctx": inspect.Parameter.empty, "config": None, "resume": False}
    for key, kind, default, text in runconfig.describe():
        name = OPTIONS[key]
        flag = "--" + name.replace("_", "-")
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


OPTIONS = {key: _option_name(key) for key, *_ in runconfig.describe()}  # train.lr -> lr, for --lr
SUMMARY = {
    "fvu": "FVU (variance not explained)",
    "nmse": "NMSE",
    "explained_variance_centred": "explained variance, centred",
    "l0": "L0 (active latents a token)",
    "dead": "dead latents (never fired here)",
    "cosine": "cosine",
    "norm_ratio": "length of reconstruction / of x",
}
LM_SUMMARY = {
    "ce_clean": "cross-entropy, clean",
    "ce_sae": "cross-entropy, with the reconstruction",
    "ce_zero": "cross-entropy, zero-ablated",
    "ce_recovered": "recovered share",
    "kl_sae": "KL to clean, with the reconstruction",
    "kl_recovered": "KL recovered share",
}
app.command("train", no_args_is_help=True)(_with_options(_train))


ORACLE_SUMMARY = {
    "fvu_oracle": SUMMARY["fvu"],
    "l0_oracle": SUMMARY["l0"],
    "dead_oracle": SUMMARY["dead"],
    **{f"{k}_oracle": v for k, v in LM_SUMMARY.items() if k not in ("ce_clean", "ce_zero")},
}


@app.command("eval", no_args_is_help=True)
def _eval(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model file, checkpoint, or the folder of a run")
    ],
    activations: Annotated[
        str | None, typer.Option(help="File or cache folder of activations to measure on")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Transcoder: file of the outputs, row for row")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Language model: smollm2-135m, a folder, or a Hugging Face name"),
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="Where the activations are read, as layers.9.resid_post")
    ] = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Transcoder: where the outputs are read and replaced")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help=".txt, .jsonl or .parquet file, a folder of them, or pydoc")
    ] = None,
    field: Annotated[str | None, typer.Option(help="Key or column of the text")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a context", min=2)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens for reconstruction", min=1)] = 65_536,
    ce_tokens: Annotated[
        int, typer.Option(help="Tokens for cross-entropy; 0 measures none", min=0)
    ] = 8192,
    steering: Annotated[
        int,
        typer.Option(help="Latents of each decade of firing rates that steer; 0: none", min=0),
    ] = 0,
    against: Annotated[
        Path | None,
        typer.Option(help="Second model: --steering compares latents of equal firing rates"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens in one pass", min=1)] = 2048,
    device: Annotated[
        str | None, typer.Option(help="Of the model; default: cuda if there is one")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every metric, as JSON")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the histogram of latent frequencies")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress")] = True,
) -> None:
    """Measure a trained model, and what it costs a language model.

    Without options that name data: on what its run held out from training.
    """
    from ksae.analysis import plots
    from ksae.coders.gradtopk import GradSelection
    from ksae.files import checkpoint
    from ksae.runs.data import pick_device
    from ksae.runs.evaluation import (
        measure,
        measure_language_model,
        open_eval_data,
        run_config,
        table,
        with_data,
    )
    from ksae.runs.evaluation import steering as steer

    if against is not None and steering == 0:
        raise UserError("eval: --steering must be given with --against, got none")
    if plot is not None and not plots.available():
        raise UserError("eval: --plot needs matplotlib: pip install matplotlib")
    sae = checkpoint.load(path, device=pick_device(device))
    run = run_config(path)
    given = {
        "activations": activations, "targets": targets, "model": model, "hook": hook,
        "target_hook": target_hook, "text": text, "field": field, "context": context,
    }  # fmt: skip
    own = {key for key, value in given.items() if value is not None}
    if run is None and not own:
        raise UserError(
            f"eval: {path} is not in the folder of a run: name the data with --activations, or "
            "--model, --hook and --text"
        )
    config = with_data(run.data if run is not None else runconfig.DataConfig(), given)
    held_out = not own & {"activations", "text"}  # other data were never trained on
    data = open_eval_data(
        config,
        held_out=held_out,
        tokens=max(tokens, ce_tokens),
        gradient=isinstance(sae, GradSelection),
        progress=progress,
    )
    result = measure(sae, data.source, tokens=tokens, batch_size=batch_size)
    oracle: dict[str, float] = {}
    if isinstance(sae, GradSelection) and data.source.has_gradient:
        with_g = measure(sae, data.source, tokens=tokens, batch_size=batch_size, oracle=True)
        oracle = {f"{name}_oracle": value for name, value in with_g.metrics.items()}
    lm: dict[str, float] = {}
    shifts: dict[str, float] = {}
    if data.language_model is not None and data.contexts is not None and ce_tokens > 0:
        lm = measure_language_model(
            sae, data.language_model, data.contexts, config, tokens=ce_tokens, progress=progress
        )
    if steering > 0:
        if data.language_model is None or data.contexts is None:
            raise UserError("eval: --steering needs a language model, got a file of activations")
        models = [sae]
        if against is not None:
            models.append(checkpoint.load(against, device=pick_device(device)))
        shifts = steer(
            models, data.language_model, data.contexts, config, data.source, latents=steering
        )
    if plot is not None:
        plots.latent_frequency(result.frequency, plot, tokens=result.tokens)
    if as_json:
        everything = {"tokens": result.tokens, **result.metrics, **oracle, **lm, **shifts}
        # JSON has no NaN
        print(json.dumps({k: v if v == v else None for k, v in everything.items()}, indent=1))
        return
    what = "held-out tokens" if held_out else "tokens"
    print(
        f"{type(sae).__name__} {sae.d_in} -> {sae.d_sae}, k = {sae.k}, on {result.tokens:,} {what}"
    )
    print(table(result.metrics, SUMMARY))
    if lm:
        print(f"{config.model} on {lm['ce_tokens']:,.0f} of them, nats a token")
        print(table(lm, LM_SUMMARY))
    if oracle:
        print("latents selected with the gradient of the loss: uses labels (oracle)")
        print(table(oracle | lm, ORACLE_SUMMARY))
    if shifts:
        print("steering: mean shift of the logits, by firing rate of the latents")
        print(table(shifts, {name: name.removeprefix("steering_") for name in shifts}))


@app.command("convert", no_args_is_help=True)
def _convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="File, folder or Hugging Face id")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write")],
    to: Annotated[
        str,
        typer.Option(
            help="ksae, sparsify, saelens, dictionary-learning, openai, nvidia or circuit-tracer"
        ),
    ],
    k: Annotated[
        int | None, typer.Option(help="Active latents a token, where SRC lacks it", min=1)
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold b_dec or norms into the encoder; rounds")
    ] = False,
    as_topk: Annotated[
        bool, typer.Option("--as-topk", help="Take BatchTopK or Matryoshka as TopK")
    ] = False,
) -> None:
    """Convert a model between ksae's files and those of other libraries.

    The format of SRC is recognised by its content.

    ksae convert EleutherAI/sae-model/layers.9 sae.safetensors --to ksae
    """
    from ksae.interop import hub
    from ksae.interop.convert import convert

    source = hub.download(src) if hub.is_id(src) else Path(src)
    done = convert(source, dst, to, k=k, fold=fold, as_topk=as_topk)
    c = done.coder
    shape = f"{c.d_in} -> {c.d_sae} -> {c.d_out}, {c.activation}, k = {c.k}, {c.dtype}"
    print(f"{done.source} to {done.target}: {shape}; written: {done.path}")


@app.command("config")
def _config(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show what was built and loaded, and what serves each op."""
    from ksae.info import config

    print(json.dumps(config(), indent=1) if as_json else config())


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo")] = Path("ksae-demo"),
    tokens: Annotated[
        int, typer.Option(help="Tokens to train on, over many epochs", min=1)
    ] = 1_000_000,
    d_sae: Annotated[int, typer.Option(help="Latents", min=1)] = 4608,
    k: Annotated[int, typer.Option(help="Active latents a token", min=1)] = 32,
    latents: Annotated[int, typer.Option(help="Latents whose contexts are shown", min=0)] = 6,
    seed: Annotated[int, typer.Option(help="Of weights and order", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's", min=1)] = None,
) -> None:
    """Train an SAE on a small language model in a few minutes, offline.

    Harvests layer 9 of SmolLM2-135M over the help topics of Python, trains, evaluates
    on topics it has not seen, and shows what some latents respond to.
    Run it again to go on where it was stopped.
    """
    from ksae.cli.demo import demo

    demo(out, tokens=tokens, d_sae=d_sae, k=k, latents=latents, seed=seed, threads=threads)


@app.command("bench")
def _bench(
    suite: Annotated[
        str | None,
        typer.Option(help="Comma-separated: ops, step, scaling, quality, roofline, threads, gpu"),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="About 40 minutes, or 2, on two cores")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results")] = Path("ksae-bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Two results: what became slower; measures nothing"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default torch's", min=1)] = None,
    data: Annotated[
        str, typer.Option(help="normal, planted, or a .npy file of activations")
    ] = "normal",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of real activations: train.npy, holdout.npy")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress")] = True,
) -> int:
    """Measure ops and whole training steps beside torch and other libraries.

    Writes a table, bench.json, pictures and report.md into --out. Ctrl-C keeps what was measured.

    ksae bench --compare old/bench.json new/bench.json says what became slower, with exit code 1.
    """
    from ksae.bench.harness import command
    from ksae.bench.harness import compare as comparison

    if compare is not None:
        return comparison.main(*compare)
    mode = "full" if full else "quick"
    return command.bench(
        command.chosen(suite, mode),
        out,
        mode=mode,
        threads=threads,
        data=data,
        cache=cache or out.parent / "ksae-bench-activations",
        progress=progress,
    )
