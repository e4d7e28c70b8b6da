# SPDX-License-Identifier: Apache-2.0
"""What training reaches on real activations: ksae fused, ksae unfused, and eai-sparsify's own step.

    python bench/quality.py --json quality.json

Residual stream after layer 9 of SmolLM2-135M over the help topics of Python, as in `ksae demo`. All
start from the same weights and see the same batches at the same learning rate; the FVU is taken on
held-out rows, from the weights, by one function. See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import data
import numpy as np
import ours
import peers
import torch
from data import Weights
from measure import describe, machine, table, write_json
from torch import Tensor

import ksae
from ksae.initialize import geometric_median

HOOK = "layers.9.resid_post"
AGREE = 0.005  # fused and unfused, relative
CHUNK = 4096
WAYS = ("ksae fused", "ksae unfused", "eai-sparsify")


def activations(cache: Path) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows [rows, d], from .npy files or harvested into them."""
    files = [cache / f"{part}.npy" for part in ("train", "holdout")]
    if not all(file.exists() for file in files):
        _harvest(files)
    train, held = (torch.from_numpy(np.load(file)) for file in files)
    return train, held


def _harvest(files: list[Path]) -> None:
    from ksae.activations import PYDOC, SMOLLM2
    from ksae.runconfig import DataConfig
    from ksae.rundata import open_data

    print(f"harvesting {SMOLLM2} at {HOOK} into {files[0].parent}", flush=True)
    config = DataConfig(model=SMOLLM2, hook=HOOK, text=PYDOC, holdout=0.1)
    sources = open_data(config)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, source in zip(files, (sources.train, sources.holdout), strict=True):
        assert source is not None
        np.save(file, torch.cat([x for x, _ in source.sweep(CHUNK)]).float().numpy())


def start_of(F: int, train: Tensor, seed: int) -> Weights:
    """Tied unit rows; b_dec is the geometric median of a sample, as ksae.initialize sets it."""
    start = data.initial_weights(F, train.shape[1], seed)
    return start | {"b_dec": geometric_median(train[: 8 * CHUNK])}


def make(way: str, start: Weights, k: int, lr: float) -> ours.Contestant:
    if way == "eai-sparsify":
        return peers.Sparsify(start, k, lr)
    return ours.Ksae(start, k, lr, fused=way == "ksae fused")


@torch.no_grad()
def fvu(weights: Weights, k: int, rows: Tensor) -> float:
    """sum (x - recon)^2 / sum (x - mean x)^2 over all rows."""
    error = 0.0
    for x in rows.split(CHUNK):
        code = ksae.topk_encode(x, weights["W_enc"], weights["b_enc"], k, weights["b_dec"])
        recon = ksae.sparse_decode(*code, weights["W_dec"], weights["b_dec"])
        error += float((recon - x).double().square().sum())
    return error / data.total_variance(rows)


def batches(train: Tensor, size: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers of each step: epochs of random permutations, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // len(train))
    rows = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])
    return list(rows[: steps * size].split(size))


def run(
    ways: list[str], train: Tensor, held: Tensor, lr: float, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """All ways in lock-step on the same batches."""
    start = start_of(args.d_sae, train, seed)
    contestants: dict[str, ours.Contestant] = {}
    failures: dict[str, str] = {}
    for way in ways:
        try:
            contestants[way] = make(way, start, args.k, lr)
        except (ImportError, RuntimeError) as error:
            failures[way] = f"{type(error).__name__}: {error}"
    seconds = dict.fromkeys(contestants, 0.0)
    curve: dict[str, list[float]] = {way: [] for way in contestants}
    for rows in batches(train, args.batch, args.steps, seed):
        x = train[rows]
        for way, contestant in contestants.items():
            begin = time.perf_counter()
            loss = contestant.step(x)
            seconds[way] += time.perf_counter() - begin
            curve[way].append(contestant.fvu(loss, x))
    result: dict[str, Any] = {"lr": lr, "seed": seed, "failures": failures, "ways": {}}
    for way, contestant in contestants.items():
        result["ways"][way] = {
            "holdout_fvu": fvu(contestant.weights(), args.k, held),
            "train_fvu": sum(curve[way][-20:]) / len(curve[way][-20:]),  # mean of the last steps
            "first_fvu": curve[way][0],
            "milliseconds_a_step": seconds[way] / args.steps * 1e3,
        }
    print(_rows_text(result), flush=True)
    return result


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way, r in result["ways"].items():
        numbers = [f"{r[key]:.5f}" for key in ("holdout_fvu", "train_fvu", "first_fvu")]
        ms = f"{r['milliseconds_a_step']:.1f}"
        rows.append([way, f"{result['lr']:g}", str(result["seed"]), *numbers, ms])
    return rows


def _rows_text(result: dict[str, Any]) -> str:
    lines = ["  ".join(row) for row in _rows(result)]
    lines += [f"{way}: {reason}" for way, reason in result["failures"].items()]
    return "\n".join(lines)


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """Fused against unfused, each run; ksae against eai-sparsify, the mean over seeds."""
    lines = []
    for lr in dict.fromkeys(r["lr"] for r in results):
        runs = [r for r in results if r["lr"] == lr]
        noise = _apart(runs, "ksae unfused")
        for r, apart in zip(runs, noise, strict=False):
            verdict = "PASS" if abs(apart) <= AGREE else "MISS"
            where = f"lr {lr:g}, seed {r['seed']}"
            lines.append(f"{verdict}  {where}: fused and unfused within {AGREE:.1%}: {apart:+.3%}")
        against = _apart(runs, "eai-sparsify")
        if not against:
            continue
        mean = sum(against) / len(against)
        # The same algorithm with other rounding: what its runs differ by means nothing.
        verdict = (
            "PASS" if mean <= 0 else "TIE " if mean <= max(map(abs, noise), default=0) else "MISS"
        )
        each = ", ".join(f"{apart:+.3%}" for apart in against)
        text = f"FVU no worse than eai-sparsify's, mean over seeds: {mean:+.3%} ({each})"
        lines.append(f"{verdict}  lr {lr:g}: {text}")
    return lines


def _apart(runs: list[dict[str, Any]], other: str) -> list[float]:
    """By how much the FVU of ksae fused is above the other's, relative, each run that has both."""
    reached = [{way: w["holdout_fvu"] for way, w in r["ways"].items()} for r in runs]
    return [f["ksae fused"] / f[other] - 1 for f in reached if "ksae fused" in f and other in f]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache"), help="folder of train.npy, holdout.npy")
    add("--lr", type=float, nargs="+", default=[4e-4, 2e-3], help="default %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--steps", type=int, default=500, help="default %(default)s")
    add("--batch", type=int, default=1024, help="tokens a step (default %(default)s)")
    add("--d-sae", type=int, default=4608, help="latents (default %(default)s)")
    add("--k", type=int, default=32, help="default %(default)s")
    add("--threads", type=int, default=2, help="default %(default)s")
    add("--json", metavar="PATH", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, held = activations(args.cache)
    settings = {name: getattr(args, name) for name in ("steps", "batch", "d_sae", "k")}
    record = machine(
        model="SmolLM2-135M", hook=HOOK, rows=len(train), held_out=len(held), d=train.shape[1]
    )
    print(describe(record | settings), flush=True)
    results = [run(args.ways, train, held, lr, seed, args) for lr in args.lr for seed in args.seeds]
    header = ["way", "lr", "seed", "FVU held out", "FVU last steps", "FVU first", "ms a step"]
    print()
    print(table(header, [row for r in results for row in _rows(r)]))
    lines = verdicts(results)
    print("\n".join(["", *lines]))
    write_json(
        args.json,
        {"machine": record, "settings": settings, "runs": results, "verdicts": lines},
    )
    return 1 if any(line.startswith("MISS") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
