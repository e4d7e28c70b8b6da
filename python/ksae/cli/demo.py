# SPDX-License-Identifier: Apache-2.0
"""`ksae demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
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
    on topics it has not seen, shows what some latents respond to, and makes
    the dashboard of all of them.
    Run it again to resume where it was stopped.
    """
    from ksae.runs import demo as job

    job.demo(out, tokens=tokens, d_sae=d_sae, k=k, latents=latents, seed=seed, threads=threads)
