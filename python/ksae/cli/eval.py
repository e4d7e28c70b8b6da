# SPDX-License-Identifier: Apache-2.0
"""`ksae eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ksae.cli.tables import LM_SUMMARY, ORACLE_SUMMARY, SUMMARY
from ksae.errors import UserError
from ksae.runs import config as runconfig


def evaluate(
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
    field: Annotated[
        str | None, typer.Option(help="Key or column of the text, or of its token ids")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Tokens left out beside special ones: ids or names")
    ] = None,
    model_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the language model")
    ] = None,
    model_dtype: Annotated[
        str | None, typer.Option(help="Of the language model: float32, bfloat16 or float16")
    ] = None,
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
    from ksae.interop.load import load
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
    sae = load(path, device=pick_device(device))
    run = run_config(path)
    given = {
        "activations": activations, "targets": targets, "model": model, "hook": hook,
        "target_hook": target_hook, "text": text, "field": field, "context": context,
        "exclude": exclude, "model_revision": model_revision, "model_dtype": model_dtype,
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
        gradient=sae.needs_gradient,
        progress=progress,
    )
    result = measure(sae, data.source, tokens=tokens, batch_size=batch_size)
    oracle: dict[str, float] = {}
    if sae.needs_gradient and data.source.has_gradient:
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
            models.append(load(against, device=pick_device(device)))
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
