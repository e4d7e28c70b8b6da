# SPDX-License-Identifier: Apache-2.0
"""The options that name a trained model, a language model and text, of every command with them."""

from __future__ import annotations

from typing import Annotated

import typer

Trained = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model file, checkpoint, folder of a run or Hub id"),
]
Pinned = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a MODEL on the Hub")
]
Model = Annotated[
    str | None, typer.Option(help="Language model: smollm2-135m, a folder, or a Hugging Face name")
]
Hook = Annotated[
    str | None, typer.Option(help="Where the activations are read, as layers.9.resid_post")
]
Text = Annotated[
    str | None, typer.Option(help=".txt, .jsonl or .parquet file, folder of them, pydoc or kjv")
]
Field = Annotated[str | None, typer.Option(help="Key or column of the text, or of its token ids")]
Separator = Annotated[
    str | None, typer.Option(help=r"What divides a .txt file into documents, as \n\n")
]
Exclude = Annotated[
    str | None, typer.Option(help="Tokens left out beside special ones: ids or names")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the language model")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the language model: float32, bfloat16 or float16")
]
Context = Annotated[int | None, typer.Option(help="Tokens of a context", min=2)]
