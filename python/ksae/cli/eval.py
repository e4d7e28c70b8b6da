# SPDX-License-Identifier: Apache-2.0
"""`ksae eval`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksae.cli.tables import LM_SUMMARY, ORACLE_SUMMARY, SUMMARY
from ksae.cli.text import (
    Context,
    Dtype,
    Exclude,
    Field,
    Hook,
    Model,
    Pinned,
    Revision,
    Separator,
    Text,
    Trained,
)
from ksae.errors import UserError
from ksae.runs import config as runconfig

if TYPE_CHECKING:
    from ksae.activations import ActivationSource
    from ksae.coders.coder import SparseCoder
    from ksae.runs.evaluation import EvalData
    from ksae.runs.measured import Measured


def evaluate(
    name: Trained,
    revision: Pinned = None,
    activations: Annotated[
        str | None, typer.Option(help="File or cache folder of activations to measure on")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Transcoder: file of the outputs, row for row")
    ] = None,
    model: Model = None,
    hook: Hook = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Transcoder: where the outputs are read and replaced")
    ] = None,
    text: Text = None,
    field: Field = None,
    separator: Separator = None,
    exclude: Exclude = None,
    model_revision: Revision = None,
    model_dtype: Dtype = None,
    context: Context = None,
    tokens: Annotated[int, typer.Option(help="Tokens for reconstruction", min=1)] = 65_536,
    ce_tokens: Annotated[
        int, typer.Option(help="Tokens for cross-entropy; 0 measures none", min=0)
    ] = 8192,
    steering: Annotated[
        int,
        typer.Option(help="Latents of each decade of firing rates that steer; 0: none", min=0),
    ] = 0,
    against: Annotated[
        str | None,
        typer.Option(help="Second model: --steering compares latents of equal firing rates"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens in one pass", min=1)] = 2048,
    device: Annotated[
        str | None, typer.Option(help="Of the model; default: cuda if there is one")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every metric, as JSON")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG file for the histogram of latent frequencies; needs matplotlib"),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress")] = True,
) -> None:
    """Measure a trained model, and what it costs a language model.

    Without options that name data: on what its run held out from training,
    or on its training data if it held nothing out.
    """
    from ksae.analysis import plots
    from ksae.interop import hub
    from ksae.runs.evaluation import run_config, with_data
    from ksae.runs.measured import measure_all

    if against is not None and steering == 0:
        raise UserError("eval: --steering must be given with --against, got none")
    if plot is not None:
        plots.check_picture(plot)
    path = hub.local(name, revision)
    files = [path] if against is None else [path, hub.local(against)]
    models = _load(files, device)
    run = run_config(path)
    given = {
        "activations": activations, "targets": targets, "model": model, "hook": hook,
        "target_hook": target_hook, "text": text, "field": field, "separator": separator,
        "context": context, "exclude": exclude, "model_revision": model_revision,
        "model_dtype": model_dtype,
    }  # fmt: skip
    own = {key for key, value in given.items() if value is not None}
    if run is None and not own:
        raise UserError(
            f"eval: {name} is not in the folder of a run: name the data with --activations, or "
            "--model, --hook and --text"
        )
    config = with_data(run.data if run is not None else runconfig.DataConfig(), given)
    if steering > 0 and config.activations is not None:
        raise UserError("eval: --steering needs a language model, got a file of activations")
    # other data, or the same otherwise divided, are not what the run held out
    held_out = run is not None and not own & {"activations", "text", "field", "separator"}
    data = _open(config, models, held_out, max(tokens, ce_tokens), progress)
    for file in files:
        _warn_of_other_data(file, data, run)
    measured = measure_all(
        models,
        data,
        config,
        tokens=tokens,
        ce_tokens=ce_tokens,
        steering_latents=steering,
        batch_size=batch_size,
        progress=progress,
    )
    if plot is not None:
        plots.latent_frequency(measured.result.frequency, plot, tokens=measured.result.tokens)
    for name, why in measured.left_out.items():
        if progress:
            print(f"ksae: {name} is left out: {why}", file=sys.stderr)
    if as_json:
        # JSON has no NaN
        numbers = {k: v if v == v else None for k, v in measured.numbers().items()}
        print(json.dumps({"measured_on": data.what, **numbers}, indent=1))
    else:
        _print(models[0], data, config, measured)


def _load(files: list[Path], device: str | None) -> list[SparseCoder]:
    from ksae.interop.load import load
    from ksae.runs.checks import check_parameters
    from ksae.runs.model import pick_device

    models = [load(file, device=pick_device(device)) for file in files]
    for file, model in zip(files, models, strict=True):
        check_parameters(model, "eval", f" {file}")
    return models


def _open(
    config: runconfig.DataConfig,
    models: list[SparseCoder],
    held_out: bool,
    tokens: int,
    progress: bool,
) -> EvalData:
    """The data, refused before a harvest if they do not fit the models."""
    from ksae.runs.checks import check_widths
    from ksae.runs.evaluation import open_eval_data

    def fits(source: ActivationSource) -> None:
        for model in models:
            check_widths(model, source, "eval")

    return open_eval_data(
        config,
        held_out=held_out,
        tokens=tokens,
        gradient=models[0].needs_gradient,
        progress=progress,
        fits=fits,
    )


def _print(
    sae: SparseCoder, data: EvalData, config: runconfig.DataConfig, measured: Measured
) -> None:
    from ksae.runs.evaluation import table

    result, lm, oracle, shifts = measured.result, measured.lm, measured.oracle, measured.shifts
    print(
        f"{type(sae).__name__} {sae.d_in} -> {sae.d_sae}, k = {sae.k}, "
        f"on {result.tokens:,} {data.what}"
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


def _warn_of_other_data(path: Path, data: EvalData, run: runconfig.RunConfig | None) -> None:
    """Say so where a model is measured on activations of another kind than it was trained on."""
    from ksae.runs.origin import differences, identity_of_file

    identity = identity_of_file(path)
    lines = differences(identity.get("origin", {}), data.origin)
    before, now = identity.get("data"), None if run is None else asdict(run.data)
    if not lines and before is not None and now is not None:
        keys = ("activations", "model", "hook", "target_hook", "text")
        lines = [
            f"{k} {before.get(k)} there, {now[k]} here" for k in keys if before.get(k) != now[k]
        ]
    for line in lines:
        print(
            f"ksae: warning: {path} was trained on other activations than these: {line}",
            file=sys.stderr,
        )
