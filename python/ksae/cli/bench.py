# SPDX-License-Identifier: Apache-2.0
"""`ksae bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    suite: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: ops, step, families, scaling, quality, roofline, threads, gpu"
        ),
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
