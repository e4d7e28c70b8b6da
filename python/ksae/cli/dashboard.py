# SPDX-License-Identifier: Apache-2.0
"""`ksae dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def dashboard(
    name: Trained,
    out: Annotated[Path, typer.Option(help="Folder of the pages: new, or a dashboard")],
    revision: Pinned = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON of latent: label, or Neuronpedia's explanations")
    ] = None,
    model: Model = None,
    hook: Hook = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Transcoder: where the outputs are written")
    ] = None,
    text: Text = None,
    field: Field = None,
    separator: Separator = None,
    exclude: Exclude = None,
    model_revision: Revision = None,
    model_dtype: Dtype = None,
    context: Context = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to read", min=1)] = 131_072,
    top: Annotated[int, typer.Option(help="Strongest contexts of a latent", min=1)] = 12,
    neuronpedia: Annotated[
        Path | None, typer.Option(help="Also write Neuronpedia's import format to this folder")
    ] = None,
    saedashboard: Annotated[
        Path | None, typer.Option(help="Also write SAEDashboard's batches to this folder")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of the model; default: cuda if there is one")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress")] = True,
) -> None:
    """Make a folder of pages that show what each latent responds to and writes.

    Reads the text of the run, or that named by options. The pages need no server and no network:
    open index.html in a browser.
    """
    from ksae.interop import hub
    from ksae.interop.load import load
    from ksae.runs import dashboard as job
    from ksae.runs.model import pick_device

    given = {
        "model": model, "hook": hook, "target_hook": target_hook, "text": text, "field": field,
        "separator": separator, "context": context, "exclude": exclude,
        "model_revision": model_revision, "model_dtype": model_dtype,
    }  # fmt: skip
    path = hub.local(name, revision)
    config = job.data_of(path, given)
    coder = load(path, device=pick_device(device))
    made = job.dashboard(
        coder, config, out, labels=labels, tokens=tokens, top=top, progress=progress,
        title=name if hub.is_id(name) else job.title_of(path),
    )  # fmt: skip
    for written in job.export(out, config, neuronpedia=neuronpedia, saedashboard=saedashboard):
        print(f"export    {written}")
    print(job.summary(made))
