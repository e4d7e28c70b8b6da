# SPDX-License-Identifier: Apache-2.0
"""Matching pursuit (MP-SAE, arXiv 2506.03093) against TopK: held-out error at the same k.

    python -m ksae.bench.studies.pursuit --cache bench/cache/recipe --out bench/results

A cell is site x k x model x seed x rate: activations of SmolLM2-135M over Python's help topics, the
decoder rows and batches of the seed, unit rows, gradients scaled to length 1, rates that fall to 0
over the last fifth. At the first seed every rate is run, and the one with the lowest error on one
half of the held-out rows is that of the other seeds; errors are reported of the other half. Each
cell is written as it ends; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.analysis.evaluate import evaluate
from ksae.coders import SAE, MatchingPursuit, TopK
from ksae.coders.coder import SparseCoder
from ksae.step.schedule import learning_rate
from ksae.step.train_step import TrainStep

from ..harness.data import fill
from ..harness.measure import describe, machine, revision, write_json
from ..suites.quality import CHUNK, batches, start_of
from .gsae_report import interval
from .recipe import DECAY, rows_of
from .store import stored

NAME = "pursuit_study"
MODELS = {"topk": TopK, "pursuit": MatchingPursuit}
ENCODER = 0.1  # length of TopK's first encoder rows, as `initialize_from` has it
KEY = ("site", "k", "model", "seed", "lr")


@dataclass(frozen=True)
class Cell:
    site: str
    k: int
    model: str
    seed: int
    lr: float


def run(cell: Cell, train: Tensor, held: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one cell and measure it on both halves of the held-out rows."""
    F, steps, batch = (settings[name] for name in ("F", "steps", "batch"))
    activation = MODELS[cell.model](cell.k)
    fused = activation.fused_refuses is None
    model = SAE(train.shape[1], F, activation, dead_after=steps * batch // 4)
    start = start_of(F, train, cell.seed)
    start["W_enc"] = start["W_enc"] * ENCODER
    fill(model, start)
    step = TrainStep(model, cell.lr, clip_norm=1.0, clip="always", fused=fused)
    begin = time.process_time()
    for t, rows in enumerate(batches(train, batch, steps, cell.seed)):
        step.lr = learning_rate(t, lr=cell.lr, steps=steps, decay=DECAY)
        step(train[rows])
    seconds = time.process_time() - begin
    half = len(held) // 2
    chosen_by, _, _ = measure(model, held[:half])
    fvu, l0, dead = measure(model, held[half:])
    return {
        "fvu": fvu, "l0": l0, "dead": dead, "fvu_of_choice": chosen_by,
        "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def measure(model: SparseCoder, rows: Tensor) -> tuple[float, float, float]:
    """FVU, active latents a token, and the share of latents that no row uses."""
    found = evaluate(model, torch.split(rows, CHUNK)).metrics
    return found["fvu"], found["l0"], found["dead"]


def cells(args: argparse.Namespace) -> list[tuple[str, int, str, int]]:
    """Site, k, model and seed; small k first, and every model before the next seed."""
    return [
        (site, k, model, seed)
        for seed in args.seeds
        for k in sorted(args.ks)
        for site in args.sites
        for model in MODELS
    ]


def rates_of(record: dict[str, Any], place: tuple[str, int, str, int], args: Any) -> list[float]:
    """All at the first seed; at the others the best of the first."""
    site, k, model, seed = place
    if seed == args.seeds[0]:
        return list(args.lrs)
    there = [
        row for row in record["cells"]
        if (row["site"], row["k"], row["model"], row["seed"]) == (site, k, model, args.seeds[0])
    ]  # fmt: skip
    return [min(there, key=lambda row: row["fvu_of_choice"])["lr"]]


def work(record: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Run the cells that have no result yet."""
    data: dict[str, tuple[Tensor, Tensor]] = {}
    for place in cells(args):
        site, k, model, seed = place
        for lr in rates_of(record, place, args):
            cell = Cell(site, k, model, seed, lr)
            if any(tuple(row[name] for name in KEY) == astuple(cell) for row in record["cells"]):
                continue
            if site not in data:
                data[site] = rows_of(site, args.cache, None)
                sizes = {"rows": len(data[site][0]), "held_out": len(data[site][1])}
                record["machine"] = machine(model="SmolLM2-135M", **sizes)
            found = run(cell, *data[site], record["settings"])
            row = asdict(cell) | found | {"revision": revision()}
            record["cells"].append(row)
            write_json(path, record)
            print(row, flush=True)


def chosen(record: dict[str, Any], place: tuple[str, int, str]) -> dict[int, dict[str, Any]]:
    """By seed the row of a site, k and model at the rate that its first seed chose."""
    site, k, model = place
    rows = [r for r in record["cells"] if (r["site"], r["k"], r["model"]) == (site, k, model)]
    if not rows:
        return {}
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    lr = min(first, key=lambda row: row["fvu_of_choice"])["lr"]
    return {row["seed"]: row for row in rows if row["lr"] == lr}


def markdown(record: dict[str, Any]) -> str:
    """Both models at each site and k, and the paired difference over seeds."""
    header = ("site", "k", "seeds", "model", "rate", "FVU", "L0", "dead", "FVU beside TopK's")
    lines = [
        "# Matching pursuit against TopK on SmolLM2-135M, layer 9",
        "",
        describe(record.get("machine", {}) | record["settings"]),
        "",
        "FVU, active latents a token and latents never used, on held-out rows; means over seeds, ±"
        " the half width of the 95 % t-interval. Last: the mean of the paired relative difference."
        " The rate is the best of the first seed on other held-out rows.",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
    ]
    places = dict.fromkeys((row["site"], row["k"]) for row in record["cells"])
    for site, k in sorted(places, key=lambda place: (place[0] != "resid", place)):
        base = chosen(record, (site, k, "topk"))
        for model in MODELS:
            rows = chosen(record, (site, k, model))
            if not rows:
                continue
            seeds = sorted(rows.keys() & base.keys())
            pairs = [100 * (rows[s]["fvu"] / base[s]["fvu"] - 1) for s in seeds]
            numbers = [
                _shown([row["fvu"] for row in rows.values()], ".4f"),
                _shown([row["l0"] for row in rows.values()], ".1f"),
                _shown([100 * row["dead"] for row in rows.values()], ".1f") + " %",
                _shown(pairs, "+.1f") + " %" if model != "topk" and pairs else "",
            ]
            rate = f"{next(iter(rows.values()))['lr']:g}"
            which = ", ".join(map(str, sorted(rows)))
            lines.append(f"| {' | '.join([site, str(k), which, model, rate, *numbers])} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float], form: str) -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form.lstrip('+')}}" if len(values) > 1 else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache/recipe"), help="folder of activations")
    add("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    add("--sites", nargs="+", choices=["resid", "mlp", "attn"], default=["resid", "mlp"])
    add("--ks", type=int, nargs="+", default=[16, 64], help="default %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    add("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="default %(default)s")
    add("--d-sae", type=int, default=4608, help="latents (default %(default)s)")
    add("--steps", type=int, default=500, help="default %(default)s")
    add("--batch", type=int, default=1024, help="tokens a step (default %(default)s)")
    add("--threads", type=int, default=2, help="default %(default)s")
    add("--report", action="store_true", help="only write the table of what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{NAME}.json"
    settings = {"F": args.d_sae, "steps": args.steps, "batch": args.batch}
    record = stored(path, settings)
    if not args.report:
        work(record, path, args)
    text = markdown(record)
    (args.out / f"{NAME}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
