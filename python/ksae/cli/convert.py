# SPDX-License-Identifier: Apache-2.0
"""`ksae convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="File, folder or Hugging Face id")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write")],
    to: Annotated[
        str,
        typer.Option(
            help="ksae, sparsify, saelens, dictionary-learning, gemma-scope, openai, nvidia or "
            "circuit-tracer"
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
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, where SRC is a Hugging Face id")
    ] = None,
) -> None:
    """Convert a model between ksae's files and those of other libraries.

    The format of SRC is recognised by its content.

    ksae convert EleutherAI/sae-model/layers.9 sae.safetensors --to ksae
    """
    from ksae.interop import convert as conversion
    from ksae.interop import hub

    done = conversion.convert(hub.local(src, revision), dst, to, k=k, fold=fold, as_topk=as_topk)
    c = done.coder
    k_of = "" if c.k is None else f", k = {c.k}"
    shape = f"{c.d_in} -> {c.d_sae} -> {c.d_out}, {c.activation}{k_of}, {c.dtype}"
    print(f"{done.source} to {done.target}: {shape}; written: {done.path}")
