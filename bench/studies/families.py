# SPDX-License-Identifier: Apache-2.0
"""Whether ksae trains each architecture as the libraries do: losses on real activations.

    python -m ksae.bench.studies.families --cache bench/cache/recipe --out bench/results

A cell is library x architecture: ksae set up as the library (contestants/pairs.py) and the
library's own step, from the same weights on the same batches of SmolLM2-135M's residual stream,
both in float32. Each cell is written as it ends; one that is there is not run again, and one that
fails is a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..contestants import pairs
from ..contestants.workers import missing
from ..harness.measure import describe, machine, revision, write_json
from ..suites.quality import batches, start_of
from .recipe import rows_of
from .store import stored

NAME = "families_study"
LAST = 20  # steps at the end whose mean loss is compared
COLUMNS = ("library", "architecture", "version", "first", "ksae", "library's", "difference",
           "largest of a step", "dead", "L0", "theirs differs")  # fmt: skip


def run(cell: tuple[str, str], train: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Train both; what goes wrong becomes the result."""
    library, architecture = cell
    F, k, steps, batch = (settings[name] for name in ("F", "k", "steps", "batch"))
    try:
        if (reason := missing(library)) is not None:
            raise ImportError(reason)
        start = start_of(F, train, seed=0)
        pair = pairs.pair(
            library, architecture, start, train[:batch], k, settings["lr"], batch,
            steps // 4 * batch,
        )  # fmt: skip
        ours, theirs = [cast(Any, make()) for make in pair]
        losses: tuple[list[float], list[float]] = [], []
        with contextlib.redirect_stdout(io.StringIO()):
            for rows in batches(train, batch, steps, seed=0):
                for one, said in zip((ours, theirs), losses, strict=True):
                    said.append(float(one.step(train[rows])))
    except Exception as error:  # of whatever another library does
        text = str(error).strip().splitlines()
        return {"failure": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
    a, b = (sum(said[-LAST:]) / LAST for said in losses)
    return {
        "version": theirs.version,
        "first": losses[1][0],
        "ksae": a,
        "library's": b,
        "difference": (a - b) / b,
        "largest of a step": max(abs(x - y) / y for x, y in zip(*losses, strict=True)),
        "dead": float(ours.model.dead.float().mean()),
        "L0": ours.l0,
    }


def markdown(record: dict[str, Any]) -> str:
    """The table of all cells."""
    lines = [
        "# Losses of ksae and of each library, architecture by architecture",
        "",
        describe(record["machine"] | record["settings"]),
        "",
        f"Squares summed over d, a token, with what the library adds to them; means of the last"
        f" {LAST} steps. dead, L0: share of latents at the end, active latents a token of the last"
        " step, by ksae. theirs differs: what the library does that ksae cannot be set to.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    order = {cell: i for i, cell in enumerate(pairs.PAIRS)}
    places = [(row["library"], row["architecture"]) for row in record["cells"]]
    for _, row in sorted(
        zip(places, record["cells"], strict=True), key=lambda p: order.get(p[0], len(order))
    ):
        cells = [str(row[name]) for name in COLUMNS[:2]]
        if "failure" in row:
            lines.append(f"| {' | '.join(cells)} | {row['failure']} |")
            continue
        cells += [row["version"], *(f"{row[name]:.3f}" for name in COLUMNS[3:6])]
        cells += [f"{100 * row[name]:.2f} %" for name in COLUMNS[6:9]]
        cells += [
            f"{row['L0']:.1f}" if "L0" in row else "",
            pairs.DIFFERENCES.get((cells[0], cells[1]), ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache/recipe"), help="folder of activations")
    add("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    add("--d-sae", type=int, default=4608, help="default %(default)s")
    add("--k", type=int, default=32, help="default %(default)s")
    add("--steps", type=int, default=200, help="default %(default)s")
    add("--batch", type=int, default=1024, help="tokens a step (default %(default)s)")
    add("--lr", type=float, default=1e-3, help="default %(default)s")
    add("--threads", type=int, default=2, help="default %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{NAME}.json"
    settings = {"F": args.d_sae, "k": args.k, "steps": args.steps, "batch": args.batch}
    settings |= {"lr": args.lr}
    record = stored(path, settings)
    train, _ = rows_of("resid", args.cache, None)
    record["machine"] = machine(model="SmolLM2-135M", rows=len(train))
    for cell in pairs.PAIRS:
        kept = [row for row in record["cells"] if (row["library"], row["architecture"]) != cell]
        if any("failure" not in row for row in record["cells"] if row not in kept):
            continue
        found = {"library": cell[0], "architecture": cell[1], **run(cell, train, settings)}
        found["revision"] = revision()
        record["cells"] = [*kept, found]
        write_json(path, record)
        print(found, flush=True)
    (args.out / f"{NAME}.md").write_text(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
